"""Which calls of a trace make up sign(u) * max(|u| - t, 0), or u * t, and a plan that does the same with our operators.

Found by values. Where y is not 0, |u| - |y| is the threshold: it must be the same along each plane, and some call must
have computed it. Everything behind that call, back to u, is the module's own way from u to the threshold. It depends
on u by its pooling alone if it gives the same when run on the pooled u, a tensor that is its own average.
Squeeze-and-excitation is found in the same way: y / u is the factor.
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..gates import STRUCTURES
from .conditions import class_of
from .plans import GatePlan, Plan, Ref, Step, ThresholdPlan, call
from .reasons import Differs, Unexplained, place
from .tracing import Trace


class Match(NamedTuple):
    """y = sign(u) * max(|u| - t, 0) or, where it scales, u * t: all three nodes of a trace."""

    u: fx.Node
    y: fx.Node
    t: fx.Node
    scales: bool = False

    @property
    def underived(self) -> str:
        """Why there is no plan."""
        if self.scales:
            return "it scales x by factors that do not follow from the mean of x"
        return "its threshold does not follow from the mean of |x| or x"


def tolerance(dtype: torch.dtype) -> float:
    """What counts as rounding, relative to the largest value."""
    return 1e-9 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    limit = tolerance(b.dtype) * b.abs().max().item() if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a.to(b.dtype), b, rtol=0, atol=limit, equal_nan=True)


def rows_of(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The thresholds (N, C) by which y is u soft thresholded, NaN in planes that are zeroed as a whole."""
    if not isinstance(y, torch.Tensor) or y.shape != u.shape:
        raise Unexplained("its output does not have x's shape")
    kept = y != 0
    if not kept.any() or not y.isfinite().all():
        raise Unexplained("its output on random numbers is 0 or not finite")
    eps = tolerance(u.dtype) * u.abs().max().item()
    signs = kept & (u.sign() != y.sign())
    if signs.any():
        raise Unexplained("its output does not have x's signs")
    inf = float("inf")
    kept, big, t = kept.flatten(2), u.abs().flatten(2), (u.abs() - y.abs()).flatten(2)
    low, high = torch.where(kept, t, inf).amin(2), torch.where(kept, t, -inf).amax(2)
    spread = (high - low).max().item()
    if eps < spread < 1e4 * eps:
        raise Differs(f"it is soft thresholding to {spread:.1g} only, in {u.dtype}: it computes in another dtype")
    if spread > eps:
        raise Unexplained(f"|x| - |y| is not one threshold a plane but varies by {spread:.2g}: not soft thresholding")
    over = (torch.where(kept | (big == 0), -inf, big).amax(2) - high)[high > -inf].max().item()
    if over > eps:
        raise Unexplained(f"it zeroes what exceeds its threshold by {over:.2g}: not soft thresholding")
    if not (high > eps).any() and not (low < -eps).any():
        raise Unexplained("its output is x wherever it is not 0: there is no threshold")
    return torch.where(high > -inf, high, torch.nan)


def match_module(trace: Trace) -> Match:
    """The whole module is the operator: u is x and y is what it returns."""
    u, y = trace.x.meta["value"], trace.y.meta["seen"]
    try:
        rows, scales = rows_of(u, y), False
    except Unexplained:
        rows, scales = factors_of(u, y), True
        if rows is None:
            raise
    t = _holding(trace, trace.y, rows, u)
    if t is None:
        what = "scales by a factor" if scales else "shrinks by a threshold"
        raise Unexplained(f"it {what} that none of its own operations returns")
    return Match(trace.x, trace.y, t, scales)


def factors_of(u: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    """The factors (N, C) by which y is u scaled, if it is; not where all of them are 1."""
    if not isinstance(y, torch.Tensor) or y.shape != u.shape or not y.isfinite().all():
        return None
    flat, scaled = u.flatten(2), y.flatten(2).to(u.dtype)
    factors = (flat * scaled).sum(2) / flat.square().sum(2)
    if not close(scaled, flat * factors.unsqueeze(2)) or close(factors, torch.ones_like(factors)):
        return None
    return factors


def match_inside(trace: Trace) -> Match | None:
    """The operator written somewhere among other code: from the earliest u to the latest y."""
    full = [n for n in trace.nodes if _is_float(n) and n.meta["seen"].dim() > 2 and n.meta["seen"][0, 0].numel() > 1]
    for i, u in enumerate(full):
        value = u.meta["seen"]
        if any(v.meta["seen"].abs().equal(value) and not v.meta["seen"].equal(value) for v in full[:i]):
            continue  # u is |v|: max(|v| - t, 0), without v's sign, would count
        for y in reversed(full[i + 1 :]):
            if y.meta["seen"].shape != value.shape:
                continue
            try:
                rows = rows_of(value, y.meta["seen"])
            except Unexplained:
                continue
            below = value.abs().flatten(2) < rows.unsqueeze(2) * (1 - tolerance(rows.dtype))
            t = _holding(trace, y, rows, value) if below.any() else None  # or u - min(u) would count
            if t is not None and u in behind(t):
                return Match(u, y, t)
    return None


def _is_float(node: fx.Node) -> bool:
    return isinstance(node.meta["seen"], torch.Tensor) and node.meta["seen"].is_floating_point()


def _holding(trace: Trace, y: fx.Node, rows: torch.Tensor, u: torch.Tensor) -> fx.Node | None:
    """The last call before y that computed these thresholds: what seems to change nothing may do so later."""
    known, before_y = ~rows.isnan(), behind(y)
    for node in reversed(trace.nodes):
        if node in before_y and _is_float(node):
            t = _as_rows(node.meta["seen"], rows, u.dim())
            if t is not None and close(t[known], rows[known]):
                return node
    return None


def _as_rows(t: torch.Tensor, rows: torch.Tensor, rank: int) -> torch.Tensor | None:
    """(N | 1, C | 1), (N | 1, C | 1, 1, ...) or one number, seen as (N, C)."""
    if t.numel() == 1:
        return t.reshape(1, 1).expand_as(rows)
    ok = t.dim() in (2, rank) and t.shape[2:].numel() == 1
    ok = ok and all(a in (1, b) for a, b in zip(t.shape, rows.shape, strict=False))
    return t.reshape(t.shape[:2]).expand_as(rows) if ok else None


def behind(*nodes: fx.Node, given: Collection[fx.Node] = ()) -> set[fx.Node]:
    """These nodes and all that they are computed from; what `given` ones are computed from left out."""
    found, todo = set(), [*nodes]
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo.extend(n.all_input_nodes if n not in given else ())
    return found


class Found(NamedTuple):
    plan: Plan
    steps: frozenset[fx.Node]  # the operations that it carries out itself
    averages: frozenset[fx.Node]  # what it takes for the average of |x| or x
    pooled: frozenset[fx.Node] = frozenset()  # those steps that are given x in the trace, and its average by the plan


def plans_for(trace: Trace, match: Match) -> Iterator[Found]:
    """Plans that give the same threshold on the trace's values, best first."""
    u, t = match.u.meta["seen"], match.t.meta["seen"]
    before_t = behind(match.t)
    if match.u not in before_t:
        if not match.scales:
            yield _threshold_plan(trace, match, None, {})
        return
    spatial = list(range(2, u.dim()))
    for pool, pooled in (("abs", u.abs().mean(spatial)), ("signed", u.mean(spatial))):
        if match.scales and pool == "abs":
            continue
        averages = {n: n.meta["seen"].dim() for n in before_t if n is not match.u and _is_average(n, pooled)}
        if match.scales == (pool == "signed") and not trace.effects:
            plan = _gate_plan(trace, match, t, pooled, averages)
            if plan is not None:
                yield plan
        if t.dim() not in (2, u.dim()) or t.shape[0] != u.shape[0]:
            raise Unexplained(f"its {'factor' if match.scales else 'threshold'} is shared by the samples of a batch")
        for known in (averages, {}):
            plan = _threshold_plan(trace, match, pool, known)
            if plan is not None:
                yield plan


def _is_average(node: fx.Node, pooled: torch.Tensor) -> bool:
    """The pooled values as (N, C), (N, C, 1), ..."""
    value = node.meta["seen"]
    return _is_float(node) and value.shape[:2] == pooled.shape and value.shape[2:].numel() == 1 and (
        close(value.reshape(pooled.shape), pooled)
    )  # fmt: skip


def _threshold_plan(trace: Trace, match: Match, pool: str | None, averages: dict[fx.Node, int]) -> Found | None:
    """The steps from x (a tensor that is its own average) and `averages` to the threshold."""
    needed = behind(match.t, *(node for _, node in trace.effects), given={match.u, *averages})
    given = [n for n in trace.nodes if n in needed and (n is match.u or n in averages)]
    if pool is None and given:
        raise Unexplained(f"it keeps {trace.effects[0][0]}, which the fused operator does not compute")
    ranks = [averages.get(n, n.meta["seen"].dim()) for n in given]
    index = {n: i for i, n in enumerate(given)}
    steps = []
    for node in trace.nodes:
        if node in needed and node not in index:
            if node.op == "placeholder":
                return None
            index[node] = len(index)
            steps.append(_step(node, index))
    effects = tuple((name, index[node]) for name, node in trace.effects)
    plan = ThresholdPlan(pool, tuple(ranks), tuple(steps), index[match.t], effects, match.scales)
    run = frozenset(index).difference(given)
    return Found(plan, run, frozenset(averages), frozenset(filter(_takes_planes, run)))


def _takes_planes(node: fx.Node) -> bool:
    values = [n.meta["seen"] for n in node.all_input_nodes]
    return any(isinstance(v, torch.Tensor) and v.dim() > 2 and v.shape[2:].numel() > 1 for v in values)


_FORM = {"dtype", "device", "shape", "ndim", "is_cuda", "size", "dim", "type", "numel"}
# What a fused form may leave out: these give the same for every x, however small, large or long it is.
_SHAPES = set("view reshape flatten unflatten squeeze unsqueeze expand expand_as contiguous getitem getattr size dim".split())
_SHAPES |= set("numel shape clone alias tuple mean repeat view_as reshape_as permute transpose add sub mul floordiv".split())
_SCALING = _SHAPES | set("mul_ imul multiply multiply_ mean".split())
_POOLING = _SHAPES | set("abs abs_ absolute absolute_ sum truediv div adaptive_avg_pool1d adaptive_avg_pool2d".split())
_POOLING |= set("adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d norm linalg_vector_norm l1_loss".split())
_SHELL = _POOLING | set("sign sgn sign_ relu relu_ max maximum min minimum clamp clamp_ clamp_min clamp_min_ where".split())
_SHELL |= set("clamp_max clamp_max_ clip clip_ fmax fmin neg neg_ negative sub_ isub iadd add_ imul mul_ multiply".split())
_SHELL |= set("multiply_ rsub gt lt ge le ne eq zeros_like full_like zeros new_zeros softshrink threshold copysign".split())
_SHELL |= set("to type_as logical_or logical_and or_ and_ masked_fill heaviside sigmoid float bool ones_like".split()) - {"sigmoid"}

_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.Dropout, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def check_dropped(trace: Trace, match: Match, found: "Found") -> None:
    """What the fused form leaves out of the forward must be known to change nothing, whatever x and the numbers are."""
    pooled = behind(*found.averages, given={match.u}) if found.averages else set()
    scaled = behind(match.t, given={match.u, *found.averages}) - pooled
    for node in behind(match.y, given={match.u}).difference(found.steps, {match.u}):
        if node.op == "get_attr":
            own = node.target.startswith("inner.")
            if (own or id(node.meta["value"]) in trace.watch.outside) and not all(map(_asks_form, node.users)):
                shown = f"self.{path_of(node)}" if own else "a tensor that it holds"
                raise Unexplained(f"{shown} does not go into its threshold alone")
        elif node.op == "call_module":
            module = node.meta["module"]
            if [*module.parameters(), *module.buffers()]:
                raise Unexplained(f"the tensors of self.{path_of(node)} do not go into its threshold alone")
            if not isinstance(module, _LAYERS) and not all(isinstance(m, (nn.Sequential, *_LAYERS)) for m in module.modules()):
                raise Unexplained(f"what self.{path_of(node)} does besides is not known")
        elif node.op in ("call_function", "call_method"):
            names = _POOLING if node in pooled else _SCALING if node in scaled else _SHELL
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
            if name.strip("_") not in {n.strip("_") for n in names} or not _harmless(name, node):
                raise Unexplained(f"what it does besides in {_line_of(node)} may change the result")


def _harmless(name: str, node: fx.Node) -> bool:
    """clamp and slices say by their arguments whether they may change anything."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if name.startswith(("clamp", "clip")):
        return all(a is None or isinstance(a, fx.Node) or a == 0 for a in rest)
    seen = node.args[0].meta["seen"] if node.args and isinstance(node.args[0], fx.Node) else None
    if name == "getitem" and isinstance(seen, torch.Tensor) and seen.dim() > 2 and seen.shape[2:].numel() > 1:
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        return all(i is None or i is ... or i == slice(None) for i in index)
    return True


def check_sign(trace: Trace, match: Match) -> None:
    """Where a threshold is negative, some forms are no soft thresholding: then it must be known never to be."""
    if match.scales:
        return
    u, t = match.u.meta["seen"], match.t.meta["seen"]
    other = t * torch.where(torch.arange(t.numel(), device=t.device).view(t.shape) % 2 == 0, -1.5, 0.5)
    values: dict[fx.Node, object] = {match.u: u, match.t: other}
    between = behind(match.y) - behind(match.u, match.t)
    try:
        with torch.no_grad():
            for node in trace.nodes:
                if node in between:
                    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _again(values.get(n, n.meta["seen"])))
                    values[node] = call(node.op, node.target, args, kwargs, trace.root)
        expected = u.sign() * (u.abs() - other.reshape(*other.shape, *[1] * (u.dim() - other.dim()))).relu()
        same = close(values[match.y], expected)
    except Exception:
        same = False
    if not same and not _never_negative(match.t):
        raise Unexplained("where its threshold is negative, as it may become, it is no soft thresholding")


def _again(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value  # operations in place


_POSITIVE = set("sigmoid softplus relu hardsigmoid exp abs softmax relu6 square absolute".split())
_POSITIVE_LAYERS = (nn.Sigmoid, nn.Softplus, nn.ReLU, nn.Hardsigmoid, nn.Softmax, nn.ReLU6)


def _never_negative(node: fx.Node) -> bool:
    """By the last operations of the way to it."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    if node.op == "call_module":
        last = [*node.meta["module"].modules()][-1]
        return isinstance(last, _POSITIVE_LAYERS) or (isinstance(last, _LAYERS) and _never_negative(node.args[0]))
    if node.op not in ("call_function", "call_method"):
        return False
    if name.strip("_") in _POSITIVE:
        return True
    if name.strip("_") in {*_SCALING, "imul", "multiply", "add", "iadd", "sum", "detach", *_POOLING} - {"sub"}:
        inputs = [n for n in node.all_input_nodes if _is_float(n)]
        numbers = [a for a in node.args if isinstance(a, (int, float)) and not isinstance(a, bool)]
        sign = all(a >= 0 for a in numbers) if name.strip("_") in ("mul", "imul", "multiply", "add", "iadd", "truediv", "div") else True
        return bool(inputs) and sign and all(map(_never_negative, inputs))
    return False


def _line_of(node: fx.Node) -> str:
    frame = node.meta["frames"][-1]
    return place(frame.code.co_filename, frame.line)


def _asks_form(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return isinstance(name, str) and name in _FORM


def _step(node: fx.Node, index: dict[fx.Node, int]) -> Step:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Ref(index[n]))
    return Step(node.op, path_of(node) if node.op in ("call_module", "get_attr") else node.target, _plain(args),
                {k: _plain(v) for k, v in kwargs.items()})  # fmt: skip


def path_of(node: fx.Node) -> str:
    if not node.target.startswith("inner."):
        raise Unexplained("its threshold uses a tensor that its forward makes anew")
    return node.target.removeprefix("inner.")


def _plain(arg):
    """torch.fx's immutable containers as Python's own."""
    if isinstance(arg, (tuple, list)) and not isinstance(arg, Ref):
        return (tuple if isinstance(arg, tuple) else list)(_plain(a) for a in arg)
    if isinstance(arg, dict):
        return {k: _plain(v) for k, v in arg.items()}
    return arg


# ---- a gate that can be named ----------------------------------------------------------------------------------------

_ACTIVATIONS: dict[object, Callable[[], nn.Module]] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), nn.ReLU),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, F.sigmoid, "sigmoid", "sigmoid_"), nn.Sigmoid),
}


def _gate_plan(trace, match, t, pooled, averages) -> Found | None:
    rows = _as_rows(t, pooled, match.u.meta["seen"].dim())
    forms = (("channel", pooled), ("sample", pooled.mean(1, keepdim=True)), (None, torch.ones_like(pooled)))
    forms = forms[2:] if match.scales else forms
    for node in trace.nodes:
        alpha = node.meta["seen"]
        if node in averages or not _is_float(node) or alpha.dim() != 2 or not averages.keys() & behind(node):
            continue
        if alpha.shape[0] != pooled.shape[0] or alpha.shape[1] not in (1, pooled.shape[1]):
            continue
        for average, factor in forms:
            if close((alpha * factor).expand_as(rows), rows) and (gate := gate_of(node, averages)) is not None:
                run = frozenset(behind(node, given=averages).difference(averages))
                return Found(GatePlan(gate, average, match.scales), run, frozenset(averages))
    return None


def gate_of(node: fx.Node, averages: dict[fx.Node, int]) -> str | tuple | None:
    """The module that was called on A (N, C) and returned this, or the layers of a standard gate."""
    if node.op == "call_module" and _only_input(node) in averages and averages[_only_input(node)] == 2:
        return path_of(node)
    chain, types = [], []
    while node is not None and node not in averages:
        if node.op == "call_module":
            chain.append(path_of(node))
            types.append(class_of(node.meta["module"]))
        elif node.target in _ACTIVATIONS:
            chain.append(_ACTIVATIONS[node.target])
            types.append(_ACTIVATIONS[node.target])
        else:
            return None
        node = _only_input(node)
    standard = node is not None and averages[node] == 2 and tuple(types[::-1]) in STRUCTURES
    return tuple(chain[::-1]) if standard else None


def _only_input(node: fx.Node) -> fx.Node | None:
    return node.args[0] if len(node.args) == 1 and len(node.all_input_nodes) == 1 else None

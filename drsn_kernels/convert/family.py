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
from .plans import GatePlan, Plan, Ref, Step, ThresholdPlan
from .reasons import Differs, Unexplained
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
    full = [n for n in trace.nodes if is_float(n) and n.meta["seen"].dim() > 2 and n.meta["seen"][0, 0].numel() > 1]
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


def is_float(node: fx.Node) -> bool:
    return isinstance(node.meta["seen"], torch.Tensor) and node.meta["seen"].is_floating_point()


def _holding(trace: Trace, y: fx.Node, rows: torch.Tensor, u: torch.Tensor) -> fx.Node | None:
    """The last call before y that computed these thresholds: what seems to change nothing may do so later."""
    known, before_y = ~rows.isnan(), behind(y)
    for node in reversed(trace.nodes):
        if node in before_y and is_float(node):
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
    for name, node in trace.effects:
        value = node.meta["seen"]
        if isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[2:].numel() > 1:
            raise Differs(f"its forward keeps the attribute {name}, which the fused form does not compute")
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
    return is_float(node) and value.shape[:2] == pooled.shape and value.shape[2:].numel() == 1 and (
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
            steps.append(step_of(node, index))
    effects = tuple((name, index[node]) for name, node in trace.effects)
    plan = ThresholdPlan(pool, tuple(ranks), tuple(steps), index[match.t], effects, match.scales)
    run = frozenset(index).difference(given)
    planes = match.u.meta["seen"].shape[2:].numel()
    return Found(plan, run, frozenset(averages), frozenset(n for n in run if _takes_planes(n, planes)))


def _takes_planes(node: fx.Node, elements: int) -> bool:
    """Of so many elements; (N, 1, C), as a gate of a convolution along C has it, is none."""
    values = [n.meta["seen"] for n in node.all_input_nodes]
    return any(isinstance(v, torch.Tensor) and v.dim() > 2 and v.shape[2:].numel() == elements > 1 for v in values)


def step_of(node: fx.Node, index: dict[fx.Node, int]) -> Step:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: Ref(index[n]))
    return Step(node.op, path_of(node) if node.op in ("call_module", "get_attr") else node.target, _plain(args),
                {k: _plain(v) for k, v in kwargs.items()})  # fmt: skip


def path_of(node: fx.Node) -> str:
    if not node.target.startswith("inner."):
        raise Unexplained("it uses a tensor that its forward makes anew")
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
        if node in averages or not is_float(node) or alpha.dim() != 2 or not averages.keys() & behind(node):
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

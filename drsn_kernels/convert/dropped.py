"""What a fused form leaves out of a forward must be known to change nothing, whatever x and the numbers are.

On random numbers a clamp at 1e4, a crop to 1,024 samples or a cast to float32 seems to do nothing. So operations are
known by name, and of the threshold it is asked whether it may become negative: there some forms of the step differ.
"""

import operator

import torch
from torch import fx, nn

from .conditions import Part, class_of
from .family import Found, Match, behind, close, is_float, path_of
from .plans import call
from .reasons import Unexplained, first_line, place
from .tracing import Trace

_FORM = {"dtype", "device", "shape", "ndim", "is_cuda", "size", "dim", "type", "numel"}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations by name, without the underscores of those in place, and what each may be part of.
_SHAPES = _names(
    """view reshape flatten unflatten squeeze unsqueeze expand expand_as view_as reshape_as permute transpose repeat
    contiguous clone alias getitem getattr size dim numel shape tuple add sub mul floordiv mean"""
)
_SCALING = _SHAPES | _names("multiply to type_as type broadcast_to")
_POOLING = _SHAPES | _names(
    """abs absolute sum div truediv norm linalg_vector_norm l1_loss adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d"""
)
_POOLED = _POOLING | _names("detach")  # steps that the plan carries out on the average
_SHELL = _POOLING | _names(
    """sign sgn copysign relu max maximum min minimum fmax fmin clamp clamp_min clamp_max clip where masked_fill neg
    negative rsub multiply gt lt ge le ne eq logical_or logical_and or and bool float to type_as
    zeros_like ones_like full_like zeros new_zeros tensor softshrink threshold heaviside type broadcast_to"""
)
_LAYERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.ReLU, nn.Dropout, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_LAYERS += (nn.AdaptiveAvgPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def _name(node: fx.Node) -> str:
    name = (node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")).strip("_")
    return name[1:] if node.target in _IN_PLACE else name


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv)  # y += z


def check_dropped(trace: Trace, match: Match, found: Found) -> None:
    """What the fused form leaves out of the forward must be known to change nothing, whatever x and the numbers are."""
    pooled = behind(*found.averages, given={match.u}) if found.averages else set()
    scaled = behind(match.t, given={match.u, *found.averages}) - pooled
    for node in trace.nodes:  # also one whose result nothing uses
        target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if target.endswith("_") and node.op != "call_module" and node not in found.steps and node.args:
            if isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
                raise Unexplained(f"its forward writes over self.{path_of(node.args[0])} in {_line_of(node)}")
    for node in behind(match.y, given={match.u}).difference(found.steps - found.pooled, {match.u}):
        if node.op == "get_attr":
            own = node.target.startswith("inner.")
            if (own or id(node.meta["value"]) in trace.watch.outside) and not all(map(_asks_form, node.users)):
                shown = f"self.{path_of(node)}" if own else "a tensor that it holds"
                raise Unexplained(f"{shown} does not go into its threshold alone")
        elif node.op == "call_module":
            module = node.meta["module"]
            if node in found.pooled and [*module.parameters()]:
                continue  # a gate that pools
            if [*module.parameters(), *module.buffers()]:
                raise Unexplained(f"the tensors of self.{path_of(node)} do not go into its threshold alone")
            if not isinstance(module, _LAYERS) and not all(
                isinstance(m, (nn.Sequential, *_LAYERS)) for m in module.modules()
            ):
                raise Unexplained(f"what self.{path_of(node)} does besides is not known")
        elif node.op in ("call_function", "call_method"):
            names = _SCALING if node in scaled else _SHELL
            names = _POOLED if node in found.pooled else _POOLING if node in pooled else names
            if _name(node) not in names or not _harmless(_name(node), node):
                raise Unexplained(f"what it does besides in {_line_of(node)} may change the result")


def _harmless(name: str, node: fx.Node) -> bool:
    """clamp and slices say by their arguments whether they may change anything."""
    rest = [*node.args[1:], *node.kwargs.values()]
    if name.startswith(("clamp", "clip")):
        return all(a is None or isinstance(a, fx.Node) or a == 0 for a in rest)
    seen = node.args[0].meta["seen"] if node.args and isinstance(node.args[0], fx.Node) else None
    if name in ("to", "type_as", "type", "float"):
        # of a mask, or to what x has: else the result may have another dtype
        given = any(isinstance(a, fx.Node) for a in rest)
        return given or (isinstance(seen, torch.Tensor) and seen.dtype == torch.bool)
    if name == "getitem" and isinstance(seen, torch.Tensor) and seen.dim() > 2 and seen.shape[2:].numel() > 1:
        index = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        return all(i is None or i is ... or i == slice(None) for i in index)
    return True


def check_sign(trace: Trace, match: Match) -> tuple[Part, ...]:
    """Where a threshold is negative, some forms are no soft thresholding: then it must be known never to be.

    Returns the modules that this is known by: a fused form holds while they are of their classes, and nobody hooks in.
    """
    if match.scales:
        return ()
    u, t = match.u.meta["seen"], match.t.meta["seen"]
    other = t * torch.where(torch.arange(t.numel(), device=t.device).view(t.shape) % 2 == 0, -1.5, 0.5)
    try:
        with torch.no_grad():
            expected = u.sign() * (u.abs() - other.reshape(*other.shape, *[1] * (u.dim() - other.dim()))).relu()
            same = close(_shrunk(trace, match, u, other), expected)
    except Exception:
        same = False
    known_by: list[Part] = []
    if not same and not _ends_in(match.t, known_by, *_NOT_NEGATIVE):
        raise Unexplained("where its threshold is negative, as it may become, it is no soft thresholding")
    return tuple(known_by)


def check_zero(trace: Trace, match: Match) -> tuple[Part, ...]:
    """Where x and its threshold are 0, no gradient may pass, as none does through soft thresholding.

    A plane is all zeros behind a norm of weight 0, as of a zero-initialised residual: there the module would learn.
    Returns the modules by which it is known that a threshold is never 0, where that is why it does not matter.
    """
    if match.scales:
        return ()
    zeros = [torch.zeros_like(node.meta["seen"]).requires_grad_() for node in (match.u, match.t)]
    with torch.enable_grad():
        try:
            y = _shrunk(trace, match, *zeros)
            gradients = torch.autograd.grad(y, zeros, torch.ones_like(y), allow_unused=True) if y.requires_grad else ()
        except Exception as error:
            raise Unexplained(f"a probe with x and its threshold 0 fails: {first_line(error)}") from None
    passing = [g for g in gradients if g is not None and (g != 0).any()]
    known_by: list[Part] = []
    if passing and not _ends_in(match.t, known_by, *_ABOVE_ZERO):
        what = "gives NaN" if any(g.isnan().any() for g in passing) else "lets a gradient pass"
        raise Unexplained(f"where x and its threshold are 0 it {what}, and soft thresholding none")
    return tuple(known_by)


def _shrunk(trace: Trace, match: Match, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """y of another u and another threshold."""
    values: dict[fx.Node, object] = {match.u: u, match.t: t}
    between = behind(match.y, given={match.u, match.t})
    for node in trace.nodes:
        if node in between and node not in values and any(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _again(values.get(n, n.meta["seen"])))
            values[node] = call(node.op, node.target, args, kwargs, trace.root)
    return values[match.y]


def _again(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value  # operations in place


# Operations and modules whose results are never negative, or never 0 (but for underflow), whatever they are given.
_NOT_NEGATIVE = (
    _names("sigmoid softplus relu hardsigmoid exp abs absolute softmax relu6 square"),
    (nn.Sigmoid, nn.Softplus, nn.ReLU, nn.Hardsigmoid, nn.Softmax, nn.ReLU6),
)
_ABOVE_ZERO = _names("sigmoid softplus exp softmax"), (nn.Sigmoid, nn.Softplus, nn.Softmax)
_KEEPS_SIGN = (_POOLED | _SCALING) - {"sub"}


def _ends_in(node: fx.Node, known_by: list[Part], names: frozenset[str], layers: tuple[type, ...]) -> bool:
    """Whether the way to it ends in these operations and modules, and nothing behind them changes the sign.

    known_by: filled with the modules.
    """
    if node.op == "call_module":
        paths, modules = zip(*node.meta["module"].named_modules(), strict=True)
        last = modules[-1]
        for name, module in zip(paths, modules, strict=True):
            if not name or paths[-1] == name or paths[-1].startswith(f"{name}."):  # the last one, and what holds it
                path = ".".join(part for part in (path_of(node), name) if part)
                known_by.append(Part(tuple(path.split(".")), class_of(module), (*module._modules,)))
        return isinstance(last, layers) or (
            isinstance(last, _LAYERS) and _ends_in(node.args[0], known_by, names, layers)
        )  # fmt: skip
    if node.op not in ("call_function", "call_method") or _name(node) not in names | _KEEPS_SIGN:
        return False
    if _name(node) in names:
        return True
    inputs = [n for n in node.all_input_nodes if is_float(n)]
    if _name(node) in ("mul", "multiply", "add", "div", "truediv"):
        if any(isinstance(a, (int, float)) and a < 0 for a in node.args):
            return False
    return bool(inputs) and all(_ends_in(n, known_by, names, layers) for n in inputs)


def _line_of(node: fx.Node) -> str:
    frame = node.meta["frames"][-1]
    return place(frame.code.co_filename, frame.line)


def _asks_form(node: fx.Node) -> bool:
    name = node.args[1] if node.target is getattr else node.target
    return isinstance(name, str) and name in _FORM

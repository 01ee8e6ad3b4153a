"""What the operators are compared with: float64 forms written from the paper, gates, and the rule for tolerances.

Written apart from drsn_kernels.reference, so that the two check each other. Nothing here rounds to x's dtype: `exact`
computes in float64, `plain` the same formula in the dtype of sums (float32, float64 for float64), which is how a
PyTorch user would write it. `close` allows twice the error of the plain form and a small floor.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.func import functional_call

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
AVERAGES = ["channel", "sample", None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, averages and thresholds."""
    return torch.float64 if dtype is torch.float64 else torch.float32


# ---- the formulas ----------------------------------------------------------------------------------------------------


def aligned(tau: torch.Tensor, rank: int) -> torch.Tensor:
    """(N, 1) or (N, C) seen from the left; anything else as it is."""
    return tau[(...,) + (None,) * (rank - 2)] if tau.dim() == 2 and rank > 2 else tau


def soft_threshold(x: torch.Tensor, tau: torch.Tensor, threshold: str = "soft", slope: float = 0.0) -> torch.Tensor:
    """Others than the soft one: slope * x within tau; outside x, moved if "soft" so that the two meet at tau."""
    tau = aligned(tau, x.dim())
    if threshold == "soft" and not slope:
        return x.sign() * torch.relu(x.abs() - tau)
    outside = x if threshold == "hard" else x.sign() * (x.abs() - (1 - slope) * tau)
    return torch.where(x.abs() <= tau, slope * x, outside) + 0 * tau  # a tau without influence has a gradient of 0


def abs_mean(x: torch.Tensor) -> torch.Tensor:
    return x.abs().flatten(2).mean(2)


def shrink(x, gate: Callable, average: str | None, residual=None, **rule) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, tau), every step in x's dtype. rule: threshold and slope of soft_threshold."""
    pooled = abs_mean(x)
    scale = {"channel": lambda: pooled, "sample": lambda: pooled.mean(1, keepdim=True), None: lambda: 1.0}[average]()
    tau = gate(pooled) * scale
    y = soft_threshold(x, tau, **rule)
    return (y if residual is None else y + residual), tau


def squeeze_excite(x, gate: Callable, residual=None) -> torch.Tensor:
    y = x * aligned(gate(x.flatten(2).mean(2)), x.dim())
    return y if residual is None else y + residual


def batch_norm_act(
    x, weight=None, bias=None, mean=None, var=None, eps: float = 1e-5, activation: str | None = "relu", slope=0.01
) -> torch.Tensor:  # fmt: skip
    """Statistics of the batch unless mean and var (C,) are given."""
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    if mean is None:
        var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    z = (x - mean.view(by_channel)) / (var.view(by_channel) + eps).sqrt()
    z = z if weight is None else z * weight.view(by_channel)
    z = z if bias is None else z + bias.view(by_channel)
    return {"relu": z.relu(), "leaky": torch.where(z > 0, z, slope * z), None: z}[activation]


class Evaluated:
    """Outputs and gradients of one function of tensors, in one dtype, for random output gradients."""

    def __init__(self, fn: Callable, inputs: Sequence[torch.Tensor], gs: Sequence[torch.Tensor | None]):
        outputs = fn(*inputs)
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        reached = [(o, g) for o, g in zip(self.outputs, gs, strict=True) if g is not None]
        self.grads = ()
        if wanted:
            self.grads = torch.autograd.grad([o for o, _ in reached], wanted, [g for _, g in reached])


def cast(tensors: Sequence[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """Fresh leaves of another dtype, requiring gradients as the originals do."""
    return [None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]


def cast_gate(gate: Callable, dtype: torch.dtype) -> Callable:
    return copy.deepcopy(gate).to(dtype) if isinstance(gate, nn.Module) else gate


# ---- inputs ----------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_gate(channels: int, out: int | None = None, norm: bool = False) -> nn.Sequential:
    """A gate without kinks, so that a rounding difference never flips one of its units."""
    layers = [nn.Linear(channels, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, out or channels), nn.Sigmoid())


def smooth_gate_for(x: torch.Tensor, out: int | None = None) -> nn.Sequential:
    return smooth_gate(x.shape[1], out).to(x.device, wide(x.dtype))


def standard_gate(channels: int, hidden: int, outputs: int, kind: str) -> nn.Sequential:
    """A standard gate of any width: "plain", with a "norm" in eval, or with "batch norm" in training."""
    norms = [] if kind == "plain" else [nn.BatchNorm1d(hidden)]
    gate = nn.Sequential(nn.Linear(channels, hidden), *norms, nn.ReLU(), nn.Linear(hidden, outputs), nn.Sigmoid())
    for norm in norms:  # statistics that are not trivial
        for t in (norm.weight, norm.running_var):
            nn.init.uniform_(t, 0.5, 1.5)
        for t in (norm.bias, norm.running_mean):
            nn.init.uniform_(t, -0.2, 0.2)
    return gate.train(kind == "batch norm")


def gate_of(channels: int, kind: str, average: str | None = "channel", reduction: int = 1) -> nn.Sequential:
    """The standard gate of `Shrinkage`."""
    return standard_gate(channels, max(channels // reduction, 1), 1 if average == "sample" else channels, kind)


def features(shape: Sequence[int], dtype=torch.float32, device=None, zeros: bool = True) -> torch.Tensor:
    """Random x with every 17th element 0, as after a ReLU; on the default device where none is named."""
    x = torch.randn(shape, dtype=torch.float64)
    if zeros:
        x.view(-1)[::17] = 0
    return x.to(device, dtype)


def varied(shape: Sequence[int], dtype=torch.float32, device=None) -> torch.Tensor:
    """features, each sample at its own level: pooled averages that differ, so that a batch norm over them is no noise
    amplifier."""
    level = 0.5 + torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=torch.float64)
    return (features(shape, torch.float64) * level).to(device, dtype)


def blank(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


# (N, C, H, W) -> a float32 tensor of that shape, in memory as the name says.
LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "contiguous": blank,
    "channels_last": lambda n, c, h, w: blank(n, h, w, c).permute(0, 3, 1, 2),
    "channels_last transposed": lambda n, c, h, w: blank(n, w, h, c).permute(0, 3, 2, 1),
    "batch innermost": lambda n, c, h, w: blank(c, h, w, n).permute(3, 0, 1, 2),
    "channel outermost": lambda n, c, h, w: blank(c, n, h, w).transpose(0, 1),
    "image transposed": lambda n, c, h, w: blank(n, c, w, h).transpose(2, 3),
    "image outermost": lambda n, c, h, w: blank(h, w, n, c).permute(2, 3, 0, 1),
    "sliced": lambda n, c, h, w: blank(n, c + 2, h, 2 * w)[:, 1:-1, :, ::2],
    "sliced channels_last": lambda n, c, h, w: blank(n, h, w, c + 3)[..., 1:-2].permute(0, 3, 1, 2),
    "padded rows": lambda n, c, h, w: blank(n, c, h, w + 3)[..., 1:-2],
    "offset": lambda n, c, h, w: blank(n * c * h * w + 1)[1:].view(n, c, h, w),
    "expanded batch": lambda n, c, h, w: blank(1, c, h, w).expand(n, c, h, w),
    "expanded channels": lambda n, c, h, w: blank(n, 1, h, w).expand(n, c, h, w),
    "expanded space": lambda n, c, h, w: blank(n, c, 1, 1).expand(n, c, h, w),
    "expanded width": lambda n, c, h, w: blank(n, c, h, 1).expand(n, c, h, w),
    "scalar": lambda n, c, h, w: blank(1, 1, 1, 1).expand(n, c, h, w),
}


def without_ties(g: torch.Tensor, x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """g, but 0 where |x| is so near to tau that rounding decides which side it is on; sums are then free of it too."""
    tau = aligned(tau.detach().double(), x.dim())
    near = (x.detach().double().abs() - tau).abs() < 1e-4 * tau.abs().clamp(min=1e-3)
    return torch.where(near, torch.zeros((), dtype=g.dtype), g)


def far_from_kinks(shape: Sequence[int], gate: Callable, average: str | None) -> torch.Tensor:
    """float64 x without zeros and without |x| near tau, where a finite difference would step across."""
    for _ in range(100):
        x = torch.randn(shape, dtype=torch.float64)
        tau = aligned(shrink(x, gate, average)[1], x.dim())
        if (x.abs() - tau).abs().min() > 2e-3 and x.abs().min() > 2e-3:
            return x.requires_grad_()
    raise AssertionError("no such x")


# ---- tolerances ------------------------------------------------------------------------------------------------------


def close(actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, what="result", scale=None, units=16) -> None:
    """|actual - exact| <= 2 * the plain form's worst error + rounding to actual's dtype + a few units of the scale.

    The scale is the largest exact value, and where that allows too little, scale(), which knows what cancelled.
    """
    assert actual.shape == exact.shape == plain.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    if not actual.numel():
        return
    assert torch.isfinite(actual).all(), f"{what} is not finite: {actual}"
    unit, computed = torch.finfo(actual.dtype), torch.finfo(plain.dtype)
    exact = exact.detach()
    size = exact.abs().max()
    # in float64 the plain form is the exact one; what remains is the order of the additions
    units = (1000 if computed.eps < 1e-12 else units) * computed.eps
    allowed = 2 * (plain.detach().double() - exact).abs().max() + units * size + unit.smallest_normal * unit.eps
    if unit.eps > computed.eps:  # the last step rounds to actual's dtype, to nearest
        allowed = allowed + (unit.eps / 2 * exact.abs() * (1 + 1e-3)).clamp(min=unit.smallest_normal * unit.eps)
    error = (actual.detach().double() - exact).abs()
    if scale is not None and (error > allowed).any():
        allowed = allowed + units * (scale() - size).clamp(min=0)
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{what}: {error.flatten()[worst]:.3e} from the exact {exact.flatten()[worst]:.6e} at flat index {int(worst)}, "
        f"allowed {allowed.flatten()[worst if allowed.dim() else 0]:.3e}, scale {size:.3e}"
    )


def check(fn: Callable, formula: Callable, inputs: dict[str, torch.Tensor | None], gs: Sequence) -> None:
    """fn's outputs and gradients against the formula in float64 and in the dtype of sums.

    `formula(dtype, *inputs)` evaluates in that dtype; gs are the output gradients, None where there is no loss.
    """
    tensors = list(inputs.values())
    ours = Evaluated(fn, tensors, gs)
    exact, plain = (
        Evaluated(lambda *t, d=d: formula(d, *t), cast(tensors, d), cast(gs, d))
        for d in (torch.float64, wide(tensors[0].dtype))
    )
    labels = [f"output {i}" for i in range(len(ours.outputs))]
    labels += [f"gradient of {name}" for name, t in inputs.items() if t is not None and t.requires_grad]
    results = [(*e.outputs, *e.grads) for e in (ours, exact, plain)]

    def before_cancellation(result: int) -> torch.Tensor:
        """How large the terms of a sum were: what it becomes, at most, when the signs of gs are drawn at random.

        Gradients are linear in gs. Where g repeats and signs alternate, a sum is exactly 0 in one order of additions
        and a few units of its terms in another.
        """
        signs = torch.Generator(tensors[0].device).manual_seed(0)
        sign = lambda g: torch.randint(2, g.shape, generator=signs, device=g.device) * 2 - 1  # noqa: E731
        flip = lambda g: None if g is None else g * sign(g)  # noqa: E731
        sizes = []
        for _ in range(8):
            leaves, flipped_gs = cast(tensors, torch.float64), [flip(g) for g in cast(gs, torch.float64)]
            flipped = Evaluated(lambda *t: formula(torch.float64, *t), leaves, flipped_gs)
            sizes.append((*flipped.outputs, *flipped.grads)[result].detach().abs().max())
        return max(sizes)

    for i, (label, actual, right, simple) in enumerate(zip(labels, *results, strict=True)):
        close(actual, right, simple, label, lambda i=i: before_cancellation(i))


def check_gated(run: Callable, formula: Callable, x, gate: nn.Module, residual, gs: Sequence) -> None:
    """check of run(x, residual) by formula(x, gate, residual), and of the gradients of every gate parameter."""
    parameters = dict(gate.named_parameters())

    def exact(dtype, x, residual, *values):
        inner, given = cast_gate(gate, dtype), dict(zip(parameters, values, strict=True))
        return formula(x, lambda pooled: functional_call(inner, given, pooled), residual)

    check(lambda x, residual, *_: run(x, residual), exact, {"x": x, "residual": residual, **parameters}, gs)


def check_shrink(
    kernels, x, gate: nn.Module, average: str | None, residual=None, inplace=False, return_tau=True, **rule
) -> None:
    """y, tau and the gradients of x, residual and every gate parameter."""
    outputs = slice(None) if return_tau else 0
    with torch.no_grad():
        tau = shrink(x.double(), cast_gate(gate, torch.float64), average)[1]
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        g = without_ties(torch.randn(x.shape, device=x.device), x, tau).to(dtype)

    def ours(x, residual):
        return kernels.shrink(
            x * 1 if inplace else x, gate, average=average, residual=residual, inplace=inplace, return_tau=return_tau,
            **rule,
        )  # fmt: skip

    gs = [g, torch.randn(tau.shape, dtype=wide(x.dtype), device=x.device)] if return_tau else [g]
    check_gated(ours, lambda x, gate, r: shrink(x, gate, average, r, **rule)[outputs], x, gate, residual, gs)


def _one_step(step, x, residual, gate, average, g, tau_g) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of one step; x and residual are fresh leaves."""
    x, residual = (None if t is None else t.detach().requires_grad_() for t in (x, residual))
    y, tau = step(x, gate, average, residual)
    grads = torch.autograd.grad(
        [y, tau], [t for t in (x, residual, *gate.parameters()) if t is not None], [g.to(y.dtype), tau_g.to(tau.dtype)]
    )
    names = [
        "dx",
        *(["dresidual"] if residual is not None else []),
        *(f"d{name}" for name, _ in gate.named_parameters()),
    ]
    return {"y": y, "tau": tau, **dict(zip(names, grads, strict=True)), **dict(gate.named_buffers())}


def check_step(ours: Callable, x, residual, gate: nn.Module, average: str | None, g: torch.Tensor, units=16) -> None:
    """`ours(x, gate, average, residual)` -> (y, tau): outputs, gradients and the gate's buffers after one step.

    Against the oracle in float64, tolerances from the oracle in the dtype of sums.
    """
    with torch.no_grad():
        tau = shrink(x.double(), cast_gate(gate, torch.float64), average)[1]
    g, tau_g = without_ties(g, x, tau), torch.randn_like(tau)

    def oracle(dtype, gate=gate, g=g, tau_g=tau_g, x=x):
        t, r = x.to(dtype), None if residual is None else residual.to(dtype)
        return _one_step(shrink, t, r, cast_gate(copy.deepcopy(gate), dtype), average, g, tau_g)

    exact, plain = oracle(torch.float64), oracle(wide(x.dtype))
    constant = copy.deepcopy(gate).double()  # without the two means that BatchNorm's backward takes away
    if isinstance(gate, nn.Sequential) and isinstance(gate[1], nn.BatchNorm1d) and gate[1].training:
        constant[1].momentum = 1.0
        shrink(x.double(), constant, average)
        constant.eval()

    def before_cancellation(name: str) -> torch.Tensor:
        """How large the terms of its sums were.

        Backward as in check, and with the statistics as constants. Forward, where a hidden unit is what is left of
        terms much larger: by how much it moves per change of the averages and the gate's parameters.
        """
        signs = torch.Generator(x.device).manual_seed(0)
        sign = lambda shape: torch.randint(2, shape, generator=signs, device=x.device).double() * 2 - 1  # noqa: E731
        flips = [(g, tau_g), *((g * sign(g.shape), tau_g * sign(tau_g.shape)) for _ in range(8))]
        terms = max(oracle(torch.float64, constant, *pair)[name].abs().max() for pair in flips)
        moves = []
        step = 2.0**-30  # no unit and no |x| comes nearer than 1e-4 to its kink
        for _ in range(8):
            nearby = copy.deepcopy(gate).double()
            with torch.no_grad():
                for p in nearby.parameters():
                    p.mul_(1 + step * sign(p.shape))
            rows = 1 + step * sign((*x.shape[:2], *[1] * (x.dim() - 2)))
            moved = oracle(torch.float64, nearby, x=x.double() * rows)[name]
            moves.append((moved.double() - exact[name].double()).abs().max() / step)
        return terms + max(moves)

    actual = _one_step(ours, x, residual, copy.deepcopy(gate), average, g, tau_g)
    for name, value in actual.items():
        if value.is_floating_point():
            terms = functools.partial(before_cancellation, name)
            close(value.detach(), exact[name].double(), plain[name], name, terms, units)
        else:
            assert torch.equal(value, exact[name]), name

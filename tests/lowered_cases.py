"""The calls that lowered_plans.py compiles for every GPU, and the cost of each: launches, bytes, widths.

A new kernel joins by cases appended to CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

import steps
import torch

import drsn_kernels as dk
from drsn_kernels.backends.step import Cost

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Expected:
    """One launch: how many times its code loads and stores a whole tile of the feature map, by pointer argument.

    In straight-line code, and in a turn of a loop. Where x, times, residual, g, y or dx is not listed, it must move
    nothing.
    """

    kernel: str
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    loop_loads: dict[str, int] = field(default_factory=dict)
    loop_stores: dict[str, int] = field(default_factory=dict)

    def tiles(self, kind: str, loop: bool) -> dict[str, int]:
        return {("ld", False): self.loads, ("st", False): self.stores,
                ("ld", True): self.loop_loads, ("st", True): self.loop_stores}[kind, loop]  # fmt: skip


def expected(kernel: str, loads: dict | None = None, stores: dict | None = None, loop: bool = False) -> Expected:
    """The same counts, all of them in a loop or none."""
    counts = (loads or {}, stores or {})
    return Expected(kernel, {}, {}, *counts) if loop else Expected(kernel, *counts)


def tile_elements(launch) -> int:
    """Elements in a tile; 0 for a kernel that has none of the feature map."""
    a = launch.arguments
    if "PB" in a:  # one_pass.py: whole samples
        return a["S"] * a["PB"] * a["B"]
    return a["R"] * a["B"] if "R" in a else 0


def tile_steps(launch) -> int:
    """Tiles of all programs together, to which the feature map is padded."""
    a = launch.arguments
    if not tile_elements(launch):
        return 0
    columns = _cdiv(a["QA"] * a["ALIGN"], a["B"])
    if "BLOCKED" in a:  # norm.py, norm_grad.py: rows of one channel
        return columns * (_cdiv(a["N"] * a["P"], a["R"]) if a["CHANNELS_LAST"] else a["P"] * _cdiv(a["N"], a["R"]))
    if "PB" in a:
        return _cdiv(a["N"], a["S"]) * (_cdiv(a["P"], a["PB"]) if a["CHANNELS_LAST"] else columns)
    if a["CHANNELS_LAST"]:
        return a["N"] * columns * _cdiv(a["P"], a["R"])
    return _cdiv(a["N"] * a["P"], a["R"]) * columns


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Case:
    """`make()` prepares tensors and returns the forward call; what it returns that requires grad goes to backward.

    `cost()` gives the launches, forward and backward; `forward` and `backward` say what each does to the feature map.
    """

    name: str
    make: Callable[[], Callable[[], object]]
    shape: tuple[int, ...]
    dtype: torch.dtype
    cost: Callable[[], tuple[Cost, Cost]]
    forward: tuple[Expected, ...]
    backward: tuple[Expected, ...] = ()
    # bytes that each load and store of the feature map should move a thread; None: not asserted
    width: int | None = None
    padding: float = 2.2  # the tiles together are at most so many times the feature map

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def small_bytes(self) -> int:
        """At most, of a pass: 8 bits an element, a dozen tensors (N, C), and the parameters of a gate three times."""
        n, c = self.shape[:2]
        return torch.Size(self.shape).numel() + 4 * (12 * n * c + 3 * (2 * c * c + 8 * c))


# ---- the cases -------------------------------------------------------------------------------------------------------

SHAPES = ((8, 16, 1024), (8, 16, 1000), (8, 16, 196), (8, 64, 49), (4, 8, 9600), (4, 4, 512), (4, 64, 28, 28))
ONE_TILE = 8192  # elements; rows up to this are one tile


def cost_of(op: str, shape: tuple[int, ...], dtype: torch.dtype, **options) -> Callable[[], tuple[Cost, Cost]]:
    options |= {"channels_last": len(shape) == 4}
    return lambda: steps.cost(getattr(steps, op)(shape, dtype, **options), "triton")


def feature_map(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def width_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """16 bytes, or as many as the start of every row is aligned to."""
    inner = shape[1] if len(shape) == 4 else shape[2]
    return min(16, gcd(16, inner) * dtype.itemsize)


def _long(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a sum over a row takes a loop."""
    return len(shape) == 4 or shape[2] > ONE_TILE


def _name(op: str, shape: tuple[int, ...], dtype: torch.dtype, note: str = "") -> str:
    layout = " channels_last" if len(shape) == 4 else ""
    size = "x".join(map(str, shape))
    return f"{op} {size} {str(dtype).removeprefix('torch.')}{layout}{' ' + note if note else ''}"


def shrink_case(shape: tuple[int, ...], dtype: torch.dtype, residual: bool = False, evaluate: bool = False) -> Case:
    def make():
        x, gate = feature_map(shape, dtype), torch.nn.Sigmoid()
        added = feature_map(shape, dtype) if residual else None
        if evaluate:
            return torch.no_grad()(lambda: dk.shrink(x, gate, residual=added))
        x.requires_grad_()
        return lambda: dk.shrink(x, gate, residual=added)

    long = _long(shape, dtype)
    loads = {"x": 1, "residual": 1} if residual else {"x": 1}
    return Case(
        _name("shrink", shape, dtype, ("residual" if residual else "") + ("no_grad" if evaluate else "")),
        make, shape, dtype, cost_of("shrink", shape, dtype, fused=False, residual=residual, grad=not evaluate),
        forward=(expected("reduce_kernel", {"x": 1}, loop=long), expected("map_kernel", loads, {"y": 1})),
        backward=() if evaluate else (
            expected("grad_kernel", {"g": 1}, loop=long), expected("grad_kernel", {"g": 1}, {"dx": 1}),
        ),
        width=width_of(shape, dtype),
    )  # fmt: skip


def abs_mean_case(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make():
        x = feature_map(shape, dtype).requires_grad_()
        return lambda: dk.abs_mean(x)

    return Case(
        _name("abs_mean", shape, dtype), make, shape, dtype, cost_of("abs_mean", shape, dtype),
        forward=(expected("reduce_kernel", {"x": 1}, loop=_long(shape, dtype)),),
        backward=(expected("grad_kernel", {}, {"dx": 1}),),
        width=width_of(shape, dtype),
    )  # fmt: skip


def soft_threshold_case(shape: tuple[int, ...], dtype: torch.dtype, note: str = "", **options) -> Case:
    def make():
        x = feature_map(shape, dtype).requires_grad_()
        tau = torch.rand(shape[:2] + (1,) * (len(shape) - 2)).requires_grad_()
        return lambda: dk.soft_threshold(x, tau, **options)

    return Case(
        _name("soft_threshold", shape, dtype, note), make, shape, dtype, cost_of("soft_threshold", shape, dtype),
        forward=(expected("map_kernel", {"x": 1}, {"y": 1}),),
        backward=(expected("grad_kernel", {"g": 1}, {"dx": 1}, loop=_long(shape, dtype)),),
        width=width_of(shape, dtype),
    )  # fmt: skip


def squeeze_excite_case(shape: tuple[int, ...], dtype: torch.dtype, residual: bool = False) -> Case:
    def make():
        x, gate = feature_map(shape, dtype).requires_grad_(), torch.nn.Sigmoid()
        added = feature_map(shape, dtype) if residual else None
        return lambda: dk.squeeze_excite(x, gate, residual=added)

    long, loads = _long(shape, dtype), {"x": 1, "residual": 1} if residual else {"x": 1}
    return Case(
        _name("squeeze_excite", shape, dtype, "residual" if residual else ""), make, shape, dtype,
        cost_of("squeeze_excite", shape, dtype, residual=residual),
        forward=(expected("reduce_kernel", {"x": 1}, loop=long), expected("map_kernel", loads, {"y": 1})),
        backward=(  # these kernels call g x, x times, and dx y
            expected("reduce_kernel", {"x": 1, "times": 1}, loop=long), expected("map_kernel", {"x": 1}, {"y": 1}),
        ),
        width=width_of(shape, dtype),
    )  # fmt: skip


NORM_ON_CHIP = (expected("norm_kernel", {"x": 1}, {"y": 1}),), (
    expected("norm_grad_kernel", {"g": 1, "x": 1}, {"dx": 1}),
)


def norm_case(
    shape: tuple[int, ...], dtype: torch.dtype, launches: tuple[tuple[Expected, ...], ...], note: str = ""
) -> Case:
    """dk.BatchNormReLU, in training, or without a backward pass in eval."""
    training = len(launches) == 2

    def make():
        module, x = dk.BatchNormReLU(shape[1]).train(training), feature_map(shape, dtype)
        if not training:
            return torch.no_grad()(lambda: module(x))
        x.requires_grad_()
        return lambda: module(x)

    return Case(
        _name("norm", shape, dtype, note), make, shape, dtype,
        cost_of("batch_norm_relu", shape, dtype, training=training, grad=training), *launches,
        width=width_of(shape, dtype),
    )  # fmt: skip


def norm_of_pieces(loop: bool = False, merge: bool = False) -> tuple[tuple[Expected, ...], ...]:
    """A channel in several programs; loop: each takes several tiles; merge: by a launch of its own."""
    merged = (expected("merge_kernel"),) * merge
    (norm,), (norm_grad,) = NORM_ON_CHIP
    return (
        (expected("moments_kernel", {"x": 1}, loop=loop), *merged, norm),
        (expected("sums_kernel", {"g": 1, "x": 1}, loop=loop), *merged, norm_grad),
    )


def _any_gate(channels: int) -> torch.nn.Module:
    return torch.nn.Sigmoid()


ONE_PASS = expected("forward_kernel", {"x": 1}, {"y": 1})
ONE_PASS_BACK = (expected("backward_kernel", {"g": 1}, {"dx": 1}), expected("linear_grad_kernel"))


def gate_case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    note: str,
    forward: tuple[Expected, ...],
    backward: tuple[Expected, ...] = (),
    padding: float = 2.2,
    **options,
) -> Case:
    """dk.Shrinkage with `options`; without a backward pass in eval mode."""

    def make():
        step, x = dk.Shrinkage(shape[1], **options), feature_map(shape, dtype)
        if not backward:
            return torch.no_grad()(lambda: step.eval()(x))
        x.requires_grad_()
        return lambda: step(x)

    cost = cost_of(
        "shrink", shape, dtype, grad=bool(backward), training=bool(backward),
        norm=options.get("norm", True), average=options.get("average", "channel"),
    )  # fmt: skip
    return Case(
        _name("Shrinkage", shape, dtype, note), make, shape, dtype, cost, forward, backward, width_of(shape, dtype),
        padding,
    )  # fmt: skip


def several(shape: tuple[int, ...], dtype: torch.dtype, coupled: bool = True):
    """reduce, the gate, map; and grad, the gate, grad. Of more than 64 units launches of their own make relu(v) and du
    where statistics are the batch's (coupled), of more than 128 channels dz. Of fewer, one makes the whole gate where
    they are not."""
    long, wide, wider = _long(shape, dtype), coupled and shape[1] > 64, shape[1] > 128
    whole = not coupled and shape[1] <= 64
    gate = ("whole_gate_kernel",) if whole else ("hidden_kernel", *("normalise_kernel",) * wide, "alpha_kernel")
    forward = (
        expected("reduce_kernel", {"x": 1}, loop=long),
        *map(expected, gate),
        expected("map_kernel", {"x": 1}, {"y": 1}),
    )
    backward = (
        expected("grad_kernel", {"g": 1}, loop=long),
        *map(expected, ("logit_grad_kernel",) * wider),
        *map(expected, ("hidden_grad_kernel", *("normalise_grad_kernel",) * wide, "linear_grad_kernel")),
        expected("grad_kernel", {"g": 1}, {"dx": 1}),
    )
    return forward, backward


CASES: list[Case] = [shrink_case(shape, F32) for shape in SHAPES]
CASES += [shrink_case(shape, BF16) for shape in SHAPES if shape != (4, 4, 512)]
CASES += [shrink_case((8, 16, 1024), F16)]
CASES += [shrink_case((8, 16, 1024), dtype, residual=True) for dtype in (F32, BF16)]
CASES += [shrink_case((4, 64, 28, 28), F32, residual=True), shrink_case((8, 16, 1000), F32, evaluate=True)]
CASES += [op((8, 16, 1000), F32) for op in (abs_mean_case, soft_threshold_case)]
CASES += [op((4, 64, 28, 28), BF16) for op in (abs_mean_case, soft_threshold_case)]
CASES += [op((4, 8, 9600), F32) for op in (abs_mean_case, soft_threshold_case)]
CASES += [soft_threshold_case((8, 16, 1000), F32, "hard", threshold="hard")]
CASES += [soft_threshold_case(shape, F32, "leaky", slope=0.1) for shape in ((8, 16, 1000), (4, 64, 28, 28))]
CASES += [squeeze_excite_case((8, 16, 1024), dtype, residual=True) for dtype in (F32, BF16)]
CASES += [squeeze_excite_case(shape, F32) for shape in ((8, 64, 49), (4, 8, 9600))]
CASES += [squeeze_excite_case((4, 64, 28, 28), dtype) for dtype in (F32, BF16)]
CASES += [gate_case((8, 16, 1024), F32, "eval", (ONE_PASS,))]
CASES += [
    gate_case((8, 16, 1024), dtype, "no BatchNorm", (ONE_PASS,), ONE_PASS_BACK, norm=False) for dtype in (F32, BF16)
]
CASES += [
    gate_case((8, 16, 196), F32, "no BatchNorm, sample", (ONE_PASS,), ONE_PASS_BACK, norm=False, average="sample")
]
CASES += [gate_case((8, 16, 1024), F32, "BatchNorm", *several((8, 16, 1024), F32))]
CASES += [gate_case((4, 64, 28, 28), F32, "BatchNorm", *several((4, 64, 28, 28), F32))]

# The one-pass shapes of the benchmarks, forward and backward, on chip and, (128, 64, 512), walked twice.
CASES += [
    gate_case(shape, dtype, "no BatchNorm", (ONE_PASS,), (*ONE_PASS_BACK, expected("add_shares_kernel")), norm=False)
    for shape, dtype in (
        ((512, 64, 256), F32), ((512, 64, 256), BF16), ((1024, 32, 512), BF16), ((4096, 16, 128), F32),
        ((512, 64, 16, 16), F32),
    )
]  # fmt: skip
TWICE = Expected("forward_kernel", {"x": 1}, {}, {"x": 2}, {"y": 1})
TWICE_BACK = (Expected("backward_kernel", {"g": 1}, {}, {"g": 2}, {"dx": 1}), expected("linear_grad_kernel"))
CASES += [
    gate_case((128, 64, 512), dtype, "no BatchNorm, twice", (TWICE,), TWICE_BACK, norm=False) for dtype in (F32, BF16)
]
# More samples than multiprocessors, and nothing kept: walked in small tiles even though they would fit.
CASES += [gate_case((512, 64, 256), dtype, "eval, many samples", (TWICE,)) for dtype in (F32, BF16)]
CASES += [
    gate_case(
        (16, 64, 1024), F32, "no BatchNorm, few samples", *several((16, 64, 1024), F32, coupled=False), norm=False
    ),
    gate_case((8, 128, 1024), BF16, "BatchNorm", *several((8, 128, 1024), BF16)),
    gate_case((40, 512, 7, 7), F32, "BatchNorm", *several((40, 512, 7, 7), F32)),
    gate_case((40, 512, 7, 7), F32, "eval", *several((40, 512, 7, 7), F32, coupled=False)[:1]),
]

# Batch normalisation: a channel on chip, in pieces, walked, and merged; rows that are aligned, ragged, long.
CASES += [norm_case((8, 16, 1024), dtype, NORM_ON_CHIP) for dtype in (F32, BF16, F16)]
CASES += [norm_case((64, 64, 49), F32, NORM_ON_CHIP), norm_case((128, 16, 128), F32, (*NORM_ON_CHIP[:1],
          norm_of_pieces()[1]))]
CASES += [norm_case((256, 64, 512), dtype, norm_of_pieces(loop=True)) for dtype in (F32, BF16)]
CASES += [norm_case(shape, F32, norm_of_pieces()) for shape in ((128, 4, 512), (4, 8, 9600))]
CASES += [norm_case((4, 64, 28, 28), dtype, norm_of_pieces(merge=True)) for dtype in (F32, BF16)]
CASES += [norm_case((8, 16, 1000), F32, NORM_ON_CHIP[:1], "eval")]

# Bytes that a thread spills: none on 9.0, for which the tiles are chosen, and these where the registers are all taken.
SPILLS = {
    ("Shrinkage 512x64x256 float32 no BatchNorm", "cuda:80"): {"forward_kernel": 16, "backward_kernel": 32},
    ("Shrinkage 512x64x256 float32 no BatchNorm", "cuda:100"): {"backward_kernel": 32},
    ("Shrinkage 512x64x16x16 float32 channels_last no BatchNorm", "cuda:80"): {
        "forward_kernel": 24, "backward_kernel": 8,
    },
    ("norm 128x16x128 float32", "cuda:100"): {"norm_kernel": 16},
}

# Machine instructions an element on 9.0, at most: reduce, map with three planes, grad (dtau), grad (dx). A little above
# what Triton 3.7.1 makes, and half or less of what comparisons, selects and sums over 32 lanes took.
INSTRUCTIONS = {
    "shrink 8x16x1024 bfloat16": (5, 12, 8, 11.5),
    "shrink 8x16x1024 float16": (6, 12, 8, 11.5),
    "shrink 8x16x1024 float32": (7.5, 23, 15, 19.5),
    "shrink 4x64x28x28 bfloat16 channels_last": (None, 28, None, 22),
    "shrink 4x64x28x28 float32 channels_last": (None, 43, None, 37),
    "shrink 8x64x49 bfloat16": (31, 66, 53, 60),
    "shrink 8x64x49 float32": (31, 66, 53, 60),
    # Batch normalisation and ReLU: moments, norm, sums, norm_grad, or norm and norm_grad of a channel on chip. What a
    # program does once is most of it: norm merges up to 128 pieces, corrects the mean, settles the running statistics.
    "norm 256x64x512 float32": (None, 28, None, 26),
    "norm 256x64x512 bfloat16": (None, 26, None, 25),
    "norm 8x16x1024 bfloat16": (31, 30),
    "norm 64x64x49 float32": (51, 63),
}

# What make test compiles, the rest is make test-all's: every kernel, both layouts, rows that are aligned, that are not,
# and that take a loop. Each is two to four seconds of a core.
SAMPLE = {
    "shrink 8x16x1024 bfloat16",
    "shrink 8x16x1024 float32",
    "shrink 8x64x49 float32",
    "shrink 4x64x28x28 bfloat16 channels_last",
    "shrink 4x8x9600 float32",
    "soft_threshold 4x64x28x28 float32 channels_last leaky",
    "squeeze_excite 8x16x1024 float32 residual",
    "norm 8x16x1024 bfloat16",
    "norm 256x64x512 float32",
    "norm 4x64x28x28 bfloat16 channels_last",
    "Shrinkage 8x16x1024 float32 eval",
    "Shrinkage 8x16x1024 float32 no BatchNorm",
    "Shrinkage 8x16x1024 float32 BatchNorm",
    "Shrinkage 512x64x256 bfloat16 no BatchNorm",
    "Shrinkage 40x512x7x7 float32 channels_last BatchNorm",
}
assert {case.name for case in CASES} > SAMPLE

# Sizes that one compilation is for: a training step on the first of them compiles, on the others nothing does.
# A gate without BatchNorm has two plans, of one launch and of several, and the batch size has a say in which it is.
BATCHES = (1, 2, 3, 16, 33, 64)
SIZES: dict[str, tuple[Callable[[int], torch.nn.Module], list[tuple[int, ...]]]] = {
    "another batch size": (_any_gate, [(n, 16, 1024) for n in BATCHES]),
    "another number of channels": (_any_gate, [(8, c, 1000) for c in (16, 1, 2, 3, 33, 64)]),
    "another batch size of short rows": (_any_gate, [(n, 3, 49) for n in BATCHES]),
    "another batch size, channels_last": (_any_gate, [(n, 32, 14, 14) for n in BATCHES]),
    "another batch size, BatchNorm": (lambda c: dk.Shrinkage(c).fc, [(n, 16, 1024) for n in (200, *BATCHES[1:])]),
    "another batch size, one launch": (
        lambda c: dk.Shrinkage(c, norm=False).fc, [(n, 16, 1024) for n in (200, *BATCHES[:4])],
    ),
}

# Kernels that a training step compiles, on one size after the other: a first step, another width, another length. Each
# is a third of a second of somebody's first step, so more of them must be wanted.
FIRST_STEPS: dict[str, tuple[Callable[[int], torch.nn.Module], dict[tuple[int, ...], int]]] = {
    "any gate": (_any_gate, {(64, 16, 512): 4, (64, 32, 512): 0, (64, 32, 256): 4}),
    "BatchNorm": (lambda c: dk.Shrinkage(c).fc, {(64, 16, 512): 8, (64, 32, 512): 4, (64, 32, 256): 4}),
    "no BatchNorm": (lambda c: dk.Shrinkage(c, norm=False).fc, {(16, 16, 512): 3, (16, 32, 512): 3, (16, 32, 256): 2}),
}

"""What is timed: operators and whole training steps on the shapes of public models, and which of them a run selects."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "A": [(n, c, length) for n in (32, 64, 128) for c, length in ((64, 1024), (128, 512), (256, 256), (512, 128))],
    "B": [(128, 64, 256), (128, 128, 128), (128, 256, 64), (128, 512, 32), (128, 32, 512)],
    "C": [(128, 4, 512), (128, 8, 256), (128, 16, 128), (64, 16, 256), (64, 32, 128), (64, 64, 64), (64, 128, 32)],
    "D": [(16, 16, 9600), (16, 32, 9600), (16, 64, 4800), (16, 128, 2400), (16, 1024, 300)],
    "E": [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7),
          (128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4)],
    "F": [(16, 4, 2048, 1), (32, 32, 1, 3), (2, 25, 24), (128, 64, 1), (1, 64, 1024)],
    "G": [(512, 64, 256), (1024, 32, 512), (4096, 16, 128)],
}  # fmt: skip
"""A core 1-D, B reduced stem, C launch-bound, D long 1-D, E images, F degenerate, G what fits a one-pass kernel."""

SAMPLE = {"A": 5, "B": 1, "C": 2, "D": 2, "E": 1, "F": 0, "G": 0}  # the shape of each group that --quick takes
OPERATORS = ("abs_mean", "soft_threshold", "shrink_train", "shrink_eval", "shrink_any_gate", "norm_relu", "unit")
NETWORKS = ("paper_network", "network_1d", "network_image")
OPS = (*OPERATORS, *NETWORKS, "scaling")
MODES = ("forward", "backward", "both")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRIDS = ("quick", "standard", "full")
LARGE = 16 << 20  # bytes of x from which a call is bound by memory and a forward pass is compared with a clone

# DRSN's options, and its input; batches that a CPU of two cores can do
_WIDE = ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2))  # 16 convolutions, with stem and classifier 18 layers
NETWORK: dict[str, tuple[dict, list[tuple[int, ...]]]] = {
    "paper_network": ({}, [(128, 1, 2048)]),
    "network_1d": ({"stages": _WIDE, "stem": (64, 2)}, [(32, 1, 1024)]),
    "network_image": ({"stages": _WIDE, "stem": (64, 1), "dims": 2}, [(16, 3, 32, 32), (8, 3, 64, 64)]),
}
SCALING = ((64, 64, 64), (64, 64, 256), (16, 64, 4800))  # in the second-level caches, in the last one, in neither


@dataclass(frozen=True)
class Case:
    """One thing to time: an operator or network (OPS) on one input.

    mode: "forward" (recorded for a backward pass where the operator trains, under no_grad otherwise), "backward",
    "both", or "step" (networks: loss, gradients and SGD).
    """

    op: str
    group: str
    shape: tuple[int, ...]
    mode: str = "both"
    dtype: str = "fp32"
    channels_last: bool = False

    @property
    def id(self) -> str:
        layout = ["channels_last"] if self.channels_last else []
        return "-".join([self.op, self.group, "x".join(map(str, self.shape)), self.dtype, *layout, self.mode])

    __str__ = id.fget

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize


def _possible(case: Case) -> bool:
    if case.channels_last and len(case.shape) != 4:
        return False
    # batch normalisation in training takes more than one sample
    return case.shape[0] > 1 or case.op in ("abs_mean", "soft_threshold", "shrink_eval")


def _headlines(group: str, shapes: Iterable[tuple[int, ...]], dtypes=("fp32",)) -> list[Case]:
    """What the project's aims are about: a training step of Shrinkage, its forward pass in eval, and the norm."""
    return [
        Case(op, group, shape, mode, dtype, channels_last)
        for shape in shapes
        for channels_last in (False, True)
        for op, mode in (("shrink_train", "both"), ("shrink_eval", "forward"), ("norm_relu", "both"))
        for dtype in (dtypes if op != "norm_relu" else ("fp32",))
    ]


def _everything(group: str, shapes: Iterable[tuple[int, ...]]) -> list[Case]:
    return [
        Case(op, group, shape, mode, dtype, channels_last)
        for shape in shapes
        for channels_last in (False, True)
        for op in OPERATORS
        for mode in MODES
        for dtype in DTYPES
    ]


def check_letters(letters: str) -> str:
    if not letters or (unknown := sorted(set(letters) - set(SHAPES))):
        raise ValueError(f"shapes takes letters of {''.join(SHAPES)}, got {''.join(unknown) if letters else 'none'}")
    return letters


def select(letters: str, grid: str, device: str = "cpu", ops: Iterable[str] | None = None) -> list[Case]:
    """The cases of a run.

    Args:
        letters: groups of SHAPES.
        grid: "quick": a training step and a forward pass in eval on one shape of each group, and the paper's network.
            "standard": those on every shape (bf16 from 16 MiB on), every operator, mode, dtype and memory format on
            one shape of each group, all networks. "full": everything on every shape.
        device: "cpu" or "cuda". ops: only these of OPS.

    Raises:
        ValueError: unknown letters, grid or ops, or a selection that is empty.
    """
    check_letters(letters)
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {grid!r}")
    if ops is not None and (unknown := sorted(set(ops) - set(OPS))):
        raise ValueError(f"ops must be of {', '.join(OPS)}, got {', '.join(unknown)}")
    cases: list[Case] = []
    for group in letters:
        one = [SHAPES[group][SAMPLE[group]]]
        if grid == "quick":
            cases += [case for case in _headlines(group, one) if not case.channels_last]
            if math.prod(one[0]) * 4 >= LARGE:
                cases += [case for case in _headlines(group, one, ("bf16",)) if not case.channels_last]
        elif grid == "standard":
            for shape in SHAPES[group]:
                large = math.prod(shape) * 4 >= LARGE or device == "cuda"
                cases += _headlines(group, [shape], ("fp32", "bf16") if large else ("fp32",))
            cases += _everything(group, one)
        else:
            cases += _everything(group, SHAPES[group])
    networks = NETWORKS[:1] if grid == "quick" else NETWORKS
    cases += [Case(op, "N", shape, "step") for op in networks for shape in NETWORK[op][1]]
    if device == "cpu" and (os.cpu_count() or 1) >= 2:
        cases += [Case("scaling", "T", shape, "forward") for shape in SCALING]
    chosen = [case for case in dict.fromkeys(cases) if _possible(case) and (ops is None or case.op in ops)]
    if not chosen:
        raise ValueError(f"nothing to time: shapes {letters}, grid {grid}, ops {', '.join(ops or OPS)}")
    return chosen

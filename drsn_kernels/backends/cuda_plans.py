"""How a call runs on the `cuda` backend: what a cluster or the grid can keep on chip, and who shares what.

Nothing here has been measured on a GPU. The rules follow from counted bytes and from the sizes of the machine.
"""

import functools
import math
from typing import NamedTuple

import torch

from ..planes import Geometry, order

THREADS = 256  # of every block, kThreads in csrc/cuda/lanes.h
_ARRAYS = 5  # of max(C, H) numbers, kArrays in csrc/cuda/one_pass.cu
_RESERVED = 1024  # bytes of shared memory that the system takes for each block
_TILE = 16  # of the gate's matrix products, kTile in csrc/cuda/gate.h
_PART_BYTES = 8 << 10  # a sample is not cut into smaller parts only to give more blocks work
_PARTIAL_BYTES = 8 << 20  # of partial sums of the weights' gradients


class Device(NamedTuple):
    capability: int  # times ten
    multiprocessors: int
    block_bytes: int  # shared memory of one block
    shared_bytes: int  # and of a multiprocessor

    @property
    def two_blocks(self) -> int:
        """Shared memory of a block where two share a multiprocessor: one works while the other waits."""
        return min(self.block_bytes, self.shared_bytes // 2 - _RESERVED)


class StandardPlan(NamedTuple):
    """The step with the standard gate. From `kind` on the numbers are what csrc/cuda/bind.cpp takes as Plan."""

    name: str
    why: str
    not_taken: tuple[tuple[str, str], ...]
    kind: int  # 0: launches, 1: one pass, 2: training
    parts: int = 1  # of a sample: blocks of its cluster, or items of the grid
    rows: int = 0  # of a part: channels; channels_last: positions
    stride: int = 0  # bytes on chip for a part
    held: int = 0  # parts that a block keeps on chip
    blocks: int = 0  # of the training plan's grid
    row_parts: int = 1  # of the launches' sums
    gate_blocks: int = 1
    shares: int = 1  # of the batch, in the weights' gradients

    def __str__(self) -> str:
        """For explain."""
        if self.kind == 0:
            return f"{self.row_parts} parts of a row, {self.gate_blocks} blocks for the gate"
        cut = f"parts of {self.rows} rows, {self.stride - 16} bytes on chip"
        if self.kind == 1:
            return f"clusters of {self.parts} blocks, {cut}" if self.parts > 1 else f"a block a sample, {cut}"
        return f"{self.blocks} blocks, {self.parts} parts a sample, {cut}, {self.held} held"

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(self[3:])


def is_one_run(geo: Geometry, *strides: tuple[int, ...]) -> bool:
    """Whether tensors of these strides are dense, and their samples, and in these the rows, follow each other."""
    (n, c, *spatial), dense = geo
    length = math.prod(spatial)
    if not (n == 1 or dense[0] == c * length) or not (c == 1 or dense[1] in (1, length)):
        return False
    return all(size == 1 or a == b for own in strides for size, a, b in zip(*geo, own, strict=True))


def row_parts(geo: Geometry, device: Device) -> int:
    """Blocks that share a row's sum (channels_last: a sample's), so that few long rows keep the GPU busy."""
    n, c, *spatial = geo[0]
    walk, length = order(geo), math.prod(spatial)
    if walk.channels_last:
        blocks, steps = n * _cdiv(c, 128), _cdiv(length * min(c, 128), 16 * THREADS)
    else:
        blocks, steps = _cdiv(n * c * walk.row_bits, 16 * THREADS), _cdiv(length, 16 * THREADS)
        blocks = max(min(blocks, n * c), 1)
    return max(min(_cdiv(2 * device.multiprocessors, max(blocks, 1)), steps), 1)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(rows: int, columns: int) -> int:
    return _cdiv(rows, _TILE) * _cdiv(columns, _TILE)


def _gate(n: int, c: int, hidden: int, outputs: int, device: Device) -> tuple[int, int]:
    """Blocks of the gate's cooperative launches, and shares of the batch in the weights' gradients."""
    weights = _tiles(hidden, c) + _tiles(outputs, hidden)
    shares = min(_cdiv(2 * device.multiprocessors, weights), _cdiv(n, 4 * _TILE))
    shares = max(min(shares, _PARTIAL_BYTES // (4 * hidden * (c + outputs))), 1)
    busiest = max(_tiles(n, hidden), _tiles(n, c) + weights * shares, _cdiv(n, 8))
    return min(device.multiprocessors, busiest), shares


class Slice(NamedTuple):
    parts: int
    rows: int
    stride: int


def _slice(rows: int, row_bytes: int, parts: int) -> Slice:
    """A sample's rows in at most `parts` parts of one run of memory each, which may begin anywhere within 16 bytes."""
    each = _cdiv(rows, parts)
    return Slice(_cdiv(rows, each), each, _cdiv(each * row_bytes, 16) * 16 + 16)


def _one_pass(geo: Geometry, itemsize: int, hidden: int, outputs: int, device: Device) -> Slice | str:
    """A cluster that holds a sample on chip, or why there is none."""
    (n, c, *spatial), walk = geo[0], order(geo)
    length = math.prod(spatial)
    if hidden * (c + outputs) > c * length:
        return f"every sample would read {hidden * (c + outputs)} weights again, more than its {c * length} elements"
    rows = length if walk.channels_last else c
    wide = THREADS * 16 // itemsize
    beside = 4 * (_ARRAYS * max(c, hidden) + max(wide, 2 * 32 * 17))
    most = 8 if device.capability >= 90 else 1  # blocks of a portable cluster
    fitting = []
    for parts in (1, 2, 4, 8):
        cut = _slice(rows, walk.length * itemsize, parts)
        if parts <= min(most, rows):
            fitting.append((cut, cut.stride + beside))
    for room in (device.two_blocks, device.block_bytes):
        taken = [cut for cut, size in fitting if size <= room]
        if taken:
            break
    else:
        size = c * length * itemsize
        return f"a sample of {size} bytes does not fit on chip in {most} block{'s' if most > 1 else ''} of this GPU"
    # the smallest cluster that gives every multiprocessor work, but for the sake of that no parts of a few KiB
    large = [cut for cut in taken[1:] if cut.stride >= _PART_BYTES]
    return next((cut for cut in (taken[0], *large) if n * cut.parts >= device.multiprocessors), (taken[0], *large)[-1])


def _training(geo: Geometry, itemsize: int, device: Device) -> tuple[Slice, int, int] | str:
    """Parts of the samples, how many of them a block holds on chip, and blocks that have any; or why not."""
    (n, c, *spatial), walk = geo[0], order(geo)
    rows = math.prod(spatial) if walk.channels_last else c
    room = device.two_blocks - 4 * max(THREADS * 16 // itemsize, 2 * 32 * 17)
    most = 2 * device.multiprocessors

    def busiest(cut: Slice) -> tuple[float, int]:
        """Rows of the block that has most of them; a row that is read again costs half of one."""
        each = _cdiv(n * cut.parts, most)
        return cut.rows * (each + max(each - room // cut.stride, 0) / 2), cut.parts

    cuts = {_slice(rows, walk.length * itemsize, parts) for parts in range(1, min(rows, max(4 * most // n, 64)) + 1)}
    cut = min(cuts, key=busiest)
    items = n * cut.parts
    if items < device.multiprocessors and cut.stride > room:
        return f"{items} parts for {device.multiprocessors} multiprocessors, and none fits on chip: rows are too long"
    return cut, min(_cdiv(items, most), room // cut.stride), min(items, most)


@functools.lru_cache(maxsize=4096)
def standard(
    geo: Geometry, dtype: torch.dtype, hidden: int, outputs: int, coupled: bool, dense: bool, device: Device
) -> StandardPlan:
    """dense: is_one_run of x, y and the residual, or of g and dx."""
    n, c = geo[0][:2]
    gate_blocks, shares = _gate(n, c, hidden, outputs, device)
    rest = {"gate_blocks": gate_blocks, "shares": shares, "row_parts": row_parts(geo, device)}
    on_chip = None
    if dtype == torch.float64:
        on_chip = "float64 has no on-chip kernels"
    elif not dense:
        on_chip = "an operand is not dense, sample by sample: what is copied on chip is one run of memory"
    if coupled:
        apart = ("one pass", "BatchNorm in training couples the batch")
        taken = on_chip or _training(geo, dtype.itemsize, device)
        if isinstance(taken, str):
            why = "mean, gate, apply: batch statistics are known only when all of x has been read"
            return StandardPlan("launches", why, (apart, ("training", taken)), 0, **rest)
        cut, held, blocks = taken
        each = _cdiv(n * cut.parts, blocks)
        blocks = max(blocks, gate_blocks)
        kept = f"{held} of a block's {each} parts of {cut.stride - 16} bytes stay on chip across the grid's barriers"
        return StandardPlan("training", kept, (apart,), 2, *cut, held, blocks, **rest)
    cut = on_chip or _one_pass(geo, dtype.itemsize, hidden, outputs, device)
    if isinstance(cut, str):
        return StandardPlan("launches", "mean, gate, apply", (("one pass", cut),), 0, **rest)
    who = "a block" if cut.parts == 1 else f"a cluster of {cut.parts} blocks"
    return StandardPlan("one pass", f"{who} holds a sample on chip", (), 1, *cut, **rest)


def workspace(
    geo: Geometry, itemsize: int, hidden: int, outputs: int, want_tau: bool, plan: StandardPlan
) -> tuple[int, int]:
    """Bytes that a call needs besides its results, forward and backward. itemsize: of a sum.

    The pieces are those that ForwardWorkspace and BackwardWorkspace in csrc/cuda/bind.cpp take, each up to 16 bytes.
    """
    n, c = geo[0][:2]
    shared = plan.row_parts
    if plan.kind == 2:
        shared = plan.parts if order(geo).channels_last else 1
    partial = shared * n * c if shared > 1 else 0
    weights = plan.shares * hidden * (c + outputs) if plan.shares > 1 else 0
    ahead: tuple[int, ...] = () if plan.kind == 1 else (0 if want_tau else n * c, n, partial)
    back = (n * outputs, n * hidden, c, weights, *(() if plan.kind == 1 else (n * c, n * c, partial)))
    return tuple(sum(_cdiv(numbers * itemsize, 16) * 16 for numbers in pieces) for pieces in (ahead, back))

"""Bit planes: what the operators keep of x for the backward pass, three bits an element instead of x itself.

The gradient needs x only through five states: sign x kept (|x| > tau), and zero. They are stored as planes, one bit an
element each: `sign` (x's sign bit), `nonzero` (x != 0) and `kept` (not |x| <= tau, and x != 0).

Layout, the same in every backend. A plane is a stream of bits, little-endian in int32 words. x is walked in the order
of its dense strides (those of torch.empty_like(x)), cut into rows:

* "rows": a row is the L spatial elements of one (n, c), row number n * C + c;
* "channels_last" (the dense stride of C is 1): a row is the C channels of one (n, l), row number n * L + l.

The spatial dimensions are taken in the order of their dense strides, so a transposed image is walked as it lies in
memory. Bit i of row r is bit r * row_bits + i of the stream, where row_bits is the row's length rounded up to 8, 16 or
a multiple of 32, so that no two rows share a byte and long rows own whole words.
"""

from typing import NamedTuple

import torch

# Shape and dense strides of x: with them a plane is decoded and a gradient allocated, without x.
Geometry = tuple[tuple[int, ...], tuple[int, ...]]


class Order(NamedTuple):
    """How x is walked: `permutation` of x's dimensions, then `rows` rows of `length` elements at `row_bits` bits."""

    permutation: tuple[int, ...]
    rows: int
    length: int
    row_bits: int
    channels_last: bool


def geometry(x: torch.Tensor) -> Geometry:
    return x.shape, x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def row_bits(length: int) -> int:
    return 8 if length <= 8 else 16 if length <= 16 else (length + 31) // 32 * 32


def _rows(geo: Geometry) -> tuple[bool, int, int]:
    """Whether the walk is channels_last, its rows, and their length. Plain comparisons: sizes may be symbolic."""
    (n, c, *spatial), strides = geo
    numel = 1
    for size in spatial:
        numel = numel * size
    if strides[1] == 1 and c > 1:
        return True, n * numel, c
    return False, n * c, numel


def order(geo: Geometry) -> Order:
    """The walk over x for planes of this geometry (rank >= 2)."""
    shape, strides = geo
    channels_last, rows, length = _rows(geo)
    dims = sorted(range(2, len(shape)), key=lambda d: (shape[d] == 1, -strides[d]))
    return Order((0, *dims, 1) if channels_last else (0, 1, *dims), rows, length, row_bits(length), channels_last)


def words(geo: Geometry) -> int:
    """int32 words in one plane."""
    _, rows, length = _rows(geo)
    return (rows * row_bits(length) + 31) // 32


def memory_order(geo: Geometry) -> tuple[list[int], list[int]]:
    """The permutation of the dimensions that puts the outermost in memory first, and its inverse."""
    shape, strides = geo
    outer_first = sorted(range(len(shape)), key=lambda d: (shape[d] == 1, -strides[d]))
    return outer_first, sorted(range(len(shape)), key=outer_first.__getitem__)


def lay_out(t: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """t with the dense strides of the geometry; a copy only where it lies otherwise."""
    if t.stride() == geo[1]:
        return t
    outer_first, inverse = memory_order(geo)
    return t.permute(outer_first).contiguous().permute(inverse)


# Byte i of an int64 holds 0 or 1; this multiplier gathers those eight bits, in order, into the top byte.
_GATHER = 0x0102040810204080


def pack(mask: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """Bool mask of x's shape -> one plane, int32 (words,)."""
    walk = order(geo)
    rows = mask.permute(walk.permutation).reshape(walk.rows, walk.length)
    padded = rows.new_zeros((walk.rows, walk.row_bits))
    padded[:, : walk.length] = rows
    octets = ((padded.view(torch.int64) * _GATHER) >> 56).to(torch.uint8).reshape(-1)
    plane = octets.new_zeros(words(geo) * 4)
    plane[: octets.numel()] = octets
    return plane.view(torch.int32)


def unpack(plane: torch.Tensor, geo: Geometry) -> torch.Tensor:
    """One plane -> bool mask of x's shape (a permuted view of x's memory order)."""
    walk = order(geo)
    octets = plane.view(torch.uint8)[: walk.rows * walk.row_bits // 8].reshape(walk.rows, walk.row_bits // 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=plane.device)
    bits = ((octets.unsqueeze(-1) >> shifts) & 1).reshape(walk.rows, walk.row_bits)[:, : walk.length]
    walked = bits.bool().reshape([geo[0][d] for d in walk.permutation])
    inverse = sorted(range(len(geo[0])), key=walk.permutation.__getitem__)
    return walked.permute(inverse)

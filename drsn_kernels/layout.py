"""How x lies in memory, and the bit planes that the operators keep of it: three bits an element instead of x itself.

The gradient needs x only through five states: sign x kept (|x| > tau), and zero. They are stored as planes, one bit an
element each: `kept` (not |x| <= tau, and x != 0), `sign` (x's sign bit) and `nonzero` (x != 0).

The same in every backend: a plane is a stream of bits, little-endian in int32 words. x is walked in the order of its
dense strides (those of torch.empty_like(x)), cut into rows:

* a row is the L spatial elements of one (n, c), row number n * C + c;
* channels_last (the dense stride of C is 1): a row is the C channels of one (n, l), row number n * L + l.

The spatial dimensions are taken in the order of their dense strides, so a transposed image is walked as it lies in
memory. Bit i of row r is bit r * row_bits + i of the stream, where row_bits is the row's length rounded up to 8, 16 or
a multiple of 32, so that no two rows share a byte and long rows own whole words.
"""

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """x (N, C, *spatial) but for its elements: with it a plane is decoded and a gradient allocated, without x."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # dense: of torch.empty_like(x)
    n: int
    c: int
    l: int  # noqa: E741  the formulas' L, the product of the spatial sizes
    channels_last: bool
    row: int  # elements in a row
    row_bits: int
    words: int  # int32 words in a plane

    @property
    def numel(self) -> int:
        return self.n * self.c * self.l

    @property
    def rows(self) -> int:
        return self.n * (self.l if self.channels_last else self.c)

    @property
    def permutation(self) -> tuple[int, ...]:
        """Of x's dimensions, so that the rows follow one another and a row's elements come last."""
        dims = sorted(range(2, len(self.shape)), key=lambda d: (self.shape[d] == 1, -self.strides[d]))
        return (0, *dims, 1) if self.channels_last else (0, 1, *dims)

    @property
    def memory_order(self) -> tuple[list[int], list[int]]:
        """The permutation of the dimensions that puts the outermost in memory first, and its inverse."""
        outer_first = sorted(range(len(self.shape)), key=lambda d: (self.shape[d] == 1, -self.strides[d]))
        return outer_first, sorted(range(len(self.shape)), key=outer_first.__getitem__)


def row_bits(length: int) -> int:
    return 8 if length <= 8 else 16 if length <= 16 else (length + 31) // 32 * 32


def dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout:
    """The layout of these dense strides. Plain comparisons: sizes may be symbolic."""
    n, c, *spatial = shape
    length = 1
    for size in spatial:
        length = length * size
    channels_last = strides[1] == 1 and c > 1
    row = c if channels_last else length
    bits = row_bits(row)
    words = (n * (length if channels_last else c) * bits + 31) // 32
    return Layout(shape, strides, n, c, length, channels_last, row, bits, words)


_known: dict[tuple, Layout] = {}


def layout_of(x: torch.Tensor) -> Layout:
    """Of an x with any strides; kept by shape and strides, which is 2 us less a call."""
    key = x.shape, x.stride()
    found = _known.get(key)
    if found is None:
        strides = x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()
        if len(_known) >= 4096:
            _known.clear()
        found = _known[key] = dense(tuple(x.shape), strides)
    return found


def is_dense(layout: Layout, strides: tuple[int, ...]) -> bool:
    """Whether a tensor of these strides lies in memory as the layout says, without gaps."""
    return all(size == 1 or a == b for size, a, b in zip(layout.shape, layout.strides, strides, strict=True))


def lay_out(t: torch.Tensor, layout: Layout) -> torch.Tensor:
    """t with the layout's strides; a copy only where it lies otherwise."""
    if t.stride() == layout.strides:
        return t
    outer_first, inverse = layout.memory_order
    return t.permute(outer_first).contiguous().permute(inverse)


# ---- planes ----------------------------------------------------------------------------------------------------------


class Planes(NamedTuple):
    """Bit planes in one tensor, int32 (planes, words), and which of its rows is which; None where it is not there."""

    bits: torch.Tensor
    kept: int | None
    sign: int
    nonzero: int | None

    def plane(self, name: str) -> torch.Tensor:
        return self.bits[getattr(self, name)]


def thresholded(bits: torch.Tensor, nonzero: bool) -> Planes:
    """What a threshold writes: kept and sign, and nonzero where A wants a gradient too."""
    return Planes(bits, 0, 1, 2 if nonzero else None)


def averaged(bits: torch.Tensor) -> Planes:
    """What abs_mean alone writes."""
    return Planes(bits, None, 0, 1)


# Byte i of an int64 holds 0 or 1; this multiplier gathers those eight bits, in order, into the top byte.
_GATHER = 0x0102040810204080


def pack(mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Bool mask of x's shape -> one plane, int32 (words,)."""
    rows = mask.permute(layout.permutation).reshape(layout.rows, layout.row)
    padded = rows.new_zeros((layout.rows, layout.row_bits))
    padded[:, : layout.row] = rows
    octets = ((padded.view(torch.int64) * _GATHER) >> 56).to(torch.uint8).reshape(-1)
    plane = octets.new_zeros(layout.words * 4)
    plane[: octets.numel()] = octets
    return plane.view(torch.int32)


def unpack(plane: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One plane -> bool mask of x's shape (a permuted view of x's memory order)."""
    octets = plane.view(torch.uint8)[: layout.rows * layout.row_bits // 8].reshape(layout.rows, layout.row_bits // 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=plane.device)
    bits = ((octets.unsqueeze(-1) >> shifts) & 1).reshape(layout.rows, layout.row_bits)[:, : layout.row]
    walked = bits.bool().reshape([layout.shape[d] for d in layout.permutation])
    inverse = sorted(range(len(layout.shape)), key=layout.permutation.__getitem__)
    return walked.permute(inverse)

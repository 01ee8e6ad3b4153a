"""How a call's operands lie in memory, in the one form all kernels take: N samples of P rows of Q elements.

P and Q follow the rows of the bit planes (layout.py): P = C and Q = L, or, in channels_last order, P = L and Q = C.
Neighbouring dimensions that every operand holds back to back are merged, so dense tensors have one P and one Q
dimension however many spatial ones they have, and a sliced or transposed image keeps two or three.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ...layout import Layout

Strides = tuple[int, ...]


class Operand(NamedTuple):
    """Strides of n, of the P and of the Q dimensions; `unit`: one Q dimension of stride 1, the others over ALIGN."""

    strides: Strides
    unit: bool


class Walk(NamedTuple):
    channels_last: bool
    n: int
    p: int
    q: int
    p_sizes: tuple[int, ...]  # of the merged dimensions, the outermost left out
    q_sizes: tuple[int, ...]
    align: int  # elements, a power of two up to 16, that every row start of the unit operands is a multiple of
    operands: tuple[Operand, ...]
    unit_bits: int  # of a plane's unit: rows own whole units, 32-bit words but for rows of at most 16 elements
    units: int  # in a row
    plane_units: int  # in a plane: how far one plane is from the next
    wide: bool  # an offset, of an element or of a bit, does not fit 31 bits

    @property
    def rows(self) -> int:
        return self.n * self.p

    @property
    def length(self) -> int:
        """L, the formulas' number of spatial elements."""
        return self.p if self.channels_last else self.q


def _merge(dims: tuple[int, ...], sizes: Strides, strides: tuple[Strides, ...]) -> tuple[list[int], list[list[int]]]:
    """Sizes, and strides by operand, of the dimensions after merging; at least one dimension is left."""
    kept: list[int] = []
    by_operand: list[list[int]] = [[] for _ in strides]
    for d in dims:
        if sizes[d] == 1:
            continue
        if kept and all(own[-1] == sizes[d] * s[d] for own, s in zip(by_operand, strides, strict=True)):
            kept[-1] *= sizes[d]
            for own, s in zip(by_operand, strides, strict=True):
                own[-1] = s[d]
        else:
            kept.append(sizes[d])
            for own, s in zip(by_operand, strides, strict=True):
                own.append(s[d])
    if not kept:
        return [1], [[1] for _ in strides]
    return kept, by_operand


def walk(layout: Layout, *strides: Strides, force_wide: bool = False) -> Walk:
    """The walk over tensors of the layout's shape with these strides."""
    shape, permutation = layout.shape, layout.permutation
    inner, columns = (permutation[1:-1], (1,)) if layout.channels_last else ((1,), permutation[2:])
    p_sizes, p_strides = _merge(inner, shape, strides)
    q_sizes, q_strides = _merge(columns, shape, strides)
    n_strides = [s[0] if shape[0] > 1 else 0 for s in strides]
    p_strides = [s if p_sizes != [1] else [0] for s in p_strides]
    units = [s == [1] for s in q_strides]
    p, q = math.prod(p_sizes), math.prod(q_sizes)
    align = math.gcd(16, q)
    for n_stride, s, unit in zip(n_strides, p_strides, units, strict=True):
        if unit:
            align = math.gcd(align, n_stride, *s)
    operands = tuple(
        Operand(opaque((*(v // (align if unit else 1) for v in (n_stride, *ps)), *qs)), unit)
        for n_stride, ps, qs, unit in zip(n_strides, p_strides, q_strides, units, strict=True)
    )
    # largest offset of an element, and of a bit of a plane
    reach = max((sum((size - 1) * s for size, s in zip(shape, own, strict=True)) for own in strides), default=0)
    # room for a tile's masked columns
    wide = force_wide or max(reach, layout.rows * layout.row_bits) >= 2**31 - 2**16
    unit_bits = min(layout.row_bits, 32)
    return Walk(
        layout.channels_last, layout.n, p, q, opaque(p_sizes[1:]), opaque(q_sizes[1:]), align, operands,
        unit_bits, layout.row_bits // unit_bits, layout.words * 32 // unit_bits, wide,
    )  # fmt: skip


def opaque(values: Iterable[int]) -> tuple[int, ...]:
    """Integers as kernels take them in tuples: 2 v + 3, which is never 1 nor a multiple of 16 (tiles.plain undoes it).

    Triton specialises on the members of a tuple whatever `do_not_specialize` says, and would compile anew for another
    batch size or number of channels.
    """
    return tuple(2 * v + 3 for v in values)

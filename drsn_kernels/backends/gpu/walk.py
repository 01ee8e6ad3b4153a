"""How a call's operands lie in memory, in the one form all kernels take: N samples of P rows of Q elements.

P and Q follow the rows of the bit planes (layout.py): P = C and Q = L, or, in channels_last order, P = L and Q = C.
Neighbouring dimensions that every operand holds back to back are merged, so dense tensors have one dimension of rows,
N and P together, and one of columns however many spatial ones they have; a sliced or transposed image keeps more.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ...layout import Layout
from ..step import Strides


class Operand(NamedTuple):
    """Strides of the row and of the Q dimensions; `unit`: one Q dimension of stride 1, the others over ALIGN."""

    strides: Strides
    unit: bool


class Walk(NamedTuple):
    channels_last: bool
    n: int
    p: int
    q: int
    row_sizes: tuple[int, ...]  # of what N and P merge into, the outermost left out: () where rows are equidistant
    q_sizes: tuple[int, ...]  # the same of Q
    align: int  # elements, a power of two up to 16, that every row start of the unit operands is a multiple of
    operands: tuple[Operand, ...]
    row_bytes: int  # of a bit plane
    plane_bytes: int  # how far one plane is from the next
    wide: bool  # an offset, of an element or into a plane, does not fit 31 bits

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


def walk(layout: Layout, *strides: Strides, apart: bool = False, force_wide: bool = False) -> Walk:
    """The walk over tensors of the layout's shape with these strides. apart: rows are told apart by sample."""
    shape, permutation = layout.shape, layout.permutation
    inner, columns = (permutation[1:-1], (1,)) if layout.channels_last else ((1,), permutation[2:])
    p_sizes, p_strides = _merge(inner, shape, strides)
    q_sizes, q_strides = _merge(columns, shape, strides)
    n_strides = [s[0] if layout.n > 1 else 0 for s in strides]
    units = [s == [1] for s in q_strides]
    p, q = math.prod(p_sizes), math.prod(q_sizes)
    # Equidistant rows need no division. One sample's are: its stride of N says nothing, and dense batches of any size
    # take the same code.
    if p == 1:
        row_sizes, row_strides = [layout.n], [[s] for s in n_strides]
    elif (
        not apart
        and len(p_sizes) == 1
        and (layout.n == 1 or all(n == p * s for n, (s,) in zip(n_strides, p_strides, strict=True)))
    ):
        row_sizes, row_strides = [layout.n * p], p_strides
    else:
        row_sizes = [layout.n, *p_sizes]
        row_strides = [[n, *s] for n, s in zip(n_strides, p_strides, strict=True)]
    align = math.gcd(16, q)
    for s, unit in zip(row_strides, units, strict=True):
        if unit:
            align = math.gcd(align, *s)
    operands = tuple(
        Operand(opaque((*(v // (align if unit else 1) for v in rows), *qs)), unit)
        for rows, qs, unit in zip(row_strides, q_strides, units, strict=True)
    )
    # largest offset of an element, which is small in a tensor that is expanded; number of a column; offset into a plane
    reach = max((sum((size - 1) * s for size, s in zip(shape, own, strict=True)) for own in strides), default=0)
    # room for a tile's masked columns
    wide = force_wide or max(reach, p, q, layout.rows * layout.row_bits // 8) >= 2**31 - 2**16
    return Walk(
        layout.channels_last, layout.n, p, q, opaque(row_sizes[1:]), opaque(q_sizes[1:]), align, operands,
        layout.row_bits // 8, layout.words * 4, wide,
    )  # fmt: skip


def opaque(values: Iterable[int]) -> tuple[int, ...]:
    """Integers as kernels take them in tuples: 2 v + 3, which is never 1 nor a multiple of 16 (tiles.plain undoes it).

    Triton specialises on the members of a tuple whatever `do_not_specialize` says, and would compile anew for another
    batch size or number of channels.
    """
    return tuple(2 * v + 3 for v in values)

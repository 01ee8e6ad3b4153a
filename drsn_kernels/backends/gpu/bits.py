"""Thresholds and their gradients as arithmetic on the bits of x, and bit planes gathered from them and spread again.

A tile is (R, B) elements in (R, W) words. What a thread holds side by side, GROUP elements, says what a word is:

    8   float16 or bfloat16, rows aligned to 16 bytes: two elements in a word, four words a thread
    4   float32, rows aligned to 16 bytes: an element in a word, four words a thread
    1   any other: an element in a word, widened to the dtype of sums (float64: 64 bits)

A condition on x is the top bit of its element (31, in words of two also 15): no comparison, no predicate. |x| <= tau is
one of integers, because the bits of |x| rise with |x|, NaN last: for a tau above 0 the limit is the largest |x| of x's
dtype that is not above tau, else 0, and limit - |x| is negative where x is kept. x == 0 never is. Two elements take one
addition, 0x7fff - limit + |x|, which carries into no neighbour.

PTX: the instructions that the compiler does not find are written out. Else the same in Triton, for its interpreter and
for other GPUs. Without the first `prmt`, LLVM makes selects of masks and ptxas runs out of predicates.
"""

import triton
import triton.language as tl

# ---- words and elements ----------------------------------------------------------------------------------------------


@triton.jit
def elements(w, DTYPE: tl.constexpr, GROUP: tl.constexpr):
    """Words (R, W) -> elements (R, B) in the dtype of sums."""
    if GROUP == 8:
        R: tl.constexpr = w.shape[0]
        B: tl.constexpr = 2 * w.shape[1]
        if DTYPE == tl.bfloat16:
            low = (w << 16).to(tl.float32, bitcast=True)
            high = (w & -0x10000).to(tl.float32, bitcast=True)
        else:
            low = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.join(low, high).reshape(R, B)
    else:
        return of_bits(w)


@triton.jit
def words(v, DTYPE: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Elements (R, B) -> words (R, W), rounded to x's dtype where a word holds two."""
    if GROUP == 8:
        R: tl.constexpr = v.shape[0]
        W: tl.constexpr = v.shape[1] // 2
        low, high = tl.split(v.reshape(R, W, 2))
        if PTX and DTYPE == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )
        elif PTX:
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            low = low.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
            high = high.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
            return (low & 0xFFFF) | (high << 16)
    else:
        return to_bits(v)


@triton.jit
def to_bits(v):
    if v.dtype == tl.float64:
        return v.to(tl.int64, bitcast=True)
    else:
        return v.to(tl.int32, bitcast=True)


@triton.jit
def of_bits(w):
    if w.dtype == tl.int64:
        return w.to(tl.float64, bitcast=True)
    else:
        return w.to(tl.float32, bitcast=True)


@triton.jit
def with_sign(v, x):
    """v, its sign turned around where x's is set; both floats."""
    if x.dtype == tl.float64:
        return of_bits(to_bits(v) ^ (to_bits(x) & -0x8000000000000000))
    else:
        return of_bits(to_bits(v) ^ (to_bits(x) & -0x80000000))


@triton.jit
def paired(v):
    """16 bits for each element, (R, B), or for each row, (R, 1) -> words of two."""
    if v.shape[1] == 1:
        return v | (v << 16)
    else:
        R: tl.constexpr = v.shape[0]
        W: tl.constexpr = v.shape[1] // 2
        low, high = tl.split(v.reshape(R, W, 2))
        return low | (high << 16)


# ---- conditions: top bits --------------------------------------------------------------------------------------------


@triton.jit
def limits(tau, DTYPE: tl.constexpr, GROUP: tl.constexpr):
    """For `exceeds`: the largest |x| that is not above tau, (R, 1) or (R, B), and the largest finite one.

    They differ where tau is infinite: then x = inf is not kept, but y is inf - inf there.
    """
    bits = tl.where(tau > 0, to_bits(tau), 0)
    if GROUP == 8:
        if DTYPE == tl.bfloat16:
            bits = bits >> 16
            largest: tl.constexpr = 0x7F7F
        else:  # towards zero
            near = tau.to(tl.float16)
            below = near.to(tl.int16, bitcast=True).to(tl.int32) - (near.to(tl.float32) > tau).to(tl.int32)
            bits = tl.where(tau > 0, below, 0)
            largest: tl.constexpr = 0x7BFF
        return _room(bits), _room(tl.minimum(bits, largest))
    elif bits.dtype == tl.int64:
        return bits, tl.minimum(bits, 0x7FEFFFFFFFFFFFFF)
    else:
        return bits, tl.minimum(bits, 0x7F7FFFFF)


@triton.jit
def _room(bits):
    """0x7fff - bits, in words of two. Unsigned: Triton's interpreter objects to an overflow."""
    return (0x7FFF7FFF - paired(bits)).to(tl.uint32, bitcast=True)


@triton.jit
def magnitudes(w, GROUP: tl.constexpr):
    """|x|, in words."""
    if GROUP == 8:
        return w & 0x7FFF7FFF
    elif w.dtype == tl.int64:
        return w & 0x7FFFFFFFFFFFFFFF
    else:
        return w & 0x7FFFFFFF


@triton.jit
def exceeds(w, limit, GROUP: tl.constexpr):
    """Top bits: |x| is above the limit."""
    if GROUP == 8:
        return (magnitudes(w, GROUP).to(tl.uint32, bitcast=True) + limit).to(tl.int32, bitcast=True)
    elif w.dtype == tl.int64:
        return ((limit - magnitudes(w, GROUP)) >> 32).to(tl.int32)
    else:
        return limit - magnitudes(w, GROUP)


@triton.jit
def nonzero(w, GROUP: tl.constexpr):
    """Top bits: x is not 0; NaN is not."""
    if GROUP == 8:
        return exceeds(w, 0x7FFF7FFF, GROUP)
    else:
        return exceeds(w, 0, GROUP)


@triton.jit
def negative(w):
    """Top bits: x's sign bit."""
    if w.dtype == tl.int64:
        return (w >> 32).to(tl.int32)
    else:
        return w


@triton.jit
def mask(t, ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Top bits -> all bits of their elements, in words."""
    if GROUP == 8:
        if PTX:
            return tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, 0, 0xbb99;", "=r,r", [t], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            return ((t >> 31) << 16) | (((t << 16) >> 31) & 0xFFFF)
    elif ACC == tl.float64:
        return _mask_word(t, PTX).to(tl.int64)
    else:
        return _mask_word(t, PTX)


@triton.jit
def masks(t, ACC: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """Top bits -> all bits of every element (R, B), as wide as the dtype of sums."""
    if GROUP == 8:
        R: tl.constexpr = t.shape[0]
        B: tl.constexpr = 2 * t.shape[1]
        return tl.join(_mask_word(t << 16, PTX), _mask_word(t, PTX)).reshape(R, B)
    else:
        return mask(t, ACC, GROUP, PTX)


@triton.jit
def _mask_word(t, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, 0xbbbb;", "=r,r", [t], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return t >> 31


@triton.jit
def signs(t, ACC: tl.constexpr, GROUP: tl.constexpr):
    """Top bits -> the sign bits of their elements, in words; words -> their own."""
    if GROUP == 8:
        return t & -0x7FFF8000  # 0x80008000
    elif t.dtype == tl.int64:
        return t & -0x8000000000000000
    elif ACC == tl.float64:
        return (t & -0x80000000).to(tl.int64) << 32
    else:
        return t & -0x80000000


@triton.jit
def choose(m, a, b):
    """a where the mask is set, else b: one LOP3."""
    return (a & m) | (b & ~m)


# ---- thresholds ------------------------------------------------------------------------------------------------------


@triton.jit
def soft(w, tau, finite, DTYPE: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """sign(x) * relu(|x| - tau) in words. finite: the second of `limits`.

    NaN is kept, a negative tau expands, x == 0 stays 0 but for a tau of NaN or -inf, which make it NaN.
    """
    left = elements(magnitudes(w, GROUP), DTYPE, GROUP) - tau
    moved = words(left, DTYPE, GROUP, PTX) ^ signs(w, tau.dtype, GROUP)  # rounding is symmetric
    within = to_bits(_within(tau))
    if GROUP == 8:
        within = paired((within >> 16) & 0xFFFF)  # NaN in either dtype
    return choose(mask(exceeds(w, finite, GROUP), tau.dtype, GROUP, PTX), moved, within)


@triton.jit
def _within(tau):
    """What y is where |x| <= tau: 0, or NaN for a tau of NaN or -inf. By arithmetic, for LLVM nests the selects."""
    below = tl.where(tau > 0, 0.0, tau)
    return below - below


@triton.jit
def soft_elements(w, tau, finite, DTYPE: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr):
    """The same as elements, not rounded."""
    v = elements(w, DTYPE, GROUP)
    outside = masks(exceeds(w, finite, GROUP), tau.dtype, GROUP, PTX)
    return of_bits(choose(outside, to_bits(v - with_sign(tau, v)), to_bits(_within(tau))))


@triton.jit
def piecewise(
    w, tau, kept, INSIDE: tl.constexpr, OFFSET: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Elements: x - sign(x) * OFFSET * tau outside of |x| <= tau, NaN included; INSIDE * x elsewhere."""
    v = elements(w, DTYPE, GROUP)
    outside = to_bits(v - with_sign(OFFSET * tau, v))
    return of_bits(choose(masks(kept, v.dtype, GROUP, PTX), outside, to_bits(INSIDE * v)))


# ---- planes ----------------------------------------------------------------------------------------------------------


@triton.jit
def _four(t):
    """(R, W) -> the first, second, third and fourth of every four words, (R, W / 4) each."""
    R: tl.constexpr = t.shape[0]
    K: tl.constexpr = t.shape[1] // 4
    even, odd = tl.split(t.reshape(R, K, 2, 2))  # words 0, 2 and 1, 3
    t0, t2 = tl.split(even)
    t1, t3 = tl.split(odd)
    return t0, t1, t2, t3


@triton.jit
def octet(t, PTX: tl.constexpr):
    """Top bits of words of two, (R, W) -> bytes of a plane (R, W / 4), in int32.

    prmt in its sign mode makes bytes 0 and -1 of four elements, dp4a adds them up with the weights -1, -2, ... -128.
    """
    t0, t1, t2, t3 = _four(t)
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $1, $2, 0xfdb9;
            prmt.b32 b, $3, $4, 0xfdb9;
            dp4a.s32.s32 a, a, 0xf8fcfeff, 0;
            dp4a.s32.s32 $0, b, 0x80c0e0f0, a;
            }""",
            "=r,r,r,r,r", [t0, t1, t2, t3], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = (t0 & -0x7FFF8000).to(tl.uint32, bitcast=True) >> 6
        low |= (t1 & -0x7FFF8000).to(tl.uint32, bitcast=True) >> 4
        low |= (t2 & -0x7FFF8000).to(tl.uint32, bitcast=True) >> 2
        low |= (t3 & -0x7FFF8000).to(tl.uint32, bitcast=True)
        return (((low >> 9) & 0x55) | ((low >> 24) & 0xAA)).to(tl.int32, bitcast=True)


@triton.jit
def nibble(t, PTX: tl.constexpr):
    """Top bits (R, W) -> half bytes of a plane (R, W / 4), in int32: (n << 1) | (t >> 31) is one funnel shift."""
    t0, t1, t2, t3 = _four(t)
    if PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a;
            shr.u32 a, $4, 31;
            shf.l.wrap.b32 a, $3, a, 1;
            shf.l.wrap.b32 a, $2, a, 1;
            shf.l.wrap.b32 $0, $1, a, 1;
            }""",
            "=r,r,r,r,r", [t0, t1, t2, t3], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return _bit(t0, 0) | _bit(t1, 1) | _bit(t2, 2) | _bit(t3, 3)


@triton.jit
def _bit(t, AT: tl.constexpr):
    """Bit 31, at AT."""
    return ((t.to(tl.uint32, bitcast=True) >> 31) << AT).to(tl.int32, bitcast=True)


@triton.jit
def octets_of(a, b, c):
    """Top bits of two or three conditions, (R, B) -> bytes of their planes (R, B / 8), one above another in int32.

    All planes in one sum over 8 lanes: where neighbours are held by different threads, shuffles are what costs.
    """
    R: tl.constexpr = a.shape[0]
    K: tl.constexpr = a.shape[1] // 8
    code = _bit(a, 0) | _bit(b, 8)
    if c is not None:
        code |= _bit(c, 16)
    return tl.sum(code.reshape(R, K, 8) << tl.arange(0, 8)[None, None, :], 2)


@triton.jit
def spread(units, GROUP: tl.constexpr, PTX: tl.constexpr):
    """GROUP bits of a plane in each unit, lowest first and anything above them -> top bits in words."""
    R: tl.constexpr = units.shape[0]
    if GROUP == 1:
        return units << 31
    else:
        W: tl.constexpr = 4 * units.shape[1]
        j = tl.arange(0, 4)[None, None, :]
        if GROUP == 4:
            t = units[:, :, None] << (31 - j)
        elif PTX:  # bits 2 j and 2 j + 1 to 15 and 31
            t = units[:, :, None] * ((1 << (15 - 2 * j)) + (1 << (30 - 2 * j)))
        else:
            t = (units[:, :, None] << (15 - 2 * j)) | (units[:, :, None] << (30 - 2 * j))
        return t.reshape(R, W)

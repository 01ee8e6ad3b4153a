// The scalar rules of the shrinkage operator, in one place for every instruction set.
//
//   y    = sign(x) * relu(|x| - tau)        sign(0) = 0, relu keeps NaN, a negative tau expands
//   kept = not (|x| <= tau) and x != 0      derivative 0 where |x| == tau; NaN counts as kept
//   dx   = kept * g + s * dA / L            s = sign(x)
//   dtau = - sum s * kept * g
#pragma once

#include <cstdint>
#include <cstring>

#define DRSN_INLINE inline __attribute__((always_inline))

namespace drsn {

template <class S> DRSN_INLINE S magnitude(S x) {
  return x < S(0) ? -x : (x == S(0) ? S(0) : x);
}

template <class S> DRSN_INLINE bool is_nonzero(S x) { return !(x == S(0)); }

// The rules over any type V of lanes: a vector register, or one element.

// y without a residual, and in `kept` the elements that a gradient passes through.
template <class V, class Mask> DRSN_INLINE V soft_threshold(V x, V tau, Mask& kept) {
  const V magnitude = x.abs(), excess = magnitude - tau;
  const Mask nonzero = x.nonzero();
  kept = V::both(V::not_le(magnitude, tau), nonzero);
  // sign(x) is multiplied in: 0 * excess is NaN where tau is NaN or -inf, as in eager PyTorch
  return V::set(1).keep(nonzero).negate(x.negative()) * excess.keep(V::not_le(excess, V::set(0)));
}

// x - sign(x) * offset * tau in `kept`, inside * x elsewhere. NaN is kept, 0 is not.
template <class V, class Mask> DRSN_INLINE V piecewise(V x, V tau, V inside, V offset, Mask& kept) {
  kept = V::both(V::not_le(x.abs(), tau), x.nonzero());
  return (x - (tau * offset).negate(x.negative())).keep(kept) + (x * inside).keep(V::mask(~V::bits(kept)));
}

// s * share, the gradient that comes back through A; `share` is dA / L.
template <class V, class Mask> DRSN_INLINE V direct_grad(V share, Mask negative, Mask nonzero) {
  return share.keep(nonzero).negate(negative);
}

// Bits of a row in a plane: rows never share a byte, and rows of more than 16 elements own whole 32-bit words.
DRSN_INLINE int64_t plane_row_bits(int64_t length) { return length <= 8 ? 8 : length <= 16 ? 16 : (length + 31) / 32 * 32; }

// 16-bit floats as storage; arithmetic is always float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DRSN_INLINE float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
DRSN_INLINE uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

DRSN_INLINE float widen(float x) { return x; }
DRSN_INLINE double widen(double x) { return x; }
DRSN_INLINE float widen(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
DRSN_INLINE float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, NaN
  if (rest >= 0x0400u) return as_float(sign | ((rest << 13) + 0x38000000u));          // normal
  const float magnitude = float(rest) * 5.9604644775390625e-8f;                       // subnormal: rest * 2^-24
  return as_float(sign | as_bits(magnitude));
}

// Round to nearest even; NaN stays NaN.
DRSN_INLINE void narrow(float x, float& out) { out = x; }
DRSN_INLINE void narrow(double x, double& out) { out = x; }
DRSN_INLINE void narrow(float x, bf16& out) {
  const uint32_t u = as_bits(x);
  out.bits = x != x ? uint16_t((u >> 16) | 0x40u) : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
DRSN_INLINE void narrow(float x, f16& out) {
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) {
    out.bits = uint16_t(sign | 0x7e00u | ((mag >> 13) & 0x3ffu));
  } else if (mag >= 0x477ff000u) {  // rounds to 2^16 or more: inf
    out.bits = uint16_t(sign | 0x7c00u);
  } else if (mag >= 0x38800000u) {  // normal
    out.bits = uint16_t(sign | ((mag - 0x38000000u + 0x0fffu + ((mag >> 13) & 1u)) >> 13));
  } else {  // subnormal: adding 0.5 rounds at 2^-24, to nearest even, in the float's last bits
    out.bits = uint16_t(sign | (as_bits(as_float(mag) + 0.5f) - 0x3f000000u));
  }
}

}  // namespace drsn

// AVX-512 (F, BW, DQ, VL) vectors: sixteen floats or eight doubles; masks are mask registers, so a plane's bits are masks.
#pragma once

#include <immintrin.h>

#include "shrink_rules.h"

namespace drsn {
namespace {

constexpr int kUnroll = 16;  // whole blocks of 64 elements
constexpr int kPanel = 4, kDots = 4;  // vectors across a panel, and rows of b at a time, in product.h

template <class Scalar> struct Vec;

template <> struct Vec<float> {
  static constexpr int W = 16;
  using Mask = __mmask16;
  __m512 v;

  static Mask first(int n) { return Mask((1u << n) - 1); }
  static Vec set(float a) { return {_mm512_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_f16()); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store(f16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_f16()); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec clamp(Vec x, float low, float high) {  // NaN stays: min and max return their second operand then
    return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x.v))};
  }
  static Vec power2(Vec n) {  // 2^n for whole n from -126 to 127, and infinity for 128
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
  }
  Vec abs() const { return {_mm512_abs_ps(v)}; }
  Mask negative() const { return _mm512_movepi32_mask(_mm512_castps_si512(v)); }
  Mask nonzero() const { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
  static Mask not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
  Vec keep(Mask m) const { return {_mm512_maskz_mov_ps(m, v)}; }
  Vec negate(Mask m) const { return {_mm512_mask_xor_ps(v, m, v, _mm512_set1_ps(-0.0f))}; }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
  static Mask both(Mask a, Mask b) { return Mask(a & b); }
  static uint64_t bits(Mask m) { return m; }
  static Mask mask(uint64_t bits) { return Mask(bits); }
  float sum() const { return _mm512_reduce_add_ps(v); }

 private:
  static Vec from_bf16(__m256i u) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16))};
  }
  __m256i to_f16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  __m256i to_bf16() const {  // round to nearest even, NaN kept (the bf16 instructions would flush subnormals)
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};

template <> struct Vec<double> {
  static constexpr int W = 8;
  using Mask = __mmask8;
  __m512d v;

  static Mask first(int n) { return Mask((1u << n) - 1); }
  static Vec set(double a) { return {_mm512_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  Vec abs() const { return {_mm512_abs_pd(v)}; }
  Mask negative() const { return _mm512_movepi64_mask(_mm512_castpd_si512(v)); }
  Mask nonzero() const { return _mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ); }
  static Mask not_le(Vec a, Vec b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ); }
  Vec keep(Mask m) const { return {_mm512_maskz_mov_pd(m, v)}; }
  Vec negate(Mask m) const { return {_mm512_mask_xor_pd(v, m, v, _mm512_set1_pd(-0.0))}; }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
  static Mask both(Mask a, Mask b) { return Mask(a & b); }
  static uint64_t bits(Mask m) { return m; }
  static Mask mask(uint64_t bits) { return Mask(bits); }
  double sum() const { return _mm512_reduce_add_pd(v); }
};

}  // namespace
}  // namespace drsn

// AVX2 + FMA + F16C vectors: eight floats or four doubles; a mask is a vector of all-ones lanes.
#pragma once

#include <immintrin.h>

#include "shrink_rules.h"

namespace drsn {
namespace {

constexpr int kUnroll = 16;  // whole blocks of 64 elements
constexpr int kPanel = 2, kDots = 2;  // vectors across a panel, and rows of b at a time, in product.h: 12 of 16 registers

template <class Scalar> struct Vec;

template <> struct Vec<float> {
  static constexpr int W = 8;
  using Mask = __m256;
  __m256 v;

  static Vec set(float a) { return {_mm256_set1_ps(a)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  template <class T> static Vec load(const T* p, int n) {
    alignas(32) T full[W] = {};
    std::memcpy(full, p, n * sizeof(T));
    return load(full);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  template <class T> void store(T* p, int n) const {
    alignas(32) T full[W];
    store(full);
    std::memcpy(p, full, n * sizeof(T));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec clamp(Vec x, float low, float high) {  // NaN stays: min and max return their second operand then
    return {_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v))};
  }
  static Vec power2(Vec n) {  // 2^n for whole n from -126 to 127, and infinity for 128
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
  }
  Vec abs() const { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)}; }
  Mask negative() const { return v; }  // movemask and blendv look at the sign bit only
  Mask nonzero() const { return _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
  static Mask not_le(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ); }
  Vec keep(Mask m) const { return {_mm256_and_ps(v, m)}; }
  Vec negate(Mask m) const { return {_mm256_xor_ps(v, _mm256_and_ps(m, _mm256_set1_ps(-0.0f)))}; }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static uint64_t bits(Mask m) { return uint32_t(_mm256_movemask_ps(m)); }
  static Mask mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(int(bits & 0xff));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, lane), lane));
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

 private:
  __m128i to_bf16() const {  // round to nearest even, NaN kept
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    r = _mm256_srli_epi32(r, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
    return _mm256_castsi256_si128(packed);
  }
};

template <> struct Vec<double> {
  static constexpr int W = 4;
  using Mask = __m256d;
  __m256d v;

  static Vec set(double a) { return {_mm256_set1_pd(a)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const double* p, int n) {
    alignas(32) double full[W] = {};
    std::memcpy(full, p, n * sizeof(double));
    return load(full);
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int n) const {
    alignas(32) double full[W];
    store(full);
    std::memcpy(p, full, n * sizeof(double));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  Vec abs() const { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), v)}; }
  Mask negative() const { return v; }
  Mask nonzero() const { return _mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_UQ); }
  static Mask not_le(Vec a, Vec b) { return _mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ); }
  Vec keep(Mask m) const { return {_mm256_and_pd(v, m)}; }
  Vec negate(Mask m) const { return {_mm256_xor_pd(v, _mm256_and_pd(m, _mm256_set1_pd(-0.0)))}; }
  static Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
  static Mask both(Mask a, Mask b) { return _mm256_and_pd(a, b); }
  static uint64_t bits(Mask m) { return uint32_t(_mm256_movemask_pd(m)); }
  static Mask mask(uint64_t bits) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(int64_t(bits & 0xf));
    return _mm256_castsi256_pd(_mm256_cmpeq_epi64(_mm256_and_si256(all, lane), lane));
  }
  double sum() const {
    const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
};

}  // namespace
}  // namespace drsn

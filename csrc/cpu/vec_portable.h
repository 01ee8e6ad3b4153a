// Vectors in plain C++: eight floats or four doubles, loops that a compiler vectorises. Same interface as AVX2, AVX-512.
#pragma once

#include "shrink_rules.h"

namespace drsn {
namespace {

constexpr int kPanel = 1, kDots = 1;  // vectors across a panel, and rows of b at a time, in product.h
constexpr int kUnroll = 1;  // a loop of loops: unrolled, this file would take a minute to compile

template <class Scalar> struct Vec {
  static constexpr int W = 32 / sizeof(Scalar);
  using Mask = uint32_t;
  Scalar v[W];

  static Vec set(Scalar a) {
    Vec r;
    for (int i = 0; i < W; ++i) r.v[i] = a;
    return r;
  }
  template <class T> static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < W; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T> static Vec load(const T* p, int n) {
    Vec r = set(0);
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T> void store(T* p) const {
    for (int i = 0; i < W; ++i) narrow(v[i], p[i]);
  }
  template <class T> void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) narrow(v[i], p[i]);
  }

  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < W; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  friend Vec operator/(Vec a, Vec b) {
    for (int i = 0; i < W; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec clamp(Vec x, Scalar low, Scalar high) {  // NaN stays
    for (int i = 0; i < W; ++i) x.v[i] = x.v[i] < low ? low : x.v[i] > high ? high : x.v[i];
    return x;
  }
  static Vec power2(Vec n) {  // 2^n for whole n from -126 to 127, and infinity for 128; float only
    for (int i = 0; i < W; ++i) n.v[i] = as_float(uint32_t(n.v[i] == n.v[i] ? int32_t(n.v[i]) + 127 : 0) << 23);
    return n;
  }
  Vec abs() const {
    Vec r;
    for (int i = 0; i < W; ++i) r.v[i] = magnitude(v[i]);
    return r;
  }
  Mask negative() const {  // the sign bit
    Mask m = 0;
    for (int i = 0; i < W; ++i) m |= Mask(__builtin_signbit(v[i]) != 0) << i;
    return m;
  }
  Mask nonzero() const {
    Mask m = 0;
    for (int i = 0; i < W; ++i) m |= Mask(is_nonzero(v[i])) << i;
    return m;
  }
  static Mask not_le(Vec a, Vec b) {
    Mask m = 0;
    for (int i = 0; i < W; ++i) m |= Mask(!(a.v[i] <= b.v[i])) << i;
    return m;
  }
  Vec keep(Mask m) const {
    Vec r;
    for (int i = 0; i < W; ++i) r.v[i] = (m >> i) & 1 ? v[i] : Scalar(0);
    return r;
  }
  Vec negate(Mask m) const {
    Vec r;
    for (int i = 0; i < W; ++i) r.v[i] = (m >> i) & 1 ? -v[i] : v[i];
    return r;
  }
  static Vec select(Mask m, Vec a, Vec b) {
    for (int i = 0; i < W; ++i) a.v[i] = (m >> i) & 1 ? a.v[i] : b.v[i];
    return a;
  }
  static Mask both(Mask a, Mask b) { return a & b; }
  static uint64_t bits(Mask m) { return m; }
  static Mask mask(uint64_t bits) { return Mask(bits & ((uint64_t(1) << W) - 1)); }
  Scalar sum() const {
    Scalar s = 0;
    for (int i = 0; i < W; ++i) s += v[i];
    return s;
  }
};

}  // namespace
}  // namespace drsn

// Matrix products of a gate's size. Each number of a result is summed by one thread in an order that does not depend on
// how the work is shared out, so neither do the bits.
#pragma once

#include "rows.h"

namespace drsn {
namespace {

constexpr int kTileRows = 6;                // with 4 vectors (dots, panels of AVX-512): 24 accumulators of 32 registers
constexpr int64_t kProductsPerElement = 16;  // multiplications that cost what an element of a row function costs

inline int64_t work(int64_t rows, int64_t columns, int64_t depth) { return rows * columns * depth / kProductsPerElement + 1; }

// ---- out[i, j] = start[j] + sum_k a[i, k] * b[j, k]: a layer, b being its weight as torch keeps it -------------------

// R rows of a by C rows of b, along k: each sum is a vector until the end.
template <int R, int C, class S> DRSN_INLINE void dots(int64_t depth, const S* a, const S* b, const S* start, S* out, int64_t ldo) {
  using V = Vec<S>;
  V sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) sum[r][c] = V::set(0);
  const auto step = [&](int64_t k, int lanes) DRSN_LAMBDA {
    V row[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) row[c] = load<V>(b + c * depth + k, lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const V one = load<V>(a + r * depth + k, lanes);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sum[r][c] = V::fma(one, row[c], sum[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + V::W <= depth; k += V::W) step(k, V::W);
  if (k < depth) step(k, int(depth - k));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) out[r * ldo + c] = start[c] + sum[r][c].sum();
}

template <int R, class S> __attribute__((noinline)) void dots_of_rows(int64_t columns, int64_t depth, const S* a, const S* b, const S* start, S* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + kDots <= columns; j += kDots) dots<R, kDots>(depth, a, b + j * depth, start + j, out + j, ldo);
  for (; j < columns; ++j) dots<R, 1>(depth, a, b + j * depth, start + j, out + j, ldo);
}

template <class S> void layer(int64_t rows, int64_t columns, int64_t depth, const S* a, const S* b, const S* start, S* out) {
  constexpr int64_t wide = 64;
  const int64_t across = (columns + wide - 1) / wide, down = (rows + kTileRows - 1) / kTileRows;
  parallel(across * down, work(kTileRows, min64(columns, wide), depth), [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {  // all rows for some columns, which stay in the cache
      const int64_t j = t / down * wide, i = t % down * kTileRows, count = min64(wide, columns - j);
      const S *const x = a + i * depth, *const w = b + j * depth, *const first = start + j;
      S* const to = out + i * columns + j;
      if (rows - i >= kTileRows) {
        dots_of_rows<kTileRows>(count, depth, x, w, first, to, columns);
      } else {
        for (int64_t r = 0; r < rows - i; ++r) dots_of_rows<1>(count, depth, x + r * depth, w, first, to + r * columns, columns);
      }
    }
  });
}

// ---- out[i, j] = start[i, j] + sum_k a[i * ai + k * ak] * b[k, j]: gradients -----------------------------------------

template <class S> struct Product {
  int64_t depth;
  const S* a;
  int64_t ai, ak;
  const S* b;
  int64_t ldb;
  const S* start;  // as out lies, or absent
  S* out;
  int64_t ldo;
};

// R rows by V vectors of columns, `lanes` columns in the last one; b is a copy of its panel, kPanel vectors wide.
template <int R, int V, class S> DRSN_INLINE void tile(const Product<S>& p, int64_t i, int lanes) {
  using Vector = Vec<S>;
  constexpr int W = Vector::W;
  const int64_t ai = p.ai, ak = p.ak;
  const S *const a = p.a + i * ai, *b = p.b;
  Vector sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v)
      sum[r][v] = p.start ? load<Vector>(p.start + (i + r) * p.ldo + v * W, v == V - 1 ? lanes : W) : Vector::set(0);
  for (int64_t k = 0; k < p.depth; ++k, b += p.ldb) {
    Vector row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = load<Vector>(b + v * W, v == V - 1 ? lanes : W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector one = Vector::set(a[r * ai + k * ak]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = Vector::fma(one, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(sum[r][v], p.out + (i + r) * p.ldo + v * W, v == V - 1 ? lanes : W);
}

template <int V, class Part, class S> __attribute__((noinline)) void panel(const Product<S>& p, int64_t rows, int columns) {
  const int lanes = Part::full ? Vec<S>::W : columns;  // whole vectors are compiled apart, without lane counts
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) tile<kTileRows, V>(p, i, lanes);
  for (; i + 2 <= rows; i += 2) tile<2, V>(p, i, lanes);
  for (; i < rows; ++i) tile<1, V>(p, i, lanes);
}

template <class S> void product(const Product<S>& whole, int64_t rows, int64_t columns) {
  using V = Vec<S>;
  constexpr int64_t width = kPanel * V::W, deep = 128, long_run = 32 * kTileRows;
  const int64_t across = (columns + width - 1) / width, runs = (rows + long_run - 1) / long_run;
  parallel(across * runs, work(min64(rows, long_run), min64(columns, width), whole.depth), [&](int64_t begin, int64_t end) {
    // The panel of b, 32 KiB, is copied: it lies in the first-level cache for all rows, where the rows of b, a power of
    // two apart, would drive each other out.
    alignas(64) S copy[deep * width];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t j = t / runs * width, first = t % runs * long_run;
      const int64_t height = min64(long_run, rows - first), wide = min64(width, columns - j);
      Product<S> p = whole;
      p.b = copy, p.ldb = width;
      p.out += first * p.ldo + j;
      if (p.start) p.start += first * p.ldo + j;
      for (int64_t k = 0; k < whole.depth; k += deep) {
        p.depth = min64(deep, whole.depth - k);
        p.a = whole.a + first * p.ai + k * p.ak;
        for (int64_t q = 0; q < p.depth; ++q) std::memcpy(copy + q * width, whole.b + (k + q) * whole.ldb + j, size_t(wide) * sizeof(S));
        if (wide == width) {
          panel<kPanel, Full>(p, height, V::W);
        } else {
          Product<S> narrow = p;
          for (int64_t w = 0; w < wide; w += V::W) {
            wide - w >= V::W ? panel<1, Full>(narrow, height, V::W) : panel<1, Tail>(narrow, height, int(wide - w));
            narrow.b += V::W, narrow.out += V::W;
            if (narrow.start) narrow.start += V::W;
          }
        }
        p.start = p.out;
      }
    }
  });
}

}  // namespace
}  // namespace drsn

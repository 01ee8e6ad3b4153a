// A part of a sample on chip, and the gate of one sample: what one_pass.cu and training.cu are made of.
#pragma once

#include "api.h"
#include "gate.h"
#include "operations.h"

namespace drsn {
namespace {

// Part `part` of sample n: channels [first, last); channels_last: positions. One run of memory either way.
struct Slice {
  int64_t n, first, last, origin, count;  // origin: offset of the run in the tensor, count: its elements

  __device__ Slice(const Walk& w, const Slices& s, int64_t n, int64_t part) : n(n) {
    const int64_t rows = w.channels_last ? w.l : w.c, length = w.channels_last ? w.c : w.l;
    first = part * s.rows < rows ? part * s.rows : rows;
    last = first + s.rows < rows ? first + s.rows : rows;
    origin = (n * rows + first) * length;
    count = (last - first) * length;
  }
};

// Runs an operation over a slice.
template <int V, class Op> __device__ __forceinline__ void walk_slice(const Op& op, const Walk& w, const Slice& s, typename Op::S* scratch) {
  if (!w.channels_last)
    return walk_rows<V>(op, w, s.n * w.c + s.first, s.n * w.c + s.last, lanes_for<V>(w.l, kThreads), 0, w.l, scratch);
  const int lanes = lanes_along_channels<V>(w.c);
  for (int64_t c = 0; c < w.c; c += lanes * V) walk_columns<V>(op, w, s.n, s.first, s.last, c, lanes, scratch);
}

template <int V> constexpr int kWalkScratch = kThreads * V;  // numbers
template <int V> constexpr int kScratch = kWalkScratch<V> > kGateScratch ? kWalkScratch<V> : kGateScratch;

template <class T, int V>
__device__ Reduce<T, V> reduce_of(const StepArgs& a, const T* x, int64_t origin, float* out, int64_t out_n) {
  return {x, nullptr, origin, out, out_n, 1.0f / float(a.walk.l), nullptr, nullptr, false, nullptr, nullptr};
}
template <class T, int V, int PLANES>
__device__ Apply<T, V, false, PLANES> apply_of(const StepArgs& a, const T* x, int64_t origin, const float* tau, int64_t tau_n, int64_t tau_c) {
  return {x, nullptr, origin, static_cast<T*>(a.y), nullptr, static_cast<const T*>(a.residual), nullptr, tau, tau_n, tau_c,
          a.kept, a.sign, a.nonzero, a.walk.channels_last, Map::soft, 0, 1, nullptr, 0, 0};
}
template <class T, int V> __device__ Grad<T, V> dtau_of(const StepGradArgs& a, const T* g, int64_t origin, float* dtau, int64_t dtau_n) {
  return {g, nullptr, origin, nullptr, 0, 0.0f, nullptr, nullptr, dtau, dtau_n, a.kept, a.sign, a.nonzero, a.walk.channels_last, 0, 1};
}
template <class T, int V> __device__ Grad<T, V> dx_of(const StepGradArgs& a, const T* g, int64_t origin, const float* da, int64_t da_n) {
  return {g, nullptr, origin, da, da_n, 1.0f / float(a.walk.l), static_cast<T*>(a.dx), nullptr, nullptr, 0,
          a.kept, a.sign, a.nonzero, a.walk.channels_last, 0, 1};
}

// ---- products of a vector and a matrix, by one block ------------------------------------------------------------------

// done(j, sum over k of vector[k] * matrix[j][k]) for j in [begin, end): a warp for each j.
template <class Done> __device__ void times_rows(int64_t begin, int64_t end, int64_t k, const float* vector, const float* matrix, const Done& done) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t j = begin + warp; j < end; j += kWarps) {
    float sum = 0;
    for (int64_t i = lane; i < k; i += kWarp) sum += vector[i] * __ldg(matrix + j * k + i);
    sum = warp_sum(sum);
    if (lane == 0) done(j, sum);
  }
}

// done(j, sum over k of vector[k] * matrix[k][j]) for j in [begin, end): a lane for each j, the warps share k.
template <class Done>
__device__ void times_columns(int64_t begin, int64_t end, int64_t k, int64_t columns, const float* vector, const float* matrix,
                              float* scratch, const Done& done) {
  for (int64_t j = begin + threadIdx.x % kWarp; j - threadIdx.x % kWarp < end; j += kWarp) {
    const float sum = column_sum<float>(k, j < end, [&](int64_t i) { return vector[i] * __ldg(matrix + i * columns + j); }, scratch);
    if (j < end && threadIdx.x < kWarp) done(j, sum);
  }
}

}  // namespace
}  // namespace drsn

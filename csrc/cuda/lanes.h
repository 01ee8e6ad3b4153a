// What one thread and one warp do: a value in the interface of the CPU's vectors, accesses of up to 16 bytes, plane
// words gathered from a warp, sums over a team of threads.
#pragma once

#include <type_traits>

#include "../common/args.h"
#include "../common/shrink_rules.h"
#include "platform.h"

namespace drsn {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block

template <class T> using Number = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class S> struct Lane {
  using Mask = bool;
  S v;
  static DRSN_HD Lane set(S a) { return {a}; }
  friend DRSN_HD Lane operator+(Lane a, Lane b) { return {a.v + b.v}; }
  friend DRSN_HD Lane operator-(Lane a, Lane b) { return {a.v - b.v}; }
  friend DRSN_HD Lane operator*(Lane a, Lane b) { return {a.v * b.v}; }
  DRSN_HD Lane abs() const { return {magnitude(v)}; }
  DRSN_HD bool nonzero() const { return is_nonzero(v); }
  DRSN_HD bool negative() const {  // the sign bit
    if constexpr (sizeof(S) == 8) {
      uint64_t u;
      std::memcpy(&u, &v, 8);
      return u >> 63;
    } else {
      return as_bits(v) >> 31;
    }
  }
  static DRSN_HD bool not_le(Lane a, Lane b) { return !(a.v <= b.v); }
  static DRSN_HD bool both(bool a, bool b) { return a && b; }
  static DRSN_HD uint64_t bits(bool m) { return m; }
  static DRSN_HD bool mask(uint64_t bits) { return bits & 1; }
  DRSN_HD Lane keep(bool m) const { return {m ? v : S(0)}; }
  DRSN_HD Lane negate(bool m) const { return {m ? -v : v}; }
};

// ---- memory ----------------------------------------------------------------------------------------------------------

// V neighbouring elements, moved by one access.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <int V, class T> __device__ __forceinline__ Pack<T, V> load(const T* p) {
  emulation::check_aligned(p, sizeof(T) * V);
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

// `last`: nobody reads it soon, so it should not push x out of L2.
template <int V, class T> __device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  emulation::check_aligned(p, sizeof(T) * V);
  if constexpr (sizeof(pack) == 16) {
    uint4 raw;
    std::memcpy(&raw, &pack, 16);
    __stcs(reinterpret_cast<uint4*>(p), raw);
  } else {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  }
}

// Copies `count` contiguous elements on chip, 16 bytes a copy, without passing through registers. The destination has
// the source's alignment within 16 bytes: it starts that far behind `to`, and is returned. Visible after
// __pipeline_wait_prior(0) and a barrier.
template <class T> __device__ T* copy_on_chip(char* to, const T* from, int64_t count) {
  const int shift = int(reinterpret_cast<uintptr_t>(from) & 15);
  T* const out = reinterpret_cast<T*>(to + shift);
  const int64_t head = shift ? (count < (16 - shift) / int(sizeof(T)) ? count : (16 - shift) / int(sizeof(T))) : 0;
  constexpr int kEach = 16 / sizeof(T);
  const int64_t packs = (count - head) / kEach, tail = head + packs * kEach;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads)
    __pipeline_memcpy_async(out + head + i * kEach, from + head + i * kEach, 16);
  __pipeline_commit();
  for (int64_t i = threadIdx.x; i < head; i += kThreads) out[i] = from[i];
  for (int64_t i = tail + threadIdx.x; i < count; i += kThreads) out[i] = from[i];
  return out;
}

// ---- plane words -----------------------------------------------------------------------------------------------------

template <int V> constexpr int kGroup = 32 / V;  // lanes whose elements fill a plane word

// Every lane brings the bits of V neighbouring elements; each group of lanes gets its word. By ballot where V is 1.
template <int V> __device__ __forceinline__ uint32_t gather_bits(uint32_t bits) {
  if constexpr (V == 1) return __ballot_sync(kAll, bits);
  uint32_t word = bits << (threadIdx.x % kGroup<V>)*V;
#pragma unroll
  for (int o = 1; o < kGroup<V>; o *= 2) word |= __shfl_xor_sync(kAll, word, o);
  return word;
}

// The bits of V elements from bit position p on.
template <int V> __device__ __forceinline__ uint32_t read_bits(const uint8_t* plane, int64_t p) {
  const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(plane) + (p >> 5));
  return word >> (p & 31) & ((1u << V) - 1);
}

// ---- sums ------------------------------------------------------------------------------------------------------------

// Over `lanes` neighbouring threads, a power of two; every one of them gets it. Up to a warp.
template <class S> __device__ __forceinline__ S warp_sum(S value, int lanes = kWarp) {
  for (int o = lanes / 2; o; o /= 2) value += __shfl_xor_sync(kAll, value, o);
  return value;
}

// Over the block, in a fixed order; every thread gets it. `scratch`: a number for each warp, not in use before a barrier.
template <class S> __device__ S block_sum(S value, S* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  S total = 0;
  for (unsigned w = 0; w < kThreads / kWarp; ++w) total += scratch[w];
  return total;
}

}  // namespace
}  // namespace drsn

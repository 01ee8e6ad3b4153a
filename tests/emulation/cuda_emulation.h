// Runs CUDA C++ kernels on a CPU, one fiber for each CUDA thread, so that tests can run where there is no GPU. The same
// source is compiled as C++: g++ -std=c++17 -U_FORTIFY_SOURCE -Itests/emulation -x c++ kernels.cu
//
// There are blocks, warps, clusters with distributed shared memory, cooperative grids, shuffles, votes, asynchronous
// copies and atomics. Shared memory begins as NaN. What CUDA leaves undefined throws: a barrier that not every thread
// comes to, a lane outside of its mask, a misaligned copy, a launch that the device does not hold (scheduler.h,
// launch.h). A missing barrier gives wrong results under some emulation::schedule: run each test under several.
//
// Not seen: ordering of memory between blocks (a missing __threadfence), what a warp does in step without a *_sync,
// registers, speed. A loop that waits for another thread's store never ends.
//
// Under AddressSanitizer and UndefinedBehaviorSanitizer no option is needed but ASAN_OPTIONS=detect_leaks=0 (a launch
// that throws leaves its stacks as they are); a stack has 512 KiB then.
#pragma once

#include "launch.h"

#include <cmath>

// ---- the language: what nvcc knows and a C++ compiler does not. __shared__ is missing on purpose: shared memory comes
// from emulation::dynamic_shared and emulation::static_shared.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

#define threadIdx (emulation::running->index)
#define blockIdx (emulation::running->block->index)
#define blockDim (emulation::launched->block)
#define gridDim (emulation::launched->grid)
constexpr int warpSize = 32;

// ---- barriers of a block -------------------------------------------------------------------------------------------

inline void __syncthreads(emulation::Site site = emulation::Site::here()) {
  emulation::block_barrier(0, "__syncthreads", site);
}
inline int __syncthreads_count(int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::block_barrier(vote != 0, "__syncthreads_count", site);
}
inline int __syncthreads_or(int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::block_barrier(vote != 0, "__syncthreads_or", site) > 0;
}
inline int __syncthreads_and(int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::block_barrier(vote == 0, "__syncthreads_and", site) == 0;
}

// ---- warps: a mask may name lanes that have ended or never were; no other lane may be missing ----------------------

inline void __syncwarp(unsigned mask = ~0u, emulation::Site site = emulation::Site::here()) {
  emulation::exchange(mask, 0, "__syncwarp", site);
}

// A hint, by CUDA's words: lanes that run in step at the moment. Any set with the calling lane is right.
inline unsigned __activemask() {
  const emulation::Thread& self = *emulation::running;
  return emulation::current_schedule() % 2 ? 1u << self.lane : self.warp->live;
}

namespace emulation {
// The value that lane `from` gave; poison where it gave none.
template <class T> T shuffle(unsigned mask, T value, int from, const char* what, Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const Exchange& met = exchange(mask, bits, what, site);
  if (met.lanes >> from & 1) std::memcpy(&value, &met.seen[from], sizeof value);
  else std::memset(&value, kPoison, sizeof value);
  return value;
}

inline unsigned ballot(unsigned mask, bool vote, const char* what, Site site) {
  const Exchange& met = exchange(mask, vote, what, site);
  unsigned lanes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (met.lanes >> lane & 1) lanes |= unsigned(met.seen[lane]) << lane;
  return lanes;
}

// First lane of the segment of `width` lanes that the running one is in.
inline int segment(int width) { return running->lane & ~(width - 1); }
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, emulation::Site site = emulation::Site::here()) {
  return emulation::shuffle(mask, value, emulation::segment(width) | (from & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulation::Site site = emulation::Site::here()) {
  const int lane = emulation::running->lane, from = lane ^ bits;
  const bool later = from >= emulation::segment(width) + width;  // an earlier segment can be read, a later one not
  return emulation::shuffle(mask, value, later ? lane : from, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   emulation::Site site = emulation::Site::here()) {
  const int lane = emulation::running->lane, from = lane + int(by);
  const bool there = from < emulation::segment(width) + width;
  return emulation::shuffle(mask, value, there ? from : lane, "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, emulation::Site site = emulation::Site::here()) {
  const int lane = emulation::running->lane, from = lane - int(by);
  return emulation::shuffle(mask, value, from < emulation::segment(width) ? lane : from, "__shfl_up_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::ballot(mask, vote != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::ballot(mask, vote != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulation::Site site = emulation::Site::here()) {
  return emulation::ballot(mask, vote == 0, "__all_sync", site) == 0;
}

// ---- memory: on one CPU thread every access is atomic and in order -------------------------------------------------

template <class T, class U> T atomicAdd(T* p, U value) {
  const T old = *p;
  *p = T(old + T(value));
  return old;
}
template <class T, class U> T atomicMax(T* p, U value) {
  const T old = *p;
  *p = std::max(old, T(value));
  return old;
}
template <class T, class U> T atomicMin(T* p, U value) {
  const T old = *p;
  *p = std::min(old, T(value));
  return old;
}
template <class T, class U> T atomicOr(T* p, U value) {
  const T old = *p;
  *p = T(old | T(value));
  return old;
}
template <class T, class U> T atomicAnd(T* p, U value) {
  const T old = *p;
  *p = T(old & T(value));
  return old;
}
template <class T> T atomicExch(T* p, T value) {
  const T old = *p;
  *p = value;
  return old;
}
template <class T> T atomicCAS(T* p, T expected, T value) {
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __ldg(const T* p) {
  emulation::check_aligned(p, sizeof(T));
  return *p;
}
template <class T> T __ldcs(const T* p) { return __ldg(p); }
template <class T> T __ldcg(const T* p) { return __ldg(p); }
template <class T> void __stcs(T* p, T value) {
  emulation::check_aligned(p, sizeof(T));
  *p = value;
}
template <class T> void __stcg(T* p, T value) { __stcs(p, value); }

inline void __pipeline_memcpy_async(void* to_shared, const void* from, size_t bytes, size_t zeros = 0) {
  emulation::copy_async(to_shared, from, bytes, zeros);
}
inline void __pipeline_commit() { emulation::commit_copies(); }
inline void __pipeline_wait_prior(size_t newest, emulation::Site site = emulation::Site::here()) {
  emulation::wait_for_copies(newest, site);
}

// ---- arithmetic. __expf and its like are less exact on a GPU. ------------------------------------------------------

using std::max;
using std::min;

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) noexcept { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }

// ---- cooperative groups: grids and clusters ------------------------------------------------------------------------

namespace cooperative_groups {

struct grid_group {
  static void sync(emulation::Site site = emulation::Site::here()) { emulation::grid_barrier(site); }
  static unsigned long long num_blocks() { return gridDim.count(); }
  static unsigned long long block_rank() {
    return (size_t(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  }
};

struct cluster_group {
  struct arrival_token {};
  static void sync(emulation::Site site = emulation::Site::here()) {
    if (emulation::is_removed(site)) return;
    emulation::cluster_arrive();
    emulation::cluster_wait("cluster.sync()", site);
  }
  static arrival_token barrier_arrive() {
    emulation::cluster_arrive();
    return {};
  }
  static void barrier_wait(emulation::Site site = emulation::Site::here()) {
    emulation::cluster_wait("cluster.barrier_wait()", site, emulation::is_removed(site));
  }
  static void barrier_wait(arrival_token&&, emulation::Site site = emulation::Site::here()) { barrier_wait(site); }
  static unsigned block_rank() { return emulation::running->block->rank; }
  static unsigned num_blocks() { return emulation::launched->cluster; }
  template <class T> static T* map_shared_rank(T* p, unsigned rank) {
    return static_cast<T*>(emulation::in_block(p, rank));
  }
};

inline grid_group this_grid() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

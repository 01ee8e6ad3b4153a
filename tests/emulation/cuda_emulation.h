// Runs csrc/cuda/one_pass.cu on a CPU, one fiber for each CUDA thread (machine.h), so that it is tested where there is
// no GPU. Shared memory begins as NaN. What CUDA leaves undefined throws, or gives wrong results under some schedule.
// asynchronous.h has bulk copies and their barriers.
//
// Not seen: the order of writes to global memory, what a warp does in step without a shuffle, registers, speed.
#pragma once

#include "asynchronous.h"

#include <cmath>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index {
  unsigned x;
};
#define threadIdx (Index{emulation::running->index})
#define blockIdx (Index{emulation::running->block->index})
#define blockDim (Index{emulation::launched->threads})
#define gridDim (Index{emulation::launched->grid})

struct alignas(16) uint4 {  // reads and writes of 16 bytes of shared memory are followed
  unsigned x, y, z, w;
  uint4(unsigned x, unsigned y, unsigned z, unsigned w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4& from) : x(from.x), y(from.y), z(from.z), w(from.w) { emulation::note_read(&from); }
  uint4& operator=(const uint4& from) {
    emulation::note_write(this);
    x = from.x, y = from.y, z = from.z, w = from.w;
    return *this;
  }
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

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

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 rounded(float v) {  // to nearest, ties to even
  const unsigned bits = __float_as_uint(v);
  return {uint16_t(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {rounded(x), rounded(y)}; }

using emulation::Site;

inline void __syncthreads(Site site = Site::here()) {
  const bool first = emulation::running->first_time(site);
  if (emulation::mutated(first ? "without the first __syncthreads" : "without a later __syncthreads", site)) return;
  emulation::meet(emulation::running->block->barrier, emulation::launched->threads, "__syncthreads", site);
}
inline float __shfl_xor_sync(unsigned, float value, int bits) { return emulation::shuffle_xor(value, bits); }

namespace cooperative_groups {
struct cluster_group {
  static void sync(Site site = Site::here()) {
    const bool first = emulation::running->first_time(site);
    if (emulation::mutated(first ? "without the first cluster.sync" : "without a later cluster.sync", site)) return;
    const size_t needed = size_t(emulation::launched->cluster) * emulation::launched->threads;
    emulation::meet(emulation::running->block->cluster->barrier, needed, "cluster.sync", site);
  }
  static unsigned block_rank() { return emulation::running->block->rank; }
  static unsigned num_blocks() { return emulation::launched->cluster; }
  template <class T> static T* map_shared_rank(T* p, unsigned rank) {
    return static_cast<T*>(emulation::in_block(p, rank));
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

// ---- what the kernel writes in PTX ----------------------------------------------------------------------------------

inline void barrier_init(uint64_t* b, unsigned arrivals, Site site = Site::here()) {
  if (emulation::mutated("one more arrival at barrier_init", site)) ++arrivals;
  emulation::here().barriers[b] = emulation::Counted{arrivals, arrivals, 0, 0, false};
}
inline void fence_barrier_init(Site site = Site::here()) {
  if (emulation::mutated("without fence_barrier_init", site)) return;
  for (auto& [at, barrier] : emulation::here().barriers) barrier.visible = true;
}
inline void barrier_expect(uint64_t* b, unsigned bytes, Site site = Site::here()) {
  if (emulation::mutated("without barrier_expect", site)) return;
  if (emulation::mutated("16 bytes fewer at barrier_expect", site)) bytes -= 16;
  if (emulation::mutated("16 bytes more at barrier_expect", site)) bytes += 16;
  emulation::Counted& barrier = emulation::barrier_at(b);
  if (!barrier.pending) emulation::misuse("more arrivals than a barrier's phase has");
  barrier.bytes += bytes, --barrier.pending;
  emulation::complete_if_due(emulation::here(), barrier);
}
inline void barrier_wait(uint64_t* b, unsigned parity, Site site = Site::here()) {
  if (emulation::mutated("without barrier_wait", site)) return;
  if (emulation::mutated("barrier_wait by thread 0 only", site) && emulation::running->index) return;
  if (emulation::mutated("the other parity at barrier_wait", site)) parity ^= 1;
  emulation::Counted& barrier = emulation::barrier_at(b);
  // passes when the phase of this parity, the current one's or the one before, has completed
  if (unsigned(barrier.completed % 2) == parity)
    emulation::wait(barrier.completed, barrier.completed, site.name("barrier_wait"));
  emulation::running->observed[&barrier] = barrier.completed;
}
inline void load_bulk(void* to, const void* from, unsigned bytes, uint64_t* b, Site site = Site::here()) {
  if (emulation::mutated("without load_bulk", site)) return;
  if (emulation::mutated("16 bytes fewer at load_bulk", site)) bytes -= 16;
  if (bytes) emulation::load(to, from, bytes, b);
}
inline void store_bulk(void* to, const void* from, unsigned bytes) { emulation::store(to, from, bytes); }
inline void commit_stores(Site site = Site::here()) {
  if (emulation::mutated("without commit_stores", site)) return;
  for (emulation::Copy* copy : emulation::running->stores) copy->committed = true;
}
inline void wait_stores_read(Site site = Site::here()) {
  if (!emulation::mutated("without wait_stores_read", site)) emulation::wait_for_stores();
}
inline void fence_async(Site site = Site::here()) {
  if (emulation::mutated("without fence_async", site)) return;
  if (emulation::mutated("fence_async by thread 0 only", site) && emulation::running->index) return;
  emulation::fence_proxy();
}

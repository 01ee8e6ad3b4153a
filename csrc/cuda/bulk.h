// Samples in shared memory ahead of their use: bulk copies (cp.async.bulk, TMA without a tensor map), barriers that
// count their bytes, and the ring of stages made of them.
#pragma once

#ifdef EMULATION  // on a CPU, by tests/emulation, which has the functions below that are PTX
#include "cuda_emulation.h"
#define SHARED_MEMORY unsigned char* const memory = emulation::dynamic_shared()
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "bulk copies, barriers that count bytes and clusters need compute capability 9.0"
#endif
#define SHARED_MEMORY extern __shared__ __align__(128) unsigned char memory[]
#endif
#include <cstdint>

namespace {

#ifndef EMULATION
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(uint64_t* b, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_bulk(void* to, const void* from, unsigned bytes, uint64_t* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                   "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(b))
               : "memory");
}
__device__ __forceinline__ void store_bulk(void* to, const void* from, unsigned bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until every store of this thread has read its source.
__device__ __forceinline__ void wait_stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// What this thread has written to shared memory is seen by the bulk copies that come after.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

struct Memory {  // gives out shared memory
  unsigned char* next;
  template <class V> __device__ V* take(int count, int align = 16) {
    V* const taken = reinterpret_cast<V*>(next);
    next += (count * int(sizeof(V)) + align - 1) / align * align;
    return taken;
  }
};

// Stages that hold a block's samples in turn: `sample`, + step, ... below `end`. While one is worked on, those to come
// land in the other stages, and the result of the one before, written over it, leaves. Thread 0 copies for the block.
struct Ring {
  unsigned char* stages;
  uint64_t* full;  // of each stage: passed when its copies have landed
  int count, bytes, current = 0;
  unsigned parity = 0;
  int64_t sample, step, end;
  __device__ Ring(Memory& from, int count, int bytes, int64_t first, int64_t step, int64_t end)
      : count(count), bytes((bytes + 127) / 128 * 128), sample(first), step(step), end(end) {
    full = from.take<uint64_t>(count, 128);
    stages = from.take<unsigned char>(count * this->bytes);
  }
  // fill(sample, stage, barrier) tells the barrier what to expect and loads.
  template <class Fill> __device__ __forceinline__ void begin(Fill fill) const {
    if (threadIdx.x) return;
    for (int i = 0; i < count; ++i) barrier_init(&full[i], 1);
    fence_barrier_init();
    for (int i = 0; i < count - 1; ++i)
      if (sample + i * step < end) fill(sample + i * step, stages + i * bytes, &full[i]);
  }
  __device__ __forceinline__ unsigned char* wait() const {
    barrier_wait(&full[current], parity);
    return stages + current * bytes;
  }
  // Fills the stage of the sample before, once its result has been read from there.
  template <class Fill> __device__ __forceinline__ void refill(Fill fill) const {
    if (threadIdx.x) return;
    wait_stores_read();
    const int64_t coming = sample + (count - 1) * step;
    const int before = current ? current - 1 : count - 1;
    if (coming < end) fill(coming, stages + before * bytes, &full[before]);
  }
  // What all threads have written over the beginning of the stage, to memory.
  __device__ __forceinline__ void send(void* to, unsigned length) const {
    fence_async();
    __syncthreads();
    if (threadIdx.x) return;
    store_bulk(to, stages + current * bytes, length);
    commit_stores();
  }
  __device__ __forceinline__ void next() {
    sample += step;
    if (++current == count) current = 0, parity ^= 1;
  }
  __device__ __forceinline__ void finish() const {  // shared memory is the block's only while the block is there
    if (threadIdx.x == 0) wait_stores_read();
  }
};

}  // namespace

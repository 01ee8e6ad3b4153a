// The CUDA that the kernels are written in: nvcc's, or the emulation that the tests run them with on a CPU.
#pragma once

#if defined(DRSN_EMULATION)

#include "cuda_emulation.h"
#define DRSN_SHARED(T, name) T* const name = reinterpret_cast<T*>(emulation::dynamic_shared())

#else

#include <cuda_runtime.h>
#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#define DRSN_SHARED(T, name)                             \
  extern __shared__ __align__(16) char shared_memory[]; \
  T* const name = reinterpret_cast<T*>(shared_memory)

namespace emulation {
__device__ __forceinline__ void check_aligned(const void*, int) {}
}  // namespace emulation
#endif

#endif

#if defined(__CUDACC__) || defined(DRSN_EMULATION)
// The blocks of a cluster, which there are from compute capability 9.0 on; older GPUs never launch what calls these.
namespace drsn {
namespace cluster {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline int rank() { return int(cooperative_groups::this_cluster().block_rank()); }
__device__ inline void sync() { cooperative_groups::this_cluster().sync(); }
__device__ inline void arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ inline void wait() { cooperative_groups::this_cluster().barrier_wait(); }
__device__ inline const float* memory_of(int rank, const float* p) {  // where p is in another block's shared memory
  return cooperative_groups::this_cluster().map_shared_rank(const_cast<float*>(p), unsigned(rank));
}
#else
__device__ inline int rank() { return 0; }
__device__ inline void sync() {}
__device__ inline void arrive() {}
__device__ inline void wait() {}
__device__ inline const float* memory_of(int, const float* p) { return p; }
#endif
}  // namespace cluster
}  // namespace drsn
#endif

// What tests/test_cuda_emulation.py runs: each facility of the emulation at work, barriers that can be left out, and
// misuse that has to be reported. `without` is the number of the barrier that is left out, 0: none.
#include <string>

#include "cuda_emulation.h"

namespace cg = cooperative_groups;

namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ float sum_of_warp(float v) {
  for (int by = 16; by; by /= 2) v += __shfl_xor_sync(kAll, v, by);
  return v;
}

// ---- barriers ---------------------------------------------------------------------------------------------------------

// out = sum(in) and sum(in^2), through the same words of shared memory: a block has to be through with the first sum.
__global__ void block_sums(const float* in, float* out, int n, int without) {
  float* part = emulation::static_shared<float>("part", 32);
  const int warps = blockDim.x / 32;
  for (int power = 1; power <= 2; ++power) {
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += power == 1 ? in[i] : in[i] * in[i];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
    if (without != 1) __syncthreads();  // written before read
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += part[w];
    if (without != 2) __syncthreads();  // read before it is written again
    out[(power - 1) * blockDim.x + threadIdx.x] = sum;
  }
}

// out[i] = in[i ^ 1] + in[i ^ 31]: lanes of a warp exchange through shared memory.
__global__ void warp_exchange(const float* in, float* out, int, int without) {
  float* mine = static_cast<float*>(emulation::dynamic_shared()) + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  mine[lane] = in[threadIdx.x];
  if (without != 1) __syncwarp();
  const float near = mine[lane ^ 1], far = mine[lane ^ 31];
  if (without != 2) __syncwarp();
  mine[lane] = -1.0f;
  out[threadIdx.x] = near + far;
}

// out = sum(in) and sum(in^2) over the cluster, a slice of it each block, through distributed shared memory.
__global__ void cluster_sums(const float* in, float* out, int n, int without) {
  auto cluster = cg::this_cluster();
  float* mine = static_cast<float*>(emulation::dynamic_shared());
  for (int turn = 0; turn < 2; ++turn) {
    float sum = 0;
    if (threadIdx.x < 32)
      for (int i = cluster.block_rank() * 32 + threadIdx.x; i < n; i += cluster.num_blocks() * 32)
        sum += turn == 0 ? in[i] : in[i] * in[i];
    sum = sum_of_warp(sum);
    if (threadIdx.x == 0) *mine = sum;
    if (without != 1) cluster.sync();  // written before it is read
    sum = 0;
    for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += *cluster.map_shared_rank(mine, rank);
    // read before it is written again; and before its block ends
    if (without != (turn == 0 ? 2 : 3)) cluster.sync();
    out[(turn * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = sum;
  }
}

// The same with the two halves of the cluster's barrier.
__global__ void cluster_halves(const float* in, float* out, int n, int without) {
  auto cluster = cg::this_cluster();
  float* mine = static_cast<float*>(emulation::dynamic_shared());
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  if (threadIdx.x == 0) *mine = in[blockIdx.x % n];
  cluster.barrier_arrive();
  if (without != 1) cluster.barrier_wait();
  out[blockIdx.x * blockDim.x + threadIdx.x] = *cluster.map_shared_rank(mine, next);
  if (without == 1) cluster.barrier_wait();
  if (without != 2) cluster.barrier_wait(cluster.barrier_arrive());
}

// out[i] = in[i] - mean(in), over the whole grid; out also holds the partial sums, behind.
__global__ void grid_centred(const float* in, float* out, int n, int without) {
  float* partial = out + n;
  const auto grid = cg::this_grid();
  float sum = 0;
  for (int i = grid.block_rank() * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  sum = sum_of_warp(sum);  // blocks of one warp
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  if (without != 1) grid.sync();
  sum = 0;
  for (unsigned b = 0; b < grid.num_blocks(); ++b) sum += partial[b];
  for (int i = grid.block_rank() * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    out[i] = in[i] - sum / n;
}

// out = in reversed within each tile of four values a thread; tiles are copied one ahead, into two buffers.
__global__ void async_tiles(const float* in, float* out, int n, int without) {
  float* buffers = static_cast<float*>(emulation::dynamic_shared());
  const int tile = 4 * blockDim.x, tiles = n / tile;
  const auto fetch = [&](int t) {
    if (t < tiles)
      __pipeline_memcpy_async(buffers + t % 2 * tile + 4 * threadIdx.x, in + t * tile + 4 * threadIdx.x, 16);
    __pipeline_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    fetch(t + 1);
    __pipeline_wait_prior(without == 1 ? 2 : 1);
    if (without != 2) __syncthreads();  // every thread's copies have landed
    for (int i = threadIdx.x; i < tile; i += blockDim.x) out[t * tile + i] = buffers[t % 2 * tile + tile - 1 - i];
    if (without != 3) __syncthreads();  // read before the next copy is written over it
  }
  __pipeline_wait_prior(0);
}

// ---- values -------------------------------------------------------------------------------------------------------------

// For each thread, by the row of out: what shuffles, votes and the rest give.
__global__ void values(const float* in, float* out, int n, int) {
  const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z), lane = t % 32;
  const float v = in[t];
  int row = 0;
  const auto put = [&](float value) { out[row++ * n + t] = value; };
  put(__shfl_sync(kAll, v, 3));
  put(__shfl_sync(kAll, v, lane + 1, 8));
  put(__shfl_xor_sync(kAll, v, 5));
  put(__shfl_xor_sync(kAll, v, 8, 8));  // a later segment is not read, an earlier one is
  put(__shfl_down_sync(kAll, v, 3));
  put(__shfl_down_sync(kAll, v, 2, 4));
  put(__shfl_up_sync(kAll, v, 3));
  put(__shfl_up_sync(kAll, v, 2, 4));
  put(float(__popc(__ballot_sync(kAll, v > 0))));
  put(float(__ffs(int(__ballot_sync(kAll, v > 0)))));
  put(float(__any_sync(kAll, lane == 7 && v > 0)));
  put(float(__all_sync(kAll, v > -100 || lane == 9)));
  put(float(__syncthreads_count(v > 0)));
  put(float(__syncthreads_or(t == 5)));
  put(float(__syncthreads_and(t != 5)));
  float even = -1;
  if (lane % 2 == 0) even = __shfl_xor_sync(0x55555555u, v, 2);  // half of the lanes
  put(even);
  put(float(__activemask() >> lane & 1));
  put(float(__clz(t)) + float(__popcll(1ull << 40 | 1u)));
  put(__uint_as_float(__float_as_uint(v)) + __ldg(in + t) - __ldcs(in + t) + __fmaf_rn(v, 2, 1));
}

__global__ void atomics(const float* in, float* out, int n, int) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(out, in[i]);
    atomicMax(out + 1, in[i]);
    atomicMin(out + 2, in[i]);
    atomicAdd(out + 3, atomicExch(out + 4, 1.0f));
    atomicAdd(out + 5, atomicCAS(out + 6, 0.0f, 2.0f) == 0.0f);
    unsigned* bits = reinterpret_cast<unsigned*>(out + 7);
    atomicOr(bits, 1u << i % 24);
    atomicAnd(bits + 1, ~(1u << i % 24));
  }
}

// Shared memory that nobody wrote, in the last word of what was asked for.
__global__ void unwritten(const float*, float* out, int n, int) {
  out[0] = emulation::static_shared<float>("unwritten", 3)[2];
  out[1] = static_cast<float*>(emulation::dynamic_shared())[n - 1];
}

// A ragged last warp: lanes that never were are named in the mask, and what they would give is poison.
__global__ void ragged(const float* in, float* out, int, int) {
  out[threadIdx.x] = __shfl_down_sync(kAll, in[threadIdx.x], 1);
}

__global__ void zeros_behind(const float* in, float* out, int, int) {
  float* here = static_cast<float*>(emulation::dynamic_shared());
  __pipeline_memcpy_async(here, in, 16, 8);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  for (int i = 0; i < 4; ++i) out[i] = here[i];
}

// ---- misuse -------------------------------------------------------------------------------------------------------------

__global__ void divergent_block(const float*, float*, int, int) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}
__global__ void ended_threads(const float*, float*, int n, int) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
}
__global__ void block_and_cluster(const float*, float*, int, int) {
  if (threadIdx.x < 32) __syncthreads();
  else cg::this_cluster().sync();
}
__global__ void divergent_warp(const float*, float* out, int, int) {
  if (threadIdx.x % 2) __syncwarp();
  else out[0] = __shfl_sync(kAll, 1.0f, 0);
}
__global__ void lane_not_in_mask(const float*, float*, int, int) { __syncwarp(0x0000ffffu); }
__global__ void missing_lane(const float*, float*, int, int) {
  if (threadIdx.x != 3) __syncwarp();
  else __syncwarp(1u << 3 | 1u << 4);
}
__global__ void grid_sync(const float*, float*, int, int) { cg::this_grid().sync(); }
__global__ void arrives_twice(const float*, float*, int, int) {
  cg::this_cluster().barrier_arrive();
  cg::this_cluster().barrier_arrive();
}
__global__ void waits_without(const float*, float*, int, int) { cg::this_cluster().barrier_wait(); }
__global__ void past_the_end(const float*, float*, int n, int) {
  static_cast<float*>(emulation::dynamic_shared())[n] = 0;
}
__global__ void large_static(const float*, float*, int n, int) { emulation::static_shared<float>("large", n)[0] = 0; }
__global__ void async_bytes(const float* in, float*, int n, int) {
  __pipeline_memcpy_async(emulation::dynamic_shared(), in, n);
}
__global__ void async_source(const float* in, float*, int n, int) {
  __pipeline_memcpy_async(emulation::dynamic_shared(), in + n, 16);
}
__global__ void async_target(const float* in, float* out, int, int) { __pipeline_memcpy_async(out, in, 16); }
__global__ void async_unwaited(const float* in, float*, int, int) {
  __pipeline_memcpy_async(emulation::dynamic_shared(), in, 16);
  __pipeline_commit();
}
__global__ void misaligned(const float* in, float* out, int n, int) {
  out[0] = __ldg(reinterpret_cast<const float4*>(in + n)).x;
}
__global__ void maps_rank(const float*, float* out, int n, int) {
  out[0] = *cg::this_cluster().map_shared_rank(static_cast<float*>(emulation::dynamic_shared()), n);
}
__global__ void maps_global(const float*, float* out, int, int) {
  out[0] = *cg::this_cluster().map_shared_rank(out, 1);
}
// Rank 0 ends at once; the others read its memory.
__global__ void maps_ended(const float*, float* out, int, int) {
  auto cluster = cg::this_cluster();
  if (cluster.block_rank() == 0) return;
  out[0] = *cluster.map_shared_rank(static_cast<float*>(emulation::dynamic_shared()), 0);
}
__global__ void reads_outside(const float*, float* out, int n, int) {
  out[0] = static_cast<float*>(emulation::dynamic_shared())[n];
}

using Kernel = void (*)(const float*, float*, int, int);
#define NAMED(kernel) {#kernel, kernel}
const std::map<std::string, Kernel> kKernels = {
    NAMED(block_sums), NAMED(warp_exchange), NAMED(cluster_sums), NAMED(cluster_halves), NAMED(grid_centred),
    NAMED(async_tiles), NAMED(values), NAMED(atomics), NAMED(unwritten), NAMED(ragged), NAMED(zeros_behind),
    NAMED(divergent_block), NAMED(ended_threads), NAMED(block_and_cluster), NAMED(divergent_warp),
    NAMED(lane_not_in_mask), NAMED(missing_lane), NAMED(grid_sync), NAMED(arrives_twice), NAMED(waits_without),
    NAMED(past_the_end), NAMED(large_static), NAMED(async_bytes), NAMED(async_source), NAMED(async_target),
    NAMED(async_unwaited), NAMED(misaligned), NAMED(maps_rank), NAMED(maps_global), NAMED(maps_ended),
    NAMED(reads_outside),
};

}  // namespace

extern "C" {

void set_schedule(int order) { emulation::schedule(order); }

void set_device(int compute_capability, int multiprocessors) {
  emulation::device().compute_capability = compute_capability;
  emulation::device().multiprocessors = multiprocessors;
}

// nullptr, or what went wrong. shape: grid x, y, z, block x, y, z, bytes of shared memory, cluster, cooperative.
const char* run(const char* kernel, const unsigned* shape, const float* in, float* out, int n, int without) {
  static thread_local std::string error;
  try {
    emulation::launch(kKernels.at(kernel), dim3(shape[0], shape[1], shape[2]), dim3(shape[3], shape[4], shape[5]),
                      shape[6], shape[7], shape[8] != 0, in, out, n, without);
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
}

// Step and standard gate in one cooperative launch where BatchNorm in training couples the batch: every block pools its
// parts of x and keeps them on chip across the barriers of the grid, all blocks together compute the gate (gate.h), and y
// comes from chip. What does not fit on chip is read a second time, in reverse order, from L2. Backward is the same with g.
#include "dispatch.h"
#include "launch.h"
#include "slices.h"

namespace drsn {
namespace {

struct GridBarrier {
  __device__ void operator()() const { cooperative_groups::this_grid().sync(); }
};

// The parts that a block takes in turn, the first `held` of them on chip.
template <class T> struct Items {
  const Walk& w;
  const Slices& s;
  const T* tensor;
  char* chip;

  __device__ int64_t count() const {
    const int64_t all = w.n * s.parts;
    return blockIdx.x < all ? (all - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  }
  __device__ int64_t held() const { return count() < s.held ? count() : s.held; }
  __device__ int64_t part(int64_t i) const { return (blockIdx.x + i * gridDim.x) % s.parts; }
  __device__ Slice slice(int64_t i) const { return Slice(w, s, (blockIdx.x + i * gridDim.x) / s.parts, part(i)); }
  __device__ T* place(int64_t i, const Slice& at) const {  // as copy_on_chip chooses it
    return reinterpret_cast<T*>(chip + i * s.stride + (reinterpret_cast<uintptr_t>(tensor + at.origin) & 15));
  }
  __device__ void fetch() const {
    for (int64_t i = 0; i < held(); ++i) {
      const Slice at = slice(i);
      copy_on_chip(chip + i * s.stride, tensor + at.origin, at.count);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  // Calls use(slice, part, where it begins, offset of that in the tensor): all of them forwards, or, what was read last
  // being in L2, backwards.
  template <class F> __device__ void each(bool backwards, const F& use) const {
    const int64_t all = count();
    for (int64_t i = 0; i < all; ++i) {
      const int64_t k = backwards ? all - 1 - i : i;
      const Slice at = slice(k);
      if (k < held()) {
        use(at, part(k), static_cast<const T*>(place(k, at)), at.origin);
      } else {
        use(at, part(k), tensor, int64_t(0));
      }
    }
  }
};

// sums (N, C) from those of the parts, where channels_last has cut the samples along L.
__device__ void add_parts(const float* parts, float* sums, int64_t count, int shares) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    float sum = 0;
    for (int p = 0; p < shares; ++p) sum += parts[p * count + i];
    sums[i] = sum;
  }
}

template <class T, int V> __global__ void __launch_bounds__(kThreads, 2) training_forward_kernel(const __grid_constant__ StepArgs a, Slices s) {
  DRSN_SHARED(char, chip);
  const Walk& w = a.walk;
  const Gate<float> gate{a.gate};
  const GridBarrier sync;
  float *const scratch = reinterpret_cast<float*>(chip + s.held * s.stride), *const tau = static_cast<float*>(a.tau);
  const int64_t sums = w.n * w.c;
  float* const parts = a.parts ? static_cast<float*>(a.parts) : gate.pooled();
  const Items<T> items{w, s, static_cast<const T*>(a.x), chip};

  items.fetch();
  items.each(false, [&](const Slice& at, int64_t part, const T* x, int64_t origin) {
    walk_slice<V>(reduce_of<T, V>(a, x, origin, a.parts ? parts + part * sums : parts, w.c), w, at, scratch);
  });
  sync();
  if (a.parts) {
    add_parts(parts, gate.pooled(), sums, s.parts);
    sync();
  }
  gate_forward(a.gate, tau, static_cast<float*>(a.means), blockIdx.x, gridDim.x, scratch, sync);
  sync();
  const int64_t tau_n = gate.one_tau() ? 1 : w.c, tau_c = gate.one_tau() ? 0 : 1;
  items.each(true, [&](const Slice& at, int64_t, const T* x, int64_t origin) {
    walk_slice<V>(apply_of<T, V, 3>(a, x, origin, tau, tau_n, tau_c), w, at, scratch);
  });
}

template <class T, int V> __global__ void __launch_bounds__(kThreads, 2) training_backward_kernel(const __grid_constant__ StepGradArgs a, Slices s) {
  DRSN_SHARED(char, chip);
  const Walk& w = a.walk;
  const GridBarrier sync;
  float *const scratch = reinterpret_cast<float*>(chip + s.held * s.stride), *const dtau = static_cast<float*>(a.dtau);
  const int64_t sums = w.n * w.c;
  float* const parts = a.parts ? static_cast<float*>(a.parts) : dtau;
  const Items<T> items{w, s, static_cast<const T*>(a.g), chip};

  items.fetch();
  items.each(false, [&](const Slice& at, int64_t part, const T* g, int64_t origin) {
    walk_slice<V>(dtau_of<T, V>(a, g, origin, a.parts ? parts + part * sums : parts, w.c), w, at, scratch);
  });
  sync();
  if (a.parts) {
    add_parts(parts, dtau, sums, s.parts);
    sync();
  }
  gate_backward(a.gate, a.grads, blockIdx.x, gridDim.x, scratch, sync);
  sync();
  items.each(true, [&](const Slice& at, int64_t, const T* g, int64_t origin) {
    walk_slice<V>(dx_of<T, V>(a, g, origin, static_cast<const float*>(a.grads.around), w.c), w, at, scratch);
  });
}

template <int V> size_t bytes_on_chip(const Slices& s) { return size_t(s.held * s.stride) + kScratch<V> * sizeof(float); }

}  // namespace

void training_forward(const StepArgs& a, const Slices& s, cudaStream_t stream) {
  for_on_chip_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int W = kWidest<T>;
    if (is_wide<T>(a.walk, a.x) && is_wide<T>(a.walk, a.y) && (!a.residual || is_wide<T>(a.walk, a.residual)))
      launch<training_forward_kernel<T, W>>({"training_forward", a.walk, s.blocks, kThreads, bytes_on_chip<W>(s), 1, true}, stream, a, s);
    else
      launch<training_forward_kernel<T, 1>>({"training_forward", a.walk, s.blocks, kThreads, bytes_on_chip<1>(s), 1, true}, stream, a, s);
  });
}

void training_backward(const StepGradArgs& a, const Slices& s, cudaStream_t stream) {
  for_on_chip_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int W = kWidest<T>;
    if (is_wide<T>(a.walk, a.g) && is_wide<T>(a.walk, a.dx))
      launch<training_backward_kernel<T, W>>({"training_backward", a.walk, s.blocks, kThreads, bytes_on_chip<W>(s), 1, true}, stream, a, s);
    else
      launch<training_backward_kernel<T, 1>>({"training_backward", a.walk, s.blocks, kThreads, bytes_on_chip<1>(s), 1, true}, stream, a, s);
  });
}

}  // namespace drsn

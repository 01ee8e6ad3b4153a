// Step and standard gate in one launch, where no sample needs another: one read of x and one write of y, one read of g and
// one write of dx. A cluster of blocks takes a sample, a single block a small one: each holds a slice of it on chip, A, the
// hidden units and the thresholds are exchanged through distributed shared memory, and y is computed from chip.
#include "dispatch.h"
#include "launch.h"
#include "slices.h"

namespace drsn {
namespace {

// The blocks that share a sample: each computes its range [begin, end) of channels, hidden units or outputs, and `share`
// brings in the others' ranges.
template <bool CLUSTER> struct Team {
  int ranks, rank;

  __device__ explicit Team(int parts) : ranks(1), rank(0) {
    if constexpr (CLUSTER) ranks = parts, rank = cluster::rank();
  }
  __device__ int64_t begin(int64_t count) const { return bound(rank, count); }
  __device__ int64_t end(int64_t count) const { return bound(rank + 1, count); }
  __device__ int64_t bound(int r, int64_t count) const {
    const int64_t each = (count + ranks - 1) / ranks;
    return r * each < count ? r * each : count;
  }
  __device__ void sync() const {
    if constexpr (CLUSTER) {
      cluster::sync();
    } else {
      __syncthreads();
    }
  }
  // After the others are done with this block's memory: it must not be gone while they read.
  __device__ void arrive() const {
    if constexpr (CLUSTER) cluster::arrive();
  }
  __device__ void leave() const {
    if constexpr (CLUSTER) cluster::wait();
  }
  __device__ const float* of(const float* p, int r) const {
    if constexpr (CLUSTER) return cluster::memory_of(r, p);
    return p;
  }
  // values[0, count): every block has written its range, `each` numbers a rank; now everybody has all of them.
  __device__ void share(float* values, int64_t count, int64_t each) const {
    sync();
    if constexpr (CLUSTER) {
      for (int64_t i = threadIdx.x; i < count; i += kThreads)
        if (const int r = int(i / each); r != rank) values[i] = of(values, r)[i];
      __syncthreads();
    }
  }
  __device__ int64_t each(int64_t count) const { return (count + ranks - 1) / ranks; }
  // out = the sum of the blocks' values, in the order of their ranks.
  __device__ void add_up(const float* values, float* out, int64_t count) const {
    sync();
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
      float sum = 0;
      for (int r = 0; r < ranks; ++r) sum += of(values, r)[i];
      out[i] = sum;
    }
    __syncthreads();
  }
};

// On chip behind the slice: arrays of max(C, H) numbers, then scratch.
DRSN_HD int64_t width_of(const GateArgs& a) { return a.c > a.h ? a.c : a.h; }
constexpr int kArrays = 5;

template <class T, int V, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 2) one_pass_forward_kernel(const __grid_constant__ StepArgs a, Slices s) {
  DRSN_SHARED(char, chip);
  const Walk& w = a.walk;
  const Gate<float> gate{a.gate};
  const Team<CLUSTER> team(s.parts);
  const int64_t n = blockIdx.x / s.parts, width = width_of(a.gate), c = a.gate.c, h = a.gate.h, o = a.gate.o;
  float *const sums = reinterpret_cast<float*>(chip + s.stride), *const pooled = sums + width, *const units = pooled + width;
  float *const tau = units + width, *const scratch = sums + kArrays * width;
  const Slice slice(w, s, n, team.rank);

  const T* const x = copy_on_chip(chip, static_cast<const T*>(a.x) + slice.origin, slice.count);
  __pipeline_wait_prior(0);
  __syncthreads();
  walk_slice<V>(reduce_of<T, V>(a, x, slice.origin, w.channels_last ? sums : pooled, 0), w, slice, scratch);
  if (w.channels_last) {
    team.add_up(sums, pooled, c);
  } else {
    team.share(pooled, c, s.rows);
  }
  if (a.sign && team.rank == 0)
    for (int64_t i = threadIdx.x; i < c; i += kThreads) gate.pooled()[n * c + i] = pooled[i];

  times_rows(team.begin(h), team.end(h), c, pooled, gate.w1(), [&](int64_t j, float sum) {
    const float u = sum + gate.b1()[j];
    if (a.sign) gate.hidden()[n * h + j] = u;
    units[j] = gate.relu(gate.normed(u, j));
  });
  team.share(units, h, team.each(h));

  float many = 1;
  if (a.gate.average == Average::sample) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < c; i += kThreads) sum += pooled[i];
    many = block_sum(sum, scratch) / float(c);
  }
  const auto done = [&](int64_t i, float sum) {
    const float alpha = gate.sigmoid(sum + gate.b2()[i]);
    if (a.sign && (o > 1 || team.rank == 0)) gate.alpha()[n * o + i] = alpha;
    if (o > 1) {
      tau[i] = alpha * (a.gate.average == Average::channel ? pooled[i] : many);
    } else {
      sums[0] = alpha;
    }
  };
  if (o == 1) {  // every block for itself
    times_rows(0, 1, h, units, gate.w2(), done);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < c; i += kThreads) tau[i] = sums[0] * (a.gate.average == Average::channel ? pooled[i] : many);
    __syncthreads();
  } else if (w.channels_last) {
    times_rows(team.begin(o), team.end(o), h, units, gate.w2(), done);
    team.share(tau, o, team.each(o));
  } else {
    times_rows(slice.first, slice.last, h, units, gate.w2(), done);
    __syncthreads();
  }
  team.arrive();
  if (a.tau) {
    float* const out = static_cast<float*>(a.tau);
    const int64_t first = w.channels_last ? team.begin(c) : slice.first, last = w.channels_last ? team.end(c) : slice.last;
    if (gate.one_tau()) {
      if (team.rank == 0 && threadIdx.x == 0) out[n] = tau[0];
    } else {
      for (int64_t i = first + threadIdx.x; i < last; i += kThreads) out[n * c + i] = tau[i];
    }
  }
  walk_slice<V>(apply_of<T, V, 3>(a, x, slice.origin, tau, 0, 1), w, slice, scratch);
  team.leave();
}

template <class T, int V, bool CLUSTER>
__global__ void __launch_bounds__(kThreads, 2) one_pass_backward_kernel(const __grid_constant__ StepGradArgs a, Slices s) {
  DRSN_SHARED(char, chip);
  const Walk& w = a.walk;
  const Gate<float> gate{a.gate};
  const Team<CLUSTER> team(s.parts);
  const int64_t n = blockIdx.x / s.parts, width = width_of(a.gate), c = a.gate.c, h = a.gate.h, o = a.gate.o;
  float *const sums = reinterpret_cast<float*>(chip + s.stride), *const dtau = sums + width, *const dz = dtau + width;
  float *const da = dz + width, *const units = da + width, *const scratch = sums + kArrays * width;
  const Slice slice(w, s, n, team.rank);

  const T* const g = copy_on_chip(chip, static_cast<const T*>(a.g) + slice.origin, slice.count);
  __pipeline_wait_prior(0);
  __syncthreads();
  walk_slice<V>(dtau_of<T, V>(a, g, slice.origin, w.channels_last ? sums : dtau, 0), w, slice, scratch);
  if (w.channels_last) {
    team.add_up(sums, dtau, c);
  } else {
    team.share(dtau, c, s.rows);
  }

  const float* const tau_grad = static_cast<const float*>(a.grads.tau_grad);
  if (threadIdx.x < kWarp)  // dz, and in `da` what comes back to A through tau = alpha * M
    threshold_grad(gate, gate.pooled() + n * c, gate.alpha() + n * o, dtau, tau_grad ? tau_grad + n * (gate.one_tau() ? 1 : c) : nullptr, dz, da);
  __syncthreads();
  if (team.rank == 0)
    for (int64_t i = threadIdx.x; i < o; i += kThreads) static_cast<float*>(a.grads.dz)[n * o + i] = dz[i];
  times_columns(team.begin(h), team.end(h), o, h, dz, gate.w2(), scratch, [&](int64_t j, float sum) {
    const float passed = gate.normed(gate.hidden()[n * h + j], j) <= 0 ? 0.0f : sum;
    static_cast<float*>(a.grads.du)[n * h + j] = passed;
    units[j] = passed * gate.scale(j);
  });
  team.share(units, h, team.each(h));

  const int64_t first = w.channels_last ? team.begin(c) : slice.first, last = w.channels_last ? team.end(c) : slice.last;
  times_columns(first, last, h, c, units, gate.w1(), scratch, [&](int64_t i, float sum) { da[i] += sum; });
  if (w.channels_last) {
    team.share(da, c, team.each(c));
  } else {
    __syncthreads();
  }
  team.arrive();
  walk_slice<V>(dx_of<T, V>(a, g, slice.origin, da, 0), w, slice, scratch);
  team.leave();
}

template <int V> size_t bytes_on_chip(const GateArgs& gate, const Slices& s) {
  return size_t(s.stride + (kArrays * width_of(gate) + kScratch<V>)*int64_t(sizeof(float)));
}

}  // namespace

void one_pass_forward(const StepArgs& a, const Slices& s, cudaStream_t stream) {
  for_on_chip_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto one, auto cluster, auto width) {
      const size_t shared = bytes_on_chip<decltype(width)::value>(a.gate, s);
      if (s.parts > 1)
        launch<decltype(cluster)::value>({"one_pass_forward", a.walk, a.walk.n * s.parts, kThreads, shared, unsigned(s.parts)}, stream, a, s);
      else
        launch<decltype(one)::value>({"one_pass_forward", a.walk, a.walk.n, kThreads, shared}, stream, a, s);
    };
    constexpr int W = kWidest<T>;
    if (is_wide<T>(a.walk, a.x) && is_wide<T>(a.walk, a.y) && (!a.residual || is_wide<T>(a.walk, a.residual)))
      run(Constant<one_pass_forward_kernel<T, W, false>>(), Constant<one_pass_forward_kernel<T, W, true>>(), Constant<W>());
    else
      run(Constant<one_pass_forward_kernel<T, 1, false>>(), Constant<one_pass_forward_kernel<T, 1, true>>(), Constant<1>());
  });
}

void one_pass_backward(const StepGradArgs& a, const Slices& s, cudaStream_t stream) {
  for_on_chip_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto one, auto cluster, auto width) {
      const size_t shared = bytes_on_chip<decltype(width)::value>(a.gate, s);
      if (s.parts > 1)
        launch<decltype(cluster)::value>({"one_pass_backward", a.walk, a.walk.n * s.parts, kThreads, shared, unsigned(s.parts)}, stream, a, s);
      else
        launch<decltype(one)::value>({"one_pass_backward", a.walk, a.walk.n, kThreads, shared}, stream, a, s);
    };
    constexpr int W = kWidest<T>;
    if (is_wide<T>(a.walk, a.g) && is_wide<T>(a.walk, a.dx))
      run(Constant<one_pass_backward_kernel<T, W, false>>(), Constant<one_pass_backward_kernel<T, W, true>>(), Constant<W>());
    else
      run(Constant<one_pass_backward_kernel<T, 1, false>>(), Constant<one_pass_backward_kernel<T, 1, true>>(), Constant<1>());
  });
}

}  // namespace drsn

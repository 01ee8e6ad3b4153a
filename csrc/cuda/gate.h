// The standard gate (drsn_kernels/gates.py) over the whole batch, forward and backward, by all blocks of one cooperative
// launch. S is float or double; the formulas are those of csrc/cpu/gate.h:
//
//   u = A w1' + b1        v = relu((u - mean) * scale + beta)        z = v w2' + b2        alpha = sigmoid(z)
//   tau = alpha * M       M = A ("channel"), mean_c A ("sample"), 1 (none)
//
// scale is gamma / sqrt(var + eps). Phases are separated by `sync`, the barrier of the grid; within a phase the blocks take
// items in turn, and every number is written by one thread from sums in a fixed order.
#pragma once

#include "api.h"
#include "lanes.h"

namespace drsn {
namespace {

constexpr int kTile = 16;   // of a matrix product: a thread for each element
constexpr int kDepth = 32;  // of the sums, a step
constexpr int kWarps = kThreads / kWarp;
constexpr int kGateScratch = 2 * kDepth * (kTile + 1);  // numbers

template <class S> struct Gate {
  const GateArgs& a;

  __device__ const S* w1() const { return static_cast<const S*>(a.w1); }
  __device__ const S* b1() const { return static_cast<const S*>(a.b1); }
  __device__ const S* w2() const { return static_cast<const S*>(a.w2); }
  __device__ const S* b2() const { return static_cast<const S*>(a.b2); }
  __device__ S* pooled() const { return static_cast<S*>(a.pooled); }
  __device__ S* hidden() const { return static_cast<S*>(a.hidden); }
  __device__ S* alpha() const { return static_cast<S*>(a.alpha); }
  __device__ S* mean() const { return static_cast<S*>(a.mean); }
  __device__ S* var() const { return static_cast<S*>(a.var); }
  __device__ bool one_tau() const { return a.o == 1 && a.average != Average::channel; }

  __device__ S scale(int64_t j) const {
    return a.norm ? static_cast<const S*>(a.gamma)[j] / S(sqrt(var()[j] + S(a.eps))) : S(1);
  }
  // what relu is given for a hidden unit's u
  __device__ S normed(S u, int64_t j) const {
    return a.norm ? (u - mean()[j]) * scale(j) + static_cast<const S*>(a.beta)[j] : u;
  }
  static __device__ S relu(S y) { return y <= S(0) ? S(0) : y; }  // keeps NaN
  static __device__ S sigmoid(S z) { return S(1) / (S(1) + S(exp(-z))); }
};

// out(i, j) = sum over k in [begin, end) of a(i, k) * b(j, k), for one tile of 16 x 16; A_ALONG: a's neighbours in memory are
// along k, so neighbouring threads take these.
template <bool A_ALONG, bool B_ALONG, class S, class A, class B, class Out>
__device__ void product_tile(int64_t tile, int64_t rows, int64_t columns, int64_t begin, int64_t end, const A& a, const B& b,
                             const Out& out, S* scratch) {
  const int64_t across = (columns + kTile - 1) / kTile, row = tile / across * kTile, column = tile % across * kTile;
  S(*const as)[kTile + 1] = reinterpret_cast<S(*)[kTile + 1]>(scratch), (*const bs)[kTile + 1] = as + kDepth;
  const int i = threadIdx.x / kTile, j = threadIdx.x % kTile;
  S sum = 0;
  for (int64_t k = begin; k < end; k += kDepth) {
    __syncthreads();  // the step before is done with them
    for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
      const int ar = A_ALONG ? e / kDepth : e % kTile, ak = A_ALONG ? e % kDepth : e / kTile;
      const int br = B_ALONG ? e / kDepth : e % kTile, bk = B_ALONG ? e % kDepth : e / kTile;
      as[ak][ar] = row + ar < rows && k + ak < end ? a(row + ar, k + ak) : S(0);
      bs[bk][br] = column + br < columns && k + bk < end ? b(column + br, k + bk) : S(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) sum += as[d][i] * bs[d][j];
  }
  if (row + i < rows && column + j < columns) out(row + i, column + j, sum);
}
DRSN_HD int64_t tiles_of(int64_t rows, int64_t columns) {
  return ((rows + kTile - 1) / kTile) * ((columns + kTile - 1) / kTile);
}

// Sums of value(n, column) over n for 32 columns, a lane each; every warp gets them. `scratch`: kThreads numbers.
template <class S, class F> __device__ S column_sum(int64_t rows, bool there, const F& value, S* scratch) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  S sum = 0;
  if (there)
    for (int64_t n = warp; n < rows; n += kWarps) sum += value(n);
  __syncthreads();  // scratch may still be read
  scratch[threadIdx.x] = sum;
  __syncthreads();
  S total = 0;
  for (int w = 0; w < kWarps; ++w) total += scratch[w * kWarp + lane];
  return total;
}
DRSN_HD int64_t column_items(int64_t columns) { return (columns + kWarp - 1) / kWarp; }

// ---- forward ---------------------------------------------------------------------------------------------------------

template <class S> __device__ void batch_statistics(const Gate<S>& gate, int64_t item, S* scratch) {
  const GateArgs& a = gate.a;
  const int64_t j = item * kWarp + threadIdx.x % kWarp;
  const bool there = j < a.h;
  const S* const u = gate.hidden();
  const S mean = column_sum<S>(a.n, there, [&](int64_t n) { return u[n * a.h + j]; }, scratch) / S(a.n);
  const S squares = column_sum<S>(a.n, there, [&](int64_t n) {
    const S d = u[n * a.h + j] - mean;
    return d * d;
  }, scratch);
  if (there && threadIdx.x < kWarp) {
    S &running_mean = static_cast<S*>(a.running_mean)[j], &running_var = static_cast<S*>(a.running_var)[j];
    const S momentum = S(a.momentum);
    gate.mean()[j] = mean;
    gate.var()[j] = squares / S(a.n);
    running_mean = momentum * mean + (S(1) - momentum) * running_mean;
    running_var = momentum * (squares / S(a.n - 1)) + (S(1) - momentum) * running_var;
  }
  if (item == 0 && threadIdx.x == 0) ++*a.batches;
}

// alpha (N, O) and tau, (N, C) or (N, 1), from A; `means`: N numbers of workspace.
template <class S, class Sync>
__device__ void gate_forward(const GateArgs& a, S* tau, S* means, int64_t block, int64_t blocks, S* scratch, const Sync& sync) {
  const Gate<S> gate{a};
  const S *const pooled = gate.pooled(), *const w1 = gate.w1(), *const w2 = gate.w2();
  S *const u = gate.hidden(), *const alpha = gate.alpha();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  for (int64_t t = block; t < tiles_of(a.n, a.h); t += blocks)
    product_tile<true, true, S>(
        t, a.n, a.h, 0, a.c, [&](int64_t n, int64_t c) { return pooled[n * a.c + c]; },
        [&](int64_t j, int64_t c) { return w1[j * a.c + c]; },
        [&](int64_t n, int64_t j, S sum) { u[n * a.h + j] = sum + gate.b1()[j]; }, scratch);
  const int64_t groups = a.average == Average::sample ? (a.n + kWarps - 1) / kWarps : 0;  // of samples, a warp each
  const int64_t statistics = a.batch_stats ? column_items(a.h) : 0;
  sync();
  for (int64_t i = block; i < statistics + groups; i += blocks) {
    if (i < statistics) {
      batch_statistics(gate, i, scratch);
      continue;
    }
    const int64_t n = (i - statistics) * kWarps + warp;
    S sum = 0;
    if (n < a.n)
      for (int64_t c = lane; c < a.c; c += kWarp) sum += pooled[n * a.c + c];
    sum = warp_sum(sum);
    if (n < a.n && lane == 0) means[n] = sum / S(a.c);
  }
  if (statistics + groups) sync();

  const auto v = [&](int64_t n, int64_t j) { return gate.relu(gate.normed(u[n * a.h + j], j)); };
  const auto many = [&](int64_t n) { return a.average == Average::sample ? means[n] : S(1); };
  if (a.o > 1) {
    for (int64_t t = block; t < tiles_of(a.n, a.o); t += blocks)
      product_tile<true, true, S>(
          t, a.n, a.o, 0, a.h, v, [&](int64_t o, int64_t j) { return w2[o * a.h + j]; },
          [&](int64_t n, int64_t o, S sum) {
            const S value = gate.sigmoid(sum + gate.b2()[o]);
            alpha[n * a.o + o] = value;
            tau[n * a.c + o] = value * (a.average == Average::channel ? pooled[n * a.c + o] : many(n));
          },
          scratch);
  } else {  // a warp for each sample
    for (int64_t n = block * kWarps + warp; n < a.n; n += blocks * kWarps) {
      S sum = 0;
      for (int64_t j = lane; j < a.h; j += kWarp) sum += v(n, j) * w2[j];
      const S value = gate.sigmoid(warp_sum(sum) + gate.b2()[0]);
      if (lane == 0) alpha[n] = value;
      if (gate.one_tau()) {
        if (lane == 0) tau[n] = value * many(n);
      } else {
        for (int64_t c = lane; c < a.c; c += kWarp) tau[n * a.c + c] = value * pooled[n * a.c + c];
      }
    }
  }
}

// ---- backward --------------------------------------------------------------------------------------------------------

// One sample, by one warp: dtau (C) and tau_grad -> dz (O), the gradient of z, and `direct` (C), that of A through
// tau = alpha * M.
template <class S>
__device__ void threshold_grad(const Gate<S>& gate, const S* pooled, const S* alpha, const S* dtau, const S* tau_grad, S* dz,
                               S* direct) {
  const GateArgs& a = gate.a;
  const int lane = threadIdx.x % kWarp;
  const bool shared = a.average == Average::sample, channel = a.average == Average::channel;
  S m = 1;
  if (shared) {
    m = 0;
    for (int64_t c = lane; c < a.c; c += kWarp) m += pooled[c];
    m = warp_sum(m) / S(a.c);
  }
  S total = 0;  // of what dalpha (O == 1) or dM ("sample") sums over the channels
  for (int64_t c = lane; c < a.c; c += kWarp) {
    const S d = dtau[c] + (tau_grad && !gate.one_tau() ? tau_grad[c] : S(0)), al = alpha[a.o == 1 ? 0 : c];
    const S dalpha = d * (channel ? pooled[c] : m);
    if (a.o > 1) dz[c] = dalpha * al * (S(1) - al);
    if (channel) direct[c] = al * d;
    total += a.o > 1 ? al * d : channel ? dalpha : d;
  }
  total = warp_sum(total);
  if (gate.one_tau() && tau_grad) total += *tau_grad;
  if (a.o == 1 && lane == 0) *dz = total * (channel ? S(1) : m) * *alpha * (S(1) - *alpha);
  if (channel) return;
  const S each = shared ? (a.o == 1 ? *alpha * total : total) / S(a.c) : S(0);
  for (int64_t c = lane; c < a.c; c += kWarp) direct[c] = each;
}

// The gradients of the norm and of the biases, for 32 hidden units; du, dv behind relu, becomes the gradient of u.
template <class S> __device__ void norm_grad(const Gate<S>& gate, const GateGrads& to, int64_t item, S* scratch) {
  const GateArgs& a = gate.a;
  const int64_t j = item * kWarp + threadIdx.x % kWarp;
  const bool there = j < a.h, writes = there && threadIdx.x < kWarp;
  const S* const u = gate.hidden();
  S* const du = static_cast<S*>(to.du);
  const S middle = there && a.norm ? gate.mean()[j] : S(0);
  const S level = column_sum<S>(a.n, there, [&](int64_t n) { return du[n * a.h + j]; }, scratch);
  if (a.norm) {
    const S slope = column_sum<S>(a.n, there, [&](int64_t n) { return du[n * a.h + j] * (u[n * a.h + j] - middle); }, scratch);
    const S rstd = there ? S(1) / S(sqrt(gate.var()[j] + S(a.eps))) : S(0), steep = there ? gate.scale(j) : S(0);
    if (writes && to.dbeta) static_cast<S*>(to.dbeta)[j] = level;
    if (writes && to.dgamma) static_cast<S*>(to.dgamma)[j] = slope * rstd;
    const S low = level / S(a.n), tilt = slope * rstd * rstd / S(a.n);
    const S sum = column_sum<S>(a.n, there, [&](int64_t n) {
      const int64_t at = n * a.h + j;
      S d = du[at];
      if (a.batch_stats) d = d - low - (u[at] - middle) * tilt;
      return du[at] = d * steep;
    }, scratch);
    if (writes && to.db1) static_cast<S*>(to.db1)[j] = sum;
  } else if (writes && to.db1) {
    static_cast<S*>(to.db1)[j] = level;
  }
}

// dA (N, C) in `around`, and the gradients of all parameters.
template <class S, class Sync>
__device__ void gate_backward(const GateArgs& a, const GateGrads& to, int64_t block, int64_t blocks, S* scratch, const Sync& sync) {
  const Gate<S> gate{a};
  const S *const u = gate.hidden(), *const w1 = gate.w1(), *const w2 = gate.w2(), *const pooled = gate.pooled();
  S *const dz = static_cast<S*>(to.dz), *const around = static_cast<S*>(to.around), *const du = static_cast<S*>(to.du);
  S* const centre = static_cast<S*>(to.centre);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  if (!to.summed) {
    const S *const dtau = static_cast<const S*>(to.dtau), *const tau_grad = static_cast<const S*>(to.tau_grad);
    for (int64_t n = block * kWarps + warp; n < a.n; n += blocks * kWarps)
      threshold_grad(gate, pooled + n * a.c, gate.alpha() + n * a.o, dtau + n * a.c,
                     tau_grad ? tau_grad + n * (gate.one_tau() ? 1 : a.c) : nullptr, dz + n * a.o, around + n * a.c);
    sync();
    for (int64_t t = block; t < tiles_of(a.n, a.h); t += blocks)
      product_tile<true, false, S>(
          t, a.n, a.h, 0, a.o, [&](int64_t n, int64_t o) { return dz[n * a.o + o]; },
          [&](int64_t j, int64_t o) { return w2[o * a.h + j]; },
          [&](int64_t n, int64_t j, S sum) {
            const int64_t at = n * a.h + j;
            du[at] = gate.normed(u[at], j) <= S(0) ? S(0) : sum;
          },
          scratch);
    sync();
  }

  // Behind batch statistics the sum of du over the batch is 0 but for rounding, which A, nearly the same for every sample,
  // would multiply in dw1: A less its mean gives the same gradient, more exactly.
  const int64_t units = column_items(a.h), outputs = to.db2 ? column_items(a.o) : 0;
  const int64_t channels = a.batch_stats && to.dw1 ? column_items(a.c) : 0;
  for (int64_t i = block; i < units + outputs + channels; i += blocks) {
    if (i < units) {
      norm_grad(gate, to, i, scratch);
    } else if (i < units + outputs) {
      const int64_t o = (i - units) * kWarp + lane;
      const S sum = column_sum<S>(a.n, o < a.o, [&](int64_t n) { return dz[n * a.o + o]; }, scratch);
      if (o < a.o && warp == 0) static_cast<S*>(to.db2)[o] = sum;
    } else {
      const int64_t c = (i - units - outputs) * kWarp + lane;
      const S sum = column_sum<S>(a.n, c < a.c, [&](int64_t n) { return pooled[n * a.c + c]; }, scratch);
      if (c < a.c && warp == 0) centre[c] = sum / S(a.n);
    }
  }
  if (a.norm) sync();  // without a norm du stays what it was

  const int64_t pooled_tiles = to.summed ? 0 : tiles_of(a.n, a.c);
  const int64_t first_tiles = to.dw1 ? tiles_of(a.h, a.c) : 0, second_tiles = to.dw2 ? tiles_of(a.o, a.h) : 0;
  const int64_t weights = a.h * a.c + a.o * a.h, tiles = first_tiles + second_tiles;
  const int64_t share = (a.n + to.shares - 1) / to.shares;
  S *const partial = static_cast<S*>(to.partial), *const dw1 = static_cast<S*>(to.dw1), *const dw2 = static_cast<S*>(to.dw2);
  for (int64_t i = block; i < pooled_tiles + tiles * to.shares; i += blocks) {
    if (i < pooled_tiles) {
      product_tile<true, false, S>(
          i, a.n, a.c, 0, a.h, [&](int64_t n, int64_t j) { return du[n * a.h + j]; },
          [&](int64_t c, int64_t j) { return w1[j * a.c + c]; },
          [&](int64_t n, int64_t c, S sum) { around[n * a.c + c] += sum; }, scratch);
      continue;
    }
    const int64_t part = (i - pooled_tiles) / tiles, t = (i - pooled_tiles) % tiles;
    const int64_t begin = part * share, end = begin + share < a.n ? begin + share : a.n;
    S* const first = to.shares > 1 ? partial + part * weights : dw1;
    S* const second = to.shares > 1 ? partial + part * weights + a.h * a.c : dw2;
    if (t < first_tiles) {
      product_tile<false, false, S>(
          t, a.h, a.c, begin, end, [&](int64_t j, int64_t n) { return du[n * a.h + j]; },
          [&](int64_t c, int64_t n) { return pooled[n * a.c + c] - (a.batch_stats ? centre[c] : S(0)); },
          [&](int64_t j, int64_t c, S sum) { first[j * a.c + c] = sum; }, scratch);
    } else {
      product_tile<false, false, S>(
          t - first_tiles, a.o, a.h, begin, end, [&](int64_t o, int64_t n) { return dz[n * a.o + o]; },
          [&](int64_t j, int64_t n) { return gate.relu(gate.normed(u[n * a.h + j], j)); },
          [&](int64_t o, int64_t j, S sum) { second[o * a.h + j] = sum; }, scratch);
    }
  }
  if (to.shares == 1) return;
  sync();
  for (int64_t i = block * kThreads + threadIdx.x; i < weights; i += blocks * kThreads) {
    S* const out = i < a.h * a.c ? (dw1 ? dw1 + i : nullptr) : (dw2 ? dw2 + i - a.h * a.c : nullptr);
    if (!out) continue;
    S sum = 0;
    for (int p = 0; p < to.shares; ++p) sum += partial[p * weights + i];
    *out = sum;
  }
}

}  // namespace
}  // namespace drsn

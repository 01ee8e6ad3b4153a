// The shrinkage step whose gate needs no other sample, in one launch: what backends/gpu/one_pass.py does in Triton,
// with the same inputs and outputs, for dense (N, C, L) of float32 or bfloat16 on compute capability 9.0 and later.
//
// Blocks are persistent: samples blockIdx.x / cluster, + gridDim.x / cluster, ... are a cluster's, and C / cluster rows
// of each are a block's. Stages in shared memory hold a sample each and are filled ahead (bulk.h). Results are written
// over the stage and leave by a bulk copy, so a thread can take 32 neighbouring elements, a word of each bit plane, and
// still what goes to memory is contiguous: no shuffle packs bits. The gate's weights are read once and stay in shared
// memory. The blocks of a cluster tell each other the sums of their rows.
//
//   forward    A = mean |x| by row; the gate; y and the planes kept, sign, nonzero (layout.py)
//   backward   dtau by row from g and the planes; back through the gate; dx. dz and dv are for the launch that makes the
//              parameters' gradients (gate.linear_grad_kernel)
//
// plans.one_pass_cu chooses cluster, stages, threads and grid, and says which sizes are taken: L above 16, in rows of a
// multiple of 16 bytes; C, H and the words of a block's planes multiples of 4. Tensors lie at multiples of 16 bytes.
#include "bulk.h"

namespace {

namespace cg = cooperative_groups;

constexpr int kMostThreads = 512;
constexpr unsigned kAllLanes = 0xffffffffu;
enum Average { kNone, kSample, kChannel };  // what alpha is multiplied by: 1, mean_c A, A

struct Sizes {
  int n, c, h, l, outputs, average, stages;  // outputs: alphas a sample, C or 1
  float eps;
};

struct ForwardArguments {  // null where it is not there: residual, tau, all that is kept, all of the norm
  const void* x;
  void* y;
  const void* residual;
  unsigned* planes;
  float *pooled, *state, *tau;
  const float *w1, *b1, *mean, *var, *gamma, *beta, *w2, *b2;
  Sizes sizes;
};

struct BackwardArguments {
  const void* g;
  void* dx;
  const unsigned* planes;
  float *dz, *dv;  // of the logits (N, outputs), of the hidden layer after its norm (N, H)
  const float *tau_grad, *pooled, *state, *w1, *mean, *var, *gamma, *beta, *w2;
  Sizes sizes;
};

// ---- 16 bytes of elements -------------------------------------------------------------------------------------------

template <class T> struct Lanes;
template <> struct Lanes<float> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ void get(uint4 q, float* v) {
    v[0] = __uint_as_float(q.x), v[1] = __uint_as_float(q.y), v[2] = __uint_as_float(q.z), v[3] = __uint_as_float(q.w);
  }
  static __device__ __forceinline__ uint4 put(const float* v) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  }
};
template <> struct Lanes<__nv_bfloat16> {
  static constexpr int kCount = 8;
  static __device__ __forceinline__ void get(uint4 q, float* v) {
    const unsigned w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __uint_as_float(w[i] << 16);
      v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ unsigned pair(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &both, 4);
    return bits;
  }
  static __device__ __forceinline__ uint4 put(const float* v) {
    return make_uint4(pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7]));
  }
};

// v, or -v where bit e of signs is set.
__device__ __forceinline__ float with_sign(float v, unsigned signs, int e) {
  return __uint_as_float(__float_as_uint(v) ^ (signs << (31 - e) & 1u << 31));
}

__device__ __forceinline__ float soft_threshold(float x, float tau) {  // sign(x) * relu(|x| - tau), NaN kept
  const float excess = fabsf(x) - tau, left = excess <= 0 ? 0.0f : excess;
  return x == 0 ? 0.0f * left : copysignf(left, x);  // NaN where left is
}

// ---- rows of a tile, and the threads that share them ----------------------------------------------------------------

__device__ __forceinline__ float sum_of(float v, int lanes) {
  for (int by = lanes / 2; by; by /= 2) v += __shfl_xor_sync(kAllLanes, v, by);
  return v;
}

// f(0) + ... + f(count - 1), by a whole warp.
template <class F> __device__ __forceinline__ float sum_over(int count, F f) {
  float sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += f(k);
  return sum_of(sum, 32);
}

// `lanes` neighbouring threads, a power of two, share a row; they take its words of 32 elements in turn.
struct Rows {
  int count, l, words, lanes, lane, first, step;
  __device__ Rows(int count, int l) : count(count), l(l), words((l + 31) / 32), lanes(1) {
    while (lanes < 32 && lanes < words) lanes *= 2;
    lane = threadIdx.x % lanes, first = threadIdx.x / lanes, step = blockDim.x / lanes;
  }
  // f(row, word): for every word of this thread
  template <class F> __device__ __forceinline__ void each_word(F f) const {
    for (int row = first; row < count; row += step)
      for (int word = lane; word < words; word += lanes) f(row, word);
  }
  // done(row, sum of f(row, word)): in all lanes of the row. The warp stays together, for its shuffles.
  template <class F, class Done> __device__ __forceinline__ void sums(F f, Done done) const {
    for (int top = 0; top < count; top += step) {
      const int row = top + first;
      float sum = 0;
      if (row < count)
        for (int word = lane; word < words; word += lanes) sum += f(row, word);
      sum = sum_of(sum, lanes);
      if (row < count) done(row, sum);
    }
  }
  // f(place, bit): for every 16 bytes of a word, their place in the tile and their first bit in the word. Each word
  // begins with another chunk, or the threads of a warp, 64 or 128 bytes apart, would meet in the same banks.
  template <class T, class F> __device__ __forceinline__ void each_chunk(int row, int word, F f) const {
    constexpr int kCount = Lanes<T>::kCount, kChunks = 32 / kCount;
    const int turn = (row * words + word) * kChunks / 8 % kChunks, at = (row * l + word * 32) / kCount;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int chunk = k ^ turn;
      if (word * 32 + chunk * kCount < l) f(at + chunk, chunk * kCount);
    }
  }
};

// ---- the gate's layers, with weights in shared memory ---------------------------------------------------------------

__device__ __forceinline__ int lanes_each(int rows) {  // lanes for each of so many dot products: a power of two
  int lanes = 32;
  while (lanes > 1 && lanes * rows > int(blockDim.x)) lanes /= 2;
  return lanes;
}

// Element k of row i comes from from[i * row + k * column]. Row i lies turned by i * lanes places, so that the rows
// that a warp reads together meet in different banks.
__device__ __forceinline__ void keep_rows(float* to, const float* from, int rows, int length, int row, int column) {
  const int lanes = lanes_each(rows);
  for (int j = threadIdx.x; j < rows * length; j += blockDim.x) {
    const int i = j / length, k = j % length;
    to[i * length + (k + i * lanes) % length] = from[size_t(i) * row + size_t(k) * column];
  }
}

// done(i, w[i, :] . v) for every row, in one thread each; every warp takes part to the end.
template <class Done>
__device__ __forceinline__ void products(const float* w, const float* v, int rows, int length, Done done) {
  const int lanes = lanes_each(rows), lane = threadIdx.x % lanes;
  for (int top = 0; top < rows; top += blockDim.x / lanes) {
    const int i = top + threadIdx.x / lanes;
    float sum = 0;
    if (i < rows) {
      int place = (lane + i * lanes) % length;
      for (int k = lane; k < length; k += lanes) {
        sum += w[i * length + place] * v[k];
        if ((place += lanes) >= length) place %= length;
      }
    }
    sum = sum_of(sum, lanes);
    if (i < rows && lane == 0) done(i, sum);
  }
}

struct Norm {  // v = (u - center) / scale * weight + shift; without one v = u
  float *center, *scale, *weight, *shift;
  __device__ Norm(Memory& from, int h) {
    center = from.take<float>(h), scale = from.take<float>(h);
    weight = from.take<float>(h), shift = from.take<float>(h);
  }
  __device__ float of(float u, int i) const { return (u - center[i]) / scale[i] * weight[i] + shift[i]; }
  template <class Arguments> __device__ __forceinline__ void keep(const Arguments& p) const {
    for (int i = threadIdx.x; i < p.sizes.h; i += blockDim.x) {
      center[i] = p.mean ? p.mean[i] : 0.0f;
      scale[i] = p.mean ? sqrtf(p.var[i] + p.sizes.eps) : 1.0f;
      weight[i] = p.mean ? p.gamma[i] : 1.0f;
      shift[i] = p.mean ? p.beta[i] : 0.0f;
    }
  }
};

// ---- a block's share, and its cluster -------------------------------------------------------------------------------

struct Share {  // of every sample: the rows of this block, from `row` on
  int blocks, rank, rows, row;
  __device__ explicit Share(int channels) {
    blocks = int(cg::this_cluster().num_blocks()), rank = int(cg::this_cluster().block_rank());
    rows = channels / blocks, row = rank * rows;
  }
  __device__ __forceinline__ void sync() const {  // all that share a sample
    if (blocks > 1) cg::this_cluster().sync();
    else __syncthreads();
  }
  // Writes the value to `to` in every block; the lanes of a row, which all have it, take turns.
  __device__ __forceinline__ void tell(float* to, float value, int lane, int lanes) const {
    if (blocks == 1 && lane == 0) *to = value;
    if (blocks > 1)
      for (int other = lane; other < blocks; other += lanes) *cg::this_cluster().map_shared_rank(to, other) = value;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ void forward(const ForwardArguments& p) {
  SHARED_MEMORY;
  constexpr int kCount = Lanes<T>::kCount;
  const Sizes& s = p.sizes;
  const Share mine(s.c);
  const Rows rows(mine.rows, s.l);
  const bool one = s.outputs == 1, one_tau = one && s.average != kChannel;
  const int alphas_kept = one ? 1 : mine.rows, first_alpha = one ? 0 : mine.row, part = mine.rows * s.l;
  const unsigned bytes = unsigned(part * sizeof(T));
  const size_t plane = size_t(s.n) * s.c * rows.words;

  Memory from{memory};
  Ring ring(from, s.stages, int(bytes) * (p.residual ? 2 : 1), blockIdx.x / mine.blocks, gridDim.x / mine.blocks, s.n);
  float *const w1 = from.take<float>(s.h * s.c), *const w2 = from.take<float>(alphas_kept * s.h);
  float *const b1 = from.take<float>(s.h), *const b2 = from.take<float>(alphas_kept), *const r = from.take<float>(s.h);
  const Norm norm(from, s.h);
  float *const averages = from.take<float>(2 * s.c), *const alphas = from.take<float>(alphas_kept);
  float* const mean = from.take<float>(1);  // of A over channels

  const auto fill = [&](int64_t i, unsigned char* stage, uint64_t* full) {
    const size_t at = (size_t(i) * s.c + mine.row) * s.l;
    barrier_expect(full, p.residual ? 2 * bytes : bytes);
    load_bulk(stage, static_cast<const T*>(p.x) + at, bytes, full);
    if (p.residual) load_bulk(stage + bytes, static_cast<const T*>(p.residual) + at, bytes, full);
  };
  ring.begin(fill);
  keep_rows(w1, p.w1, s.h, s.c, s.c, 1);
  keep_rows(w2, p.w2 + size_t(first_alpha) * s.h, alphas_kept, s.h, s.h, 1);
  for (int k = threadIdx.x; k < s.h; k += blockDim.x) b1[k] = p.b1[k];
  for (int k = threadIdx.x; k < alphas_kept; k += blockDim.x) b2[k] = p.b2[first_alpha + k];
  norm.keep(p);
  mine.sync();  // the other blocks have begun, too

  float* a = averages;  // two in turn: a neighbour may be a sample ahead when it tells its averages
  for (; ring.sample < s.n; ring.next(), a = a == averages ? averages + s.c : averages) {
    const int64_t i = ring.sample, row0 = i * s.c + mine.row;
    uint4* const tile = reinterpret_cast<uint4*>(ring.wait());
    rows.sums(
        [&](int row, int word) {
          float sum = 0;
          rows.each_chunk<T>(row, word, [&](int k, int) {
            float v[kCount];
            Lanes<T>::get(tile[k], v);
#pragma unroll
            for (int e = 0; e < kCount; ++e) sum += fabsf(v[e]);
          });
          return sum;
        },
        [&](int row, float sum) {
          mine.tell(&a[mine.row + row], sum / s.l, rows.lane, rows.lanes);
          if (p.pooled && rows.lane == 0) p.pooled[row0 + row] = sum / s.l;
        });
    mine.sync();
    ring.refill(fill);
    if (s.average == kSample && threadIdx.x < 32) {
      const float sum = sum_over(s.c, [&](int k) { return a[k]; });
      if (threadIdx.x == 0) *mean = sum / s.c;
    }
    products(w1, a, s.h, s.c, [&](int k, float sum) {
      const float u = sum + b1[k], v = norm.of(u, k);
      r[k] = v <= 0 ? 0.0f : v;  // NaN stays
      if (p.state && mine.rank == 0) p.state[i * s.h + k] = u;
    });
    __syncthreads();
    products(w2, r, alphas_kept, s.h, [&](int k, float sum) {
      alphas[k] = 1.0f / (1.0f + expf(-(sum + b2[k])));
      if (p.state && !(one && mine.rank)) p.state[size_t(s.n) * s.h + i * s.outputs + first_alpha + k] = alphas[k];
    });
    __syncthreads();
    rows.each_word([&](int row, int word) {
      const float average = s.average == kChannel ? a[mine.row + row] : s.average == kSample ? *mean : 1.0f;
      const float tau = alphas[one ? 0 : row] * average;
      if (p.tau && word == 0 && !(one_tau && mine.row + row)) p.tau[one_tau ? i : row0 + row] = tau;
      unsigned kept = 0, sign = 0, nonzero = 0;
      rows.each_chunk<T>(row, word, [&](int k, int bit) {
        float v[kCount], more[kCount];
        Lanes<T>::get(tile[k], v);
        if (p.planes) {
          unsigned keeps = 0, signs = 0, values = 0;
#pragma unroll
          for (int e = 0; e < kCount; ++e) {
            if (v[e] != 0) values |= 1u << e;
            if (v[e] != 0 && !(fabsf(v[e]) <= tau)) keeps |= 1u << e;
            signs |= __float_as_uint(v[e]) >> 31 << e;
          }
          kept |= keeps << bit, sign |= signs << bit, nonzero |= values << bit;
        }
        if (p.residual) Lanes<T>::get(tile[k + part / kCount], more);
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
          v[e] = soft_threshold(v[e], tau);
          if (p.residual) v[e] += more[e];
        }
        tile[k] = Lanes<T>::put(v);
      });
      if (p.planes) {
        unsigned* const to = p.planes + (row0 + row) * rows.words + word;
        to[0] = kept, to[plane] = sign, to[2 * plane] = nonzero;
      }
    });
    ring.send(static_cast<T*>(p.y) + row0 * s.l, bytes);
  }
  ring.finish();
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ void backward(const BackwardArguments& p) {
  SHARED_MEMORY;
  constexpr int kCount = Lanes<T>::kCount;
  const Sizes& s = p.sizes;
  const Share mine(s.c);
  const Rows rows(mine.rows, s.l);
  const bool one = s.outputs == 1, one_tau = one && s.average != kChannel;
  const bool tau_grads = p.tau_grad && !one_tau;  // (N, C) of them
  const int words = mine.rows * rows.words;
  const unsigned bytes = unsigned(mine.rows * s.l * sizeof(T)), vector = unsigned(4 * s.c);
  const size_t plane = size_t(s.n) * s.c * rows.words;
  const float* const all_alphas = p.state + size_t(s.n) * s.h;

  // a stage: g, three planes, u, A, alpha, the gradient of tau
  const unsigned u_at = bytes + 3 * 4 * words, a_at = u_at + 4 * s.h, alpha_at = a_at + vector;
  const unsigned grad_at = alpha_at + (one ? 0 : vector), stage_bytes = grad_at + (tau_grads ? vector : 0);
  Memory from{memory};
  Ring ring(from, s.stages, int(stage_bytes), blockIdx.x / mine.blocks, gridDim.x / mine.blocks, s.n);
  float *const w2 = from.take<float>(s.h * s.outputs), *const w1 = from.take<float>(mine.rows * s.h);  // transposed
  const Norm norm(from, s.h);
  float *const sums = from.take<float>(2 * s.c), *const dz = from.take<float>(s.outputs);
  float *const du = from.take<float>(s.h), *const shares = from.take<float>(mine.rows);
  float* const totals = from.take<float>(2);

  const auto fill = [&](int64_t i, unsigned char* stage, uint64_t* full) {
    const size_t row = size_t(i) * s.c + mine.row;
    barrier_expect(full, stage_bytes);
    load_bulk(stage, static_cast<const T*>(p.g) + row * s.l, bytes, full);
    for (int k = 0; k < 3; ++k)
      load_bulk(stage + bytes + k * 4 * words, p.planes + k * plane + row * rows.words, 4 * words, full);
    load_bulk(stage + u_at, p.state + i * s.h, 4 * s.h, full);
    load_bulk(stage + a_at, p.pooled + i * s.c, vector, full);
    if (!one) load_bulk(stage + alpha_at, all_alphas + i * s.c, vector, full);
    if (tau_grads) load_bulk(stage + grad_at, p.tau_grad + i * s.c, vector, full);
  };
  ring.begin(fill);
  keep_rows(w2, p.w2, s.h, s.outputs, 1, s.h);
  keep_rows(w1, p.w1 + mine.row, mine.rows, s.h, 1, s.c);
  norm.keep(p);
  mine.sync();

  float* d = sums;  // two in turn, as forward's averages
  for (; ring.sample < s.n; ring.next(), d = d == sums ? sums + s.c : sums) {
    const int64_t i = ring.sample, row0 = i * s.c + mine.row;
    const float alone = one ? all_alphas[i] : 0.0f;  // where there is one alpha; one gradient of tau
    const float own = one_tau && p.tau_grad ? p.tau_grad[i] : 0.0f;
    unsigned char* const stage = ring.wait();
    uint4* const tile = reinterpret_cast<uint4*>(stage);
    const unsigned* const planes = reinterpret_cast<const unsigned*>(stage + bytes);
    const auto vector_at = [&](unsigned at) { return reinterpret_cast<const float*>(stage + at); };
    const float *const u = vector_at(u_at), *const a = vector_at(a_at), *const alphas = vector_at(alpha_at);
    const auto alpha_of = [&](int k) { return one ? alone : alphas[k]; };
    const auto d_of = [&](int k) { return tau_grads ? d[k] + vector_at(grad_at)[k] : d[k]; };
    rows.sums(
        [&](int row, int word) {
          const unsigned* const at = planes + row * rows.words + word;
          const unsigned kept = at[0], sign = at[words];
          float sum = 0;
          rows.each_chunk<T>(row, word, [&](int k, int bit) {
            const unsigned keeps = kept >> bit, signs = sign >> bit;
            float v[kCount];
            Lanes<T>::get(tile[k], v);
#pragma unroll
            for (int e = 0; e < kCount; ++e)
              if (keeps & 1u << e) sum += with_sign(v[e], signs, e);
          });
          return sum;
        },
        [&](int row, float sum) { mine.tell(&d[mine.row + row], -sum, rows.lane, rows.lanes); });
    mine.sync();
    ring.refill(fill);
    if ((one || s.average == kSample) && threadIdx.x < 32) {  // what channels share: a gradient, and the average of A
      const auto part = [&](int k) { return d_of(k) * (s.average == kChannel ? a[k] : one ? 1.0f : alphas[k]); };
      const float total = sum_over(s.c, part), sum = sum_over(s.c, [&](int k) { return a[k]; });
      if (threadIdx.x == 0) totals[0] = total + own, totals[1] = sum / s.c;
    }
    if (!one && s.average == kSample) __syncthreads();  // the gradient of one alpha is thread 0's, as the totals are
    for (int k = threadIdx.x; k < s.outputs; k += blockDim.x) {
      const float average = s.average == kSample ? totals[1] : s.average == kChannel && !one ? a[k] : 1.0f;
      dz[k] = (one ? totals[0] : d_of(k)) * average * (alpha_of(k) * (1 - alpha_of(k)));
      if (mine.rank == 0) p.dz[i * s.outputs + k] = dz[k];
    }
    __syncthreads();
    products(w2, dz, s.h, s.outputs, [&](int k, float sum) {
      const float dv = norm.of(u[k], k) > 0 ? sum : 0.0f;
      du[k] = dv * (norm.weight[k] / norm.scale[k]);
      if (mine.rank == 0) p.dv[i * s.h + k] = dv;
    });
    __syncthreads();
    products(w1, du, mine.rows, s.h, [&](int k, float sum) {
      float direct = 0;  // A's gradient as the average
      if (s.average == kChannel) direct = d_of(mine.row + k) * alpha_of(mine.row + k);
      if (s.average == kSample) direct = totals[0] * (one ? alone : 1.0f) / s.c;
      shares[k] = (sum + direct) / s.l;
    });
    __syncthreads();
    rows.each_word([&](int row, int word) {
      const unsigned* const at = planes + row * rows.words + word;
      const unsigned kept = at[0], sign = at[words], nonzero = at[2 * words];
      const float share = shares[row];
      rows.each_chunk<T>(row, word, [&](int k, int bit) {
        const unsigned keeps = kept >> bit, signs = sign >> bit, values = nonzero >> bit;
        float v[kCount];
        Lanes<T>::get(tile[k], v);
#pragma unroll
        for (int e = 0; e < kCount; ++e)
          v[e] = (keeps & 1u << e ? v[e] : 0.0f) + (values & 1u << e ? with_sign(share, signs, e) : 0.0f);
        tile[k] = Lanes<T>::put(v);
      });
    });
    ring.send(static_cast<T*>(p.dx) + row0 * s.l, bytes);
  }
  ring.finish();
}

}  // namespace

#define KERNEL extern "C" __global__ void __launch_bounds__(kMostThreads, 2)  // at most 64 registers
KERNEL one_pass_forward_float32(const __grid_constant__ ForwardArguments p) { forward<float>(p); }
KERNEL one_pass_forward_bfloat16(const __grid_constant__ ForwardArguments p) { forward<__nv_bfloat16>(p); }
KERNEL one_pass_backward_float32(const __grid_constant__ BackwardArguments p) { backward<float>(p); }
KERNEL one_pass_backward_bfloat16(const __grid_constant__ BackwardArguments p) { backward<__nv_bfloat16>(p); }

// reduce, apply and grad over whole tensors of any size and layout: one launch each, and a short one that adds partial
// sums where too few rows would leave the GPU idle.
#include "api.h"
#include "dispatch.h"
#include "launch.h"
#include "operations.h"

namespace drsn {
namespace {

struct Share {
  int lanes;      // threads a row, or along the channels
  int parts;      // of a row; channels_last: of a sample
  int64_t piece;  // elements of a part; channels_last: rows
  int64_t tiles;  // channels_last: of channels
};

// `parts` 0: where nothing is summed, a block for each step.
template <int V> Share share_out(const Walk& w, int parts) {
  int lanes;
  int64_t step, tiles = 1;
  if (w.channels_last) {
    lanes = lanes_along_channels<V>(w.c);
    step = int64_t(kThreads / lanes) * kUnroll<V>;
    tiles = (w.c + lanes * V - 1) / (lanes * V);
  } else {
    lanes = lanes_for<V>(w.l, kThreads);
    step = int64_t(lanes) * V * kUnroll<V>;
  }
  const int64_t steps = (w.l + step - 1) / step;
  if (!parts) parts = int(steps);
  return {lanes, parts, (steps + parts - 1) / parts * step, tiles};
}

int64_t blocks_of(const Walk& w, const Share& s) {
  if (w.l == 0 || w.c == 0) return 0;
  if (w.channels_last) return w.n * s.tiles * s.parts;
  const int64_t teams = kThreads / s.lanes;
  return (w.n * w.c + teams - 1) / teams * s.parts;
}

// `make(part)` is the operation for one part of the rows.
template <int V, class Make> __device__ __forceinline__ void walk(const Make& make, const Walk& w, const Share& s, int64_t block) {
  using Op = decltype(make(0));
  DRSN_SHARED(typename Op::S, scratch);
  const int64_t part = block % s.parts, at = block / s.parts;
  const Op op = make(part);
  if (w.channels_last) {
    const int64_t first = part * s.piece, last = first + s.piece < w.l ? first + s.piece : w.l;
    walk_columns<V>(op, w, at / s.tiles, first, last, at % s.tiles * s.lanes * V, s.lanes, scratch);
  } else {
    const int64_t teams = kThreads / s.lanes, first = at * teams, rows = w.n * w.c;
    const int64_t begin = part * s.piece, end = begin + s.piece < w.l ? begin + s.piece : w.l;
    walk_rows<V>(op, w, first, first + teams < rows ? first + teams : rows, s.lanes, begin, end, scratch);
  }
}

template <class T, int V, bool STRIDED, bool PRODUCTS>
__global__ void __launch_bounds__(kThreads, V > 1 ? 3 : 2) reduce_kernel(const __grid_constant__ ReduceArgs a, Share s, Number<T>* out) {
  const Number<T> share = PRODUCTS ? Number<T>(1) : Number<T>(1) / Number<T>(a.walk.l);
  const auto make = [&](int64_t part) {
    return Reduce<T, V, STRIDED, PRODUCTS>{static_cast<const T*>(a.x), &a.xs, 0, out + part * a.walk.n * a.walk.c, a.walk.c,
                                           share, a.sign, a.nonzero, a.sum == Sum::values, static_cast<const T*>(a.times), &a.ts};
  };
  walk<V>(make, a.walk, s, blockIdx.x);
}

// Backwards through the tensor: what reduce, going forwards, has read last is still in L2.
template <class T, int V, bool STRIDED, bool ANY_MAP>
__global__ void __launch_bounds__(kThreads, V == 8 && !ANY_MAP ? 3 : 2) apply_kernel(const __grid_constant__ ApplyArgs a, Share s) {
  using S = Number<T>;
  const auto make = [&](int64_t) {
    return Apply<T, V, STRIDED, 2, ANY_MAP>{
        static_cast<const T*>(a.x), &a.xs, 0, static_cast<T*>(a.y), &a.ys, static_cast<const T*>(a.residual), &a.rs,
        static_cast<const S*>(a.tau), a.tau_n, a.tau_c, a.kept, a.sign, nullptr, a.walk.channels_last,
        a.map, S(a.inside), S(a.offset), static_cast<const S*>(a.shift), a.walk.c, S(1) / S(a.walk.l)};
  };
  walk<V>(make, a.walk, s, gridDim.x - 1 - blockIdx.x);
}

template <class T, int V, bool STRIDED, bool LEAKY>
__global__ void __launch_bounds__(kThreads, V > 1 ? 3 : 2) grad_kernel(const __grid_constant__ GradArgs a, Share s, Number<T>* dtau) {
  using S = Number<T>;
  const auto make = [&](int64_t part) {
    return Grad<T, V, STRIDED, LEAKY>{
        static_cast<const T*>(a.g), &a.gs, 0, static_cast<const S*>(a.da), a.walk.c, S(1) / S(a.walk.l), static_cast<T*>(a.dx),
        &a.ds, dtau ? dtau + part * a.walk.n * a.walk.c : nullptr, a.walk.c, a.kept, a.sign, a.nonzero, a.walk.channels_last,
        S(a.inside), S(a.offset)};
  };
  walk<V>(make, a.walk, s, a.dtau ? blockIdx.x : gridDim.x - 1 - blockIdx.x);  // forwards first, then backwards
}

template <class S> __global__ void __launch_bounds__(kThreads, 2) sum_parts_kernel(const S* partial, S* out, int64_t count, int parts) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  S total = 0;
  for (int p = 0; p < parts; ++p) total += partial[p * count + i];
  out[i] = total;
}

// ---- host ------------------------------------------------------------------------------------------------------------

bool is_dense(const Walk& w, const Strides& s) {
  if (s.dims > 1) return false;
  const bool row = s.dims == 0 || s.stride[0] == (w.channels_last ? w.c : 1);
  return row && (w.c == 1 || s.c == (w.channels_last ? 1 : w.l)) && (w.n == 1 || s.n == w.c * w.l);
}

template <class T> bool is_wide(const Walk& w, const void* p, const Strides& s) {
  return !p || (is_wide<T>(w, p) && is_dense(w, s));
}

template <int V, class S> size_t scratch_bytes(const Walk& w) {
  return (w.channels_last ? kThreads * V : kThreads / kWarp) * sizeof(S);
}

template <class S> void add_up(const Walk& w, int parts, void* partial, void* out, cudaStream_t stream) {
  const int64_t count = w.n * w.c;
  if (parts > 1)
    launch<sum_parts_kernel<S>>({"sum_parts", w, (count + kThreads - 1) / kThreads, kThreads}, stream,
                                static_cast<const S*>(partial), static_cast<S*>(out), count, parts);
}

}  // namespace

void reduce(const ReduceArgs& a, int parts, void* partial, cudaStream_t stream) {
  for_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Number<T>;
    const auto run = [&](auto means, auto products, auto width) {
      constexpr int V = decltype(width)::value;
      const Share s = share_out<V>(a.walk, parts);
      const Launch at{"reduce", a.walk, blocks_of(a.walk, s), kThreads, scratch_bytes<V, S>(a.walk)};
      S* const out = static_cast<S*>(parts > 1 ? partial : a.out);
      if (a.sum == Sum::products) return launch<decltype(products)::value>(at, stream, a, s, out);
      launch<decltype(means)::value>(at, stream, a, s, out);
    };
    constexpr int W = kWidest<T>;
    if (W > 1 && is_wide<T>(a.walk, a.x, a.xs) && is_wide<T>(a.walk, a.times, a.ts))
      run(Constant<reduce_kernel<T, W, W == 1, false>>(), Constant<reduce_kernel<T, W, W == 1, true>>(), Constant<W>());
    else
      run(Constant<reduce_kernel<T, 1, true, false>>(), Constant<reduce_kernel<T, 1, true, true>>(), Constant<1>());
    add_up<S>(a.walk, parts, partial, a.out, stream);
  });
}

void apply(const ApplyArgs& a, cudaStream_t stream) {
  for_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto soft, auto any, auto width) {
      constexpr int V = decltype(width)::value;
      const Share s = share_out<V>(a.walk, 0);
      const Launch at{"apply", a.walk, blocks_of(a.walk, s), kThreads, scratch_bytes<V, Number<T>>(a.walk)};
      if (a.map == Map::soft) return launch<decltype(soft)::value>(at, stream, a, s);
      launch<decltype(any)::value>(at, stream, a, s);
    };
    constexpr int W = kWidest<T>;
    if (W > 1 && is_wide<T>(a.walk, a.x, a.xs) && is_wide<T>(a.walk, a.y, a.ys) && is_wide<T>(a.walk, a.residual, a.rs))
      run(Constant<apply_kernel<T, W, W == 1, false>>(), Constant<apply_kernel<T, W, W == 1, true>>(), Constant<W>());
    else
      run(Constant<apply_kernel<T, 1, true, false>>(), Constant<apply_kernel<T, 1, true, true>>(), Constant<1>());
  });
}

void grad(const GradArgs& a, int parts, void* partial, cudaStream_t stream) {
  for_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Number<T>;
    const auto run = [&](auto soft, auto leaky, auto width) {
      constexpr int V = decltype(width)::value;
      const Share s = share_out<V>(a.walk, a.dtau ? parts : 0);
      const Launch at{"grad", a.walk, blocks_of(a.walk, s), kThreads, scratch_bytes<V, S>(a.walk)};
      S* const dtau = static_cast<S*>(a.dtau && parts > 1 ? partial : a.dtau);
      if (a.inside == 0 && a.offset == 1) return launch<decltype(soft)::value>(at, stream, a, s, dtau);
      launch<decltype(leaky)::value>(at, stream, a, s, dtau);
    };
    constexpr int W = kWidest<T>;
    if (W > 1 && is_wide<T>(a.walk, a.g, a.gs) && is_wide<T>(a.walk, a.dx, a.ds))
      run(Constant<grad_kernel<T, W, W == 1, false>>(), Constant<grad_kernel<T, W, W == 1, true>>(), Constant<W>());
    else
      run(Constant<grad_kernel<T, 1, true, false>>(), Constant<grad_kernel<T, 1, true, true>>(), Constant<1>());
    if (a.dtau) add_up<S>(a.walk, parts, partial, a.dtau, stream);
  });
}

std::string no_code_for_this_device() {
#if defined(DRSN_EMULATION)
  return "";
#else
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, sum_parts_kernel<float>);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
#endif
}

}  // namespace drsn

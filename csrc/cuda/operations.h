// The three kernels of every backend, V elements at a time: what is read, computed and written (walk.h calls them).
//
//   Reduce   A = mean |x|, or mean x, and planes sign, nonzero; PRODUCTS: sum x * times
//   Apply    y = soft_threshold(x, tau) [+ residual]; planes kept, sign (on chip also nonzero); ANY_MAP: by another rule,
//            or x * tau [+ residual] [+ shift]
//   Grad     dx = kept * g + s * dA / L and / or dtau = - sum s * kept * g; LEAKY: by another rule
//
// The soft threshold has kernels of its own, so that the others cost it nothing.
// `origin` is where a tensor begins that lies on chip, as an offset in the whole one.
#pragma once

#include "walk.h"

namespace drsn {
namespace {

template <class T, int V, bool STRIDED = false, bool PRODUCTS = false> struct Reduce {
  using S = Number<T>;
  static constexpr int kPlanes = PRODUCTS ? 1 : 2, kWritten = PRODUCTS ? 0 : 2;
  struct Nothing {};
  struct Data {
    Pack<T, V> x, times;
  };

  const T* x;
  const Strides* xs;
  int64_t origin;
  S* out;         // A of (n, c) at n * out_n + c
  int64_t out_n;
  S share;        // 1 / L, or 1
  uint8_t *sign, *nonzero;
  bool signed_sum;  // of x, not |x|
  const T* times;
  const Strides* ts;

  __device__ bool sums() const { return true; }
  __device__ uint8_t* plane(int p) const { return p == 0 ? sign : nonzero; }
  __device__ Nothing begin(int64_t, int64_t, bool) const { return {}; }
  __device__ __forceinline__ Data fetch(const Place& at) const {
    Data data{};
    if (!at.live) return data;
    data.x = load<V>(x + (offset_of<STRIDED>(xs, at) - origin));
    if constexpr (PRODUCTS) data.times = load<V>(times + offset_of<STRIDED>(ts, at));
    return data;
  }
  template <int K>
  __device__ __forceinline__ void step(const Place&, Nothing, const Data& data, S (&sum)[K], uint32_t (&bits)[kPlanes]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Lane<S> a{S(widen(data.x.at[v]))};
      if constexpr (PRODUCTS) {
        sum[K == 1 ? 0 : v] += a.v * S(widen(data.times.at[v]));
      } else {
        sum[K == 1 ? 0 : v] += signed_sum ? a.v : a.abs().v;
        bits[0] |= uint32_t(a.negative()) << v;
        bits[1] |= uint32_t(a.nonzero()) << v;
      }
    }
  }
  __device__ void finish(int64_t n, int64_t c, S sum) const { out[n * out_n + c] = sum * share; }
};

template <class T, int V, bool STRIDED = false, int PLANES = 2, bool ANY_MAP = false> struct Apply {
  using S = Number<T>;
  static constexpr int kPlanes = PLANES, kWritten = PLANES;
  struct Data {
    Pack<T, V> x, residual;
  };

  const T* x;
  const Strides* xs;
  int64_t origin;
  T* y;
  const Strides* ys;
  const T* residual;
  const Strides* rs;
  const S* tau;
  int64_t tau_n, tau_c;
  uint8_t *kept, *sign, *nonzero;
  bool channels_last;
  Map map;
  S inside, offset;  // of Map::pieces
  const S* shift;    // of (n, c) at n * C + c, times share
  int64_t shift_n;
  S share;

  __device__ bool sums() const { return false; }
  __device__ uint8_t* plane(int p) const { return p == 0 ? kept : p == 1 ? sign : nonzero; }
  struct Thresholds {
    S tau[V];
    S shift[ANY_MAP ? V : 1];
  };
  __device__ __forceinline__ Thresholds begin(int64_t n, int64_t c, bool there) const {
    Thresholds given{};
    if (!there) return given;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v == 0 || channels_last) given.tau[v] = tau[n * tau_n + (c + v) * tau_c];
    if (!channels_last)
#pragma unroll
      for (int v = 1; v < V; ++v) given.tau[v] = given.tau[0];
    if constexpr (ANY_MAP)
      if (shift)
#pragma unroll
        for (int v = 0; v < V; ++v) given.shift[v] = share * shift[n * shift_n + c + (channels_last ? v : 0)];
    return given;
  }
  __device__ __forceinline__ Data fetch(const Place& at) const {
    Data data{};
    if (!at.live) return data;
    data.x = load<V>(x + (offset_of<STRIDED>(xs, at) - origin));
    if (residual) data.residual = load<V>(residual + offset_of<STRIDED>(rs, at));
    return data;
  }
  template <int K>
  __device__ __forceinline__ void step(const Place& at, const Thresholds& given, const Data& data, S (&)[K],
                                       uint32_t (&bits)[kPlanes]) const {
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Lane<S> a{S(widen(data.x.at[v]))}, threshold{given.tau[v]};
      bool above = false;
      S value;
      if constexpr (ANY_MAP) {
        if (map == Map::scale) {
          value = a.v * threshold.v + given.shift[v];
        } else {
          value = piecewise(a, threshold, Lane<S>{inside}, Lane<S>{offset}, above).v;
        }
      } else {
        value = soft_threshold(a, threshold, above).v;
      }
      if (residual) value += S(widen(data.residual.at[v]));
      narrow(value, out.at[v]);
      const bool live = at.live;
      bits[0] |= uint32_t(live && above) << v;
      bits[1] |= uint32_t(live && a.negative()) << v;
      if constexpr (PLANES == 3) bits[2] |= uint32_t(live && a.nonzero()) << v;
    }
    if (at.live) store(y + offset_of<STRIDED>(ys, at), out);
  }
  __device__ void finish(int64_t, int64_t, S) const {}
};

template <class T, int V, bool STRIDED = false, bool LEAKY = false> struct Grad {
  using S = Number<T>;
  static constexpr int kPlanes = 1, kWritten = 0;
  struct Data {
    Pack<T, V> g;
    uint32_t kept, sign, nonzero;
  };

  const T* g;
  const Strides* gs;
  int64_t origin;
  const S* da;  // of (n, c) at n * da_n + c
  int64_t da_n;
  S share;  // 1 / L
  T* dx;
  const Strides* ds;
  S* dtau;
  int64_t dtau_n;
  const uint8_t *kept, *sign, *nonzero;
  bool channels_last;
  S inside, offset;  // LEAKY

  __device__ bool sums() const { return dtau != nullptr; }
  __device__ uint8_t* plane(int) const { return nullptr; }
  struct Direct {
    S share[V];
  };
  __device__ __forceinline__ Direct begin(int64_t n, int64_t c, bool there) const {
    Direct given{};
    if (!there || !da) return given;
#pragma unroll
    for (int v = 0; v < V; ++v)
      if (v == 0 || channels_last) given.share[v] = da[n * da_n + c + v] * share;
    if (!channels_last)
#pragma unroll
      for (int v = 1; v < V; ++v) given.share[v] = given.share[0];
    return given;
  }
  __device__ __forceinline__ Data fetch(const Place& at) const {
    Data data{};
    if (!at.live) return data;
    if (g) {
      data.g = load<V>(g + (offset_of<STRIDED>(gs, at) - origin));
      data.kept = read_bits<V>(kept, at.bit);
    }
    if (da || dtau) data.sign = read_bits<V>(sign, at.bit);
    if (da) data.nonzero = read_bits<V>(nonzero, at.bit);
    return data;
  }
  template <int K>
  __device__ __forceinline__ void step(const Place& at, const Direct& given, const Data& data, S (&sum)[K],
                                       uint32_t (&)[kPlanes]) const {
    Pack<T, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const bool negative = data.sign >> v & 1;
      const Lane<S> whole{S(widen(data.g.at[v]))}, masked = whole.keep(data.kept >> v & 1);
      sum[K == 1 ? 0 : v] -= masked.negate(negative).v;
      S value = masked.v;
      if constexpr (LEAKY) value = data.kept >> v & 1 ? value : inside * whole.v;
      if (da) value += direct_grad(Lane<S>{given.share[v]}, negative, bool(data.nonzero >> v & 1)).v;
      narrow(value, out.at[v]);
    }
    if (dx && at.live) store(dx + offset_of<STRIDED>(ds, at), out);
  }
  __device__ void finish(int64_t n, int64_t c, S sum) const { dtau[n * dtau_n + c] = LEAKY ? offset * sum : sum; }
};

}  // namespace
}  // namespace drsn

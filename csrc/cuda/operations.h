// The three kernels of every backend, V elements at a time: what is read, computed and written (walk.h calls them).
//
//   Reduce   A = mean |x|; planes sign, nonzero
//   Apply    y = soft_threshold(x, tau) [+ residual]; planes kept, sign (on chip also nonzero)
//   Grad     dx = kept * g + s * dA / L and / or dtau = - sum s * kept * g
//
// `origin` is where a tensor begins that lies on chip, as an offset in the whole one.
#pragma once

#include "walk.h"

namespace drsn {
namespace {

template <class T, int V, bool STRIDED = false> struct Reduce {
  using S = Number<T>;
  static constexpr int kPlanes = 2, kWritten = 2;
  struct Nothing {};
  using Data = Pack<T, V>;

  const T* x;
  const Strides* xs;
  int64_t origin;
  S* out;         // A of (n, c) at n * out_n + c
  int64_t out_n;
  S share;        // 1 / L
  uint8_t *sign, *nonzero;

  __device__ bool sums() const { return true; }
  __device__ uint8_t* plane(int p) const { return p == 0 ? sign : nonzero; }
  __device__ Nothing begin(int64_t, int64_t, bool) const { return {}; }
  __device__ __forceinline__ Data fetch(const Place& at) const {
    if (at.live) return load<V>(x + (offset_of<STRIDED>(xs, at) - origin));
    return {};
  }
  template <int K>
  __device__ __forceinline__ void step(const Place&, Nothing, const Data& data, S (&sum)[K], uint32_t (&bits)[kPlanes]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Lane<S> a{S(widen(data.at[v]))};
      sum[K == 1 ? 0 : v] += a.abs().v;
      bits[0] |= uint32_t(a.negative()) << v;
      bits[1] |= uint32_t(a.nonzero()) << v;
    }
  }
  __device__ void finish(int64_t n, int64_t c, S sum) const { out[n * out_n + c] = sum * share; }
};

template <class T, int V, bool STRIDED = false, int PLANES = 2> struct Apply {
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

  __device__ bool sums() const { return false; }
  __device__ uint8_t* plane(int p) const { return p == 0 ? kept : p == 1 ? sign : nonzero; }
  struct Thresholds {
    S tau[V];
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
      bool above;
      S value = soft_threshold(a, threshold, above).v;
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

template <class T, int V, bool STRIDED = false> struct Grad {
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
      const Lane<S> masked = Lane<S>{S(widen(data.g.at[v]))}.keep(data.kept >> v & 1);
      sum[K == 1 ? 0 : v] -= masked.negate(negative).v;
      S value = masked.v;
      if (da) value += direct_grad(Lane<S>{given.share[v]}, negative, bool(data.nonzero >> v & 1)).v;
      narrow(value, out.at[v]);
    }
    if (dx && at.live) store(dx + offset_of<STRIDED>(ds, at), out);
  }
  __device__ void finish(int64_t n, int64_t c, S sum) const { dtau[n * dtau_n + c] = sum; }
};

}  // namespace
}  // namespace drsn

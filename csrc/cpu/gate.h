// The standard gate (drsn_kernels/gates.py) and its gradients, S being float or double:
//
//   u = A w1' + b1        v = relu(u * scale + shift)        z = v w2' + b2        alpha = sigmoid(z)
//   tau = alpha * M       M = A ("channel"), mean_c A ("sample"), 1 (none)
//
// scale and shift are BatchNorm's: gamma / sqrt(var + eps) and beta - mean * scale, or 1 and 0 without a norm.
#pragma once

#include <cmath>

#include "product.h"

namespace drsn {
namespace {

template <class S> const S* in(const void* p) { return static_cast<const S*>(p); }
template <class S> S* out(void* p) { return static_cast<S*>(p); }

template <class V> DRSN_INLINE V relu(V a) { return a.keep(V::not_le(a, V::set(0))); }  // keeps NaN

// 1 / (1 + exp(-z)) to about 2 units in the last place, 0 where it is less than 4.2e-39; exp after Cephes. 8 times as fast
// as a loop over expf.
DRSN_INLINE Vec<float> sigmoid(Vec<float> z) {
  using V = Vec<float>;
  const V x = V::clamp(V::set(0) - z, -87.0f, 89.0f), magic = V::set(12582912.0f);  // adding 1.5 * 2^23 rounds
  const V n = V::fma(x, V::set(1.44269504088896341f), magic) - magic;
  V r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  V p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::fma(p, r * r, r + V::set(1));
  return V::set(1) / V::fma(p, V::power2(n), V::set(1));
}
DRSN_INLINE Vec<double> sigmoid(Vec<double> z) {
  constexpr int W = Vec<double>::W;
  double lanes[W];
  z.store(lanes);
  for (int i = 0; i < W; ++i) lanes[i] = 1 / (1 + ::exp(-lanes[i]));
  return Vec<double>::load(lanes);
}

// out[k][j] = sum_i of value k at (i, j), for one vector of columns: sums of kFlush rows in S, of these in double.
// value(i, sums) adds to sums[k].
template <int K, class S, class F> DRSN_INLINE void sum_column(int64_t rows, double (*total)[Vec<S>::W], const F& value) {
  using V = Vec<S>;
  for (int k = 0; k < K; ++k)
    for (int w = 0; w < V::W; ++w) total[k][w] = 0;
  for (int64_t i = 0; i < rows;) {
    V sums[K];
    for (auto& s : sums) s = V::set(0);
    for (const int64_t stop = min64(i + kFlush, rows); i < stop; ++i) value(i, sums);
    for (int k = 0; k < K; ++k) {
      S lanes[V::W];
      sums[k].store(lanes);
      for (int w = 0; w < V::W; ++w) total[k][w] += lanes[w];
    }
  }
}

// Calls column(first, lanes) for vectors of columns, in parallel.
template <class S, class F> void each_column(int64_t rows, int64_t columns, const F& column) {
  constexpr int W = Vec<S>::W;
  parallel((columns + W - 1) / W, rows * W, [=, &column](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) column(t * W, int(min64(W, columns - t * W)));
  });
}

template <class S> struct Gate {
  using V = Vec<S>;
  const GateArgs& a;
  const int64_t n, c, h, o;
  Scratch<S> affine;  // scale, shift

  explicit Gate(const GateArgs& args) : a(args), n(args.n), c(args.c), h(args.h), o(args.o), affine(2 * args.h) {}
  S* scale() const { return affine.data; }
  S* shift() const { return affine.data + h; }
  bool one_tau() const { return o == 1 && a.average != Average::channel; }

  // Statistics of the batch into mean and var; the running ones as torch.nn.BatchNorm1d keeps them.
  void statistics() const {
    const S* const u = in<S>(a.hidden);
    S *const mean = out<S>(a.mean), *const var = out<S>(a.var);
    each_column<S>(n, h, [&](int64_t j, int lanes) {
      double sum[1][V::W], square[1][V::W];
      S center[V::W];
      sum_column<1, S>(n, sum, [&](int64_t i, V* s) DRSN_LAMBDA { s[0] = s[0] + load<V>(u + i * h + j, lanes); });
      for (int w = 0; w < V::W; ++w) center[w] = S(sum[0][w] / double(n));
      const V middle = V::load(center);
      sum_column<1, S>(n, square, [&](int64_t i, V* s) DRSN_LAMBDA {
        const V d = load<V>(u + i * h + j, lanes) - middle;
        s[0] = V::fma(d, d, s[0]);
      });
      for (int w = 0; w < lanes; ++w) {
        mean[j + w] = center[w];
        var[j + w] = S(square[0][w] / double(n));
        S &running_mean = out<S>(a.running_mean)[j + w], &running_var = out<S>(a.running_var)[j + w];
        running_mean = S(a.momentum * center[w] + (1 - a.momentum) * running_mean);
        running_var = S(a.momentum * (square[0][w] / double(n - 1)) + (1 - a.momentum) * running_var);
      }
    });
    ++*a.batches;
  }

  void fold() const {
    for (int64_t j = 0; j < h; ++j) {
      const S rstd = a.norm ? S(1 / std::sqrt(double(in<S>(a.var)[j]) + a.eps)) : S(1);
      scale()[j] = a.norm ? in<S>(a.gamma)[j] * rstd : S(1);
      shift()[j] = a.norm ? in<S>(a.beta)[j] - in<S>(a.mean)[j] * scale()[j] : S(0);
    }
  }
  V normed(const S* u, int64_t j, int lanes) const {
    return V::fma(load<V>(u + j, lanes), load<V>(scale() + j, lanes), load<V>(shift() + j, lanes));
  }

  // u of samples [first, first + count), from A
  void first_layer(int64_t first, int64_t count) const {
    layer(count, h, c, in<S>(a.pooled) + first * c, in<S>(a.w1), in<S>(a.b1), out<S>(a.hidden) + first * h);
  }

  // alpha and tau of samples [first, first + count), from u and A; v (count, H) is scratch
  void second_layer(int64_t first, int64_t count, S* v, S* tau) const {
    const S* const u = in<S>(a.hidden);
    S* const alpha = out<S>(a.alpha);
    parallel(count, h, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        over_row<V>(h, [&](int64_t j, int lanes) DRSN_LAMBDA {
          store(relu(normed(u + (first + i) * h, j, lanes)), v + i * h + j, lanes);
        });
    });
    layer(count, o, h, v, in<S>(a.w2), in<S>(a.b2), alpha + first * o);
    parallel(count, c + 2 * o, [&](int64_t begin, int64_t end) {
      for (int64_t i = first + begin; i < first + end; ++i) {
        S* const al = alpha + i * o;
        over_row<V>(o, [&](int64_t j, int lanes) DRSN_LAMBDA { store(sigmoid(load<V>(al + j, lanes)), al + j, lanes); });
        threshold(i, al, tau + i * (one_tau() ? 1 : c));
      }
    });
  }

  S mean_over_channels(const S* row) const {
    V sum = V::set(0);
    over_row<V>(c, [&](int64_t j, int lanes) DRSN_LAMBDA { sum = sum + load<V>(row + j, lanes); });
    return sum.sum() / S(c);
  }

  void threshold(int64_t i, const S* al, S* tau) const {
    const S* const pooled = in<S>(a.pooled) + i * c;
    const S shared = a.average == Average::sample ? mean_over_channels(pooled) : S(1);
    over_row<V>(one_tau() ? 1 : c, [&](int64_t j, int lanes) DRSN_LAMBDA {
      const V one = o == 1 ? V::set(*al) : load<V>(al + j, lanes);
      store(one * (a.average == Average::channel ? load<V>(pooled + j, lanes) : V::set(shared)), tau + j, lanes);
    });
  }

  // Sample i: dtau (C) and tau_grad -> dz (O), the gradient of z, and `direct` (C), that of A through tau = alpha * M.
  void threshold_grad(int64_t i, const S* dtau, const S* tau_grad, S* dz, S* direct) const {
    const S *const pooled = in<S>(a.pooled) + i * c, *const alpha = in<S>(a.alpha) + i * o;
    const bool shared = a.average == Average::sample, channel = a.average == Average::channel;
    const S m = shared ? mean_over_channels(pooled) : S(1);
    V sum = V::set(0);  // of what dalpha (o == 1) or dM ("sample") sums over the channels
    over_row<V>(c, [&](int64_t j, int lanes) DRSN_LAMBDA {
      V d = load<V>(dtau + j, lanes);
      if (tau_grad && !one_tau()) d = d + load<V>(tau_grad + j, lanes);
      const V al = o == 1 ? V::set(*alpha) : load<V>(alpha + j, lanes);
      const V dalpha = d * (channel ? load<V>(pooled + j, lanes) : V::set(m));
      if (o > 1) store(dalpha * al * (V::set(1) - al), dz + j, lanes);
      if (channel) store(al * d, direct + j, lanes);
      sum = sum + (o > 1 ? al * d : channel ? dalpha : d);
    });
    S total = sum.sum();
    if (one_tau() && tau_grad) total += *tau_grad;
    if (o == 1) *dz = total * (channel ? S(1) : m) * *alpha * (S(1) - *alpha);
    if (!channel) {
      const S each = shared ? (o == 1 ? *alpha * total : total) / S(c) : S(0);
      over_row<V>(c, [&](int64_t j, int lanes) DRSN_LAMBDA { store(V::set(each), direct + j, lanes); });
    }
  }

  // dv (N, H), the gradient of v, becomes that of u, and v (N, H) is computed anew; db1, dgamma and dbeta are summed.
  void norm_grad(S* dv, S* v, S* db1, S* dgamma, S* dbeta) const {
    const S* const u = in<S>(a.hidden);
    each_column<S>(n, h, [&](int64_t j, int lanes) {
      const V middle = a.norm ? load<V>(in<S>(a.mean) + j, lanes) : V::set(0);
      double sums[2][V::W];
      sum_column<2, S>(n, sums, [&](int64_t i, V* s) DRSN_LAMBDA {
        const int64_t at = i * h + j;
        const V y = normed(u + i * h, j, lanes), passed = load<V>(dv + at, lanes).keep(V::not_le(y, V::set(0)));
        store(relu(y), v + at, lanes);
        store(passed, dv + at, lanes);
        s[0] = s[0] + passed;
        s[1] = V::fma(passed, load<V>(u + at, lanes) - middle, s[1]);
      });
      if (!a.norm) return take(sums[0], db1 + j, lanes);
      S mean[V::W], slope[V::W];  // mean of dv, and of dv * xhat over sqrt(var + eps)
      for (int w = 0; w < lanes; ++w) {
        const double rstd = 1 / std::sqrt(double(in<S>(a.var)[j + w]) + a.eps);
        dbeta[j + w] = S(sums[0][w]);
        dgamma[j + w] = S(sums[1][w] * rstd);
        mean[w] = S(sums[0][w] / double(n));
        slope[w] = S(sums[1][w] * rstd * rstd / double(n));
      }
      const V steep = load<V>(scale() + j, lanes), level = load<V>(mean, lanes), tilt = load<V>(slope, lanes);
      sum_column<1, S>(n, sums, [&](int64_t i, V* s) DRSN_LAMBDA {
        const int64_t at = i * h + j;
        V d = load<V>(dv + at, lanes);
        if (a.batch_stats) d = d - level - (load<V>(u + at, lanes) - middle) * tilt;
        d = d * steep;
        store(d, dv + at, lanes);
        s[0] = s[0] + d;
      });
      take(sums[0], db1 + j, lanes);
    });
  }
  void centre_pooled(S* to) const {
    const S* const pooled = in<S>(a.pooled);
    each_column<S>(n, c, [&](int64_t j, int lanes) {
      double sum[1][V::W];
      S mean[V::W];
      sum_column<1, S>(n, sum, [&](int64_t i, V* s) DRSN_LAMBDA { s[0] = s[0] + load<V>(pooled + i * c + j, lanes); });
      for (int w = 0; w < V::W; ++w) mean[w] = S(sum[0][w] / double(n));
      for (int64_t i = 0; i < n; ++i) store(load<V>(pooled + i * c + j, lanes) - V::load(mean), to + i * c + j, lanes);
    });
  }
  static void take(const double* sums, S* to, int lanes) {
    for (int w = 0; w < lanes; ++w) to[w] = S(sums[w]);
  }
};

}  // namespace
}  // namespace drsn

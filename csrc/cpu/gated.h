// The whole step with the standard gate: forward and backward from the kernels of kernels.h and the gate of gate.h.
#pragma once

#include "gate.h"
#include "kernels.h"

namespace drsn {
namespace {

inline int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

template <class P> P* shift(P* p, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return p ? reinterpret_cast<P*>(reinterpret_cast<Byte*>(p) + bytes) : nullptr;
}

// The same call on samples [first, first + count).
ReduceArgs part(ReduceArgs a, int64_t first, int64_t count) {
  const int64_t item = size_of(a.dtype), plane = first * (a.walk.channels_last ? a.walk.l : a.walk.c) * a.walk.row_bytes;
  a.walk.n = count;
  a.x = shift(a.x, first * a.xs.n * item);
  a.out = shift(a.out, first * a.walk.c * (item == 8 ? 8 : 4));
  a.sign = offset(a.sign, plane);
  a.nonzero = offset(a.nonzero, plane);
  return a;
}
MapArgs part(MapArgs a, int64_t first, int64_t count) {
  const int64_t item = size_of(a.dtype), plane = first * (a.walk.channels_last ? a.walk.l : a.walk.c) * a.walk.row_bytes;
  a.walk.n = count;
  a.x = shift(a.x, first * a.xs.n * item);
  a.y = shift(a.y, first * a.ys.n * item);
  a.t = shift(a.t, first * a.t_n * (item == 8 ? 8 : 4));
  a.residual = shift(a.residual, first * a.rs.n * item);
  a.kept = offset(a.kept, plane);
  a.sign = offset(a.sign, plane);
  a.nonzero = offset(a.nonzero, plane);
  return a;
}

template <class S> void forward_as(GatedForwardArgs args) {
  const bool kept = args.gate.pooled;  // A and the state are otherwise this call's own
  Scratch<S> pooled(kept ? 0 : args.gate.n * args.gate.c), state(kept ? 0 : args.gate.state());
  if (!kept) {
    args.gate.pooled = args.reduce.out = pooled.data;
    args.gate.lay_out(state.data, sizeof(S));
  }
  const Gate<S> gate(args.gate);
  const int64_t n = gate.n, h = gate.h;
  Scratch<S> v(n * h), own(args.map.t ? 0 : n * gate.c);
  MapArgs last = args.map;
  if (!last.t) last.t = own.data;
  S* const tau = static_cast<S*>(const_cast<void*>(last.t));
  const auto pool = [&](int64_t first, int64_t count) {
    reduce(part(args.reduce, first, count));
    gate.first_layer(first, count);
  };
  const auto shrink = [&](int64_t first, int64_t count) {
    gate.second_layer(first, count, v.data + first * h, tau);
    map(part(last, first, count));
  };
  if (!args.block) {
    pool(0, n);
    if (args.gate.batch_stats) gate.statistics();
    gate.fold();
    return shrink(0, n);
  }
  gate.fold();
  const int64_t block = args.block;
  parallel((n + block - 1) / block, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block; i < min64(end * block, n); i += block) {
      const int64_t count = min64(block, n - i);
      pool(i, count);
      shrink(i, count);
    }
  });
}

template <class S> void backward_as(const GatedBackwardArgs& args) {
  const Gate<S> gate(args.gate);
  const int64_t n = gate.n, c = gate.c, h = gate.h, o = gate.o;
  const GateArgs& a = args.gate;
  Scratch<S> dtau(n * c), around(n * c), dz(n * o), v(n * h), du(n * h);
  gate.fold();
  GradArgs first = args.dtau;
  first.dtau = dtau.data;
  grad(first);
  const S* const tau_grad = in<S>(args.tau_grad);
  parallel(n, 4 * c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      gate.threshold_grad(i, dtau.data + i * c, tau_grad ? tau_grad + i * (gate.one_tau() ? 1 : c) : nullptr, dz.data + i * o,
                          around.data + i * c);
  });
  product<S>({o, dz.data, o, 1, in<S>(a.w2), h, 1, nullptr, 0, du.data, h}, n, h);
  Scratch<S> unwanted(3 * h);
  const auto wanted = [&](void* p, int64_t i) { return p ? out<S>(p) : unwanted.data + i * h; };
  gate.norm_grad(du.data, v.data, wanted(args.db1, 0), wanted(args.dgamma, 1), wanted(args.dbeta, 2));
  if (args.db2) each_column<S>(n, o, [&](int64_t j, int lanes) {
    using V = Vec<S>;
    double sums[1][V::W];
    sum_column<1, S>(n, sums, [&](int64_t i, V* s) DRSN_LAMBDA { s[0] = s[0] + load<V>(dz.data + i * o + j, lanes); });
    Gate<S>::take(sums[0], out<S>(args.db2) + j, lanes);
  });
  if (args.dw2) product<S>({n, dz.data, 1, o, v.data, h, 1, nullptr, 0, out<S>(args.dw2), h}, o, h);
  if (args.dw1) {
    // Behind batch statistics the sum of du over the batch is 0 but for rounding, which A, nearly the same for every sample,
    // would multiply: A less its mean gives the same gradient, more exactly.
    Scratch<S> centred(a.batch_stats ? n * c : 0);
    if (a.batch_stats) gate.centre_pooled(centred.data);
    product<S>({n, du.data, 1, h, a.batch_stats ? centred.data : in<S>(a.pooled), c, 1, nullptr, 0, out<S>(args.dw1), c}, h, c);
  }
  if (!args.dx.dx) return;
  // dA, where the direct part lies
  product<S>({h, du.data, h, 1, in<S>(a.w1), c, 1, around.data, c, around.data, c}, n, c);
  GradArgs last = args.dx;
  last.da = around.data;
  grad(last);
}

void gated_forward(const GatedForwardArgs& a) {
  a.reduce.dtype == DType::f64 ? forward_as<double>(a) : forward_as<float>(a);
}
void gated_backward(const GatedBackwardArgs& a) {
  a.dx.dtype == DType::f64 ? backward_as<double>(a) : backward_as<float>(a);
}

}  // namespace
}  // namespace drsn

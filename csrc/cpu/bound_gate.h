// What is bound once for all calls on tensors of one dtype and layout: a walk, and a step with the standard gate, whose calls
// take nothing but tensors.
#pragma once

#include <pybind11/pybind11.h>

#include "api.h"
#include "named.h"
#include "shape.h"

namespace drsn {

// A dtype and a layout, parsed once.
struct BoundWalk {
  DType dtype;
  Shape shape;
  int64_t plane;  // bytes

  BoundWalk(int dtype, const py::tuple& sizes, const py::tuple& strides)
      : dtype(DType(dtype)), shape(sizes, strides), plane(plane_bytes(shape.walk)) {}
  int64_t numbers() const { return dtype == DType::f64 ? 8 : 4; }  // bytes of one in sums, thresholds and the gate
  bool empty() const { return shape.walk.n * shape.walk.c * shape.walk.l == 0; }
};

struct BoundGate {
  BoundWalk walk;
  GateArgs gate;  // sizes and numbers; no addresses
  int64_t block;
  bool keep;

  BoundGate(const BoundWalk& walk, int average, int64_t hidden, int64_t outputs, bool norm, bool batch_stats, double eps,
            double momentum, int64_t block, bool keep)
      : walk(walk), block(block), keep(keep) {
    gate.n = walk.shape.walk.n;
    gate.c = walk.shape.walk.c;
    gate.h = hidden;
    gate.o = outputs;
    gate.average = Average(average);
    gate.norm = norm;
    gate.batch_stats = batch_stats;
    gate.eps = eps;
    gate.momentum = momentum;
  }
  int64_t state_bytes() const { return gate.state() * walk.numbers(); }
  int64_t kept_bytes() const { return state_bytes() + 3 * walk.plane; }
};

// The address of a tensor that a caller hands in. A null pointer would end the process; tensors without elements have none.
template <class T = void> T* taken(const BoundGate& b, Ordered& call, bool needed = false) {
  PyObject* const tensor = call.next();
  T* const at = tensor ? static_cast<T*>(cpu_address(tensor)) : nullptr;
  if (needed && !at && !b.walk.empty())
    throw py::type_error("the cpu kernels need the argument " + std::string(call.latest()));
  return at;
}

// The same of a tensor of x's shape, and its strides.
inline void* taken(const BoundGate& b, Ordered& call, bool needed, Strides& strides) {
  PyObject* const tensor = call.next();
  if (tensor) strides = b.walk.shape.merged(steps(tensor, b.walk.shape.rank).ptr());
  void* const at = tensor ? cpu_address(tensor) : nullptr;
  if (needed && !at && !b.walk.empty())
    throw py::type_error("the cpu kernels need the argument " + std::string(call.latest()));
  return at;
}

inline constexpr const char* kForward[] = {"x", "y", "residual", "tau", "pooled", "kept", "w1", "b1", "gamma", "beta", "w2",
                                           "b2", "mean", "var", "batches"};

// pooled and kept: where the step keeps something.
inline void gated_forward(const BoundGate& b, Ordered& call) {
  GatedForwardArgs a;
  ReduceArgs& reduce = a.reduce;
  MapArgs& map = a.map;
  GateArgs& gate = a.gate = b.gate;
  reduce.dtype = map.dtype = b.walk.dtype;
  reduce.walk = map.walk = b.walk.shape.walk;
  reduce.x = map.x = taken(b, call, true, map.xs);
  reduce.xs = map.xs;
  map.y = taken(b, call, true, map.ys);
  map.residual = taken(b, call, false, map.rs);
  map.t = taken(b, call);
  const bool one_tau = gate.o == 1 && gate.average != Average::channel;
  map.t_n = one_tau ? 1 : gate.c;
  map.t_c = one_tau ? 0 : 1;
  gate.pooled = reduce.out = taken(b, call, b.keep);
  char* const kept = taken<char>(b, call, b.keep);
  gate.w1 = taken(b, call, true);
  gate.b1 = taken(b, call, true);
  gate.gamma = taken(b, call, gate.norm);
  gate.beta = taken(b, call, gate.norm);
  gate.w2 = taken(b, call, true);
  gate.b2 = taken(b, call, true);
  gate.mean = gate.running_mean = taken(b, call, gate.norm);
  gate.var = gate.running_var = taken(b, call, gate.norm);
  gate.batches = taken<int64_t>(b, call, gate.batch_stats);
  if (b.keep && kept) {
    gate.lay_out(kept, b.walk.numbers());
    map.kept = reinterpret_cast<uint8_t*>(kept) + b.state_bytes();
    map.sign = map.kept + b.walk.plane;
    map.nonzero = map.sign + b.walk.plane;
  }
  a.block = b.block;
  py::gil_scoped_release release;
  kernels->gated_forward(a);
}

inline constexpr const char* kBackward[] = {"g", "dx", "tau_grad", "pooled", "kept", "w1", "gamma", "beta", "w2", "mean",
                                            "var", "dw1", "db1", "dgamma", "dbeta", "dw2", "db2"};

// mean and var: where they are not of the batch. Gradients: each where it is wanted.
inline void gated_backward(const BoundGate& b, Ordered& call) {
  GatedBackwardArgs a;
  GateArgs& gate = a.gate = b.gate;
  GradArgs both;
  both.dtype = b.walk.dtype;
  both.walk = b.walk.shape.walk;
  both.g = taken(b, call, true, both.gs);
  void* const dx = taken(b, call);
  a.tau_grad = taken(b, call);
  gate.pooled = taken(b, call, true);
  char* const kept = taken<char>(b, call, true);
  gate.w1 = taken(b, call, true);
  gate.gamma = taken(b, call, gate.norm);
  gate.beta = taken(b, call, gate.norm);
  gate.w2 = taken(b, call, true);
  gate.mean = taken(b, call, gate.norm && !gate.batch_stats);
  gate.var = taken(b, call, gate.norm && !gate.batch_stats);
  if (kept) {
    gate.lay_out(kept, b.walk.numbers());
    both.kept = reinterpret_cast<const uint8_t*>(kept) + b.state_bytes();
    both.sign = both.kept + b.walk.plane;
    both.nonzero = both.sign + b.walk.plane;
  }
  a.dtau = a.dx = both;
  a.dx.dx = dx;
  a.dx.ds = b.walk.shape.dense;
  a.dw1 = taken(b, call);
  a.db1 = taken(b, call);
  a.dgamma = taken(b, call);
  a.dbeta = taken(b, call);
  a.dw2 = taken(b, call);
  a.db2 = taken(b, call);
  py::gil_scoped_release release;
  kernels->gated_backward(a);
}

}  // namespace drsn

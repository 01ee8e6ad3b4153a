// Arguments of the bindings: tuples of Python integers to walks, strides, pointers.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "args.h"
#include "shrink_rules.h"

namespace drsn {

namespace py = pybind11;

inline int64_t item(const py::tuple& t, int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i)); }

// Spatial dimensions in walking order: those of size 1 dropped, by falling dense stride (see planes.py).
struct Shape {
  Walk walk;
  int dims = 0;
  int axis[kMaxDims];
  int64_t size[kMaxDims];

  Shape(const py::tuple& shape, const py::tuple& dense) {
    const int rank = int(shape.size());
    if (rank < 2 || rank > kMaxDims + 2 || dense.size() != shape.size())
      throw std::invalid_argument("the kernels take tensors of rank 2 to " + std::to_string(kMaxDims + 2) +
                                  ", got rank " + std::to_string(rank));
    walk.n = item(shape, 0);
    walk.c = item(shape, 1);
    walk.l = 1;
    for (int d = 2; d < rank; ++d) {
      const int64_t n = item(shape, d);
      walk.l *= n;
      if (n == 1) continue;
      int at = dims++;
      for (; at > 0 && item(dense, axis[at - 1]) < item(dense, d); --at) {
        axis[at] = axis[at - 1];
        size[at] = size[at - 1];
      }
      axis[at] = d;
      size[at] = n;
    }
    walk.channels_last = item(dense, 1) == 1 && walk.c > 1;
    walk.row_bytes = plane_row_bits(walk.channels_last ? walk.c : walk.l) / 8;
  }

  Strides strides(const py::tuple& t) const {
    Strides s;
    s.n = item(t, 0);
    s.c = item(t, 1);
    for (int d = 0; d < dims; ++d) {
      const int64_t stride = item(t, axis[d]);
      if (s.dims && s.stride[s.dims - 1] == stride * size[d]) {  // the two dimensions are one
        s.size[s.dims - 1] *= size[d];
        s.stride[s.dims - 1] = stride;
      } else {
        s.size[s.dims] = size[d];
        s.stride[s.dims++] = stride;
      }
    }
    return s;
  }
};

inline int64_t plane_bytes(const Walk& w) {  // whole 32-bit words
  return (w.n * (w.channels_last ? w.l : w.c) * w.row_bytes + 3) / 4 * 4;
}

template <class T> T* pointer(uintptr_t p) { return reinterpret_cast<T*>(p); }

// Pointers of a tuple of addresses, 0 where there is none, in turn.
struct Addresses {
  const py::tuple& t;
  int i = 0;
  void* next() { return reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(t.ptr(), i++))); }
};

// parts: w1, b1, gamma, beta, w2, b2, running mean, running var, batches; state: pooled, hidden, alpha, mean, var
inline GateArgs gate_args(const Walk& w, int average, int64_t hidden, int64_t outputs, bool batch_stats, double eps,
                   double momentum, const py::tuple& parts, const py::tuple& state) {
  Addresses p{parts}, q{state};
  GateArgs a{};
  a.n = w.n, a.c = w.c, a.h = hidden, a.o = outputs;
  a.average = Average(average), a.batch_stats = batch_stats, a.eps = eps, a.momentum = momentum;
  a.w1 = p.next(), a.b1 = p.next(), a.gamma = p.next(), a.beta = p.next(), a.w2 = p.next(), a.b2 = p.next();
  a.running_mean = p.next(), a.running_var = p.next(), a.batches = static_cast<int64_t*>(p.next());
  a.pooled = q.next(), a.hidden = q.next(), a.alpha = q.next(), a.mean = q.next(), a.var = q.next();
  a.norm = a.gamma != nullptr;
  return a;
}

}  // namespace drsn

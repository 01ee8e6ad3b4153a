// Tuples of Python integers to walks and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "args.h"
#include "shrink_rules.h"

namespace drsn {

namespace py = pybind11;

inline int64_t item(PyObject* tuple, int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }
inline int64_t item(const py::tuple& t, int i) { return item(t.ptr(), i); }

// Of an x with these sizes and dense strides: how it is walked, and its spatial dimensions in walking order, by falling
// dense stride, those of size 1 dropped (see drsn_kernels/layout.py).
struct Shape {
  Walk walk;
  int rank = 0, dims = 0;
  int axis[kMaxDims];
  int64_t size[kMaxDims];
  Strides dense;

  Shape(const py::tuple& shape, const py::tuple& strides) : rank(int(shape.size())) {
    if (rank < 2 || rank > kMaxDims + 2 || strides.size() != shape.size())
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
      for (; at > 0 && item(strides, axis[at - 1]) < item(strides, d); --at) {
        axis[at] = axis[at - 1];
        size[at] = size[at - 1];
      }
      axis[at] = d;
      size[at] = n;
    }
    walk.channels_last = item(strides, 1) == 1 && walk.c > 1;
    walk.row_bytes = plane_row_bits(walk.channels_last ? walk.c : walk.l) / 8;
    dense = merged(strides.ptr());
  }

  Strides merged(PyObject* strides) const {
    Strides s;
    s.n = item(strides, 0);
    s.c = item(strides, 1);
    for (int d = 0; d < dims; ++d) {
      const int64_t stride = item(strides, axis[d]);
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

}  // namespace drsn

// The extension drsn_kernels._cpu: raw pointers, shapes and strides in, nothing of torch's C++ in it.
#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../common/shrink_rules.h"
#include "api.h"

namespace py = pybind11;

namespace drsn {

ParallelFor parallel_for = nullptr;

namespace {

const Kernels* best_kernels() {
#if defined(DRSN_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return &kernels_avx512;
  if (avx2) return &kernels_avx2;
#endif
  return &kernels_portable;
}

const Kernels* kernels = best_kernels();

// Asks for huge pages under a large fresh output, before its pages are touched. From 32 MiB on glibc maps every block
// anew, and half the time of a step goes into page faults, one for each 4 KiB; where transparent huge pages are on request
// ("madvise", the usual setting) this makes it one for each 2 MiB: 27.8 to 16.1 ms a step. Smaller blocks mostly come from
// the heap, already mapped: no gain there, so they are left alone. torch's allocator does the same with
// THP_MEM_ALLOC_ENABLE=1. DRSN_HUGE_PAGES=0 in the environment turns it off.
bool huge_pages = true;

void prefer_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  constexpr int64_t kMapped = 32 << 20;  // glibc's DEFAULT_MMAP_THRESHOLD_MAX
  if (!huge_pages || bytes < kMapped) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes)) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: failing is fine
#endif
}

int64_t bytes_of(const Walk& w, DType dtype) {
  return w.n * w.c * w.l * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
}

int64_t item(const py::tuple& t, int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(t.ptr(), i)); }

// Spatial dimensions in walking order: those of size 1 dropped, by falling dense stride (see planes.py).
struct Shape {
  Walk walk;
  int dims = 0;
  int axis[kMaxDims];
  int64_t size[kMaxDims];

  Shape(const py::tuple& shape, const py::tuple& dense) {
    const int rank = int(shape.size());
    if (rank < 2 || rank > kMaxDims + 2 || dense.size() != shape.size())
      throw std::invalid_argument("drsn_kernels._cpu takes tensors of rank 2 to " + std::to_string(kMaxDims + 2) +
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

template <class T> T* pointer(uintptr_t p) { return reinterpret_cast<T*>(p); }

void reduce(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs, uintptr_t out,
            uintptr_t sign, uintptr_t nonzero) {
  const Shape s(shape, dense);
  const ReduceArgs args{DType(dtype),       s.walk, pointer<void>(x), s.strides(xs), pointer<void>(out),
                        pointer<uint8_t>(sign), pointer<uint8_t>(nonzero)};
  py::gil_scoped_release release;
  kernels->reduce(args);
}

void apply(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs, uintptr_t y,
           const py::tuple& ys, uintptr_t tau, const py::tuple& tau_shape, const py::tuple& ts, uintptr_t residual, const py::tuple& rs,
           uintptr_t kept, uintptr_t sign) {
  const Shape s(shape, dense);
  const int64_t tau_n = item(tau_shape, 0) == 1 ? 0 : item(ts, 0), tau_c = item(tau_shape, 1) == 1 ? 0 : item(ts, 1);
  const ApplyArgs args{DType(dtype), s.walk,        pointer<void>(x),         s.strides(xs), pointer<void>(y),
                       s.strides(ys), pointer<void>(tau), tau_n,              tau_c,         pointer<void>(residual),
                       s.strides(rs), pointer<uint8_t>(kept), pointer<uint8_t>(sign)};
  py::gil_scoped_release release;
  if (y != x) prefer_huge_pages(args.y, bytes_of(s.walk, args.dtype));
  kernels->apply(args);
}

void grad(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g, const py::tuple& gs, uintptr_t da,
          uintptr_t dx, uintptr_t dtau, uintptr_t kept, uintptr_t sign, uintptr_t nonzero) {
  const Shape s(shape, dense);
  const GradArgs args{DType(dtype),      s.walk,       pointer<void>(g),       s.strides(gs), pointer<void>(da),
                      pointer<void>(dx), s.strides(dense), pointer<void>(dtau), pointer<uint8_t>(kept),
                      pointer<uint8_t>(sign), pointer<uint8_t>(nonzero)};
  py::gil_scoped_release release;
  if (dx) prefer_huge_pages(args.dx, bytes_of(s.walk, args.dtype));
  kernels->grad(args);
}

int64_t plane_words(const py::tuple& shape, const py::tuple& dense) {
  const Walk w = Shape(shape, dense).walk;
  return (w.n * (w.channels_last ? w.l : w.c) * w.row_bytes + 3) / 4;
}

py::tuple available() {
  py::list names;
  names.append(kernels_portable.name);
#if defined(DRSN_X86)
  const std::string best = best_kernels()->name;
  if (best != kernels_portable.name) names.append(kernels_avx2.name);
  if (best == kernels_avx512.name) names.append(kernels_avx512.name);
#endif
  return py::tuple(names);
}

void set_isa(const std::string& name) {
  bool usable = false;
  for (const auto& known : available()) usable |= py::cast<std::string>(known) == name;
  if (!usable)
    throw std::invalid_argument("this CPU and build offer " + py::cast<std::string>(py::repr(available())) +
                                ", got '" + name + "'");
  kernels = &kernels_portable;
#if defined(DRSN_X86)
  if (name == kernels_avx2.name) kernels = &kernels_avx2;
  if (name == kernels_avx512.name) kernels = &kernels_avx512;
#endif
}

}  // namespace
}  // namespace drsn

PYBIND11_MODULE(_cpu, m) {
  using namespace drsn;
  m.doc() = "CPU kernels of drsn_kernels; called by drsn_kernels.backends.cpu, which checks what it passes.";
  m.def("reduce", &reduce, "out (N, C) = mean |x|, and the planes sign and nonzero where not 0");
  m.def("apply", &apply, "y = sign(x) relu(|x| - tau) + residual, and the planes kept and sign where not 0");
  m.def("grad", &grad, "dx = kept g + s dA / L and dtau = -sum s kept g, each where its pointer is not 0");
  m.def("plane_words", &plane_words, "32-bit words in one plane of a tensor of this shape and dense strides");
  m.def("set_parallel_for", [](uintptr_t p) { parallel_for = reinterpret_cast<ParallelFor>(p); },
        "The address of torch_parallel_for, or 0 for serial kernels.");
  m.def("has_parallel_for", [] { return parallel_for != nullptr; });
  m.def("set_huge_pages", [](bool on) { huge_pages = on; }, "Ask for huge pages under large outputs (default: yes).");
  m.def("isa", [] { return kernels->name; }, "The instruction set in use.");
  m.def("available_isas", &available, "What this CPU and build offer, slowest first.");
  m.def("set_isa", &set_isa, "Use another instruction set (tests and benchmarks).");
}

// The extension drsn_kernels._cpu: raw pointers, shapes and strides in, nothing of torch's C++ in it.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "../common/shape.h"
#include "api.h"
#include "arena.h"
#include "dlpack.h"

namespace py = pybind11;

namespace drsn {

ParallelFor parallel_for = nullptr;

struct NoMemory : std::bad_alloc {  // Python's MemoryError
  std::string message;
  explicit NoMemory(const std::string& what) : message("drsn_kernels: out of memory for " + what) {}
  const char* what() const noexcept override { return message.c_str(); }
};

void out_of_memory() { throw NoMemory("the sums of a CPU kernel"); }

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

Arena& arena() {  // never destroyed: tensors may outlive the interpreter
  static Arena* const one = new Arena;
  return *one;
}

struct FromArena {
  DLManagedTensor tensor;
  void* data;
  size_t bytes;
  int64_t shape[kMaxDims + 2], strides[kMaxDims + 2];
};

void give_back(DLManagedTensor* tensor) {
  auto* const owner = static_cast<FromArena*>(tensor->manager_ctx);
  arena().release(owner->data, owner->bytes);
  delete owner;
}

// An uninitialised tensor, as a DLPack capsule for torch.from_dlpack.
py::capsule empty(int dtype, const py::tuple& shape, const py::tuple& strides) {
  static constexpr DLDataType kinds[] = {{kDLFloat, 32, 1}, {kDLFloat, 64, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}, {kDLInt, 32, 1}};
  auto* const owner = new FromArena{};
  const int rank = int(shape.size());
  int64_t items = 1;
  for (int d = 0; d < rank; ++d) {
    owner->shape[d] = item(shape, d);
    owner->strides[d] = item(strides, d);
    items *= owner->shape[d];
  }
  owner->bytes = size_t(items) * kinds[dtype].bits / 8;
  owner->data = arena().acquire(owner->bytes);
  if (!owner->data) {
    const size_t bytes = owner->bytes;
    delete owner;
    throw NoMemory("an output of " + std::to_string(bytes) + " bytes");
  }
  owner->tensor = {{owner->data, {kDLCPU, 0}, rank, kinds[dtype], owner->shape, owner->strides, 0}, owner, give_back};
  return py::capsule(&owner->tensor, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor"))  // nobody took it
      give_back(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
  });
}

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
           uintptr_t kept, uintptr_t sign, double inside, double factor) {
  const Shape s(shape, dense);
  const Map map = inside == 0 && factor == 1 ? Map::soft : Map::pieces;
  const int64_t tau_n = item(tau_shape, 0) == 1 ? 0 : item(ts, 0), tau_c = item(tau_shape, 1) == 1 ? 0 : item(ts, 1);
  const ApplyArgs args{DType(dtype), s.walk,        pointer<void>(x),         s.strides(xs), pointer<void>(y),
                       s.strides(ys), pointer<void>(tau), tau_n,              tau_c,         pointer<void>(residual),
                       s.strides(rs), pointer<uint8_t>(kept), pointer<uint8_t>(sign), map, inside, factor};
  py::gil_scoped_release release;
  kernels->apply(args);
}

void grad(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g, const py::tuple& gs, uintptr_t da,
          uintptr_t dx, uintptr_t dtau, uintptr_t kept, uintptr_t sign, uintptr_t nonzero, double inside, double factor) {
  const Shape s(shape, dense);
  const GradArgs args{DType(dtype),      s.walk,       pointer<void>(g),       s.strides(gs), pointer<void>(da),
                      pointer<void>(dx), s.strides(dense), pointer<void>(dtau), pointer<uint8_t>(kept),
                      pointer<uint8_t>(sign), pointer<uint8_t>(nonzero), inside, factor};
  py::gil_scoped_release release;
  kernels->grad(args);
}

void mean(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs, uintptr_t out) {
  const Shape s(shape, dense);
  const ReduceArgs args{DType(dtype), s.walk, pointer<void>(x), s.strides(xs), pointer<void>(out), nullptr, nullptr, Sum::values};
  py::gil_scoped_release release;
  kernels->reduce(args);
}

void scale(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs, uintptr_t y,
           uintptr_t factors, const py::tuple& fs, uintptr_t residual, const py::tuple& rs, uintptr_t shift) {
  const Shape s(shape, dense);
  const ApplyArgs args{DType(dtype), s.walk, pointer<void>(x), s.strides(xs), pointer<void>(y), s.strides(dense),
                       pointer<void>(factors), item(fs, 0), item(fs, 1), pointer<void>(residual), s.strides(rs), nullptr, nullptr,
                       Map::scale, 0, 1, pointer<void>(shift)};
  py::gil_scoped_release release;
  kernels->apply(args);
}

void scale_sums(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g, const py::tuple& gs, uintptr_t x,
                const py::tuple& xs, uintptr_t out) {
  const Shape s(shape, dense);
  const ReduceArgs args{DType(dtype), s.walk, pointer<void>(g), s.strides(gs), pointer<void>(out), nullptr, nullptr,
                        Sum::products, pointer<void>(x), s.strides(xs)};
  py::gil_scoped_release release;
  kernels->reduce(args);
}

void standard_forward(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs, uintptr_t y,
                      const py::tuple& ys, uintptr_t residual, const py::tuple& rs, uintptr_t bits, uintptr_t tau, int average,
                      int64_t hidden, int64_t outputs, bool batch_stats, double eps, double momentum, const py::tuple& parts,
                      const py::tuple& state, int64_t block) {
  const Shape s(shape, dense);
  const GateArgs gate = gate_args(s.walk, average, hidden, outputs, batch_stats, eps, momentum, parts, state);
  const int64_t plane = plane_bytes(s.walk);
  uint8_t *const sign = pointer<uint8_t>(bits), *const nonzero = sign ? sign + plane : nullptr;
  const bool one_tau = outputs == 1 && gate.average != Average::channel;
  const StandardForwardArgs args{
      {DType(dtype), s.walk, pointer<void>(x), s.strides(xs), gate.pooled, sign, nonzero},
      {DType(dtype), s.walk, pointer<void>(x), s.strides(xs), pointer<void>(y), s.strides(ys), pointer<void>(tau),
       one_tau ? 1 : s.walk.c, one_tau ? 0 : 1, pointer<void>(residual), s.strides(rs), sign ? sign + 2 * plane : nullptr, nullptr},
      gate, block};
  py::gil_scoped_release release;
  kernels->standard_forward(args);
}

// grads: dw1, db1, dgamma, dbeta, dw2, db2
void standard_backward(int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g, const py::tuple& gs, uintptr_t dx,
                       uintptr_t bits, uintptr_t tau_grad, int average, int64_t hidden, int64_t outputs, bool batch_stats,
                       double eps, const py::tuple& parts, const py::tuple& state, const py::tuple& grads) {
  const Shape s(shape, dense);
  const int64_t plane = plane_bytes(s.walk);
  const uint8_t *const sign = pointer<uint8_t>(bits), *const nonzero = sign + plane, *const kept = sign + 2 * plane;
  Addresses to{grads};
  StandardBackwardArgs args{};
  args.gate = gate_args(s.walk, average, hidden, outputs, batch_stats, eps, 0, parts, state);
  args.dtau = {DType(dtype), s.walk, pointer<void>(g), s.strides(gs), nullptr, nullptr, {}, nullptr, kept, sign, nonzero};
  args.dx = {DType(dtype), s.walk, pointer<void>(g), s.strides(gs), nullptr, pointer<void>(dx), s.strides(dense), nullptr, kept, sign, nonzero};
  args.tau_grad = pointer<void>(tau_grad);
  args.dw1 = to.next(), args.db1 = to.next(), args.dgamma = to.next(), args.dbeta = to.next(), args.dw2 = to.next(), args.db2 = to.next();
  py::gil_scoped_release release;
  kernels->standard_backward(args);
}

int64_t plane_words(const py::tuple& shape, const py::tuple& dense) {
  return plane_bytes(Shape(shape, dense).walk) / 4;
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
  m.def("apply", &apply, "y = sign(x) relu(|x| - tau) + residual, or of other pieces, and the planes kept and sign where not 0");
  m.def("grad", &grad, "dx = kept g + s dA / L and dtau = -sum s kept g, each where its pointer is not 0");
  m.def("mean", &mean, "out (N, C) = mean x");
  m.def("scale", &scale, "y = x f + residual, or x f + shift / L; factors f by their strides, 0 where they are broadcast");
  m.def("scale_sums", &scale_sums, "out (N, C) = sum g x");
  m.def("plane_words", &plane_words, "32-bit words in one plane of a tensor of this shape and dense strides");
  m.def("set_parallel_for", [](uintptr_t p) { parallel_for = reinterpret_cast<ParallelFor>(p); },
        "The address of torch_parallel_for, or 0 for serial kernels.");
  m.def("has_parallel_for", [] { return parallel_for != nullptr; });
  m.def("standard_forward", &standard_forward, "The step with the standard gate: y, and what its gradient needs.");
  m.def("standard_backward", &standard_backward, "dx and the gradients of the gate's parameters.");
  m.def("empty", &empty, "Uninitialised memory for a large output, as a DLPack capsule.");
  m.def("set_cache_limit", [](size_t bytes) { arena().set_limit(bytes); }, "Bytes of freed outputs to keep.");
  m.def("cached_bytes", [] { return arena().cached(); }, "Bytes of freed outputs kept now.");
  m.def("isa", [] { return kernels->name; }, "The instruction set in use.");
  m.def("available_isas", &available, "What this CPU and build offer, slowest first.");
  m.def("set_isa", &set_isa, "Use another instruction set (tests and benchmarks).");
}

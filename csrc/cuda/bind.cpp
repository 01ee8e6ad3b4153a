// The extension drsn_kernels._cuda: raw pointers, shapes, strides and a stream in, nothing of torch's C++ in it.
// With DRSN_EMULATION it is _cuda_emulated, on the CPU, for tests.
#include <pybind11/pybind11.h>

#include "../common/shape.h"
#include "api.h"
#if defined(DRSN_EMULATION)
#include "launch.h"
#endif

namespace drsn {
namespace {

#if defined(DRSN_EMULATION)

py::tuple device_properties(int) {
  const auto& d = emulation::device();
  return py::make_tuple(d.compute_capability, d.multiprocessors, d.shared_per_block, d.shared_per_multiprocessor);
}
int device_count() { return 1; }

#else

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("drsn_kernels: ") + what + ": " + cudaGetErrorString(error));
}

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Compute capability times 10, multiprocessors, shared memory of a block and of a multiprocessor in bytes.
py::tuple device_properties(int device) {
  return py::make_tuple(
      10 * attribute(device, cudaDevAttrComputeCapabilityMajor) + attribute(device, cudaDevAttrComputeCapabilityMinor),
      attribute(device, cudaDevAttrMultiProcessorCount), attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor));
}
int device_count() {  // without a driver this is an error, and no error
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

#endif

#if defined(DRSN_EMULATION)
struct WithoutPython {
  ~WithoutPython() {}
};  // the emulation has one device, and its list of launches no lock
#else
using WithoutPython = py::gil_scoped_release;  // a launch waits where the device's queue is full
#endif

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

void reduce_tensor(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x,
                   const py::tuple& xs, uintptr_t out, uintptr_t sign, uintptr_t nonzero, int parts, uintptr_t partial) {
  const Shape s(shape, dense);
  const Strides of_x = s.strides(xs);
  const WithoutPython release;
  reduce({DType(dtype), s.walk, pointer<void>(x), of_x, pointer<void>(out), pointer<uint8_t>(sign), pointer<uint8_t>(nonzero)},
         parts, pointer<void>(partial), stream_of(stream));
}

void apply_tensor(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x,
                  const py::tuple& xs, uintptr_t y, const py::tuple& ys, uintptr_t tau, const py::tuple& tau_shape,
                  const py::tuple& ts, uintptr_t residual, const py::tuple& rs, uintptr_t kept, uintptr_t sign,
                  double inside, double offset) {
  const Shape s(shape, dense);
  const Map map = inside == 0 && offset == 1 ? Map::soft : Map::pieces;
  const int64_t tau_n = item(tau_shape, 0) == 1 ? 0 : item(ts, 0), tau_c = item(tau_shape, 1) == 1 ? 0 : item(ts, 1);
  const Strides of_x = s.strides(xs), of_y = s.strides(ys), of_residual = s.strides(rs);
  const WithoutPython release;
  apply({DType(dtype), s.walk, pointer<void>(x), of_x, pointer<void>(y), of_y, pointer<void>(tau), tau_n, tau_c,
         pointer<void>(residual), of_residual, pointer<uint8_t>(kept), pointer<uint8_t>(sign), map, inside, offset},
        stream_of(stream));
}

void grad_tensor(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g,
                 const py::tuple& gs, uintptr_t da, uintptr_t dx, uintptr_t dtau, uintptr_t kept, uintptr_t sign,
                 uintptr_t nonzero, int parts, uintptr_t partial, double inside, double offset) {
  const Shape s(shape, dense);
  const Strides of_g = s.strides(gs), of_dx = s.strides(dense);
  const WithoutPython release;
  grad({DType(dtype), s.walk, pointer<void>(g), of_g, pointer<void>(da), pointer<void>(dx), of_dx,
        pointer<void>(dtau), pointer<uint8_t>(kept), pointer<uint8_t>(sign), pointer<uint8_t>(nonzero), inside, offset},
       parts, pointer<void>(partial), stream_of(stream));
}

// ---- squeeze_excite --------------------------------------------------------------------------------------------------

// out (N, C) = mean x; with `times` sum x * times
void sum_tensor(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs,
                uintptr_t times, const py::tuple& ts, uintptr_t out, int parts, uintptr_t partial) {
  const Shape s(shape, dense);
  const ReduceArgs args{DType(dtype), s.walk, pointer<void>(x), s.strides(xs), pointer<void>(out), nullptr, nullptr,
                        times ? Sum::products : Sum::values, pointer<void>(times), s.strides(ts)};
  const WithoutPython release;
  reduce(args, parts, pointer<void>(partial), stream_of(stream));
}

// y = x * factors + residual, or x * factors + shift / L; factors by their strides, 0 where they are broadcast
void scale_tensor(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x, const py::tuple& xs,
                  uintptr_t y, uintptr_t factors, const py::tuple& fs, uintptr_t residual, const py::tuple& rs, uintptr_t shift) {
  const Shape s(shape, dense);
  const ApplyArgs args{DType(dtype), s.walk, pointer<void>(x), s.strides(xs), pointer<void>(y), s.strides(dense),
                       pointer<void>(factors), item(fs, 0), item(fs, 1), pointer<void>(residual), s.strides(rs), nullptr, nullptr,
                       Map::scale, 0, 1, pointer<void>(shift)};
  const WithoutPython release;
  apply(args, stream_of(stream));
}

// ---- the step with the standard gate ----------------------------------------------------------------------------------

enum class Kind : int { launches = 0, one_pass = 1, training = 2 };

// The plan of backends/cuda.py.
struct Plan {
  Kind kind;
  Slices slices;
  int parts, gate_blocks, shares;
  explicit Plan(const py::tuple& t)
      : kind(Kind(item(t, 0))),
        slices{int(item(t, 1)), item(t, 2), item(t, 3), int(item(t, 4)), int(item(t, 5))},
        parts(int(item(t, 6))), gate_blocks(int(item(t, 7))), shares(int(item(t, 8))) {}
  bool partial(const Walk& w) const { return kind == Kind::training ? w.channels_last && slices.parts > 1 : parts > 1; }
  int64_t partial_sums() const { return kind == Kind::training ? slices.parts : parts; }
};

// Hands out pieces of one tensor, whose size is worked out in backends/cuda_plans.py.
struct Workspace {
  char* data;
  int64_t left, number;
  Workspace(uintptr_t p, int64_t bytes, int dtype) : data(pointer<char>(p)), left(bytes), number(DType(dtype) == DType::f64 ? 8 : 4) {}
  void* take(int64_t count) {
    void* const p = data;
    const int64_t bytes = (count * number + 15) / 16 * 16;
    if (left < bytes) throw std::logic_error("drsn_kernels: the workspace of a CUDA kernel is too small");
    data += bytes, left -= bytes;
    return p;
  }
};

struct ForwardWorkspace {
  void *tau, *means = nullptr, *partial = nullptr;
  ForwardWorkspace(Workspace& w, const Plan& plan, const Walk& walk, void* wanted) : tau(wanted) {
    if (plan.kind == Kind::one_pass) return;
    if (!tau) tau = w.take(walk.n * walk.c);
    means = w.take(walk.n);
    if (plan.partial(walk)) partial = w.take(plan.partial_sums() * walk.n * walk.c);
  }
};

struct BackwardWorkspace {
  void *dtau = nullptr, *partial = nullptr;
  GateGrads grads{};
  BackwardWorkspace(Workspace& w, const Plan& plan, const Walk& walk, int64_t hidden, int64_t outputs) {
    grads.dz = w.take(walk.n * outputs);
    grads.du = w.take(walk.n * hidden);
    grads.centre = w.take(walk.c);
    grads.shares = plan.shares;
    if (plan.shares > 1) grads.partial = w.take(plan.shares * (hidden * walk.c + outputs * hidden));
    if (plan.kind == Kind::one_pass) return;
    dtau = w.take(walk.n * walk.c);
    grads.dtau = dtau;
    grads.around = w.take(walk.n * walk.c);
    if (plan.partial(walk)) partial = w.take(plan.partial_sums() * walk.n * walk.c);
  }
};

void standard_forward(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t x,
                      const py::tuple& xs, uintptr_t y, const py::tuple& ys, uintptr_t residual, const py::tuple& rs,
                      uintptr_t bits, uintptr_t tau, int average, int64_t hidden, int64_t outputs, bool batch_stats, double eps,
                      double momentum, const py::tuple& parts, const py::tuple& state, const py::tuple& plan_of, uintptr_t workspace, int64_t workspace_bytes) {
  const Shape s(shape, dense);
  const Plan plan(plan_of);
  const Walk& w = s.walk;
  const GateArgs gate = gate_args(w, average, hidden, outputs, batch_stats, eps, momentum, parts, state);
  const int64_t plane = plane_bytes(w);
  uint8_t* const sign = pointer<uint8_t>(bits);
  uint8_t *const nonzero = sign ? sign + plane : nullptr, *const kept = sign ? sign + 2 * plane : nullptr;
  Workspace memory(workspace, workspace_bytes, dtype);
  const ForwardWorkspace to(memory, plan, w, pointer<void>(tau));
  const Strides of_x = s.strides(xs), of_y = s.strides(ys), of_residual = s.strides(rs);
  const WithoutPython release;
  const cudaStream_t on = stream_of(stream);
  const StepArgs step{DType(dtype), w, pointer<void>(x), pointer<void>(y), pointer<void>(residual), sign, nonzero, kept, gate,
                      to.tau, to.means, to.partial};
  if (plan.kind == Kind::one_pass) return one_pass_forward(step, plan.slices, on);
  if (plan.kind == Kind::training) return training_forward(step, plan.slices, on);
  const bool one_tau = outputs == 1 && gate.average != Average::channel;
  reduce({DType(dtype), w, pointer<void>(x), of_x, gate.pooled, sign, nonzero}, plan.parts, to.partial, on);
  gate_forward(DType(dtype), w, gate, to.tau, to.means, plan.gate_blocks, on);
  apply({DType(dtype), w, pointer<void>(x), of_x, pointer<void>(y), of_y, to.tau, one_tau ? 1 : w.c, one_tau ? 0 : 1,
         pointer<void>(residual), of_residual, kept, nullptr},
        on);
}

// grads: dw1, db1, dgamma, dbeta, dw2, db2
void standard_backward(uintptr_t stream, int dtype, const py::tuple& shape, const py::tuple& dense, uintptr_t g,
                       const py::tuple& gs, uintptr_t dx, uintptr_t bits, uintptr_t tau_grad, int average, int64_t hidden,
                       int64_t outputs, bool batch_stats, double eps, const py::tuple& parts, const py::tuple& state,
                       const py::tuple& wanted, const py::tuple& plan_of, uintptr_t workspace, int64_t workspace_bytes) {
  const Shape s(shape, dense);
  const Plan plan(plan_of);
  const Walk& w = s.walk;
  const GateArgs gate = gate_args(w, average, hidden, outputs, batch_stats, eps, 0, parts, state);
  const int64_t plane = plane_bytes(w);
  const uint8_t *const sign = pointer<uint8_t>(bits), *const nonzero = sign + plane, *const kept = sign + 2 * plane;
  Workspace memory(workspace, workspace_bytes, dtype);
  BackwardWorkspace to(memory, plan, w, hidden, outputs);
  Addresses out{wanted};
  to.grads.tau_grad = pointer<void>(tau_grad);
  to.grads.dw1 = out.next(), to.grads.db1 = out.next(), to.grads.dgamma = out.next(), to.grads.dbeta = out.next();
  to.grads.dw2 = out.next(), to.grads.db2 = out.next();
  const Strides of_g = s.strides(gs), of_dx = s.strides(dense);
  const WithoutPython release;
  const cudaStream_t on = stream_of(stream);
  const StepGradArgs step{DType(dtype), w, pointer<void>(g), pointer<void>(dx), sign, nonzero, kept, gate, to.grads, to.dtau, to.partial};
  if (plan.kind == Kind::training) return training_backward(step, plan.slices, on);
  if (plan.kind == Kind::one_pass) {
    one_pass_backward(step, plan.slices, on);
    const GateGrads& grads = to.grads;
    if (!grads.dw1 && !grads.db1 && !grads.dgamma && !grads.dbeta && !grads.dw2 && !grads.db2) return;
    to.grads.summed = true;
    return gate_backward(DType(dtype), w, gate, to.grads, plan.gate_blocks, on);
  }
  const auto grad_of = [&](void* da, void* to_dx, void* to_dtau) {
    grad({DType(dtype), w, pointer<void>(g), of_g, da, to_dx, of_dx, to_dtau, kept, sign, nonzero}, plan.parts,
         to.partial, on);
  };
  grad_of(nullptr, nullptr, to.dtau);
  gate_backward(DType(dtype), w, gate, to.grads, plan.gate_blocks, on);
  if (dx) grad_of(to.grads.around, pointer<void>(dx), nullptr);
}

int64_t plane_words_of(const py::tuple& shape, const py::tuple& dense) { return plane_bytes(Shape(shape, dense).walk) / 4; }

}  // namespace
}  // namespace drsn

#if defined(DRSN_EMULATION)
PYBIND11_MODULE(_cuda_emulated, m) {
  using namespace drsn;
  m.def("schedule", &emulation::schedule, "the order in which warps, lanes and blocks run");
  m.def("watch_barriers", [](bool watching) { emulation::removal() = {watching, {}, "", 0, 0}; });
  m.def("barriers", [] {  // (file, line, times a thread came to it in a launch)
    py::list seen;
    for (const auto& [site, times] : emulation::removal().seen) seen.append(py::make_tuple(site.file, site.line, times));
    return seen;
  });
  m.def("remove_barrier", [](const std::string& file, int line, int nth) {
    auto& removal = emulation::removal();
    removal.file = file, removal.line = line, removal.nth = nth;
  });
  m.def("run_launches", [](bool run) { launches_run = run; });
  m.def("launches", [] {  // since the last call
    py::list names;
    for (const auto& name : launches) names.append(name);
    launches.clear();
    return names;
  });
  m.def("set_device", [](int capability, int multiprocessors, int64_t shared_per_block, int64_t shared_per_multiprocessor) {
    emulation::device() = {capability, multiprocessors, size_t(shared_per_block), size_t(shared_per_multiprocessor)};
  });
#else
PYBIND11_MODULE(_cuda, m) {
  using namespace drsn;
#endif
  m.doc() = "CUDA kernels of drsn_kernels; called by drsn_kernels.backends.cuda, which checks what it passes.";
#if defined(DRSN_CUDA_ARCHITECTURES)
  m.attr("architectures") = DRSN_CUDA_ARCHITECTURES;
#else
  m.attr("architectures") = "";
#endif
#if defined(CUDART_VERSION)
  m.attr("runtime") = std::to_string(CUDART_VERSION / 1000);
#endif
  m.def("device_count", &device_count);
  m.def("no_code_for_this_device", &no_code_for_this_device);
  m.def("device_properties", &device_properties);
  m.def("plane_words", &plane_words_of);
  m.def("reduce", &reduce_tensor);
  m.def("apply", &apply_tensor);
  m.def("grad", &grad_tensor);
  m.def("sum", &sum_tensor);
  m.def("scale", &scale_tensor);
  m.def("standard_forward", &standard_forward);
  m.def("standard_backward", &standard_backward);
}

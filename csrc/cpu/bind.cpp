// The extension drsn_kernels._cpu: tensors in, by their Python attributes; nothing of torch's C++ in it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "api.h"
#include "arena.h"
#include "bound_gate.h"
#include "dlpack.h"
#include "named.h"
#include "read_gate.h"
#include "shape.h"

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

}  // namespace

const Kernels* kernels = best_kernels();

namespace {

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

// ---- the kernels: methods of a walk, their arguments by name ---------------------------------------------------------

namespace names {
const Name kind("kind"), inside("inside"), offset("offset");
const Name x("x"), times("times"), out("out"), y("y"), t("t"), residual("residual"), shift("shift");
const Name planes("planes"), kept("kept"), sign("sign"), nonzero("nonzero");
const Name g("g"), dA("dA"), dx("dx"), dtau("dtau");
const Name batch("batch"), slope("slope"), eps("eps"), factor("factor"), count("count");
const Name weight("weight"), bias("bias"), mean("mean"), var("var"), stats("stats"), sums("sums");
const Name running_mean("running_mean"), running_var("running_var"), batches("batches");
}  // namespace names

// The address of a tensor that a caller hands in, and of one that is made for the call; null where there is none.
template <class T = void> T* given(Named& call, const Name& name) {
  PyObject* const tensor = call.given(name);
  return tensor ? static_cast<T*>(cpu_address(tensor)) : nullptr;
}
template <class T = void> T* made(Named& call, const Name& name) {
  PyObject* const tensor = call.given(name);
  return tensor ? static_cast<T*>(address(tensor)) : nullptr;
}

// The same of a tensor of x's shape, and its strides.
void* given(const BoundWalk& w, Named& call, const Name& name, Strides& strides) {
  PyObject* const tensor = call.given(name);
  if (!tensor) return nullptr;
  strides = w.shape.merged(steps(tensor, w.shape.rank).ptr());
  return cpu_address(tensor);
}

// A plane in a tensor of them, by the number of its row; null where there is none.
template <class T> T* plane(const BoundWalk& w, Named& call, T* planes, const Name& name) {
  const int64_t row = call.integer(name, -1);
  return planes && row >= 0 ? planes + row * w.plane : nullptr;
}

// A null pointer would end the process. Tensors without elements have no address either.
void require(const BoundWalk& w, std::initializer_list<std::pair<const void*, const Name*>> arguments) {
  for (const auto& [address, name] : arguments)
    if (!address && !w.empty())
      throw py::type_error("the cpu kernels need the argument " + py::cast<std::string>(name->text));
}

void reduce(const BoundWalk& w, Named& call) {
  ReduceArgs a;
  a.dtype = w.dtype;
  a.walk = w.shape.walk;
  a.sum = Sum(call.choice(names::kind, {"magnitude", "value", "product"}, 0));
  a.x = given(w, call, names::x, a.xs);
  a.times = given(w, call, names::times, a.ts);
  a.out = made(call, names::out);
  uint8_t* const planes = given<uint8_t>(call, names::planes);
  a.sign = plane(w, call, planes, names::sign);
  a.nonzero = plane(w, call, planes, names::nonzero);
  call.finish();
  require(w, {{a.x, &names::x}, {a.out, &names::out}});
  if (a.sum == Sum::products) require(w, {{a.times, &names::times}});
  py::gil_scoped_release release;
  kernels->reduce(a);
}

void map(const BoundWalk& w, Named& call) {
  MapArgs a;
  a.dtype = w.dtype;
  a.walk = w.shape.walk;
  const bool scales = call.choice(names::kind, {"threshold", "scale"}, 0) == 1;
  a.x = given(w, call, names::x, a.xs);
  a.y = given(w, call, names::y, a.ys);
  if (PyObject* const t = call.given(names::t)) {
    const py::object size = sizes(t, 2), step = steps(t, 2);
    a.t = cpu_address(t);
    a.t_n = item(size.ptr(), 0) == 1 ? 0 : item(step.ptr(), 0);
    a.t_c = item(size.ptr(), 1) == 1 ? 0 : item(step.ptr(), 1);
  }
  a.inside = call.number(names::inside, 0);
  a.offset = call.number(names::offset, 1);
  a.map = scales ? Map::scale : a.inside == 0 && a.offset == 1 ? Map::soft : Map::pieces;
  a.residual = given(w, call, names::residual, a.rs);
  a.shift = given(call, names::shift);
  uint8_t* const planes = given<uint8_t>(call, names::planes);
  a.kept = plane(w, call, planes, names::kept);
  a.sign = plane(w, call, planes, names::sign);
  a.nonzero = plane(w, call, planes, names::nonzero);
  call.finish();
  require(w, {{a.x, &names::x}, {a.y, &names::y}, {a.t, &names::t}});
  py::gil_scoped_release release;
  kernels->map(a);
}

void grad(const BoundWalk& w, Named& call) {
  GradArgs a;
  a.dtype = w.dtype;
  a.walk = w.shape.walk;
  a.g = given(w, call, names::g, a.gs);
  a.da = given(call, names::dA);
  a.dx = made(call, names::dx);
  a.ds = w.shape.dense;
  a.dtau = made(call, names::dtau);
  const uint8_t* const planes = given<uint8_t>(call, names::planes);
  a.kept = plane(w, call, planes, names::kept);
  a.sign = plane(w, call, planes, names::sign);
  a.nonzero = plane(w, call, planes, names::nonzero);
  a.inside = call.number(names::inside, 0);
  a.offset = call.number(names::offset, 1);
  call.finish();
  require(w, {{planes, &names::planes}, {a.g ? a.g : a.da, &names::g}});
  py::gil_scoped_release release;
  kernels->grad(a);
}

void norm(const BoundWalk& w, Named& call) {
  NormArgs a;
  a.dtype = w.dtype;
  a.walk = w.shape.walk;
  a.batch = call.integer(names::batch, 1);
  a.slope = call.number(names::slope, 0);
  a.eps = call.number(names::eps, 0);
  a.x = given(w, call, names::x, a.xs);
  a.y = made(call, names::y);
  a.ys = w.shape.dense;
  a.weight = given(call, names::weight);
  a.bias = given(call, names::bias);
  a.stats = made(call, names::stats);
  a.given_mean = given(call, names::mean);
  a.given_var = given(call, names::var);
  a.running_mean = given(call, names::running_mean);
  a.running_var = given(call, names::running_var);
  a.factor = call.number(names::factor, 0);
  a.batches = given<int64_t>(call, names::batches);
  call.finish();
  require(w, {{a.x, &names::x}, {a.stats, &names::stats}});
  if (!a.batch) require(w, {{a.given_mean, &names::mean}, {a.given_var, &names::var}});
  py::gil_scoped_release release;
  kernels->norm(a);
}

void norm_grad(const BoundWalk& w, Named& call) {
  NormGradArgs a;
  a.dtype = w.dtype;
  a.walk = w.shape.walk;
  a.batch = call.integer(names::batch, 1);
  a.slope = call.number(names::slope, 0);
  a.g = given(w, call, names::g, a.gs);
  a.x = given(w, call, names::x, a.xs);
  a.dx = made(call, names::dx);
  a.ds = w.shape.dense;
  a.weight = given(call, names::weight);
  a.bias = given(call, names::bias);
  a.stats = given(call, names::stats);
  a.sums = made(call, names::sums);
  a.count = call.number(names::count, 0);
  a.given = a.count > 0;
  call.finish();
  require(w, {{a.g, &names::g}, {a.x, &names::x}, {a.stats, &names::stats}});
  if (a.batch) require(w, {{a.sums, &names::sums}});
  py::gil_scoped_release release;
  kernels->norm_grad(a);
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
  py::class_<BoundWalk> walk(m, "Walk", "The kernels for tensors of one dtype, shape and dense strides.");
  walk.def(py::init<int, const py::tuple&, const py::tuple&>(), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
  walk.def_property_readonly("words", [](const BoundWalk& w) { return w.plane / 4; }, "32-bit words in one plane.");
  add_named<BoundWalk, reduce>(walk, "reduce", "out (N, C) = mean |x|, mean x, or the sum of x * times; planes sign, nonzero.");
  add_named<BoundWalk, map>(walk, "map", "y = x thresholded at t, or x * t; and the planes kept, sign and nonzero.");
  add_named<BoundWalk, grad>(walk, "grad", "dx = kept g + s dA / L and dtau = -sum s kept g, each where it is given.");
  add_named<BoundWalk, norm>(walk, "norm", "y = act(weight (x - mean) rstd + bias), the statistics and the running ones.");
  add_named<BoundWalk, norm_grad>(walk, "norm_grad", "sums (2, C), dbias and dweight, and dx, each where it is given.");
  py::class_<BoundGate> gate(m, "Gate", "The step with the standard gate, for tensors of one dtype, shape and dense strides.");
  gate.def(py::init<const BoundWalk&, int, int64_t, int64_t, bool, bool, double, double, int64_t, bool>(), py::kw_only(),
           py::arg("walk"), py::arg("average"), py::arg("hidden"), py::arg("outputs"), py::arg("norm"),
           py::arg("batch_stats"), py::arg("eps"), py::arg("momentum"), py::arg("block"), py::arg("keep"));
  gate.def_property_readonly("kept_bytes", &BoundGate::kept_bytes, "Of the tensor `kept`: the state, then the planes.");
  gate.def_property_readonly("state_bytes", &BoundGate::state_bytes, "Of it, those before the planes.");
  add_ordered<BoundGate, gated_forward, kForward>(gate, "forward", "y, and what its gradient needs.");
  add_ordered<BoundGate, gated_backward, kBackward>(gate, "backward", "dx and the gradients of the gate's parameters.");
  py::class_<GateReader> reader(m, "GateReader", "Reads the parts of a standard gate, for drsn_kernels.gates.");
  reader.def(py::init<py::type, const std::vector<std::vector<py::type>>&, std::vector<py::dict>, py::type>(), py::kw_only(),
             py::arg("sequential"), py::arg("structures"), py::arg("global_hooks"), py::arg("parts"));
  add_method<GateReader>(
      reader, "read", "(parts, norm's other numbers), or None where the gate is not a standard one.",
      [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject*) {
        return guarded([&] {
          if (positional != 1) throw py::type_error("read takes a gate");
          return py::cast<const GateReader*>(py::handle(self))->read(values[0]);
        });
      });
  m.def("set_parallel_for", [](uintptr_t p) { parallel_for = reinterpret_cast<ParallelFor>(p); },
        "The address of torch_parallel_for, or 0 for serial kernels.");
  m.def("has_parallel_for", [] { return parallel_for != nullptr; });
  m.def("empty", &empty, "Uninitialised memory for a large output, as a DLPack capsule.");
  m.def("set_cache_limit", [](size_t bytes) { arena().set_limit(bytes); }, "Bytes of freed outputs to keep.");
  m.def("cached_bytes", [] { return arena().cached(); }, "Bytes of freed outputs kept now.");
  m.def("isa", [] { return kernels->name; }, "The instruction set in use.");
  m.def("available_isas", &available, "What this CPU and build offer, slowest first.");
  m.def("set_isa", &set_isa, "Use another instruction set (tests and benchmarks).");
}

// drsn_kernels._launch: launches all kernels of a pass by one call. No torch and no CUDA headers (driver.h).
//
// A Sequence holds for each kernel what the driver wants, worked out once by backends/gpu/native.py: the function, the
// grid, and parameters of which only addresses are missing. An address is that of one of the call's tensors, or lies some
// bytes into it. run() fills them into a copy of the parameters, on its own stack, so threads may share a Sequence, and
// launches with the GIL released.
//
// Kernels were compiled for tensors of which some are None and some lie at multiples of 16 bytes. Where a call's do not,
// run() launches nothing and says so.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

#include "driver.h"

namespace py = pybind11;

namespace drsn::launch {

constexpr size_t MOST_BASES = 64, MOST_PARAMETERS = 96;
constexpr unsigned MOST_SHARED_UNASKED = 48 << 10;  // bytes of shared memory that a kernel may take without opting in

struct Patch {  // this parameter is the address of bases[base] + offset
  uint32_t parameter;
  uint32_t base;
  int64_t offset;
};

struct Kernel {
  std::string name;
  Function function;
  unsigned grid, threads, shared;
  bool dependent;                    // may begin while the launch before it still runs: it waits by itself
  std::vector<uint64_t> parameters;  // each in the first bytes of its 8
  std::vector<Patch> patches;
};

using Patches = std::vector<std::tuple<uint32_t, uint32_t, int64_t>>;
// name, function, grid, threads, shared, dependent, bytes of the parameters, patches
using Described = std::tuple<std::string, uint64_t, unsigned, unsigned, unsigned, bool, std::string, Patches>;

// The first launch that a Sequence ever makes has failed: something about it is not as believed, and nothing has run.
struct NotLaunched : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Sequence {
 public:
  // aligned: for each base whether its address is a multiple of 16 bytes (True, False), whether it is None (None), or
  // "any" where no kernel asks.
  Sequence(int device, const std::vector<Described>& kernels, const std::vector<py::object>& aligned) : device_(device) {
    if (aligned.size() > MOST_BASES) throw py::value_error("a Sequence takes at most 64 tensors");
    for (size_t i = 0; i < aligned.size(); ++i) {
      const uint64_t bit = uint64_t{1} << i;
      if (aligned[i].is_none()) none_ |= bit;
      else if (py::isinstance<py::bool_>(aligned[i])) asked_ |= bit, aligned_ |= aligned[i].cast<bool>() ? bit : 0;
      else if (!aligned[i].equal(py::str("any"))) throw py::value_error("a tensor is True, False, None or 'any'");
    }
    bases_ = aligned.size();
    for (const auto& described : kernels) kernels_.push_back(parsed(described));
    const Driver& driver = Driver::get();
    driver.ensure_context(device);
    for (const Kernel& kernel : kernels_) fits(driver, kernel);
  }

  bool run(uint64_t stream, const py::tuple& given) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (given.size() != bases_) throw py::type_error("this Sequence takes " + std::to_string(bases_) + " tensors");
    uint64_t address[MOST_BASES], none = 0, aligned = 0;
    for (size_t i = 0; i < bases_; ++i) {
      PyObject* tensor = PyTuple_GET_ITEM(given.ptr(), i);
      const uint64_t bit = uint64_t{1} << i;
      address[i] = 0;
      if (tensor == Py_None) {
        none |= bit;
        continue;
      }
      const auto number = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr));
      if (!number) throw py::error_already_set();
      address[i] = PyLong_AsUnsignedLongLong(number.ptr());
      if (address[i] == static_cast<uint64_t>(-1) && PyErr_Occurred()) throw py::error_already_set();
      aligned |= address[i] % 16 == 0 ? bit : 0;
    }
    if (none != none_ || (aligned & asked_) != aligned_) return false;
    py::gil_scoped_release released;
    const Driver& driver = Driver::get();
    driver.ensure_context(device_);
    for (const Kernel& kernel : kernels_) {
      if (kernel.grid == 0) continue;  // as Triton does: the driver would call it an error
      const Result error = launch(driver, kernel, reinterpret_cast<Stream>(stream), address);
      if (error != 0) {
        const std::string text = "launching " + kernel.name + ": " + driver.describe(error);
        if (!proven_) throw NotLaunched(text);
        throw std::runtime_error(text);
      }
      proven_ = true;
    }
    return true;
  }

 private:
  static Kernel parsed(const Described& described) {
    Kernel kernel;
    std::string bytes;
    Patches patches;
    uint64_t function = 0;
    std::tie(kernel.name, function, kernel.grid, kernel.threads, kernel.shared, kernel.dependent, bytes,
             patches) = described;
    kernel.function = reinterpret_cast<Function>(function);
    if (bytes.size() % 8 != 0 || bytes.size() > 8 * MOST_PARAMETERS)
      throw py::value_error(kernel.name + ": at most 96 parameters of 8 bytes");
    kernel.parameters.resize(bytes.size() / 8);
    if (!bytes.empty()) std::memcpy(kernel.parameters.data(), bytes.data(), bytes.size());
    for (const auto& [parameter, base, offset] : patches) {
      if (parameter >= kernel.parameters.size()) throw py::value_error(kernel.name + ": an address of no parameter");
      kernel.patches.push_back({parameter, base, offset});
    }
    return kernel;
  }

  // That the function is one, of this context, and takes this launch.
  void fits(const Driver& driver, const Kernel& kernel) const {
    for (const Patch& patch : kernel.patches)
      if (patch.base >= bases_ || (none_ >> patch.base & 1))
        throw py::value_error(kernel.name + ": an address of a tensor that is not given");
    int threads = 0, shared = 0;
    driver.check(driver.attribute(&threads, MAX_THREADS_PER_BLOCK, kernel.function), "cuFuncGetAttribute");
    driver.check(driver.attribute(&shared, MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.function), "cuFuncGetAttribute");
    if (kernel.threads > static_cast<unsigned>(threads))
      throw py::value_error(kernel.name + " takes at most " + std::to_string(threads) + " threads");
    if (kernel.shared > MOST_SHARED_UNASKED && kernel.shared > static_cast<unsigned>(shared))
      throw py::value_error(kernel.name + " may take at most " + std::to_string(shared) + " bytes of shared memory");
  }

  static Result launch(const Driver& driver, const Kernel& kernel, Stream stream, const uint64_t* address) {
    uint64_t parameters[MOST_PARAMETERS];
    void* pointers[MOST_PARAMETERS];
    std::copy(kernel.parameters.begin(), kernel.parameters.end(), parameters);
    for (const Patch& patch : kernel.patches) parameters[patch.parameter] = address[patch.base] + patch.offset;
    for (size_t i = 0; i < kernel.parameters.size(); ++i) pointers[i] = &parameters[i];
    LaunchAttribute dependent = {PROGRAMMATIC_STREAM_SERIALIZATION, {}, {1}};
    const unsigned attributes = kernel.dependent ? 1 : 0;
    const LaunchConfig config = {kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, &dependent, attributes};
    return driver.launch(&config, kernel.function, pointers, nullptr);
  }

  int device_;
  size_t bases_ = 0;
  uint64_t none_ = 0, asked_ = 0, aligned_ = 0;
  std::vector<Kernel> kernels_;
  std::atomic<bool> proven_{false};  // a launch has gone well
};

}  // namespace drsn::launch

PYBIND11_MODULE(_launch, m) {
  using namespace drsn::launch;
  m.doc() = "Launches prepared sequences of kernels through the CUDA driver";
  py::register_exception<NotLaunched>(m, "NotLaunched", PyExc_RuntimeError);
  py::class_<Sequence>(m, "Sequence")
      .def(py::init<int, const std::vector<Described>&, const std::vector<py::object>&>(), py::arg("device"),
           py::arg("kernels"), py::arg("aligned"))
      .def("run", &Sequence::run, py::arg("stream"), py::arg("given"),
           "Launch on a stream with these tensors; False, and nothing is launched, if the kernels are for others.");
  m.def("missing", [] {
    try {
      Driver::get();
      return std::string();
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
  }, "Why there is no driver to launch with; empty where there is.");
}

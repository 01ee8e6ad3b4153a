// What drsn_kernels/gates.py reads of a standard gate at every call, by dictionary look-ups alone: nothing is remembered, so
// nothing can be out of date. Where anything is unusual it returns None, and Python looks for the reason.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>
#include <vector>

namespace drsn {

namespace py = pybind11;

namespace key {  // interned, as attributes are
inline PyObject* const backward_hooks = PyUnicode_InternFromString("_backward_hooks");
inline PyObject* const backward_pre_hooks = PyUnicode_InternFromString("_backward_pre_hooks");
inline PyObject* const buffers = PyUnicode_InternFromString("_buffers");
inline PyObject* const forward_hooks = PyUnicode_InternFromString("_forward_hooks");
inline PyObject* const forward_pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
inline PyObject* const modules = PyUnicode_InternFromString("_modules");
inline PyObject* const parameters = PyUnicode_InternFromString("_parameters");
inline PyObject* const bias = PyUnicode_InternFromString("bias");
inline PyObject* const eps = PyUnicode_InternFromString("eps");
inline PyObject* const forward = PyUnicode_InternFromString("forward");
inline PyObject* const momentum = PyUnicode_InternFromString("momentum");
inline PyObject* const num_batches_tracked = PyUnicode_InternFromString("num_batches_tracked");
inline PyObject* const num_features = PyUnicode_InternFromString("num_features");
inline PyObject* const running_mean = PyUnicode_InternFromString("running_mean");
inline PyObject* const running_var = PyUnicode_InternFromString("running_var");
inline PyObject* const track_running_stats = PyUnicode_InternFromString("track_running_stats");
inline PyObject* const training = PyUnicode_InternFromString("training");
inline PyObject* const weight = PyUnicode_InternFromString("weight");
}  // namespace key

class GateReader {
 public:
  // structures: the accepted types of the children, with a norm second where there are five. global_hooks: dictionaries that
  // torch fills in place. parts: the NamedTuple to return.
  GateReader(py::type sequential, const std::vector<std::vector<py::type>>& structures, std::vector<py::dict> global_hooks,
             py::type parts)
      : sequential_(std::move(sequential)), structures_(structures), global_hooks_(std::move(global_hooks)),
        parts_(std::move(parts)) {}

  // (parts, None), or with a norm (parts, (track_running_stats, num_features)); or None.
  py::object read(PyObject* gate) const {
    if (!has_type(gate, sequential_)) return py::none();
    for (const py::dict& hooks : global_hooks_)
      if (PyDict_GET_SIZE(hooks.ptr())) return py::none();
    const py::object own = plain(gate);
    PyObject* const modules = own ? found(own.ptr(), key::modules) : nullptr;
    if (!modules || !PyDict_CheckExact(modules)) return py::none();  // an OrderedDict has an order of its own
    PyObject *child, *children[kMost];
    Py_ssize_t position = 0;
    size_t count = 0;
    while (PyDict_Next(modules, &position, nullptr, &child)) {
      if (count == kMost) return py::none();
      children[count++] = child;
    }
    if (!accepted(children, count)) return py::none();
    py::object owns[kMost];
    for (size_t i = 0; i < count; ++i)
      if (!(owns[i] = plain(children[i]))) return py::none();

    PyObject *const first = found(owns[0].ptr(), key::parameters), *const last = found(owns[count - 2].ptr(), key::parameters);
    if (!first || !last) return py::none();
    PyObject *w1 = found(first, key::weight), *b1 = found(first, key::bias), *w2 = found(last, key::weight),
             *b2 = found(last, key::bias);
    if (!w1 || !b1 || !w2 || !b2) return py::none();
    if (count < 5) {
      static PyObject* const zero = PyFloat_FromDouble(0);
      PyObject* const none = Py_None;
      return pair({w1, b1, none, none, w2, b2, none, none, none, zero, zero, Py_False}, py::none());
    }
    PyObject* const norm = owns[1].ptr();
    PyObject *const affine = found(norm, key::parameters), *const buffers = found(norm, key::buffers);
    if (!affine || !buffers) return py::none();
    PyObject *gamma = found(affine, key::weight), *beta = found(affine, key::bias), *mean = found(buffers, key::running_mean),
             *var = found(buffers, key::running_var), *batches = found(buffers, key::num_batches_tracked);
    PyObject *eps = found(norm, key::eps), *momentum = found(norm, key::momentum), *training = found(norm, key::training);
    PyObject *tracks = found(norm, key::track_running_stats), *features = found(norm, key::num_features);
    for (PyObject* one : {gamma, beta, mean, var, batches, eps, momentum, training, tracks, features})
      if (!one) return py::none();
    return pair({w1, b1, gamma, beta, w2, b2, mean, var, batches, eps, momentum, training},
                py::reinterpret_steal<py::object>(PyTuple_Pack(2, tracks, features)));
  }

 private:
  static constexpr size_t kMost = 8;
  static constexpr Py_ssize_t kParts = 12;

  static bool has_type(PyObject* object, const py::type& type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type.ptr();
  }
  bool accepted(PyObject* const* children, size_t count) const {
    for (const auto& types : structures_) {
      bool same = types.size() == count;
      for (size_t i = 0; same && i < count; ++i) same = has_type(children[i], types[i]);
      if (same) return true;
    }
    return false;
  }

  // Borrowed; null where it is not there or None.
  static PyObject* found(PyObject* dictionary, PyObject* name) {
    PyObject* const value = PyDict_Check(dictionary) ? PyDict_GetItemWithError(dictionary, name) : nullptr;
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value == Py_None ? nullptr : value;
  }

  // The module's own dictionary; null where it has hooks, or a forward of its own.
  static py::object plain(PyObject* module) {
    static PyObject* const hooks[] = {key::forward_hooks, key::forward_pre_hooks, key::backward_hooks,
                                      key::backward_pre_hooks};
    auto own = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!own) throw py::error_already_set();
    for (PyObject* const name : hooks) {
      PyObject* const kind = found(own.ptr(), name);
      if (!kind || !PyDict_Check(kind) || PyDict_GET_SIZE(kind)) return {};
    }
    return PyDict_Contains(own.ptr(), key::forward) ? py::object() : own;
  }

  py::object pair(std::initializer_list<PyObject*> values, const py::object& norm) const {
    auto* const type = reinterpret_cast<PyTypeObject*>(parts_.ptr());
    const auto parts = py::reinterpret_steal<py::object>(type->tp_alloc(type, kParts));  // as tuple.__new__ does
    if (!parts) throw py::error_already_set();
#if PY_VERSION_HEX >= 0x030E0000
    reinterpret_cast<PyTupleObject*>(parts.ptr())->ob_hash = -1;  // not known yet; 0 would be taken for it
#endif
    Py_ssize_t i = 0;
    for (PyObject* value : values) PyTuple_SET_ITEM(parts.ptr(), i++, py::handle(value).inc_ref().ptr());
    return py::reinterpret_steal<py::object>(PyTuple_Pack(2, parts.ptr(), norm.ptr()));
  }

  py::type sequential_;
  std::vector<std::vector<py::type>> structures_;
  std::vector<py::dict> global_hooks_;
  py::type parts_;
};

}  // namespace drsn

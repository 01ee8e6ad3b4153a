// Keyword arguments of a call, taken by name. pybind11 would take 90 ns for each, a fifth of a small call for all; Python
// interns the names in a call, so here they are compared by address.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

namespace drsn {

namespace py = pybind11;

struct Name {
  PyObject* const text;
  explicit Name(const char* name) : text(PyUnicode_InternFromString(name)) {}
};

class Named {
 public:
  // of METH_FASTCALL | METH_KEYWORDS
  Named(PyObject* const* values, Py_ssize_t positional, PyObject* names)
      : values_(values), names_(names), count_(names ? PyTuple_GET_SIZE(names) : 0) {
    if (positional || count_ > 64) throw py::type_error("the kernels take keyword arguments only, at most 64");
  }

  // Null where it is not given. Names are found at once where they are asked for in the order of the call.
  PyObject* get(const Name& name) {
    for (Py_ssize_t k = 0, i = next_; k < count_; ++k, ++i) {
      if (i >= count_) i = 0;
      if (PyTuple_GET_ITEM(names_, i) != name.text) continue;
      taken_ |= uint64_t(1) << i;
      next_ = i + 1;
      return values_[i];
    }
    return nullptr;
  }

  // An address; 0 is null.
  template <class T> T* pointer(const Name& name) {
    PyObject* const value = get(name);
    return value ? reinterpret_cast<T*>(PyLong_AsUnsignedLongLong(value)) : nullptr;
  }
  int64_t integer(const Name& name, int64_t otherwise) {
    PyObject* const value = get(name);
    return value && value != Py_None ? PyLong_AsLongLong(value) : otherwise;
  }
  double number(const Name& name, double otherwise) {
    PyObject* const value = get(name);
    return value ? PyFloat_AsDouble(value) : otherwise;
  }
  // A tuple of as many integers, or null.
  PyObject* tuple(const Name& name, Py_ssize_t size) {
    PyObject* const value = get(name);
    if (!value || value == Py_None) return nullptr;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != size) wrong(name, "a tuple of " + std::to_string(size));
    return value;
  }
  // Its place in `known`; `otherwise` where it is not given or None.
  int choice(const Name& name, std::initializer_list<const char*> known, int otherwise) {
    PyObject* const value = get(name);
    if (!value || value == Py_None) return otherwise;
    int i = 0;
    std::string all;
    for (const char* one : known) {
      if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, one) == 0) return i;
      all += (i++ ? ", " : "one of ") + std::string(one);
    }
    wrong(name, all);
  }

  // When all are taken: errors of the conversions, and names that nobody asked for.
  void finish() const {
    if (PyErr_Occurred()) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < count_; ++i)
      if (!(taken_ >> i & 1))
        throw py::type_error("unexpected argument " + py::cast<std::string>(PyTuple_GET_ITEM(names_, i)));
  }

 private:
  [[noreturn]] static void wrong(const Name& name, const std::string& accepted) {
    throw py::type_error(py::cast<std::string>(name.text) + " must be " + accepted);
  }

  PyObject* const* const values_;
  PyObject* const names_;
  const Py_ssize_t count_;
  Py_ssize_t next_ = 0;
  uint64_t taken_ = 0;
};

// A method of a bound class from function(self, named), which fills the arguments of a kernel and runs it.
template <class Self, void (*function)(const Self&, Named&)>
PyObject* call_named(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  try {
    Named named(values, positional, names);
    function(*py::cast<const Self*>(py::handle(self)), named);
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  }
  return nullptr;
}

template <class Self, void (*function)(const Self&, Named&)>
void add_method(const py::class_<Self>& type, const char* name, const char* doc) {
  auto* const method = new PyMethodDef{};  // for as long as the process lives, as the type does
  method->ml_name = name;
  method->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_named<Self, function>));
  method->ml_flags = METH_FASTCALL | METH_KEYWORDS;
  method->ml_doc = doc;
  PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method);
  if (!descriptor) throw py::error_already_set();
  py::setattr(type, name, py::reinterpret_steal<py::object>(descriptor));
}

}  // namespace drsn

// Arguments of a call, taken by name (Named) or in a fixed order (Ordered). pybind11 would take 90 ns for each, a fifth of
// a small call for all; Python interns the names that stand in a call, so here they are compared by address first.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <iterator>
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
    for (Py_ssize_t i = 0; i < count_; ++i) {  // not there, or a name that was made at run time
      if (PyUnicode_Compare(PyTuple_GET_ITEM(names_, i), name.text) != 0) continue;
      taken_ |= uint64_t(1) << i;
      return values_[i];
    }
    return nullptr;
  }

  // Null where it is not given or None.
  PyObject* given(const Name& name) {
    PyObject* const value = get(name);
    return value == Py_None ? nullptr : value;
  }
  int64_t integer(const Name& name, int64_t otherwise) {
    PyObject* const value = given(name);
    return value ? checked(PyLong_AsLongLong(value)) : otherwise;
  }
  double number(const Name& name, double otherwise) {
    PyObject* const value = get(name);
    return value ? checked(PyFloat_AsDouble(value)) : otherwise;
  }
  // Its place in `known`; `otherwise` where it is not given or None.
  int choice(const Name& name, std::initializer_list<const char*> known, int otherwise) {
    PyObject* const value = given(name);
    if (!value) return otherwise;
    int i = 0;
    for (const char* one : known) {
      if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, one) == 0) return i;
      ++i;
    }
    std::string all;
    for (const char* one : known) all += (all.empty() ? "" : ", ") + std::string(one);
    throw py::value_error(py::cast<std::string>(name.text) + " must be one of " + all + ", got " +
                          py::cast<std::string>(py::repr(value)));
  }

  // When all are taken: a name that nobody asked for is an error.
  void finish() const {
    for (Py_ssize_t i = 0; i < count_; ++i)
      if (!(taken_ >> i & 1))
        throw py::type_error("unexpected argument " + py::cast<std::string>(PyTuple_GET_ITEM(names_, i)));
  }

 private:
  template <class T> static T checked(T converted) {
    if (converted == T(-1) && PyErr_Occurred()) throw py::error_already_set();
    return converted;
  }

  PyObject* const* const values_;
  PyObject* const names_;
  const Py_ssize_t count_;
  Py_ssize_t next_ = 0;
  uint64_t taken_ = 0;
};

// Positional arguments, all of them, taken one after the other.
class Ordered {
 public:
  Ordered(PyObject* const* values, Py_ssize_t positional, PyObject* names, const char* const* known, Py_ssize_t count)
      : values_(values), known_(known) {
    if (positional == count && !(names && PyTuple_GET_SIZE(names))) return;
    std::string all;
    for (Py_ssize_t i = 0; i < count; ++i) all += (i ? ", " : "") + std::string(known[i]);
    throw py::type_error("takes " + std::to_string(count) + " positional arguments: " + all);
  }
  // Null where it is None.
  PyObject* next() {
    PyObject* const value = values_[next_++];
    return value == Py_None ? nullptr : value;
  }
  const char* latest() const { return known_[next_ - 1]; }

 private:
  PyObject* const* const values_;
  const char* const* const known_;
  Py_ssize_t next_ = 0;
};

// ---- tensors, through their Python attributes ------------------------------------------------------------------------

inline py::object attribute(PyObject* tensor, const Name& name) {
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name.text));
}

inline void* address(PyObject* tensor) {
  static const Name data_ptr("data_ptr");
  const auto at = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, data_ptr.text));
  if (!at) throw py::error_already_set();
  const unsigned long long number = PyLong_AsUnsignedLongLong(at.ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return reinterpret_cast<void*>(number);
}

// Of what a caller hands in: memory of another device would be read as this process's own.
inline void* cpu_address(PyObject* tensor) {
  static const Name is_cpu("is_cpu"), shape("shape"), device("device");
  const py::object here = attribute(tensor, is_cpu);
  if (!here) throw py::error_already_set();
  if (here.ptr() == Py_True) return address(tensor);
  throw py::value_error("the cpu kernels take CPU tensors, got one of shape " +
                        py::cast<std::string>(py::str(py::tuple(py::list(attribute(tensor, shape))))) + " on " +
                        py::cast<std::string>(py::str(attribute(tensor, device))));
}

// A tuple of `rank` integers.
inline py::object of_rank(py::object tuple, Py_ssize_t rank) {
  if (!tuple) throw py::error_already_set();
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != rank)
    throw py::value_error("the cpu kernels take a tensor of rank " + std::to_string(rank) + " there");
  return tuple;
}
inline py::object sizes(PyObject* tensor, Py_ssize_t rank) {
  static const Name shape("shape");
  return of_rank(attribute(tensor, shape), rank);
}
inline py::object steps(PyObject* tensor, Py_ssize_t rank) {
  static const Name stride("stride");
  return of_rank(py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, stride.text)), rank);
}

// ---- methods ---------------------------------------------------------------------------------------------------------

// What call() returns, or null with what it throws as Python's error.
template <class F> PyObject* guarded(const F& call) {
  try {
    return py::object(call()).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

using Method = PyObject* (*)(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names);

template <class Self> void add_method(const py::class_<Self>& type, const char* name, const char* doc, Method call) {
  auto* const method = new PyMethodDef{};  // for as long as the process lives, as the type does
  method->ml_name = name;
  method->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
  method->ml_flags = METH_FASTCALL | METH_KEYWORDS;
  method->ml_doc = doc;
  PyObject* const descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method);
  if (!descriptor) throw py::error_already_set();
  py::setattr(type, name, py::reinterpret_steal<py::object>(descriptor));
}

// A method of a bound class from function(self, arguments), which fills the arguments of a kernel and runs it.
template <class Self, void (*function)(const Self&, Named&)>
void add_named(const py::class_<Self>& type, const char* name, const char* doc) {
  add_method<Self>(type, name, doc, [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    return guarded([&] {
      Named named(values, positional, names);
      function(*py::cast<const Self*>(py::handle(self)), named);
      return py::none();
    });
  });
}

// known: the names of all arguments, in their order.
template <class Self, void (*function)(const Self&, Ordered&), const auto& known>
void add_ordered(const py::class_<Self>& type, const char* name, const char* doc) {
  add_method<Self>(type, name, doc, [](PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
    return guarded([&] {
      Ordered ordered(values, positional, names, known, std::end(known) - std::begin(known));
      function(*py::cast<const Self*>(py::handle(self)), ordered);
      return py::none();
    });
  });
}

}  // namespace drsn

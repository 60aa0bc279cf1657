// fastgen._C: the kernel tables of the instruction sets that this CPU has, as Python functions.
//
// A tensor argument is anything with data_ptr(), an address as an int, or None for a null pointer. Calls go through the
// CPython vectorcall interface: for small tensors the call is the cost. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "kernels.h"

// units.inc, written by the build: UNIT(isa, op) for every unit that was compiled, the fastest instruction set first.
#define UNIT(isa, op)             \
  namespace fastgen::isa {        \
  extern const Table op##_table;  \
  }
#include "units.inc"
#undef UNIT

namespace {

namespace py = pybind11;
using fastgen::Argument;
using fastgen::Kernel;

constexpr int MOST_ARGUMENTS = 48;
PyObject* data_ptr_name;

bool convert(PyObject* object, char letter, Argument& out) {
  if (letter == 'i') {
    out.integer = PyLong_AsLongLong(object);
    return !(out.integer == -1 && PyErr_Occurred());
  }
  if (letter == 'r') {
    out.real = PyFloat_AsDouble(object);
    return !(out.real == -1.0 && PyErr_Occurred());
  }
  if (object == Py_None) {
    out.pointer = nullptr;
    return true;
  }
  if (PyLong_Check(object)) {
    out.pointer = PyLong_AsVoidPtr(object);
    return !PyErr_Occurred();
  }
  PyObject* address = PyObject_CallMethodNoArgs(object, data_ptr_name);
  if (!address) return false;
  out.pointer = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  return !PyErr_Occurred();
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  const auto* kernel = static_cast<const Kernel*>(PyCapsule_GetPointer(self, nullptr));
  const auto wanted = static_cast<Py_ssize_t>(strlen(kernel->signature));
  if (count != wanted) return PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", kernel->name, wanted, count);
  Argument slots[MOST_ARGUMENTS];
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!convert(args[i], kernel->signature[i], slots[i])) return nullptr;
  Py_BEGIN_ALLOW_THREADS
  kernel->entry(slots);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

PyMethodDef method = {"kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL, nullptr};

const fastgen::Table* const units[] = {
#define UNIT(isa, op) &fastgen::isa::op##_table,
#include "units.inc"
#undef UNIT
};

bool runs_here(const char* isa) {
#ifdef __x86_64__
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return true;
}

// isa -> name -> function, for the instruction sets that this CPU can run, fastest first.
py::dict tables() {
  py::dict out;
  for (const fastgen::Table* table : units) {
    if (!runs_here(table->isa)) continue;
    if (!out.contains(table->isa)) out[table->isa] = py::dict();
    for (int i = 0; i < table->count; ++i) {
      const Kernel& kernel = table->kernels[i];
      if (strlen(kernel.signature) > MOST_ARGUMENTS) throw std::length_error(kernel.name);
      const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(const_cast<Kernel*>(&kernel), nullptr, nullptr));
      out[table->isa][kernel.name] = py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule.ptr()));
    }
  }
  return out;
}

// name -> signature, one letter per argument; the same for every instruction set.
py::dict signatures() {
  py::dict out;
  for (const fastgen::Table* table : units)
    for (int i = 0; i < table->count; ++i) out[table->kernels[i].name] = table->kernels[i].signature;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  data_ptr_name = PyUnicode_InternFromString("data_ptr");
  module.doc() = "CPU kernels of fastgen, by instruction set.";
  module.def("tables", &tables);
  module.def("signatures", &signatures);
}

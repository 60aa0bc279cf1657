// fastgen._C: the kernel tables of the instruction sets that this CPU has, as Python functions.
//
// A tensor argument is anything with data_ptr(), an address as an int, or None for a null pointer. Calls go through the
// CPython vectorcall interface: for small tensors the call is the cost. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"
#include "launch.h"

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

using fastgen::Chain;
using fastgen::Launch;
using fastgen::MOST_ARGUMENTS;
using fastgen::Record;
using fastgen::Watch;

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
  fastgen::dlpack::Tensor tensor;
  if (fastgen::Torch::get().describe(object, tensor)) {
    out.pointer = fastgen::address(tensor);
    return true;
  }
  PyErr_Clear();
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
  Watch::get().run(*kernel, slots);
  Py_END_ALLOW_THREADS
  if (fastgen::listener && !fastgen::tell(kernel->name, nullptr, args, count, Py_None)) return nullptr;
  Py_RETURN_NONE;
}

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

// The instruction sets that this CPU can run, fastest first.
const std::vector<std::string>& isas() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> out;
    for (const fastgen::Table* table : units)
      if (runs_here(table->isa) && std::find(out.begin(), out.end(), table->isa) == out.end()) out.push_back(table->isa);
    return out;
  }();
  return found;
}

// Index in isas() of the set that launches use; -1 for none of them.
int selected = -1;

void use_isa(const std::string& isa) {
  const auto found = std::find(isas().begin(), isas().end(), isa);
  selected = found == isas().end() ? -1 : static_cast<int>(found - isas().begin());
}

PyObject* launch_call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return (*static_cast<const Launch*>(PyCapsule_GetPointer(self, nullptr)))(args, count, selected);
}

template <auto Member>
PyObject* record_call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return (static_cast<const Record*>(PyCapsule_GetPointer(self, nullptr))->*Member)(args, count, selected);
}

template <auto F>
py::object function(const char* name, const py::object& self) {
  static PyMethodDef method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(F)), METH_FASTCALL, nullptr};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, self.ptr()));
}

// A launch and its kernel's name: what Python has of it.
using Description = std::pair<std::string, std::string>;

Launch launch_of(const Description& description) {
  const auto& [name, plan] = description;
  std::vector<const Kernel*> kernels;
  for (const std::string& isa : isas())
    for (const fastgen::Table* table : units)
      for (int i = 0; isa == table->isa && i < table->count; ++i)
        if (name == table->kernels[i].name) kernels.push_back(&table->kernels[i]);
  if (kernels.size() != isas().size()) throw py::key_error(name);
  return Launch(kernels, plan);
}

py::object capsule(void* object) { return py::reinterpret_steal<py::object>(PyCapsule_New(object, nullptr, nullptr)); }

// A function that launches the kernel of this name by the plan. It lives as long as the process.
py::object launch(const Description& description) {
  return function<launch_call>("launch", capsule(new Launch(launch_of(description))));
}

PyObject* chain_call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return (*static_cast<const Chain*>(PyCapsule_GetPointer(self, nullptr)))(args, count, selected);
}

// A function that makes these launches one after the other. It lives as long as the process.
py::object chain(const std::vector<Description>& descriptions, const std::vector<std::string>& takes) {
  std::vector<Launch> launches;
  for (const Description& description : descriptions) launches.push_back(launch_of(description));
  return function<chain_call>("chain", capsule(new Chain(std::move(launches), takes)));
}

// A function that launches the first, or records the others: `make_apply` makes of a forward and a backward function the
// `apply` of a torch.autograd.Function. It lives as long as the process.
py::object record(const Description& plain, const Description& forward, const Description& backward,
                  const Description& final, int returns, const std::string& takes, const std::string& gives,
                  const py::object& make_apply, py::object longer) {
  auto* made = new Record(launch_of(plain), launch_of(forward), launch_of(backward), launch_of(final), returns, takes, gives);
  const py::object self = capsule(made);
  made->complete(make_apply(function<record_call<&Record::forward>>("forward", self),
                            function<record_call<&Record::backward>>("backward", self)),
                 std::move(longer));
  return function<record_call<&Record::attempt>>("record", self);
}

// From now on this thread tells `told` of its kernels; None: nobody. Returns whom it told before.
py::object listen(const py::object& told) {
  PyObject* const before = std::exchange(fastgen::listener, told.is_none() ? nullptr : Py_NewRef(told.ptr()));
  return before ? py::reinterpret_steal<py::object>(before) : py::none();
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
      out[table->isa][kernel.name] = function<call>("kernel", capsule(const_cast<Kernel*>(&kernel)));
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
  module.def("use_isa", &use_isa);
  module.def("launch", &launch);
  module.def("record", &record);
  module.def("chain", &chain);
  module.def("listen", &listen);
  module.def("signatures", &signatures);
  module.def("restart_watch", [](bool on) { return Watch::get().restart(on); });
}

// The records left by MMFAST_REGISTER as functions of a Python module. Included by the two module.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "registry.h"

// The linker sets both to the ends of the section; absent if no op is compiled in.
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __start_mmfast_ops[];
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __stop_mmfast_ops[];

namespace mmfast {

constexpr int kMaxArguments = 24;

// Of a call that runs without the interpreter's lock, by the thread that made it.
inline thread_local PyThreadState* released = nullptr;

// Lets Python handle the signals that came meanwhile: true if that raised, as Ctrl-C does in the main thread.
inline bool handle_signals() {
  PyEval_RestoreThread(released);
  const bool has_raised = PyErr_CheckSignals() != 0;
  released = PyEval_SaveThread();
  return has_raised;
}

// Plain C calling convention: a third of the cost of a pybind11 function with nine arguments.
inline PyObject* call_entry(PyObject* self, PyObject* const* values, Py_ssize_t num_values) {
  const auto& entry = *static_cast<const Entry*>(PyCapsule_GetPointer(self, nullptr));
  if (num_values != entry.num_arguments) {
    PyErr_Format(PyExc_TypeError, "%s takes %d arguments, got %zd", entry.name, entry.num_arguments,
                 num_values);
    return nullptr;
  }
  Argument arguments[kMaxArguments];
  for (int i = 0; i < entry.num_arguments; ++i) {
    if (entry.is_real[i]) {
      arguments[i].real = PyFloat_AsDouble(values[i]);
    } else {
      arguments[i].integer = PyLong_AsLongLong(values[i]);
    }
    if (PyErr_Occurred()) return nullptr;
  }
  // Always released, as torch does: 40 ns, and other threads run on while a kernel computes.
  released = PyEval_SaveThread();
  PyObject* type = nullptr;
  bool has_raised = false;
  std::string error;
  try {
    entry.call(arguments);
  } catch (const Interrupted&) {
    has_raised = true;
  } catch (const std::invalid_argument& exception) {
    type = PyExc_ValueError, error = exception.what();
  } catch (const std::exception& exception) {
    type = PyExc_RuntimeError, error = exception.what();
  }
  PyEval_RestoreThread(released);
  if (has_raised) return nullptr;
  if (type != nullptr) {
    PyErr_SetString(type, error.c_str());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// Adds every op to `module`: of its builds the newest that is no newer than `isa`, whose name, where there
// are `names`, is its __doc__.
inline void bind_ops(pybind11::module_& module, int isa, const char* const* names = nullptr) {
  static std::deque<PyMethodDef> definitions;
  ask_interrupted = &handle_signals;
  if (__start_mmfast_ops == nullptr) return;
  for (auto candidate = __start_mmfast_ops; candidate != __stop_mmfast_ops; ++candidate) {
    const Entry& entry = **candidate;
    bool is_best = entry.isa <= isa;
    for (auto other = __start_mmfast_ops; other != __stop_mmfast_ops; ++other) {
      const bool is_same_op = std::strcmp((*other)->name, entry.name) == 0;
      is_best = is_best && !(is_same_op && (*other)->isa > entry.isa && (*other)->isa <= isa);
    }
    if (!is_best) continue;
    if (entry.num_arguments > kMaxArguments)
      throw std::length_error(std::string(entry.name) + ": too many arguments");
    auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_entry));
    const char* doc = names == nullptr ? nullptr : names[entry.isa];
    definitions.push_back({entry.name, function, METH_FASTCALL, doc});
    pybind11::capsule self(static_cast<const void*>(&entry));
    auto name = pybind11::reinterpret_steal<pybind11::object>(PyUnicode_FromString("mmfast"));
    module.add_object(entry.name, pybind11::reinterpret_steal<pybind11::object>(
                                      PyCFunction_NewEx(&definitions.back(), self.ptr(), name.ptr())));
  }
}

}  // namespace mmfast

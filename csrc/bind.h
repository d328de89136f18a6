// The records left by MMFAST_REGISTER as functions of a Python module. Included by the two module.cpp only.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "codes.h"
#include "registry.h"

// The linker sets both to the ends of the section; absent if no op is compiled in.
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __start_mmfast_ops[];
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __stop_mmfast_ops[];

namespace mmfast {

constexpr int kMaxArguments = 32;
constexpr int kMaxResults = 8;

// Of a call that runs without the interpreter's lock, by the thread that made it.
inline thread_local PyThreadState* released = nullptr;

// Lets Python handle the signals that came meanwhile: true if that raised, as Ctrl-C does in the main thread.
inline bool handle_signals() {
  PyEval_RestoreThread(released);
  const bool has_raised = PyErr_CheckSignals() != 0;
  released = PyEval_SaveThread();
  return has_raised;
}

// Of no result None, of one an int, of several a tuple.
inline PyObject* as_python(const int64_t* results, int count) {
  if (count == 0) Py_RETURN_NONE;
  if (count == 1) return PyLong_FromLongLong(results[0]);
  PyObject* tuple = PyTuple_New(count);
  for (int i = 0; tuple != nullptr && i < count; ++i) {
    PyObject* number = PyLong_FromLongLong(results[i]);
    if (number == nullptr) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SET_ITEM(tuple, i, number);
  }
  return tuple;
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
  int64_t results[kMaxResults];
  for (int i = 0; i < entry.num_arguments; ++i) {
    // Only -1 may mean an error, which is looked for then alone.
    bool may_be_wrong;
    if (entry.is_real[i]) {
      arguments[i].real = PyFloat_AsDouble(values[i]);
      may_be_wrong = arguments[i].real == -1.0;
    } else {
      arguments[i].integer = PyLong_AsLongLong(values[i]);
      may_be_wrong = arguments[i].integer == -1;
    }
    if (may_be_wrong && PyErr_Occurred()) return nullptr;
  }
  // Always released, as torch does: 40 ns, and other threads run on while a kernel computes.
  released = PyEval_SaveThread();
  PyObject* type = nullptr;
  bool has_raised = false;
  std::string error;
  try {
    entry.call(arguments, results);
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
  return as_python(results, entry.num_results);
}

// The names behind the codes, for a test that holds Python's beside them.
inline void bind_codes(pybind11::module_& module) {
  const auto tuple = [](const auto& names) {
    pybind11::list found;
    for (const char* name : names) found.append(name);
    return pybind11::tuple(found);
  };
  pybind11::dict codes;
  codes["dtype"] = tuple(kDtypeNames);
  codes["reduction"] = tuple(kReductionNames);
  codes["utility"] = tuple(kUtilityNames);
  codes["score"] = tuple(kScoreNames);
  module.attr("codes") = codes;
}

// Adds every op to `module`: of its builds the newest that is no newer than `isa`, whose name, where there
// are `names`, is its __doc__.
inline void bind_ops(pybind11::module_& module, int isa, const char* const* names = nullptr) {
  static std::deque<PyMethodDef> definitions;
  ask_interrupted = &handle_signals;
  bind_codes(module);
  if (__start_mmfast_ops == nullptr) return;
  for (auto candidate = __start_mmfast_ops; candidate != __stop_mmfast_ops; ++candidate) {
    const Entry& entry = **candidate;
    bool is_best = entry.isa <= isa;
    for (auto other = __start_mmfast_ops; other != __stop_mmfast_ops; ++other) {
      const bool is_same_op = std::strcmp((*other)->name, entry.name) == 0;
      is_best = is_best && !(is_same_op && (*other)->isa > entry.isa && (*other)->isa <= isa);
    }
    if (!is_best) continue;
    if (entry.num_arguments > kMaxArguments || entry.num_results > kMaxResults)
      throw std::length_error(std::string(entry.name) + ": too many arguments or results");
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

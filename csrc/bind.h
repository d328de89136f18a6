// The records left by MMFAST_REGISTER as functions of a Python module. Included by the two module.cpp only.
//
// Python's stable interface alone (setup.py defines Py_LIMITED_API): one build serves every CPython from 3.11
// on.
#pragma once

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>

#include "codes.h"
#include "python.h"
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
    PyTuple_SetItem(tuple, i, number);
  }
  return tuple;
}

// An array of arguments instead of a tuple that would be made for each call.
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

// Adds `object`, whose reference is taken over, to `module`. False if that raised.
inline bool add(PyObject* module, const char* name, PyObject* object) {
  const bool is_added = object != nullptr && PyModule_AddObjectRef(module, name, object) == 0;
  Py_XDECREF(object);
  return is_added;
}

template <std::size_t count>
PyObject* as_tuple(const char* const (&names)[count], std::size_t used = count) {
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(used));
  for (std::size_t i = 0; tuple != nullptr && i < used; ++i) {
    PyObject* name = PyUnicode_FromString(names[i]);
    if (name == nullptr) {
      Py_DECREF(tuple);
      return nullptr;
    }
    PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), name);
  }
  return tuple;
}

// By what a module was built, and from which commit where that was known: "GCC 12.2.0, 0123456789ab".
inline PyObject* built_by() {
#if defined(__clang__)
  constexpr const char* compiler = __VERSION__;
#else
  constexpr const char* compiler = "GCC " __VERSION__;
#endif
  constexpr const char* revision = MMFAST_REVISION;
  return PyUnicode_FromFormat("%s%s%s", compiler, *revision == '\0' ? "" : ", ", revision);
}

// The names behind the codes, for a test that holds Python's beside them.
inline PyObject* codes() {
  return Py_BuildValue("{sNsNsNsN}", "dtype", as_tuple(kDtypeNames), "reduction", as_tuple(kReductionNames),
                       "utility", as_tuple(kUtilityNames), "score", as_tuple(kScoreNames));
}

// Adds what both modules have, and every op: of its builds the newest that is no newer than `isa`, whose
// name, where there are `names`, is its __doc__. False if that raised.
inline bool bind_ops(PyObject* module, int isa, const char* const* names = nullptr) {
  static std::deque<PyMethodDef> definitions;
  ask_interrupted = &handle_signals;
  if (PyModule_AddIntConstant(module, "interface", kInterface) != 0 || !add(module, "codes", codes()) ||
      !add(module, "built_by", built_by()))
    return false;
  if (__start_mmfast_ops == nullptr) return true;
  for (auto candidate = __start_mmfast_ops; candidate != __stop_mmfast_ops; ++candidate) {
    const Entry& entry = **candidate;
    bool is_best = entry.isa <= isa;
    for (auto other = __start_mmfast_ops; other != __stop_mmfast_ops; ++other) {
      const bool is_same_op = std::strcmp((*other)->name, entry.name) == 0;
      is_best = is_best && !(is_same_op && (*other)->isa > entry.isa && (*other)->isa <= isa);
    }
    if (!is_best) continue;
    if (entry.num_arguments > kMaxArguments || entry.num_results > kMaxResults) {
      PyErr_Format(PyExc_SystemError, "%s: too many arguments or results", entry.name);
      return false;
    }
    auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_entry));
    const char* doc = names == nullptr ? nullptr : names[entry.isa];
    definitions.push_back({entry.name, function, METH_FASTCALL, doc});
    PyObject* self = PyCapsule_New(const_cast<Entry*>(&entry), nullptr, nullptr);
    PyObject* home = PyUnicode_FromString("mmfast");
    const bool is_made = self != nullptr && home != nullptr;
    PyObject* made = is_made ? PyCFunction_NewEx(&definitions.back(), self, home) : nullptr;
    Py_XDECREF(self);
    Py_XDECREF(home);
    if (!add(module, entry.name, made)) return false;
  }
  return true;
}

// How the module of this name is defined; `functions` end with a null one.
inline PyModuleDef definition_of(const char* name, const char* doc, PyMethodDef* functions) {
  return {PyModuleDef_HEAD_INIT, name, doc, -1, functions, nullptr, nullptr, nullptr, nullptr};
}

// Makes the module with every op, as bind_ops has it. Null if that raised.
inline PyObject* make_module(PyModuleDef& definition, int isa, const char* const* names = nullptr) {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && !bind_ops(module, isa, names)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

}  // namespace mmfast

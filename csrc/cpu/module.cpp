// The Python module mmfast._cpu: every registered op, in the build that fits this processor.
#include "python.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "bind.h"
#include "tensor_lists.h"

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

#if defined(__x86_64__)
// Asked of the processor itself: GCC before 11 and older clang know no "f16c".
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

int supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("avx2") &&
                    __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx2 ? (avx512 ? 2 : 1) : 0;
#else
  return 0;
#endif
}

// That of $MMFAST_CPU_ISA, else the newest of this processor. -1 if that raised.
int chosen_isa() {
  const int supported = supported_isa();
  const char* wanted = std::getenv("MMFAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported;
  for (int isa = 0; isa < 3; ++isa) {
    if (std::strcmp(wanted, kNames[isa]) != 0) continue;
    if (isa <= supported) return isa;
    PyErr_Format(PyExc_ImportError, "MMFAST_CPU_ISA=%s: this processor supports %s at most", wanted,
                 kNames[supported]);
    return -1;
  }
  PyErr_Format(PyExc_ImportError, "MMFAST_CPU_ISA must be baseline, avx2 or avx512, got %s", wanted);
  return -1;
}

// Of the module; chosen when it is imported.
int isa_in_use = 0;

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(kNames[isa_in_use]); }

PyObject* supported_isas(PyObject*, PyObject*) { return mmfast::as_tuple(kNames, supported_isa() + 1); }

PyMethodDef functions[] = {
    {"isa", &isa, METH_NOARGS, "The instruction set of the kernels in use."},
    {"supported_isas", &supported_isas, METH_NOARGS, "The values of MMFAST_CPU_ISA this processor can run."},
    {"tensor_words", &mmfast::tensor_words, METH_VARARGS,
     "What tells all about the tensors of two lists, as bytes."},
    {"has_tensor_words", &mmfast::has_words, METH_VARARGS, "Whether tensor_words would return these bytes."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = mmfast::definition_of(
    "_cpu", "C++ kernels on raw addresses; mmfast.ops checks their arguments.", functions);

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  isa_in_use = chosen_isa();
  return isa_in_use < 0 ? nullptr : mmfast::make_module(definition, isa_in_use, kNames);
}

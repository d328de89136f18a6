// The Python module mmfast._cpu: every registered op, in the build that fits this processor.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <string>

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

int chosen_isa() {
  const int supported = supported_isa();
  const char* wanted = std::getenv("MMFAST_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return supported;
  for (int isa = 0; isa < 3; ++isa) {
    if (std::string(wanted) != kNames[isa]) continue;
    if (isa > supported) {
      throw pybind11::import_error(std::string("MMFAST_CPU_ISA=") + wanted + ": this processor supports " +
                                   kNames[supported] + " at most");
    }
    return isa;
  }
  throw pybind11::import_error(std::string("MMFAST_CPU_ISA must be baseline, avx2 or avx512, got ") + wanted);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  const int isa = chosen_isa();
  module.attr("interface") = mmfast::kInterface;
  module.doc() = "C++ kernels on raw addresses; mmfast.ops checks their arguments.";
  module.def("isa", [isa] { return kNames[isa]; }, "The instruction set of the kernels in use.");
  module.def(
      "supported_isas",
      [] {
        pybind11::list names;
        for (int i = 0; i <= supported_isa(); ++i) names.append(kNames[i]);
        return names;
      },
      "The values of MMFAST_CPU_ISA this processor can run.");
  module.def("tensor_words", &mmfast::tensor_words,
             "What tells all about the tensors of two lists, as bytes.");
  module.def("has_tensor_words", &mmfast::has_words, "Whether tensor_words would return these bytes.");
  mmfast::bind_ops(module, isa, kNames);
}

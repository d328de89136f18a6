// How an op's file hands its functions to Python without either side knowing the other.
//
// MMFAST_REGISTER(f) leaves a constant record of the function f in the object file. The linker gathers the
// records of all files, and bind.h makes a Python function of each. No constructor runs at import: code
// compiled for AVX-512 must not be executed, not even to register itself, on a machine without it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// Instruction set this file is compiled for: 0 baseline, 1 AVX2, 2 AVX-512.
#ifndef MMFAST_ISA
#define MMFAST_ISA 0
#endif
#if MMFAST_ISA == 2
#define MMFAST_ISA_NAMESPACE isa_avx512
#elif MMFAST_ISA == 1
#define MMFAST_ISA_NAMESPACE isa_avx2
#else
#define MMFAST_ISA_NAMESPACE isa_baseline
#endif

namespace mmfast {

// What Python may rely on: raised when a function's arguments or duties change. A module that was built
// before such a change is refused by mmfast/backend.py, which names the same number.
constexpr int kInterface = 2;

// One argument as Python gives it: an integer (addresses too) or a float.
union Argument {
  int64_t integer;
  double real;
};

struct Entry {
  const char* name;
  int isa;
  int num_arguments;
  const bool* is_real;  // [num_arguments]
  void (*call)(const Argument*);
};

template <class T>
T cast_argument(const Argument& argument) {
  static_assert(std::is_arithmetic_v<T> || std::is_pointer_v<T>, "arguments are numbers and addresses");
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(argument.integer);
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(argument.real);
  } else {
    return static_cast<T>(argument.integer);
  }
}

template <auto function>
struct Thunk;

template <class... Arguments, void (*function)(Arguments...)>
struct Thunk<function> {
  static constexpr bool is_real[] = {std::is_floating_point_v<Arguments>...};

  template <std::size_t... index>
  static void unpack(const Argument* arguments, std::index_sequence<index...>) {
    function(cast_argument<Arguments>(arguments[index])...);
  }
  static void call(const Argument* arguments) { unpack(arguments, std::index_sequence_for<Arguments...>{}); }

  static constexpr Entry entry(const char* name) {
    return {name, MMFAST_ISA, static_cast<int>(sizeof...(Arguments)), is_real, &call};
  }
};

// Thrown out of a call that its user wants to end before its time: what it was to write is then undefined.
struct Interrupted {};

// Asks, in the thread that made a call, whether it is to end. Set by bind.h: kernels know nothing of Python.
inline bool (*ask_interrupted)() = nullptr;

}  // namespace mmfast

// `function` must have internal linkage (an anonymous namespace), or the builds for several instruction sets
// would be taken for one and the same.
#define MMFAST_REGISTER(function)                                                                      \
  static constexpr ::mmfast::Entry function##_entry = ::mmfast::Thunk<&function>::entry(#function);    \
  __attribute__((section("mmfast_ops"), used)) static const ::mmfast::Entry* const function##_record = \
      &function##_entry;

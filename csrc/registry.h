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
constexpr int kInterface = 5;

// One argument as Python gives it: an integer (addresses too) or a float.
union Argument {
  int64_t integer;
  double real;
};
static_assert(sizeof(Argument) == 8 && sizeof(void*) == 8);

// A tensor as `*strided(x)` of mmfast/ops/_launch.py gives it: sizes, and strides in elements.
template <int rank>
struct Strided {
  void* data;
  int64_t sizes[rank];
  int64_t strides[rank];
};

struct Entry {
  const char* name;
  int isa;
  int num_arguments;
  int num_results;
  const bool* is_real;  // [num_arguments]
  void (*call)(const Argument* arguments, int64_t* results);
};

// What an aggregate's members are begun from, one for each argument: int64_t and addresses, nothing else.
struct AnyArgument {
  template <class T, class = std::enable_if_t<std::is_same_v<T, int64_t> || std::is_pointer_v<T>>>
  operator T() const;
};

// Members that are arrays are begun without braces of their own, of which clang warns.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"
template <class T, std::size_t... member>
constexpr auto is_begun_from(std::index_sequence<member...>)
    -> decltype(T{(static_cast<void>(member), AnyArgument{})...}, true) {
  return true;
}
#pragma GCC diagnostic pop
template <class T>
constexpr bool is_begun_from(...) {
  return false;
}

// How many arguments a parameter takes. A number, an enum or an address is one; an aggregate (Strided, or a
// struct of the op's file whose members are all int64_t or addresses) is as many as it has members, so that
// a call of 20 arguments reads as five that have names.
template <class T>
constexpr int num_arguments_of() {
  if constexpr (std::is_class_v<T>) {
    static_assert(std::is_trivially_copyable_v<T> && std::is_aggregate_v<T> && alignof(T) == 8 &&
                      is_begun_from<T>(std::make_index_sequence<sizeof(T) / sizeof(Argument)>{}),
                  "members must be int64_t or addresses");
    return sizeof(T) / sizeof(Argument);
  } else {
    static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_pointer_v<T>);
    return 1;
  }
}

template <class T>
__attribute__((always_inline)) inline T read_argument(const Argument* argument) {
  if constexpr (std::is_class_v<T>) {
    T aggregate;
    __builtin_memcpy(&aggregate, argument, sizeof(T));
    return aggregate;
  } else if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(argument->integer);
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(argument->real);
  } else {
    return static_cast<T>(argument->integer);
  }
}

template <class T>
using plain_t = std::remove_cv_t<std::remove_reference_t<T>>;

template <auto function>
struct Thunk;

// What a function returns is nothing, an int64_t, or an aggregate of them, which Python gets as a tuple:
// sizes that a launch needs, for Python allocates.
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Thunk<function> {
  static constexpr int counts[sizeof...(Parameters) + 1] = {num_arguments_of<plain_t<Parameters>>()..., 0};
  static constexpr bool is_one_real[sizeof...(Parameters) + 1] = {
      std::is_floating_point_v<plain_t<Parameters>>..., false};

  static constexpr int offset(std::size_t parameter) {
    int sum = 0;
    for (std::size_t i = 0; i < parameter; ++i) sum += counts[i];
    return sum;
  }
  static constexpr int num_arguments = offset(sizeof...(Parameters));
  static constexpr int num_results = [] {
    if constexpr (std::is_void_v<Result>)
      return 0;
    else
      return num_arguments_of<Result>();
  }();

  struct Kinds {
    bool is_real[num_arguments + 1];
  };
  static constexpr Kinds kinds = [] {
    Kinds found{};
    for (std::size_t i = 0; i != sizeof...(Parameters); ++i) found.is_real[offset(i)] = is_one_real[i];
    return found;
  }();

  template <std::size_t... index>
  static void unpack(const Argument* arguments, int64_t* results, std::index_sequence<index...>) {
    if constexpr (std::is_void_v<Result>) {
      function(read_argument<plain_t<Parameters>>(arguments + offset(index))...);
    } else {
      const Result result = function(read_argument<plain_t<Parameters>>(arguments + offset(index))...);
      __builtin_memcpy(results, &result, sizeof(Result));
    }
  }
  static void call(const Argument* arguments, int64_t* results) {
    unpack(arguments, results, std::index_sequence_for<Parameters...>{});
  }

  static constexpr Entry entry(const char* name) {
    return {name, MMFAST_ISA, num_arguments, num_results, kinds.is_real, &call};
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

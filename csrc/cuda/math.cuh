// Limits of floating-point types, and CUDA's functions by type: a C++ compiler would take the float to
// double.
#pragma once

#include <limits>

#include "common.cuh"

namespace mmfast {
namespace {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();
// Larger than nothing but -infinity.
template <class A>
constexpr A kLowest = std::numeric_limits<A>::lowest();

template <class A>
__device__ bool is_finite(A x) {
  return x - x == 0;
}

template <class A>
__device__ __forceinline__ A power_of_two(A x) {
  if constexpr (std::is_same_v<A, float>) {
    return exp2f(x);
  } else {
    return exp2(x);
  }
}
template <class A>
__device__ __forceinline__ A multiply_add(A x, A y, A z) {
  if constexpr (std::is_same_v<A, float>) {
    return fmaf(x, y, z);
  } else {
    return fma(x, y, z);
  }
}
template <class A>
__device__ __forceinline__ A exponential(A x) {
  if constexpr (std::is_same_v<A, float>) {
    return expf(x);
  } else {
    return exp(x);
  }
}
// ln(1 + x).
template <class A>
__device__ __forceinline__ A natural_log_of_one_and(A x) {
  if constexpr (std::is_same_v<A, float>) {
    return log1pf(x);
  } else {
    return log1p(x);
  }
}
template <class A>
__device__ __forceinline__ A natural_log(A x) {
  if constexpr (std::is_same_v<A, float>) {
    return logf(x);
  } else {
    return log(x);
  }
}

}  // namespace
}  // namespace mmfast

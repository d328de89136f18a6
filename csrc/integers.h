// Integer arithmetic of tilings, for host code and for CUDA kernels.
#pragma once

#include <type_traits>

// In front of a function that CUDA kernels may call, too.
#ifdef __CUDACC__
#define MMFAST_HOST_DEVICE __host__ __device__
#else
#define MMFAST_HOST_DEVICE
#endif

namespace mmfast {
// Each build for an instruction set has copies of its own: the linker must not take one for all.
namespace {

// The number of groups of `size` that hold n items, n >= 0.
template <class N, class Size>
MMFAST_HOST_DEVICE constexpr std::common_type_t<N, Size> ceil_div(N n, Size size) {
  return (n + size - 1) / size;
}

// The smallest multiple of `multiple` that is at least n, n >= 0.
template <class N, class Multiple>
MMFAST_HOST_DEVICE constexpr std::common_type_t<N, Multiple> round_up(N n, Multiple multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace
}  // namespace mmfast

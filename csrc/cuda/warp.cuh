// Reductions over the lanes of a warp. All lanes of the warp come along.
#pragma once

#include "common.cuh"

namespace mmfast {
namespace {

constexpr unsigned kFullMask = 0xffffffffu;

struct Sum {
  template <class V>
  __device__ V operator()(V x, V y) const {
    return x + y;
  }
};

// The larger, or the one that is no NaN.
struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
  __device__ double operator()(double x, double y) const { return fmax(x, y); }
};

struct Min {
  __device__ int operator()(int x, int y) const { return x < y ? x : y; }
};

// Over every `lanes` neighbouring lanes, a power of two, to each of them.
template <int lanes = kWarp, class V, class Operation>
__device__ __forceinline__ V warp_reduce(V x, Operation operation) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    x = operation(x, __shfl_xor_sync(kFullMask, x, distance));
  return x;
}
template <class V, class Operation>
__device__ __forceinline__ V warp_reduce(V x, int lanes, Operation operation) {
#pragma unroll 1
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    x = operation(x, __shfl_xor_sync(kFullMask, x, distance));
  return x;
}

// Over every four neighbouring lanes, which share a row of a tensor core's accumulators.
template <class V, class Operation>
__device__ __forceinline__ V quad_reduce(V x, Operation operation) {
  x = operation(x, __shfl_xor_sync(kFullMask, x, 1));
  return operation(x, __shfl_xor_sync(kFullMask, x, 2));
}

// The sum over the lanes that are the same modulo `lanes`, a power of two, to each of them.
template <class V>
__device__ __forceinline__ V warp_sum_modulo(V x, int lanes) {
#pragma unroll 1
  for (int distance = lanes; distance < kWarp; distance *= 2) x += __shfl_xor_sync(kFullMask, x, distance);
  return x;
}

// The sum over this lane and those before it.
__device__ __forceinline__ int warp_prefix_sum(int x) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullMask, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

// How many lanes before this one the ballot names.
__device__ __forceinline__ int rank_in(unsigned ballot) {
  return __popc(ballot & ((1u << threadIdx.x % kWarp) - 1));
}

}  // namespace
}  // namespace mmfast

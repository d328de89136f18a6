// Threads that work on one row together, from one lane to a block, and what they find out about it.
#pragma once

#include "warp.cuh"

namespace mmfast {
namespace {

constexpr int kMaxWarps = 8, kMaxLeaves = 8;

// Of a power of two.
__device__ inline int log2_of(int power) { return __popc(static_cast<unsigned>(power) - 1u); }

// The threads of one sample: 1 to 32 lanes of a warp or, if `is_block`, all warps of a block. A warp's lanes
// always run through the same steps, whatever teams they belong to.
template <bool is_block>
struct Team {
  int threads;  // in a warp, a power of two
  int log_threads;
  int lane;         // in [0, threads)
  int warp, warps;  // 0 and 1 unless is_block
  double* scratch;  // [kMaxLeaves, kMaxWarps] shared, if is_block

  __device__ Team(int threads, double* scratch)
      : threads(is_block ? kWarp : threads),
        log_threads(is_block ? 5 : log2_of(threads)),
        lane(static_cast<int>(threadIdx.x) & ((is_block ? kWarp : threads) - 1)),
        warp(is_block ? static_cast<int>(threadIdx.x) / kWarp : 0),
        warps(is_block ? static_cast<int>(blockDim.x) / kWarp : 1),
        scratch(scratch) {}

  __device__ int index() const { return warp * kWarp + lane; }
  __device__ int size() const { return warps * threads; }

  template <class V, class Operation>
  __device__ V across_warps(V x, Operation operation, int entry, bool is_writer) const {
    if constexpr (is_block) {
      V* values = reinterpret_cast<V*>(scratch) + entry * kMaxWarps;
      if (is_writer) values[warp] = x;
      __syncthreads();
      x = values[0];
#pragma unroll 1
      for (int w = 1; w < warps; ++w) x = operation(x, values[w]);
      // The next exchange writes here again.
      __syncthreads();
    }
    return x;
  }

  // Over all threads, to each of them.
  template <class V, class Operation>
  __device__ V all(V x, Operation operation) const {
    return across_warps(warp_reduce(x, threads, operation), operation, 0, lane == 0);
  }

  // Each of J values over all threads; one shuffle a value, nearly, however many lanes there are. A thread
  // ends with values first<J>() .. + left<J>() at x[0]; with more lanes than values, group<J>() of them
  // share one.
  template <int J, class V, class Operation>
  __device__ void scatter(V (&x)[J], Operation operation) const {
    int distance = threads / 2;
#pragma unroll
    for (int half = J / 2; half > 0; half /= 2) {
      if (distance > 0) {
        const bool is_upper = lane & distance;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const V sent = is_upper ? x[i] : x[half + i], kept = is_upper ? x[half + i] : x[i];
          x[i] = operation(kept, __shfl_xor_sync(kFullMask, sent, distance));
        }
        distance /= 2;
      }
    }
#pragma unroll 1
    for (; distance > 0; distance /= 2) x[0] = operation(x[0], __shfl_xor_sync(kFullMask, x[0], distance));
    x[0] = across_warps(x[0], operation, first<J>(), (lane & (group<J>() - 1)) == 0);
  }
  // By shifts, since to divide costs as much as all the rest.
  template <int J>
  __device__ int group() const {
    return 1 << log_group<J>();
  }
  template <int J>
  __device__ int left() const {
    return threads < J ? J >> log_threads : 1;
  }
  template <int J>
  __device__ int first() const {
    return (lane >> log_group<J>()) * left<J>();
  }
  template <int J>
  __device__ int log_group() const {
    constexpr int log_j = J == 8 ? 3 : J == 4 ? 2 : 1;
    static_assert(1 << log_j == J, "a power of two");
    return log_threads > log_j ? log_threads - log_j : 0;
  }
  // Which of the teams of the block this thread belongs to.
  __device__ int place() const { return is_block ? 0 : static_cast<int>(threadIdx.x) >> log_threads; }
  __device__ int teams() const { return is_block ? 1 : static_cast<int>(blockDim.x) >> log_threads; }

  // What scatter left with single threads, to all of them.
  template <int J, class V>
  __device__ void gather(V (&x)[J]) const {
#pragma unroll
    for (int half = 1; half < J; half *= 2) {
      const int distance = static_cast<int>(static_cast<unsigned>(threads * half) / J);
      if (distance > 0) {
        const bool is_upper = lane & distance;
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const V mine = x[i], other = __shfl_xor_sync(kFullMask, mine, distance);
          x[i] = is_upper ? other : mine;
          x[half + i] = is_upper ? mine : other;
        }
      }
    }
  }

  // The sum over what scatter left with the lanes of a warp, to each of them.
  template <int J, class V>
  __device__ V sum_parts(V x) const {
#pragma unroll 1
    for (int distance = threads / 2; distance >= group<J>() && distance > 0; distance /= 2)
      x += __shfl_xor_sync(kFullMask, x, distance);
    return x;
  }
};

}  // namespace
}  // namespace mmfast

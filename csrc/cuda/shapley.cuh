// The weights of Shapley values, for the kernels that fold utilities into them.
#pragma once

#include "math.cuh"
#include "shapley_weights.h"
#include "warp.cuh"

namespace mmfast {
namespace {

// Into shared memory, where the threads of a warp may read different sizes at once.
template <class A>
__device__ void share_weights(const ShapleyWeights<A>& weights, A* a, A* b) {
  if (threadIdx.x <= kMaxPlayers) {
    a[threadIdx.x] = weights.a[threadIdx.x];
    b[threadIdx.x] = weights.b[threadIdx.x];
  }
  __syncthreads();
}

// Who is lifted and who is sunk by infinite utilities: a coalition worth infinity lifts those within it and
// sinks the others, and so the reverse; NaN does both. Every coalition counts for every player, so the finite
// ones do not matter then.
struct Fates {
  static constexpr unsigned kAll = (1u << kMaxPlayers) - 1;
  unsigned lifted, sunk;

  template <class A>
  __device__ void add(unsigned coalition, A utility) {
    if (is_finite(utility)) return;
    const unsigned others = ~coalition & kAll;
    if (!(utility < 0)) lifted |= coalition, sunk |= others;
    if (!(utility > 0)) lifted |= others, sunk |= coalition;
  }

  // Those of so many lanes, to each of them; all lanes of the warp come along.
  __device__ void share(int lanes) {
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      lifted |= __shfl_xor_sync(kFullMask, lifted, distance);
      sunk |= __shfl_xor_sync(kFullMask, sunk, distance);
    }
  }

  __device__ bool any() const { return (lifted | sunk) != 0; }

  // What a player gets if there are any.
  template <class A>
  __device__ A value(int player) const {
    return (lifted >> player & 1 ? kInfinity<A> : A(0)) - (sunk >> player & 1 ? kInfinity<A> : A(0));
  }
};

}  // namespace
}  // namespace mmfast

// The weights of Shapley values, for the kernels that fold utilities into them.
#pragma once

#include <limits>

#include "common.cuh"

namespace mmfast {
namespace {

constexpr int kMaxPlayers = 20;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s,  b_k = k! (M-k-1)! / M!,  b_M = 0,  a_k = b_{k-1} +
// b_k
template <class A>
struct Weights {
  A a[kMaxPlayers + 1], b[kMaxPlayers + 1];

  // Of utilities that are still to be multiplied by the size of their coalition, if `by_size`.
  explicit Weights(int num_players, bool by_size = false) {
    double last = 0, next = 1.0 / num_players;
    for (int k = 0; k <= kMaxPlayers; ++k) {
      const int factor = by_size ? k : 1;
      a[k] = static_cast<A>((last + next) * factor), b[k] = static_cast<A>(next * factor);
      last = next;
      next = k + 1 < num_players ? next * (k + 1) / (num_players - 1 - k) : 0;
    }
  }
};

// Into shared memory, where the threads of a warp may read different sizes at once.
template <class A>
__device__ void share_weights(const Weights<A>& weights, A* a, A* b) {
  if (threadIdx.x <= kMaxPlayers) {
    a[threadIdx.x] = weights.a[threadIdx.x];
    b[threadIdx.x] = weights.b[threadIdx.x];
  }
  __syncthreads();
}

template <class A>
__device__ bool is_finite(A x) {
  return x - x == 0;
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
      lifted |= __shfl_xor_sync(0xffffffffu, lifted, distance);
      sunk |= __shfl_xor_sync(0xffffffffu, sunk, distance);
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

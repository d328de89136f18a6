// The weights of Shapley values, for the kernels that fold utilities into them.
#pragma once

#include "common.cuh"

namespace mmfast {
namespace {

constexpr int kMaxPlayers = 20;

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

}  // namespace
}  // namespace mmfast

// The weights of Shapley values, computed on the host in float64.
#pragma once

namespace mmfast {

constexpr int kMaxPlayers = 20;

// phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s
// b_k = k! (M-k-1)! / M!,  b_M = 0,  a_k = b_{k-1} + b_k
template <class A>
struct ShapleyWeights {
  // By the size of the coalition; 0 beyond a_M and b_{M-1}.
  A a[kMaxPlayers + 1], b[kMaxPlayers + 1];

  // With `by_size` of utilities that are still to be multiplied by the size of their coalition.
  explicit ShapleyWeights(int num_players, bool by_size = false) {
    double last = 0, next = 1.0 / num_players;
    for (int k = 0; k <= kMaxPlayers; ++k) {
      const int factor = by_size ? k : 1;
      a[k] = static_cast<A>((last + next) * factor), b[k] = static_cast<A>(next * factor);
      last = next;
      next = k + 1 < num_players ? next * (k + 1) / (num_players - 1 - k) : 0;
    }
  }
};

}  // namespace mmfast

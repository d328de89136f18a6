// The weights of Shapley values, computed on the host in float64.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mmfast {
// Each build for an instruction set has copies of its own: the linker must not take one for all.
namespace {

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

[[maybe_unused]] int checked_players(const char* op, int64_t num_players, const char* name = "num_players") {
  if (num_players >= 1 && num_players <= kMaxPlayers) return static_cast<int>(num_players);
  throw std::invalid_argument(std::string(op) + ": " + name + " must lie in [1, 20], got " +
                              std::to_string(num_players));
}

// The number of players who have so many coalitions.
[[maybe_unused]] int players_of(const char* op, int64_t num_coalitions) {
  if (num_coalitions <= 0 || (num_coalitions & (num_coalitions - 1)) != 0)
    throw std::invalid_argument(std::string(op) + ": S must be a power of two, got " +
                                std::to_string(num_coalitions));
  return checked_players(op, __builtin_ctzll(static_cast<unsigned long long>(num_coalitions)));
}

}  // namespace
}  // namespace mmfast

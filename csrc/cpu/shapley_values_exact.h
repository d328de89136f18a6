// The rows that folds cannot do: infinite utilities make NaN of a fold, and large ones may overflow there
// though their weighted means do not. Such rows are computed once more, player by player, in float64.
#pragma once

#include <cmath>
#include <limits>

#include "shapley_weights.h"
#include "vec_math.h"

namespace mmfast {
namespace {

// Copies `count` elements that lie `stride` apart.
template <class T>
void gather(const T* source, int64_t stride, int64_t count, T* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i * stride];
}

// Whether any of `count` elements is NaN, infinite, or above `most` in magnitude.
template <class T>
__attribute__((noinline)) bool has_unbounded(const T* x, int64_t count, accumulate_t<T> most) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>, kSums = 4;
  // What is above `most` is infinite after this; 0 times it, and all that is added to that, is NaN.
  const A reach = std::numeric_limits<A>::max() / most;
  Vec<A> nonfinite[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * L <= count; i += kSums * L) {
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) nonfinite[j] += load(x + i + j * L) * reach * A(0);
  }
  A rest = 0;
  for (; i < count; ++i) rest += widen(x[i]) * reach * A(0);
  return rest != 0 || any((nonfinite[0] + nonfinite[1]) + (nonfinite[2] + nonfinite[3]) != 0);
}

// The values of a row by the formula itself, if any of them is NaN or infinite as the fold left it.
template <class T>
__attribute__((noinline, cold)) void recompute_values(const T* v, int64_t stride, int num_players, T* phi) {
  using A = accumulate_t<T>;
  if (!has_unbounded(phi, num_players, std::numeric_limits<A>::max())) return;
  // Every coalition counts for every player: one that is worth infinity lifts those within it and sinks the
  // others, and so the reverse. Who is both lifted and sunk has NaN.
  uint32_t lifted = 0, sunk = 0;
  const uint32_t size = uint32_t{1} << num_players;
  for (uint32_t s = 0; s < size; ++s) {
    const A utility = widen(v[s * stride]);
    if (std::isfinite(utility)) continue;
    if (!(utility < 0)) lifted |= s, sunk |= ~s;
    if (!(utility > 0)) lifted |= ~s, sunk |= s;
  }
  const bool has_infinite = (lifted | sunk) != 0;
  const ShapleyWeights<double> weights(num_players);
  for (int m = 0; m < num_players; ++m) {
    // Halves, so that nothing overflows that a value does not.
    double with = 0, without = 0;
    for (uint32_t s = 0; s < size && !has_infinite; ++s) {
      const double half = 0.5 * widen(v[s * stride]);
      const int players = __builtin_popcount(s);
      if (s >> m & 1) {
        with += weights.b[players - 1] * half;
      } else {
        without += weights.b[players] * half;
      }
    }
    A value = static_cast<A>(2 * (with - without));
    if (has_infinite) value = (lifted >> m & 1 ? kInfinity<A> : A(0)) - (sunk >> m & 1 ? kInfinity<A> : A(0));
    phi[m] = narrow<T>(value);
  }
}

// The gradients of `count` coalitions from `first` on by the formula itself.
template <class T>
__attribute__((noinline, cold)) void recompute_gradients(const T* dphi, int num_players, int64_t first,
                                                         int64_t count, T* dv) {
  const ShapleyWeights<double> weights(num_players);
  for (int64_t i = 0; i < count; ++i) {
    const int players = __builtin_popcountll(first + i);
    double sum = 0;
    for (int m = 0; m < num_players; ++m) {
      const double share = widen(dphi[m]);
      sum += (first + i) >> m & 1 ? weights.b[players - 1] * share : -weights.b[players] * share;
    }
    dv[i] = narrow<T>(static_cast<accumulate_t<T>>(sum));
  }
}

}  // namespace
}  // namespace mmfast

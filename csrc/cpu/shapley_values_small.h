// Shapley values of up to five players: kLanes rows at once, one in each SIMD lane, transposed in registers.
#pragma once

#include "shapley_values_exact.h"
#include "subsets.h"

namespace mmfast {
namespace {

constexpr int reverse_bits(int n, int width) {
  return width == 0 ? 0 : (n & 1) << (width - 1) | reverse_bits(n >> 1, width - 1);
}

// From vectors of interleaved rows of n elements to one vector per column, at the position of reversed bits:
// a transposition of rows shorter than a vector. `zip_rows` undoes it.
template <int n, class V>
inline void unzip_rows(V* x) {
  if constexpr (n > 1) {
    V halves[n];
    MMFAST_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      halves[i] = unzip<false>(x[2 * i], x[2 * i + 1]);
      halves[n / 2 + i] = unzip<true>(x[2 * i], x[2 * i + 1]);
    }
    unzip_rows<n / 2>(halves);
    unzip_rows<n / 2>(halves + n / 2);
    MMFAST_UNROLL
    for (int i = 0; i < n; ++i) x[i] = halves[i];
  }
}
template <int n, class V>
inline void zip_rows(V* x) {
  if constexpr (n > 1) {
    zip_rows<n / 2>(x);
    zip_rows<n / 2>(x + n / 2);
    V rows[n];
    MMFAST_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      rows[2 * i] = zip<false>(x[i], x[n / 2 + i]);
      rows[2 * i + 1] = zip<true>(x[i], x[n / 2 + i]);
    }
    MMFAST_UNROLL
    for (int i = 0; i < n; ++i) x[i] = rows[i];
  }
}

// Lane `lane` of vector `vector` when n elements of each row lie side by side (Rows), or when vector i holds
// element i of all rows (Columns): which vector of the other form it is in, and at which lane.
template <int n, int L>
struct Rows {
  static constexpr int vector(int vector, int lane) { return (vector * L + lane) % n; }
  static constexpr int lane(int vector, int lane) { return (vector * L + lane) / n; }
};
template <int n, int L>
struct Columns {
  static constexpr int vector(int vector, int lane) { return (lane * n + vector) / L; }
  static constexpr int lane(int vector, int lane) { return (lane * n + vector) % L; }
};

// Vector i of the form `To`, taken together from the n vectors x of the other form, one shuffle for each
// after the first.
template <class To, int i, int k, class V, int... lane>
inline V merge(V merged, V next, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  return shuffle<(To::vector(i, lane) == k             ? L + To::lane(i, lane)
                  : k == 1 && To::vector(i, lane) == 0 ? To::lane(i, lane)
                                                       : lane)...>(merged, next);
}
template <class To, int i, class V, int... k>
inline V convert_one(const V* x, std::integer_sequence<int, k...>) {
  V merged = x[0];
  ((merged = merge<To, i, k + 1>(merged, x[k + 1], lanes_of<V>{})), ...);
  return merged;
}
template <class To, class V, int... i>
inline void convert(const V* x, V* out, std::integer_sequence<int, i...>) {
  ((out[i] = convert_one<To, i>(x, std::make_integer_sequence<int, sizeof...(i) - 1>{})), ...);
}

// Few players: kLanes rows at once, one in each lane.
template <class T, int num_players>
struct SmallRows {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Players = std::make_integer_sequence<int, num_players>;
  static constexpr int M = num_players, S = 1 << M, L = kLanes<A>;
  A a[M + 1], b[M + 1];

  SmallRows() {
    const ShapleyWeights<double> weights(M);
    for (int k = 0; k <= M; ++k) a[k] = static_cast<A>(weights.a[k]), b[k] = static_cast<A>(weights.b[k]);
  }

  // L rows of S utilities to L rows of M values. What it returns is 0 unless a value is NaN or infinite and
  // may have to be recomputed.
  V fwd(const T* v, T* phi) const {
    V x[S], values[M], rows[M], nonfinite = {};
    MMFAST_UNROLL
    for (int i = 0; i < S; ++i) x[i] = load(v + i * L);
    unzip_rows<S>(x);
    if constexpr (M == 1) {
      values[0] = x[1] - x[0];
    } else {
      nonfinite = M < 5 ? by_differences(x, values) : fold(x, values);
    }
    convert<Rows<M, L>>(values, rows, Players{});
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) store(phi + m * L, rows[m]);
    return nonfinite;
  }

  // Values of the utilities x, as the formula is written; returns 0 unless one is NaN or infinite. Sums over
  // coalitions with a player and without, which `fold` shares among players, may be ten times as large as the
  // value that is left of them, and cost as many operations up to four players. Inlined, or x would go
  // through memory.
  __attribute__((always_inline)) V by_differences(const V* x, V* values) const {
    V sum_of_values;
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) {
      // The top bit is that of the first player.
      const int player = S >> (m + 1);
      V sum;
      MMFAST_UNROLL
      for (int i = 0; i < S; ++i) {
        if (i & player) continue;
        const V gain = b[count_bits(i)] * (x[i | player] - x[i]);
        sum = i == 0 ? gain : sum + gain;
      }
      values[m] = sum;
      sum_of_values = m == 0 ? values[m] : sum_of_values + values[m];
    }
    return sum_of_values - sum_of_values;
  }

  // The same of five players, in fewer registers, which they fill; overwrites x.
  __attribute__((always_inline)) V fold(V* x, V* values) const {
    V shared = {}, sum_of_values;
    // A number taken from all utilities changes no value: with one between those of nobody and of all, little
    // cancels wherever one coalition outweighs the others.
    const V origin = A(0.5) * x[0] + A(0.5) * x[S - 1];
    MMFAST_UNROLL
    for (int i = 0; i < S; ++i) {
      const int size = count_bits(i);
      const V utility = x[i] - origin;
      // b is 0 for all players together.
      if (i != S - 1) shared += b[size] * utility;
      x[i] = a[size] * utility;
    }
    // The top bit is folded first.
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) {
      const int half = S >> (m + 1);
      V sum = x[half];
      MMFAST_UNROLL
      for (int i = 1; i < half; ++i) sum += x[half + i];
      MMFAST_UNROLL
      for (int i = 0; i < half; ++i) x[i] += x[half + i];
      values[m] = sum - shared;
      sum_of_values = m == 0 ? values[m] : sum_of_values + values[m];
    }
    return sum_of_values - sum_of_values;
  }

  // b_k / b_0 = 1 / binom(M-1, k)
  static constexpr A relative_b(int k) { return k == 0 ? A(1) : relative_b(k - 1) * k / (M - k); }

  // L rows of M gradients of values to L rows of S gradients of utilities.
  void bwd(const T* dphi, T* dv) const {
    V rows[M], columns[M], x[S], zipped[S];
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) rows[m] = load(dphi + m * L);
    convert<Columns<M, L>>(rows, columns, Players{});
    // By b_0 beforehand, so that no sum overflows.
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) columns[m] *= A(1) / M;
    subset_sums<M>(V{}, columns, 1, x);
    // The players of a coalition and the others apart: infinities remain what they are.
    zipped[0] = -x[S - 1];
    zipped[S - 1] = x[S - 1];
    MMFAST_UNROLL
    for (int s = 1; s < S - 1; ++s) {
      const int size = count_bits(s);
      zipped[reverse_bits(s, M)] = relative_b(size - 1) * x[s] - relative_b(size) * x[S - 1 - s];
    }
    zip_rows<S>(zipped);
    MMFAST_UNROLL
    for (int i = 0; i < S; ++i) store(dv + i * L, zipped[i]);
  }

  // Calls step(source rows, target rows) for L rows at a time, through copies where rows are strided or fewer
  // than L.
  template <int source_size, int target_size, class Step>
  static void for_blocks(const T* source, T* target, int64_t begin, int64_t end, int64_t stride_row,
                         int64_t stride, Step&& step) {
    T sources[L * source_size] = {}, targets[L * target_size];
    for (int64_t row = begin; row < end; row += L) {
      const int64_t count = std::min<int64_t>(L, end - row);
      const T* block = source + row * stride_row;
      if (count < L || stride_row != source_size || stride != 1) {
        for (int64_t r = 0; r < count; ++r)
          gather(block + r * stride_row, stride, source_size, sources + r * source_size);
        block = sources;
      }
      step(block, count == L ? target + row * target_size : targets);
      if (count < L) std::memcpy(target + row * target_size, targets, count * target_size * sizeof(T));
    }
  }
};

}  // namespace
}  // namespace mmfast

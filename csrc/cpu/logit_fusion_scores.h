// What both layouts of logit_fusion share: where a modality's logits lie, how sure it is of a sample, and the
// weights.
#pragma once

#include "codes.h"
#include "lanes_rows.h"
#include "vec_math.h"

namespace mmfast {
namespace {

template <class T>
struct Fusion {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Mask = Vec<Int<A>>;
  static constexpr int L = kLanes<A>;

  const T* logits;         // [M, N, C]
  const uint8_t* present;  // [M, N] or null
  int64_t M, N, C, stride_m, stride_n, stride_c;
  Score score;
  A temperature;

  const T* end() const { return logits + (M - 1) * stride_m + (N - 1) * stride_n + (C - 1) * stride_c + 1; }

  // The last sample fills lanes that have none.
  int64_t sample(int64_t n) const { return std::min(n, N - 1); }
  // The rows of the samples from `first` on, whose first is `row`.
  template <class Element>
  void find_rows(Element* row, int64_t stride, int64_t first, Element** rows) const {
    if (first + L <= N) {
      for (int l = 0; l < L; ++l) rows[l] = row + l * stride;
    } else {
      for (int64_t l = 0; l < L; ++l) rows[l] = row + std::min(l, N - 1 - first) * stride;
    }
  }
  void find_rows(int64_t m, int64_t first, const T** rows) const {
    find_rows(logits + m * stride_m + first * stride_n, stride_n, first, rows);
  }
  bool is_present(int64_t m, int64_t n) const {
    return present == nullptr || present[m * N + sample(n)] != 0;
  }

  // All ones in the lanes of samples that have modality m.
  Mask lanes_present(int64_t m, int64_t first) const {
    Mask mask = {};
    if (present == nullptr) return ~mask;
    for (int l = 0; l < L; ++l) mask[l] = -Int<A>{is_present(m, first + l)};
    return mask;
  }

  // How many of the samples from `first` on there are in a block.
  int rows_from(int64_t first) const { return static_cast<int>(std::min<int64_t>(L, N - first)); }

  // What the next blocks are read from, while these are written: into the second cache, for the first is
  // full.
  static void prefetch(const T* address) { __builtin_prefetch(address, 0, 2); }

  // z - max, finite for a class that is excluded by a logit of -inf.
  static V shifted(V z, V max) { return larger<A>(V{} + MathConstants<A>::kLogSmallest * 2, z - max); }

  // From s = sum_c e_c and the mean t / s of z_c - max z, weighted by e_c.
  V score_of(V s, V mean) const {
    return score == kEntropy ? mean - log_positive<A>(s) : 1 / (s * temperature);
  }

  // The softmax of the scores, in place: 0 for what is absent, also where all is.
  void weigh(V* scores, int64_t first) const {
    V max = V{} - kInfinity<A>, sum = {};
    for (int64_t m = 0; m < M; ++m) max = larger<A>(max, lanes_present(m, first) ? scores[m] : max);
    for (int64_t m = 0; m < M; ++m) {
      const V e = exp_nonpositive<A>(scores[m] - max);
      scores[m] = lanes_present(m, first) ? e : V{};
      sum += scores[m];
    }
    sum = sum == 0 ? V{} + 1 : sum;
    // Once more 0 for what is absent, beside a modality whose score is NaN.
    for (int64_t m = 0; m < M; ++m) scores[m] = lanes_present(m, first) ? scores[m] / sum : V{};
  }

  // An element of each sample's from `first` on.
  V load_samples(const T* values, int64_t first) const {
    if (first + L <= N) return load(values + first);
    V result;
    for (int l = 0; l < L; ++l) result[l] = widen(values[sample(first + l)]);
    return result;
  }

  void store_weights(const V* w, int64_t first, T* weights) const {
    for (int64_t m = 0; m < M; ++m) {
      if (first + L <= N) {
        store(weights + m * N + first, w[m]);
      } else {
        for (int64_t n = first; n < N; ++n) weights[m * N + n] = narrow<T>(w[m][n - first]);
      }
    }
  }

  // Whether rounding made a weight 0. Mathematically it is above: its product with a finite logit vanishes,
  // that with the -inf of an excluded class does not.
  bool has_zero_weight(const V* w) const {
    Mask is_zero = {};
    for (int64_t m = 0; m < M; ++m) is_zero |= w[m] == 0;
    return any(is_zero);
  }
  static V weighted(V w, V z) {
    const auto vanishes = (w == 0) & (z >= V{} + std::numeric_limits<A>::lowest());
    return vanishes ? V{} : (w == 0 ? V{} + 1 : w) * z;
  }
};

}  // namespace
}  // namespace mmfast

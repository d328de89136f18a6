// Smooth utilities of coalitions by products: the exponential of a sum of logits is that of each modality's,
// so that a class costs M exponentials instead of 2^M.
//
// Where modalities are sure of different classes, sums over classes are small. Where one is so small that
// terms which underflowed may count, `has_failed` is set: the caller takes the logits themselves
// (additive_shapley_utilities.h). The label's class is kept apart, 0 stands in its place in z.
#pragma once

#include "additive_shapley_utilities.h"

namespace mmfast {
namespace {

// What a sum of exponentials must reach, and how far from 0 the largest logits of all modalities may lie
// together, so that no product overflows.
template <class A>
constexpr A kLeastSum = A(1) / (int64_t{1} << 60);
template <class A>
constexpr A kModerate = 20;

// The last K modalities' 2^K coalitions, given the products z of the modalities before them.
template <class A, int K>
struct Products {
  using V = Vec<A>;
  static constexpr int J = 1 << K;

  const V* partials;        // [K, C]
  const V* label_partials;  // [K]
  int64_t C;
  Utility utility;
  bool has_failed = false;

  // All products of `first` and the K `terms`.
  static void subset_products(V first, const V* terms, V* x) {
    x[0] = first;
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) {
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[(1 << i) + j] = x[j] * terms[i];
    }
  }

  // The label's exponentials y, and the sums over all classes, as products of the partials' exponentials.
  // Returns false where a sum is so small that what underflowed in it may count.
  bool sum_products(const V* z, V z_label, V* y, V* sums) const {
    V total[J];
    subset_products(z_label, label_partials, y);
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) total[j] = y[j];
    for (int64_t begin = 0; begin < C; begin += kGroup) {
      V group[J] = {};
      for (int64_t c = begin; c < std::min(begin + kGroup, C); ++c) {
        // The last modality's products are added as they are made.
        constexpr int kHalf = J / 2;
        V e[K], x[J];
        MMFAST_UNROLL
        for (int i = 0; i < K; ++i) e[i] = partials[i * C + c];
        x[0] = z[c];
        MMFAST_UNROLL
        for (int i = 0; i + 1 < K; ++i) {
          MMFAST_UNROLL
          for (int j = 0; j < 1 << i; ++j) x[(1 << i) + j] = x[j] * e[i];
        }
        MMFAST_UNROLL
        for (int j = 0; j < kHalf; ++j) group[j] += x[j], group[kHalf + j] += x[j] * e[K - 1];
      }
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) total[j] += group[j];
    }
    // Logarithms of the label's probability want that to be a number, too.
    V least = utility == kLogProbability ? smaller<A>(y[J - 1], total[J - 1]) : total[J - 1];
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      least = smaller<A>(least, utility == kLogProbability ? smaller<A>(y[j], total[j]) : total[j]);
      sums[j] = total[j];
    }
    return !any(~(least >= kLeastSum<A>));
  }

  // The utility of each coalition.
  __attribute__((noinline)) void utilities(const V* z, V z_label, V* u) {
    V y[J], sums[J];
    has_failed |= !sum_products(z, z_label, y, sums);
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      u[j] = y[j] / sums[j];
      if (utility == kLogProbability) u[j] = log_positive<A>(u[j]);
    }
  }

  // Adds the gradients of sum_j du[j] u[j] with respect to the logarithms of z and of the partials, the
  // label's apart; nothing where it fails.
  __attribute__((noinline)) void gradients(const V* z, V z_label, const V* du, V* dz, V* dz_label,
                                           V* dpartials, V* dlabel_partials) {
    V y[J], sums[J], scale[J], label_gradient[J], halves[K + 1];
    if (!sum_products(z, z_label, y, sums)) {
      has_failed = true;
      return;
    }
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      const V p = y[j] / sums[j], weight = utility == kProbability ? du[j] * p : du[j];
      scale[j] = -weight / sums[j];
      label_gradient[j] = weight - weight * p;
    }
    for (int64_t c = 0; c < C; ++c) {
      // Of z times the polynomial sum_j scale_j prod_i e_i, the highest variable taken out first.
      V e[K], x[J];
      MMFAST_UNROLL
      for (int i = 0; i < K; ++i) e[i] = partials[i * C + c];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) x[j] = scale[j];
      MMFAST_UNROLL
      for (int i = K - 1; i >= 0; --i) {
        V derivative[J];
        MMFAST_UNROLL
        for (int j = 0; j < 1 << i; ++j) derivative[j] = x[(1 << i) + j], x[j] += e[i] * x[(1 << i) + j];
        MMFAST_UNROLL
        for (int k = i - 1; k >= 0; --k) {
          MMFAST_UNROLL
          for (int j = 0; j < 1 << k; ++j) derivative[j] += e[k] * derivative[(1 << k) + j];
        }
        dpartials[i * C + c] += z[c] * e[i] * derivative[0];
      }
      dz[c] += z[c] * x[0];
    }
    Leaves<A, K>::fold(label_gradient, halves);
    *dz_label += label_gradient[0];
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) dlabel_partials[i] += halves[i];
  }
};

}  // namespace
}  // namespace mmfast

// Utilities of coalitions' logits, and their gradients: 2^K coalitions of kLanes samples at a time in
// registers.
//
// The label's class is kept apart, -inf stands in its place: the maximum is then that of the others, and one
// comparison decides. Gradients of "margin" have NaN there, which equals no maximum, where all others are
// -inf. A tie is looked into class by class, for of equal logits the lowest class counts.
#pragma once

#include <algorithm>
#include <limits>

#include "codes.h"
#include "lanes_rows.h"
#include "vec_math.h"

namespace mmfast {
namespace {

#define MMFAST_UNROLL _Pragma("GCC unroll 8")

// Classes of a group: a sum of few groups' sums rounds less than one of C terms.
constexpr int64_t kGroup = 64;

// A sample is bounded if none of its logits is NaN or above this: then no logit of a coalition, a sum of up
// to 21 of them, is NaN or +inf. -inf may be among them.
template <class A>
constexpr A kLargestBounded = std::numeric_limits<A>::max() / 32;

template <class A>
constexpr A in_place_of_label(Utility utility, bool is_backward) {
  return is_backward && utility == kMargin ? std::numeric_limits<A>::quiet_NaN() : -kInfinity<A>;
}

// Takes each lane's label apart from its logits: `own` is the label's, in whose place `other` stands then.
template <class A>
struct LabelApart {
  Vec<Int<A>> labels;
  Vec<A> other, own = {};
  Vec<Int<A>> is_bounded = ~Vec<Int<A>>{};

  Vec<A> operator()(Vec<A> z, int64_t c) {
    const auto is_label = labels == static_cast<Int<A>>(c);
    own = is_label ? z : own;
    is_bounded &= z <= kLargestBounded<A>;
    return is_label ? other : z;
  }
};

// The last K modalities' 2^K coalitions, given the logits z of the modalities before them.
template <class A, int K>
struct Leaves {
  using V = Vec<A>;
  using Mask = Vec<Int<A>>;
  static constexpr int J = 1 << K;

  const V* partials;        // [K, C]
  const V* label_partials;  // [K]
  int64_t C;
  Utility utility;
  Mask labels = {};
  bool is_bounded = true;

  // All sums x[j] of the K `terms`, `stride` apart, and `first`.
  static void subset_sums(V first, const V* terms, int64_t stride, V* x) {
    x[0] = first;
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) {
      const V term = terms[i * stride];
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[(1 << i) + j] = x[j] + term;
    }
  }

  // The folds of x: sums over the halves of j with bit i set, and the total in x[0].
  static void fold(V* x, V* halves) {
    MMFAST_UNROLL
    for (int i = K - 1; i >= 0; --i) {
      V sum = x[1 << i];
      MMFAST_UNROLL
      for (int j = 1; j < 1 << i; ++j) sum += x[(1 << i) + j];
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[j] += x[(1 << i) + j];
      halves[i] = sum;
    }
  }

  void find_maxima(const V* z, V* maxima) const {
    V top[J], x[J];
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) top[j] = V{} - kInfinity<A>;
    for (int64_t c = 0; c < C; ++c) {
      subset_sums(z[c], partials + c, C, x);
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) top[j] = larger<A>(x[j], top[j]);
    }
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) maxima[j] = top[j];
  }

  // 1 where the first of the largest logits is the label's; a NaN counts as largest, as torch has it.
  void find_argmax(const V* z, const V* y, V* u) const {
    V best[J], x[J];
    Mask arg[J] = {};
    for (int j = 0; j < J; ++j) best[j] = V{} - kInfinity<A>;
    for (int64_t c = 0; c < C; ++c) {
      subset_sums(z[c], partials + c, C, x);
      const Mask is_label = labels == static_cast<Int<A>>(c);
      for (int j = 0; j < J; ++j) {
        const V value = is_label ? y[j] : x[j];
        const Mask is_more = (value > best[j]) | ((value != value) & (best[j] == best[j]));
        best[j] = is_more ? value : best[j];
        arg[j] = is_more ? Mask{} + static_cast<Int<A>>(c) : arg[j];
      }
    }
    for (int j = 0; j < J; ++j) u[j] = arg[j] == labels ? V{} + 1 : V{};
  }

  // Takes the 1 from a label that a lower class equals. Without a bias that is looked into for every sample:
  // the empty coalition's logits are all 0.
  void settle_ties(const V* z, const V* y, V* u) const {
    Mask is_beaten[J] = {};
    V x[J];
    for (int64_t c = 0; c < C; ++c) {
      subset_sums(z[c], partials + c, C, x);
      const Mask is_lower = labels > static_cast<Int<A>>(c);
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) is_beaten[j] |= is_lower & (x[j] == y[j]);
    }
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) u[j] = is_beaten[j] ? V{} : u[j];
  }

  // The utility of each coalition, for "cardinality" as for "correct".
  void utilities(const V* z, V z_label, V* u) const {
    V y[J], maxima[J], x[J];
    subset_sums(z_label, label_partials, 1, y);
    find_maxima(z, maxima);
    if (utility == kMargin) {
      for (int j = 0; j < J; ++j) u[j] = y[j] - maxima[j];
      // The maximum passes over a NaN.
      for (int64_t c = 0; c < C && !is_bounded; ++c) {
        subset_sums(z[c], partials + c, C, x);
        for (int j = 0; j < J; ++j) u[j] = x[j] != x[j] ? x[j] : u[j];
      }
    } else if (utility == kCorrect || utility == kCardinality) {
      if (!is_bounded) return find_argmax(z, y, u);
      Mask is_tie = {};
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        u[j] = y[j] >= maxima[j] ? V{} + 1 : V{};
        is_tie |= y[j] == maxima[j];
      }
      if (any(is_tie)) settle_ties(z, y, u);
    } else {
      V sums[J];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        maxima[j] = larger<A>(y[j], maxima[j]);
        y[j] -= maxima[j];
        sums[j] = exp_nonpositive<A>(y[j]);
        u[j] = sums[j];
      }
      for (int64_t begin = 0; begin < C; begin += kGroup) {
        V group[J] = {};
        for (int64_t c = begin; c < std::min(begin + kGroup, C); ++c) {
          subset_sums(z[c], partials + c, C, x);
          MMFAST_UNROLL
          for (int j = 0; j < J; ++j) group[j] += exp_nonpositive<A>(x[j] - maxima[j]);
        }
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) sums[j] += group[j];
      }
      // The logarithm takes a NaN for a number.
      for (int j = 0; j < J && !is_bounded; ++j) y[j] += sums[j] - sums[j];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j)
        u[j] = utility == kProbability ? u[j] / sums[j] : y[j] - log_positive<A>(sums[j]);
    }
  }

  // As `gradients` of "margin" for samples that are not bounded: a NaN is larger than all numbers.
  __attribute__((noinline, cold)) void unbounded_margin_gradients(const V* z, const V* maxima, const V* du,
                                                                  V* dz, V* dz_label, V* dpartials,
                                                                  V* dlabel_partials) const {
    V x[J], halves[K + 1];
    Mask has_nan[J] = {}, runner_up[J] = {};
    for (int64_t c = C - 1; c >= 0; --c) {
      subset_sums(z[c], partials + c, C, x);
      const Mask is_other = labels != static_cast<Int<A>>(c);
      for (int j = 0; j < J; ++j) {
        const Mask is_nan = x[j] != x[j], is_top = is_other & (is_nan | (~has_nan[j] & (x[j] == maxima[j])));
        has_nan[j] |= is_other & is_nan;
        runner_up[j] = is_top ? Mask{} + static_cast<Int<A>>(c) : runner_up[j];
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int j = 0; j < J; ++j) x[j] = runner_up[j] == static_cast<Int<A>>(c) ? -du[j] : V{};
      fold(x, halves);
      dz[c] += x[0];
      for (int i = 0; i < K; ++i) dpartials[i * C + c] += halves[i];
    }
    for (int j = 0; j < J; ++j) x[j] = du[j];
    fold(x, halves);
    *dz_label += x[0];
    for (int i = 0; i < K; ++i) dlabel_partials[i] += halves[i];
  }

  // Adds the gradients of sum_j du[j] u[j] with respect to z and to the partials, the label's apart.
  void gradients(const V* z, V z_label, const V* du,
                 V* e,  // [C, J] for what is computed on the way
                 V* dz, V* dz_label, V* dpartials, V* dlabel_partials) const {
    V y[J], maxima[J], scale[J], label_gradient[J], x[J], halves[K + 1];
    Mask is_open[J];
    subset_sums(z_label, label_partials, 1, y);
    find_maxima(z, maxima);
    if (__builtin_expect(utility == kMargin && !is_bounded, 0)) {
      // Copies, for what a function is given the address of does not stay in registers.
      V found[J], given[J];
      std::copy_n(maxima, J, found);
      std::copy_n(du, J, given);
      return unbounded_margin_gradients(z, found, given, dz, dz_label, dpartials, dlabel_partials);
    }
    if (utility == kMargin) {
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) is_open[j] = ~Mask{}, label_gradient[j] = du[j];
    } else {
      V sums[J];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        maxima[j] = larger<A>(y[j], maxima[j]);
        sums[j] = y[j] = exp_nonpositive<A>(y[j] - maxima[j]);
      }
      for (int64_t begin = 0; begin < C; begin += kGroup) {
        V group[J] = {};
        for (int64_t c = begin; c < std::min(begin + kGroup, C); ++c) {
          subset_sums(z[c], partials + c, C, x);
          MMFAST_UNROLL
          for (int j = 0; j < J; ++j) {
            e[c * J + j] = exp_nonpositive<A>(x[j] - maxima[j]);
            group[j] += e[c * J + j];
          }
        }
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) sums[j] += group[j];
      }
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        const V p = y[j] / sums[j], weight = utility == kProbability ? du[j] * p : du[j];
        scale[j] = weight / sums[j];
        label_gradient[j] = weight - weight * p;
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      if (utility == kMargin) {
        subset_sums(z[c], partials + c, C, x);
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) {
          // The lowest class of the largest logit of the others.
          const Mask is_top = is_open[j] & (x[j] == maxima[j]);
          is_open[j] &= ~is_top;
          x[j] = is_top ? -du[j] : V{};
        }
      } else {
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) x[j] = -scale[j] * e[c * J + j];
      }
      fold(x, halves);
      dz[c] += x[0];
      MMFAST_UNROLL
      for (int i = 0; i < K; ++i) dpartials[i * C + c] += halves[i];
    }
    fold(label_gradient, halves);
    *dz_label += label_gradient[0];
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) dlabel_partials[i] += halves[i];
  }
};

}  // namespace
}  // namespace mmfast

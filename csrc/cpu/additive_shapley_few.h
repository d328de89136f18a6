// "probability" and "log_probability" of at most three modalities: all coalitions' sums of exponentials in
// registers, added up while the last modality's logits are turned on their side, and gradients made while
// they are turned back.
//
// What is too large or too small for products is left to the walk (additive_shapley_walk.h).
#pragma once

#include <vector>

#include "additive_shapley_walk.h"

namespace mmfast {
namespace {

// The rows of a block's samples in one modality, each contiguous.
template <class T>
struct BlockRows {
  EvenRows<T> rows;
  const T* end;   // of what may be read
  int64_t ahead;  // from a row to that of the next block
};

// Shapley is the struct of additive_shapley.cpp, whose samples these are.
template <class Shapley, int K>
class FewModalities {
 public:
  using T = typename Shapley::Element;
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int J = 1 << K, L = kLanes<A>;

  FewModalities(const Shapley& shapley, Walk<A, K>& walk, bool is_backward)
      : shapley_(shapley),
        walk_(walk),
        C_(shapley.C),
        utility_(shapley.utility),
        takes_part_(shapley.may_multiply() && shapley.M == K) {
    if (!takes_part_) return;
    e_.resize((is_backward ? K : K - 1) * C_);
    if (shapley.bias == nullptr) return;
    walk.set_base(shapley.bias);
    bias_ = walk.base_exponentials.data();
  }

  // The values of the block that begins with sample `first`, in sums.halves. Returns whether they are there.
  bool fwd(int64_t first, Sums<A>& sums) {
    if constexpr (kIsPossible) {
      if (!takes_part_) return false;
      shapley_.load_labels(first, walk_);
      Exponentials given;
      if (!sum<false>(first, given)) return false;
      V u[J];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        u[j] = given.y[j] / given.sums[j];
        if (utility_ == kLogProbability) u[j] = log_positive<A>(u[j]);
      }
      walk_.add_up(u, 0, sums);
      MMFAST_UNROLL
      for (int m = 0; m < K; ++m) sums.halves[m] -= sums.shared;
      return true;
    }
    return false;
  }

  // The gradients of the block, given dphi in the walk. Returns whether they were written.
  bool bwd(int64_t first, T* dpartial_logits) {
    if constexpr (kIsPossible) {
      if (!takes_part_ || walk_.any_unbounded_dphi) return false;
      shapley_.load_labels(first, walk_);
      Exponentials given;
      if (!sum<true>(first, given)) return false;
      V du[J];
      walk_.utility_gradients(0, V{}, du);
      write_gradients(first, given, du, dpartial_logits);
      return true;
    }
    return false;
  }

 private:
  // Products round more often, which float64 is not chosen for.
  static constexpr bool kIsPossible = std::is_same_v<A, float>;

  // The label's exponentials of the coalitions, and the sums over all classes.
  struct Exponentials {
    V y[J], sums[J];
  };

  // Returns whether they are neither too large nor too small. All exponentials are kept for gradients.
  template <bool is_backward>
  __attribute__((noinline)) bool sum(int64_t first_sample, Exponentials& out) {
    V *const all = e_.data(), largest = {}, total[J] = {}, own[K] = {}, own_bias = V{} + 1;
    const V* const bias = bias_;
    const Vec<Int<A>> labels = walk_.leaves.labels;
    for (int m = 0; m < K - 1; ++m) {
      const auto block = shapley_.rows(m, first_sample, space_);
      V *e = all + m * C_, max = V{} - kInfinity<A>;
      visit_lanes<T>(block.rows, 1, C_, block.end, block.ahead, [&](V z, int64_t c) {
        max = larger<A>(z, max);
        e[c] = exp_nonpositive<A>(z);
      });
      largest += larger<A>(max, -max);
    }
    const auto last = shapley_.rows(K - 1, first_sample, space_);
    V max = V{} - kInfinity<A>;
    for (int64_t begin = 0; begin < C_; begin += kGroup) {
      V group[J] = {};
      visit_lanes<T>(EvenRows<T>{last.rows.first + begin, last.rows.stride}, 1, std::min(kGroup, C_ - begin),
                     last.end, last.ahead, [&](V z, int64_t offset) {
                       const int64_t c = begin + offset;
                       constexpr int kHalf = J / 2;
                       V e[K], x[J];
                       MMFAST_UNROLL
                       for (int i = 0; i + 1 < K; ++i) e[i] = all[i * C_ + c];
                       e[K - 1] = exp_nonpositive<A>(z);
                       if (is_backward) all[(K - 1) * C_ + c] = e[K - 1];
                       max = larger<A>(z, max);
                       const auto is_label = labels == static_cast<Int<A>>(c);
                       MMFAST_UNROLL
                       for (int i = 0; i < K; ++i) own[i] = is_label ? e[i] : own[i];
                       x[0] = V{} + 1;
                       if (bias != nullptr) {
                         x[0] = bias[c];
                         own_bias = is_label ? x[0] : own_bias;
                         group[0] += x[0], group[kHalf] += x[0] * e[K - 1];
                       } else {
                         group[kHalf] += e[K - 1];
                       }
                       MMFAST_UNROLL
                       for (int i = 0; i + 1 < K; ++i) {
                         x[1 << i] = bias != nullptr ? x[0] * e[i] : e[i];
                         MMFAST_UNROLL
                         for (int j = 1; j < 1 << i; ++j) x[(1 << i) + j] = x[j] * e[i];
                       }
                       MMFAST_UNROLL
                       for (int j = 1; j < kHalf; ++j) group[j] += x[j], group[kHalf + j] += x[j] * e[K - 1];
                     });
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) total[j] += group[j];
    }
    largest += larger<A>(max, -max);
    if (bias == nullptr) total[0] = V{} + static_cast<A>(C_);
    V y[J], least = total[0];
    Products<A, K>::subset_products(own_bias, own, y);
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      out.y[j] = y[j], out.sums[j] = total[j];
      least = smaller<A>(least, utility_ == kLogProbability ? smaller<A>(y[j], total[j]) : total[j]);
    }
    return !any(~((largest <= kModerate<A>)&(least >= kLeastSum<A>)));
  }

  // The gradients of sum_j du[j] u[j] of the block whose exponentials were summed last; they are added to
  // the walk's dbias where there is a bias.
  __attribute__((noinline)) void write_gradients(int64_t first, const Exponentials& given, const V* du,
                                                 T* dpartial_logits) const {
    const V *const all = e_.data(), *const bias = bias_;
    const Vec<Int<A>> labels = walk_.leaves.labels;
    const int num_rows = shapley_.rows(first);
    V scale[J], label_gradient[J], halves[K + 1];
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      // A quotient, not a product with the inverse of the sum: 1 where there is one class.
      const V p = given.y[j] / given.sums[j], weight = utility_ == kProbability ? du[j] * p : du[j];
      scale[j] = -weight / given.sums[j];
      label_gradient[j] = weight - weight * p;
    }
    Leaves<A, K>::fold(label_gradient, halves);
    // The label's gradient is not that of the others and more: what they had in common would not cancel.
    const auto unless_label = [&](int64_t c, V x, V own) {
      return labels == static_cast<Int<A>>(c) ? own : x;
    };
    for (int64_t c = 0; c < C_ && bias != nullptr; ++c) {
      V x[J];
      std::copy_n(scale, J, x);
      walk_.dbias[c] += unless_label(c, bias[c] * polynomial<K>(all, x, 0, c), label_gradient[0]);
    }
    each_modality(std::make_integer_sequence<int, K>{}, [&](auto modality) {
      constexpr int m = modality;
      // Of the coalitions with m, the others' exponentials are multiplied out.
      V coefficients[J / 2];
      MMFAST_UNROLL
      for (int j = 0; j < J / 2; ++j)
        coefficients[j] = scale[(j >> m << (m + 1)) + (1 << m) + (j & ((1 << m) - 1))];
      const V own = halves[m], *e = all + m * C_;
      write_lanes(C_, num_rows, dpartial_logits + (m * shapley_.N + first) * C_,
                  [&](int64_t c) __attribute__((always_inline)) {
                    V x[J / 2];
                    MMFAST_UNROLL
                    for (int j = 0; j < J / 2; ++j) x[j] = coefficients[j];
                    const V scaled = bias != nullptr ? bias[c] * e[c] : e[c];
                    return unless_label(c, scaled * polynomial<K - 1>(all, x, m, c), own);
                  });
    });
  }

  template <int... m, class Function>
  static void each_modality(std::integer_sequence<int, m...>, Function&& function) {
    (function(std::integral_constant<int, m>{}), ...);
  }

  // sum_j x[j] prod_i e_i at class c, where i counts modalities other than `left_out` if they are fewer than
  // K.
  template <int count>
  __attribute__((always_inline)) V polynomial(const V* all, V* x, int left_out, int64_t c) const {
    MMFAST_UNROLL
    for (int i = count - 1; i >= 0; --i) {
      const V e = all[(count < K && i >= left_out ? i + 1 : i) * C_ + c];
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[j] += e * x[(1 << i) + j];
    }
    return x[0];
  }

  const Shapley& shapley_;
  Walk<A, K>& walk_;
  const int64_t C_;
  const Utility utility_;
  const bool takes_part_;
  const V* bias_ = nullptr;  // [C], its exponentials in all lanes, or null
  std::vector<V> e_;         // [K, C], or [K - 1, C] forward
  std::vector<T> space_;     // of Shapley::rows
};

}  // namespace
}  // namespace mmfast

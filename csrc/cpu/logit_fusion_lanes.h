// kLanes samples at a time, one in each SIMD lane: their logits are transposed once into the L1 cache, where
// maximum, sums and fusion are plain vector operations for any C. For rows shorter than a vector, and those
// whose elements lie apart.
#pragma once

#include <vector>

#include "logit_fusion_scores.h"

namespace mmfast {
namespace {

template <class T>
class LaneBlocks {
 public:
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Mask = Vec<Int<A>>;
  static constexpr int L = kLanes<A>;

  // Space for so many blocks of L samples.
  LaneBlocks(const Fusion<T>& fusion, int64_t num_blocks, bool is_backward)
      : f_(fusion),
        C_(fusion.C),
        batch_(num_blocks * L),
        z_(num_blocks * fusion.M * C_),
        dfused_(is_backward ? num_blocks * C_ : 0),
        e_(is_backward && fusion.score == kEntropy ? num_blocks * fusion.M * C_ : 0) {}

  // Where results go.
  void write_to(T* target) { target_ = target; }

  // The sums of the softmax of modality m, of block g of those held, which begins with sample `first`.
  void sums(int64_t g, int64_t m, int64_t first, V& s_out, V& t_out) {
    V *z = logits(g, m), s = {}, t = {};
    const V max = load_logits(m, first, z);
    const T* const target = m == 0 ? target_ + first * C_ : nullptr;
    for_groups(C_, [&](int64_t begin, int64_t end) {
      V group_s = {}, group_t = {};
      for (int64_t c = begin; c < end; ++c) {
        if (target != nullptr) __builtin_prefetch(target + c * L, 1);
        const V x = f_.shifted(z[c], max), e = exp_nonpositive<A>(x);
        group_s += e;
        group_t += e * x;
      }
      s += group_s, t += group_t;
    });
    s_out = s, t_out = t;
  }

  void fuse(int64_t g, int64_t first, const V* w) {
    V* z = logits(g, 0);
    const bool has_zero = f_.has_zero_weight(w);
    const T* const next = next_block(0, first);
    for (int64_t c = 0; c < C_; ++c) {
      for (int64_t m = 0; m < f_.M && next != nullptr; ++m) f_.prefetch(next + m * f_.stride_m + c * L);
      V sum = has_zero ? f_.weighted(w[0], z[c]) : w[0] * z[c];
      for (int64_t m = 1; m < f_.M; ++m)
        sum += has_zero ? f_.weighted(w[m], z[m * C_ + c]) : w[m] * z[m * C_ + c];
      z[c] = sum;
    }
    store_lanes(z, C_, f_.rows_from(first), target_ + first * C_, AsTheyAre{}, 0);
  }

  void load_gradient(int64_t g, int64_t first, const T* dfused) {
    given_ = dfused;
    load_lanes(dfused + first * C_, C_, f_.N - first, 1, C_, dfused + f_.N * C_, dfused_.data() + g * C_,
               AsTheyAre{}, 0);
  }

  // Also the product of the logits with dfused. What is left of the logits z: z - max, and e beside it, for
  // entropy; e for certainty.
  void sums_and_product(int64_t g, int64_t m, int64_t first, V& s_out, V& t_out, V& product_out) {
    V *z = logits(g, m), *kept = e_.empty() ? nullptr : e_.data() + (g * f_.M + m) * C_;
    const V *dfused = dfused_.data() + g * C_, max = load_logits(m, first, z);
    const T* const target = target_ + (m * f_.N + first) * C_;
    const V lowest = V{} + std::numeric_limits<A>::lowest();
    // What a logit's exponential is at most that is not the largest, or rounding would make it one.
    const V below_one = V{} + (1 - std::numeric_limits<A>::epsilon() / 2);
    V s = {}, t = {}, product = {};
    for_groups(C_, [&](int64_t begin, int64_t end) {
      V group_s = {}, group_t = {}, group_product = {};
      for (int64_t c = begin; c < end; ++c) {
        __builtin_prefetch(target + c * L, 1);
        const V x = f_.shifted(z[c], max), e = exp_nonpositive<A>(x);
        // Where a class is excluded the fused logit is -inf whatever the weights are.
        group_product += dfused[c] * (z[c] < lowest ? V{} : z[c]);
        group_s += e;
        group_t += e * x;
        if (kept != nullptr) {
          z[c] = x, kept[c] = e;
        } else {
          z[c] = ((x < 0) & (e == 1)) ? below_one : e;
        }
      }
      s += group_s, t += group_t, product += group_product;
    });
    s_out = s, t_out = t, product_out = product;
  }

  // w dfused + dscore times the gradient of the score, but for the factor 1 / s.
  void gradients(int64_t g, int64_t m, int64_t first, V w, V dscore, V s, V t_over_s) {
    V *e = logits(g, m), *dfused = dfused_.data() + g * C_;
    const T *const next = next_block(m, first), *const next_dfused = given_ + (first + batch_) * C_;
    for (int64_t c = 0; c < C_ && next != nullptr; ++c) f_.prefetch(next + c * L);
    for (int64_t c = 0; c < C_ && m == 0; ++c) f_.prefetch(next_dfused + c * L);
    if (f_.score == kEntropy) {
      const V* kept = e_.data() + (g * f_.M + m) * C_;
      // p (ln p + H), with ln p + H = x - t / s.
      for (int64_t c = 0; c < C_; ++c) e[c] = w * dfused[c] + dscore * kept[c] * (e[c] - t_over_s);
    } else {
      const V scale = dscore / s;
      Mask is_open = ~Mask{};
      for (int64_t c = 0; c < C_; ++c) {
        // The lowest class of the largest logit, where e is 1.
        const Mask is_top = is_open & (e[c] == 1);
        is_open &= ~is_top;
        // Of a class that has all probability the score's two parts, which may be large, are equal.
        e[c] = w * dfused[c] + ((is_top ? dscore : V{}) - scale * e[c]);
      }
    }
    mask_absent(m, first, e);
    store_lanes(e, C_, f_.rows_from(first), target_ + (m * f_.N + first) * C_, AsTheyAre{}, 0);
  }

 private:
  V* logits(int64_t g, int64_t m) { return z_.data() + (g * f_.M + m) * C_; }

  // The same block of the next batch, if its rows lie one behind the other.
  const T* next_block(int64_t m, int64_t first) const {
    if (f_.stride_c != 1 || f_.stride_n != C_) return nullptr;
    return f_.logits + m * f_.stride_m + (first + batch_) * C_;
  }

  // Finds the largest logit of each lane on the way.
  struct Max {
    V max = V{} - kInfinity<A>;
    V operator()(V z, int64_t) {
      max = larger<A>(z, max);
      return z;
    }
  };

  // Modality m of the samples from `first` on, 0 where it is absent; returns the largest ones.
  V load_logits(int64_t m, int64_t first, V* z) const {
    const V max = load_lanes(f_.logits + m * f_.stride_m + first * f_.stride_n, f_.stride_n, f_.N - first,
                             f_.stride_c, C_, f_.end(), z, Max{}, 0)
                      .max;
    mask_absent(m, first, z);
    return f_.present == nullptr ? max : f_.lanes_present(m, first) ? max : V{};
  }

  void mask_absent(int64_t m, int64_t first, V* z) const {
    if (f_.present == nullptr) return;
    const Mask here = f_.lanes_present(m, first);
    if (!any(~here)) return;
    for (int64_t c = 0; c < C_; ++c) z[c] = from_bits<A>(bits_of<A>(z[c]) & here);
  }

  const Fusion<T>& f_;
  const int64_t C_, batch_;   // samples of a batch
  T* target_ = nullptr;       // [N, C], backward [M, N, C]
  const T* given_ = nullptr;  // [N, C], the gradient with respect to what is fused
  std::vector<V> z_;          // [blocks, M, C]
  std::vector<V> dfused_;     // [blocks, C]
  std::vector<V> e_;          // [blocks, M, C], entropy's gradients
};

}  // namespace
}  // namespace mmfast

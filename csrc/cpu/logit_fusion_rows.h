// kLanes samples at a time, row by row: sums over classes are kept in the lanes of a vector for each sample,
// and added up for all samples of the block at once. For rows of at least a vector, which are read as they
// lie: from memory once, then from the caches. The last vector of a row overlaps the one before it.
#pragma once

#include <vector>

#include "logit_fusion_scores.h"

namespace mmfast {
namespace {

#define MMFAST_ROWS _Pragma("GCC unroll 4") for (int r = 0; r < R; ++r)

template <class T>
class RowBlocks {
 public:
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Mask = Vec<Int<A>>;
  static constexpr int L = kLanes<A>;
  static constexpr Mask kNoClass = Mask{} + std::numeric_limits<Int<A>>::max();
  // Rows that are worked on side by side: nobody waits for the end of one chain of operations.
  static constexpr int R = std::min(4, L);

  // Space for so many blocks of L samples.
  RowBlocks(const Fusion<T>& fusion, int64_t num_blocks, bool is_backward)
      : f_(fusion),
        C_(fusion.C),
        batch_(num_blocks * L),
        is_backward_(is_backward),
        maxima_(num_blocks * fusion.M),
        needs_care_(num_blocks * fusion.M),
        tops_(is_backward ? num_blocks * fusion.M : 0),
        e_(is_backward ? num_blocks * fusion.M * L * C_ : 0),
        zeros_(fusion.present == nullptr ? 0 : C_) {
    for (int l = 0; l < L; ++l) new_lanes_[l] = -Int<A>{l >= L - C_ % L}, first_classes_[l] = l;
  }

  // Where results go.
  void write_to(T* target) { target_ = target; }

  void sums(int64_t g, int64_t m, int64_t first, V& s, V& t) {
    const T* rows[L];
    find_rows(m, first, rows);
    if (find_maxima(g, m, first, rows)) {
      row_sums<true>(rows, maxima_[g * f_.M + m], s, t);
    } else {
      row_sums<false>(rows, maxima_[g * f_.M + m], s, t);
    }
  }

  void fuse(int64_t, int64_t first, const V* w) {
    T* const fused = target_;
    if (f_.present != nullptr || f_.has_zero_weight(w)) {
      fuse_with_zeros(first, w, fused);
    } else if (f_.M == 2) {
      fuse_all(first, w, std::integral_constant<int, 2>{}, fused);
    } else if (f_.M == 3) {
      fuse_all(first, w, std::integral_constant<int, 3>{}, fused);
    } else {
      fuse_all(first, w, f_.M, fused);
    }
  }

  void load_gradient(int64_t, int64_t, const T* dfused) { dfused_ = dfused; }

  // Also the product of the logits with dfused; keeps e.
  void sums_and_product(int64_t g, int64_t m, int64_t first, V& s, V& t, V& product) {
    const T *rows[L], *dfused[L];
    find_rows(m, first, rows);
    f_.find_rows(dfused_ + first * C_, C_, first, dfused);
    if (find_maxima(g, m, first, rows)) {
      row_sums_and_products<true>(g, m, rows, dfused, s, t, product);
    } else {
      row_sums_and_products<false>(g, m, rows, dfused, s, t, product);
    }
    if (f_.score == kCertainty) find_tops(g, m, rows);
  }

  // w dfused + dscore times the gradient of the score, but for the factor 1 / s. Lanes without a sample write
  // that of the last one again.
  void gradients(int64_t g, int64_t m, int64_t first, V w, V dscore, V s, V mean) {
    const T *rows[L], *dfused[L];
    T* targets[L];
    find_rows(m, first, rows);
    f_.find_rows(dfused_ + first * C_, C_, first, dfused);
    f_.find_rows(target_ + (m * f_.N + first) * C_, C_, first, targets);
    const V max = maxima_[g * f_.M + m];
    if (f_.score == kCertainty) {
      certainty_gradients(dfused, tops_[g * f_.M + m], exponentials(g, m), w, dscore, s, targets);
    } else if (needs_care_[g * f_.M + m]) {
      entropy_gradients<true>(rows, dfused, max, exponentials(g, m), w, dscore, mean, targets);
    } else {
      entropy_gradients<false>(rows, dfused, max, exponentials(g, m), w, dscore, mean, targets);
    }
    for (int l = 0; l < L && f_.present != nullptr; ++l)
      if (!f_.is_present(m, first + l)) std::fill_n(targets[l], C_, T{});
  }

 private:
  A* exponentials(int64_t g, int64_t m) { return e_.data() + (g * f_.M + m) * L * C_; }

  // The rows of modality m of a block, zeros where it is absent.
  void find_rows(int64_t m, int64_t first, const T** rows) const {
    f_.find_rows(m, first, rows);
    for (int l = 0; l < L && f_.present != nullptr; ++l)
      if (!f_.is_present(m, first + l)) rows[l] = zeros_.data();
  }

  // Calls visit(column, whether some of its classes were in the vector before it) for every vector of a row,
  // and flush() after every 32 vectors but the last: a sum of few groups' sums rounds less than one of as
  // many terms.
  template <class Visit, class Flush>
  void for_vectors(Visit&& visit, Flush&& flush) const {
    constexpr int64_t kGroup = 32 * L;
    int64_t c = 0;
    for (; C_ - c > kGroup; flush())
      for (const int64_t end = c + kGroup; c < end; c += L) visit(c, std::false_type{});
    for (; c + L <= C_; c += L) visit(c, std::false_type{});
    if (c < C_) visit(C_ - L, std::true_type{});
  }
  template <class Visit>
  void for_vectors(Visit&& visit) const {
    int64_t c = 0;
    for (; c + L <= C_; c += L) visit(c, std::false_type{});
    if (c < C_) visit(C_ - L, std::true_type{});
  }

  // 0 in the lanes of classes that the vector before it had.
  template <class IsOverlapping>
  V counted(V x, IsOverlapping) const {
    return IsOverlapping{} ? from_bits<A>(bits_of<A>(x) & new_lanes_) : x;
  }

  template <bool is_careful>
  static V shifted(V z, V max) {
    return is_careful ? Fusion<T>::shifted(z, max) : z - max;
  }

  static V add_lanes(V* x) {
    return reduce_lanes<A>(x, [](V a, V b) { return a + b; });
  }

  // Returns whether logits of the block are NaN, infinite, or so far apart that their differences may be.
  bool find_maxima(int64_t g, int64_t m, int64_t first, const T* const* rows) {
    // What this block will write, while others are read: a store that misses holds up those behind it.
    const bool has_target = is_backward_ || m == 0;
    const T* const target = target_ + ((is_backward_ ? m * f_.N : 0) + first) * C_;
    const V far = V{} + A(1e30);
    V highest[L], lowest = {};
    for (int l = 0; l < L; l += R) {
      V high[R];
      MMFAST_ROWS high[r] = load(rows[l + r]);
      for_vectors([&](int64_t c, auto) {
        MMFAST_ROWS {
          if (has_target) __builtin_prefetch(target + (l + r) * C_ + c, 1);
          const V z = load(rows[l + r] + c);
          // In this order a NaN, which belongs to one row, is not taken for the lowest of all.
          high[r] = larger<A>(high[r], z), lowest = smaller<A>(z, lowest);
        }
      });
      MMFAST_ROWS highest[l + r] = high[r];
    }
    const V max = reduce_lanes<A>(highest, larger<A>);
    maxima_[g * f_.M + m] = max;
    const bool needs_care = any(~((max < far) & (lowest > -far)));
    needs_care_[g * f_.M + m] = needs_care;
    return needs_care;
  }

  template <bool is_careful>
  __attribute__((noinline)) void row_sums(const T* const* rows, V maxima, V& s_out, V& t_out) const {
    const int64_t ahead = batch_ * f_.stride_n;
    V all_s[L], all_t[L];
    for (int l = 0; l < L; l += R) {
      V max[R], s[R] = {}, t[R] = {}, before_s[R] = {}, before_t[R] = {};
      MMFAST_ROWS max[r] = V{} + maxima[l + r];
      for_vectors(
          [&](int64_t c, auto is_overlapping) {
            MMFAST_ROWS {
              f_.prefetch(rows[l + r] + c + ahead);
              const V x = shifted<is_careful>(load(rows[l + r] + c), max[r]);
              const V e = counted(exp_nonpositive<A>(x), is_overlapping);
              s[r] += e, t[r] += e * x;
            }
          },
          [&] { MMFAST_ROWS before_s[r] += s[r], before_t[r] += t[r], s[r] = t[r] = V{}; });
      MMFAST_ROWS all_s[l + r] = before_s[r] + s[r], all_t[l + r] = before_t[r] + t[r];
    }
    s_out = add_lanes(all_s), t_out = add_lanes(all_t);
  }

  template <bool is_careful>
  __attribute__((noinline)) void row_sums_and_products(int64_t g, int64_t m, const T* const* rows,
                                                       const T* const* dfused, V& s_out, V& t_out,
                                                       V& product_out) {
    const V maxima = maxima_[g * f_.M + m];
    A* const kept = exponentials(g, m);  // [L, C]
    const int64_t ahead = batch_ * f_.stride_n;
    V all_s[L], all_t[L], products[L];
    const V lowest = V{} + std::numeric_limits<A>::lowest();
    for (int l = 0; l < L; l += R) {
      V max[R], s[R] = {}, t[R] = {}, product[R] = {}, before_s[R] = {}, before_t[R] = {}, before[R] = {};
      MMFAST_ROWS max[r] = V{} + maxima[l + r];
      for_vectors(
          [&](int64_t c, auto is_overlapping) {
            MMFAST_ROWS {
              f_.prefetch(rows[l + r] + c + ahead);
              const V z = load(rows[l + r] + c), x = shifted<is_careful>(z, max[r]),
                      e = exp_nonpositive<A>(x);
              store(kept + (l + r) * C_ + c, e);
              s[r] += counted(e, is_overlapping), t[r] += counted(e, is_overlapping) * x;
              // Where a class is excluded the fused logit is -inf whatever the weights are.
              product[r] += counted(load(dfused[l + r] + c), is_overlapping) *
                            (is_careful ? (z < lowest ? V{} : z) : z);
            }
          },
          [&] {
            MMFAST_ROWS before_s[r] += s[r], before_t[r] += t[r], before[r] += product[r];
            MMFAST_ROWS s[r] = t[r] = product[r] = V{};
          });
      MMFAST_ROWS all_s[l + r] = before_s[r] + s[r], all_t[l + r] = before_t[r] + t[r];
      MMFAST_ROWS products[l + r] = before[r] + product[r];
    }
    s_out = add_lanes(all_s), t_out = add_lanes(all_t), product_out = add_lanes(products);
  }

  // `count` is M, where it may be a constant. Lanes without a sample write that of the last one again.
  template <class Count>
  __attribute__((noinline)) void fuse_all(int64_t first, const V* w, Count count, T* fused) const {
    const T* rows[L];
    T* targets[L];
    f_.find_rows(0, first, rows);
    f_.find_rows(fused + first * C_, C_, first, targets);
    for (int l = 0; l < L; l += R) {
      for_vectors([&](int64_t c, auto) {
        MMFAST_ROWS {
          V sum = w[0][l + r] * load(rows[l + r] + c);
          for (int64_t m = 1; m < count; ++m) sum += w[m][l + r] * load(rows[l + r] + m * f_.stride_m + c);
          store(targets[l + r] + c, sum);
        }
      });
    }
  }

  __attribute__((noinline, cold)) void fuse_with_zeros(int64_t first, const V* w, T* fused) const {
    std::vector<const T*> rows(f_.M * L);
    for (int64_t m = 0; m < f_.M; ++m) find_rows(m, first, rows.data() + m * L);
    for (int l = 0; l < f_.rows_from(first); ++l) {
      for_vectors([&](int64_t c, auto) {
        V sum = f_.weighted(V{} + w[0][l], load(rows[l] + c));
        for (int64_t m = 1; m < f_.M; ++m) sum += f_.weighted(V{} + w[m][l], load(rows[m * L + l] + c));
        store(fused + (first + l) * C_ + c, sum);
      });
    }
  }

  template <bool is_careful>
  __attribute__((noinline)) void entropy_gradients(const T* const* rows, const T* const* dfused, V maxima,
                                                   const A* e,  // [L, C]
                                                   V weights, V dscores, V means, T* const* targets) const {
    const int64_t ahead = batch_ * C_;
    for (int l = 0; l < L; l += R) {
      V max[R], w[R], dscore[R], mean[R];
      MMFAST_ROWS max[r] = V{} + maxima[l + r], mean[r] = V{} + means[l + r];
      MMFAST_ROWS w[r] = V{} + weights[l + r], dscore[r] = V{} + dscores[l + r];
      for_vectors([&](int64_t c, auto) {
        MMFAST_ROWS {
          f_.prefetch(dfused[l + r] + c + ahead);
          // p (ln p + H), with ln p + H = x - t / s.
          const V x = shifted<is_careful>(load(rows[l + r] + c), max[r]);
          store(targets[l + r] + c,
                w[r] * load(dfused[l + r] + c) + dscore[r] * load(e + (l + r) * C_ + c) * (x - mean[r]));
        }
      });
    }
  }

  // The lowest class of the largest logit in each row; any, or one beyond all classes, where a logit is NaN.
  __attribute__((noinline)) void find_tops(int64_t g, int64_t m, const T* const* rows) {
    const V maxima = maxima_[g * f_.M + m];
    V tops[L];
    for (int l = 0; l < L; l += R) {
      V max[R];
      Mask top[R], classes = first_classes_;
      MMFAST_ROWS max[r] = V{} + maxima[l + r], top[r] = kNoClass;
      for_vectors([&](int64_t c, auto) {
        classes = first_classes_ + static_cast<Int<A>>(c);
        MMFAST_ROWS {
          const Mask found = load(rows[l + r] + c) == max[r] ? classes : kNoClass;
          top[r] = found < top[r] ? found : top[r];
        }
      });
      MMFAST_ROWS tops[l + r] = from_bits<A>(top[r]);
    }
    tops_[g * f_.M + m] = bits_of<A>(reduce_lanes<A>(tops, [](V a, V b) {
      return from_bits<A>(bits_of<A>(a) < bits_of<A>(b) ? bits_of<A>(a) : bits_of<A>(b));
    }));
  }

  __attribute__((noinline)) void certainty_gradients(const T* const* dfused, Mask tops,
                                                     const A* e,  // [L, C]
                                                     V weights, V dscores, V s, T* const* targets) const {
    const int64_t ahead = batch_ * C_;
    const V scales = dscores / s;
    for (int l = 0; l < L; l += R) {
      V w[R], scale[R], dscore[R];
      Mask top[R];
      MMFAST_ROWS w[r] = V{} + weights[l + r], scale[r] = V{} + scales[l + r],
                  dscore[r] = V{} + dscores[l + r];
      MMFAST_ROWS top[r] = Mask{} + tops[l + r];
      for_vectors([&](int64_t c, auto) {
        const Mask classes = first_classes_ + static_cast<Int<A>>(c);
        MMFAST_ROWS {
          f_.prefetch(dfused[l + r] + c + ahead);
          // Of a class that has all probability the score's two parts, which may be large, are equal.
          const V slope = (classes == top[r] ? dscore[r] : V{}) - scale[r] * load(e + (l + r) * C_ + c);
          store(targets[l + r] + c, w[r] * load(dfused[l + r] + c) + slope);
        }
      });
    }
  }

  const Fusion<T>& f_;
  const int64_t C_, batch_;  // samples of a batch
  const bool is_backward_;
  T* target_ = nullptr;              // [N, C], backward [M, N, C]
  std::vector<V> maxima_;            // [blocks, M]
  std::vector<uint8_t> needs_care_;  // [blocks, M]
  std::vector<Mask> tops_;           // [blocks, M], certainty's gradients
  std::vector<A> e_;                 // [blocks, M, L, C]
  std::vector<T> zeros_;             // [C], or empty
  const T* dfused_ = nullptr;        // [N, C]
  Mask first_classes_ = {};          // 0, 1, 2, ...
  Mask new_lanes_ = {};              // those of a row's last vector that the one before it does not have
};

#undef MMFAST_ROWS

}  // namespace
}  // namespace mmfast

// Sums of unimodal logits weighted by the softmax, over modalities, of how sure each is of a sample.
//
//   entropy    score_m = sum_c p_c ln p_c    = t / s - ln s     e_c = exp(z_c - max z), s = sum_c e_c
//   certainty  score_m = max_c p_c / T       = 1 / (s T)        t = sum_c e_c (z_c - max z)
//   w = softmax_m(score),  fused = sum_m w_m z^m
//
// kLanes samples at a time, one in each SIMD lane: their logits are transposed once into the L1 cache, where
// maximum, sums and fusion are plain vector operations for any C. Backward recomputes the sums.
//
// Floors: (M + 1) C + M elements a sample over the bandwidth of memory; some 20 vector instructions for each
// kLanes logits (exponential 14, transposition 4). Measured: bench/results/logit_fusion.md.
#include <vector>

#include "codes.h"
#include "integers.h"
#include "lanes.h"
#include "vec_math.h"

namespace mmfast {
namespace {

template <class T>
struct Fusion {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const T* logits;         // [M, N, C]
  const uint8_t* present;  // [M, N] or null
  int64_t M, N, C, stride_m, stride_n, stride_c;
  Score score;
  A temperature;

  const T* end() const { return logits + (M - 1) * stride_m + (N - 1) * stride_n + (C - 1) * stride_c + 1; }

  // All ones in the lanes of samples that have modality m.
  Vec<Int<A>> lanes_present(int64_t m, int64_t first) const {
    Vec<Int<A>> mask = {};
    if (present == nullptr) return ~mask;
    for (int l = 0; l < L; ++l) mask[l] = -Int<A>{present[m * N + std::min(first + l, N - 1)] != 0};
    return mask;
  }

  // Modality m of the samples from `first` on, 0 where it is absent; the last sample fills missing lanes.
  void load_logits(int64_t m, int64_t first, Vec<Int<A>> here, V* z) const {
    const T* rows[L];
    for (int l = 0; l < L; ++l) rows[l] = logits + m * stride_m + std::min(first + l, N - 1) * stride_n;
    load_lanes(rows, stride_c, C, end(), L * stride_n, z);
    mask_absent(z, here);
  }

  // Sets the logits of samples without the modality to 0.
  void mask_absent(V* z, Vec<Int<A>> here) const {
    if (!any(~here)) return;
    for (int64_t c = 0; c < C; ++c) z[c] = from_bits<A>(bits_of<A>(z[c]) & here);
  }

  // How many of the samples from `first` on there are in a block.
  int rows_from(int64_t first) const { return static_cast<int>(std::min<int64_t>(L, N - first)); }

  V max_of(const V* z) const {
    V maxima[4] = {z[0], z[0], z[0], z[0]};
    int64_t c = 0;
    for (; c + 4 <= C; c += 4)
      for (int i = 0; i < 4; ++i) maxima[i] = larger<A>(maxima[i], z[c + i]);
    for (; c < C; ++c) maxima[0] = larger<A>(maxima[0], z[c]);
    return larger<A>(larger<A>(maxima[0], maxima[1]), larger<A>(maxima[2], maxima[3]));
  }

  // z - max, finite for a class that is excluded by a logit of -inf.
  static V shifted(V z, V max) {
    const V x = z - max, least = V{} + MathConstants<A>::kLogSmallest * 2;
    return x < least ? least : x;
  }

  // The softmax of the scores, in place: 0 for what is absent, also where all is.
  void weigh(V* scores, const Vec<Int<A>>* here) const {
    V max = V{} - kInfinity<A>, sum = {};
    for (int64_t m = 0; m < M; ++m) max = larger<A>(max, here[m] ? scores[m] : max);
    for (int64_t m = 0; m < M; ++m) {
      const V e = exp_nonpositive<A>(scores[m] - max);
      scores[m] = here[m] ? e : V{};
      sum += scores[m];
    }
    sum = sum == 0 ? V{} + 1 : sum;
    // Once more 0 for what is absent, beside a modality whose score is NaN.
    for (int64_t m = 0; m < M; ++m) scores[m] = here[m] ? scores[m] / sum : V{};
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

  // The score of a modality's logits z.
  V score_of(const V* z) const {
    const V max = max_of(z);
    V s = {}, t = {};
    if (score == kEntropy) {
      for_groups(C, [&](int64_t begin, int64_t end) {
        V group_s = {}, group_t = {};
        for (int64_t c = begin; c < end; ++c) {
          const V x = shifted(z[c], max), e = exp_nonpositive<A>(x);
          group_s += e;
          group_t += e * x;
        }
        s += group_s, t += group_t;
      });
      return t / s - log_positive<A>(s);
    }
    for_groups(C, [&](int64_t begin, int64_t end) {
      V group = {};
      for (int64_t c = begin; c < end; ++c) group += exp_nonpositive<A>(z[c] - max);
      s += group;
    });
    return 1 / (s * temperature);
  }

  // Where rounding made a weight 0: mathematically it is above, so its product with a finite logit vanishes,
  // that with the -inf of an excluded class does not.
  void replace_zero_weights(V* z, V* w) const {
    auto is_zero = w[0] == 0;
    for (int64_t m = 1; m < M; ++m) is_zero |= w[m] == 0;
    if (!any(is_zero)) return;
    const V lowest = V{} + std::numeric_limits<A>::lowest();
    for (int64_t m = 0; m < M; ++m) {
      const auto vanishes = w[m] == 0;
      for (int64_t c = 0; c < C; ++c) z[m * C + c] = vanishes & (z[m * C + c] >= lowest) ? V{} : z[m * C + c];
      w[m] = vanishes ? V{} + 1 : w[m];
    }
  }

  // Into the logits of the first modality.
  void fuse(V* z, const V* w) const {
    for (int64_t c = 0; c < C; ++c) {
      V sum = w[0] * z[c];
      for (int64_t m = 1; m < M; ++m) sum += w[m] * z[m * C + c];
      z[c] = sum;
    }
  }

  void fwd(int64_t block, V* z, V* w, Vec<Int<A>>* here, T* fused, T* weights) const {
    const int64_t first = block * L;
    for (int64_t m = 0; m < M; ++m) {
      here[m] = lanes_present(m, first);
      load_logits(m, first, here[m], z + m * C);
      w[m] = score_of(z + m * C);
    }
    weigh(w, here);
    store_weights(w, first, weights);
    replace_zero_weights(z, w);
    fuse(z, w);
    store_lanes(z, C, rows_from(first), fused + first * C);
  }

  // What backward needs of a modality's logits z: s, t / s, and their product with dfused. z becomes x = z -
  // max for entropy, e for certainty.
  void softmax_sums(V* z, const V* dfused, V& s_out, V& t_over_s, V& dot_out) const {
    const V max = max_of(z), lowest = V{} + std::numeric_limits<A>::lowest();
    // What a logit's exponential is at most that is not the largest, or rounding would make it one.
    const V below_one = V{} + (1 - std::numeric_limits<A>::epsilon() / 2);
    V s = {}, t = {}, dot = {};
    for_groups(C, [&](int64_t begin, int64_t end) {
      V group_s = {}, group_t = {}, group_dot = {};
      for (int64_t c = begin; c < end; ++c) {
        const V x = shifted(z[c], max), e = exp_nonpositive<A>(x);
        // Where a class is excluded the fused logit is -inf whatever the weights are.
        group_dot += dfused[c] * (z[c] < lowest ? V{} : z[c]);
        group_s += e;
        group_t += e * x;
        z[c] = score == kEntropy ? x : ((x < 0) & (e == 1)) ? below_one : e;
      }
      s += group_s, t += group_t, dot += group_dot;
    });
    s_out = s, t_over_s = t / s, dot_out = dot;
  }

  // From what `softmax_sums` left in e to the gradient of the logits, in place: w dfused + dscore times the
  // gradient of the score, but for the factor 1 / s.
  void logit_gradients(V* e, const V* dfused, V w, V dscore, V s, V t_over_s) const {
    if (score == kEntropy) {
      // p (ln p + H), with ln p + H = x - t / s.
      for (int64_t c = 0; c < C; ++c)
        e[c] = w * dfused[c] + dscore * exp_nonpositive<A>(e[c]) * (e[c] - t_over_s);
      return;
    }
    const V top = 1 / s, scale = dscore * top;
    auto is_open = ~Vec<Int<A>>{};
    for (int64_t c = 0; c < C; ++c) {
      // The lowest class of the largest logit, where e is 1.
      const auto is_top = is_open & (e[c] == 1);
      is_open &= ~is_top;
      e[c] = w * dfused[c] - scale * e[c] + (is_top ? dscore : V{});
    }
  }

  void bwd(int64_t block, V* e, V* w, Vec<Int<A>>* here, const T* dfused, const T* dweights,
           T* dlogits) const {
    const int64_t first = block * L;
    V *df = e + M * C, *s = w + M, *dots = w + 2 * M, *t_over_s = w + 3 * M;
    const T* rows[L];
    for (int l = 0; l < L; ++l) rows[l] = dfused + std::min(first + l, N - 1) * C;
    load_lanes(rows, 1, C, dfused + N * C, L * C, df);
    for (int64_t m = 0; m < M; ++m) {
      here[m] = lanes_present(m, first);
      load_logits(m, first, here[m], e + m * C);
      softmax_sums(e + m * C, df, s[m], t_over_s[m], dots[m]);
      w[m] = score == kEntropy ? t_over_s[m] - log_positive<A>(s[m]) : 1 / (s[m] * temperature);
    }
    weigh(w, here);
    V mean = {};
    for (int64_t m = 0; m < M; ++m) {
      V dweight;
      for (int l = 0; l < L; ++l) dweight[l] = widen(dweights[m * N + std::min(first + l, N - 1)]);
      dots[m] += dweight;
      mean += w[m] * dots[m];
    }
    for (int64_t m = 0; m < M; ++m) {
      const V dscore = w[m] * (dots[m] - mean) / temperature / s[m];
      logit_gradients(e + m * C, df, w[m], dscore, s[m], t_over_s[m]);
      mask_absent(e + m * C, here[m]);
      store_lanes(e + m * C, C, rows_from(first), dlogits + (m * N + first) * C);
    }
  }

  // Calls function(block, class vectors, modality vectors, masks) for every block of L samples.
  template <class Function>
  void for_blocks(int64_t num_threads, Function&& function) const {
    parallel_for(ceil_div(N, L), L * M * C * sizeof(A), num_threads, [&](int64_t begin, int64_t end) {
      std::vector<V> classes((M + 1) * C), modalities(4 * M);
      std::vector<Vec<Int<A>>> masks(M);
      for (int64_t block = begin; block < end; ++block)
        function(block, classes.data(), modalities.data(), masks.data());
    });
  }
};

template <class T>
Fusion<T> make_fusion(const Strided<3>& logits, const uint8_t* present, Score score, double temperature) {
  const auto& [M, N, C] = logits.sizes;
  const auto& [stride_m, stride_n, stride_c] = logits.strides;
  return {static_cast<const T*>(logits.data),       present, M, N, C, stride_m, stride_n, stride_c, score,
          static_cast<accumulate_t<T>>(temperature)};
}

void logit_fusion_fwd(const Strided<3>& logits,  // [M, N, C]
                      const uint8_t* present,    // [M, N] contiguous, or null
                      void* fused,               // [N, C] contiguous
                      void* weights,             // [M, N] contiguous
                      Score score, double temperature, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("logit_fusion_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto fusion = make_fusion<T>(logits, present, score, temperature);
    fusion.for_blocks(num_threads, [&](int64_t block, auto* z, auto* w, auto* here) {
      fusion.fwd(block, z, w, here, static_cast<T*>(fused), static_cast<T*>(weights));
    });
  });
}

void logit_fusion_bwd(const void* dfused,        // [N, C] contiguous
                      const void* dweights,      // [M, N] contiguous
                      const Strided<3>& logits,  // [M, N, C]
                      const uint8_t* present,    // [M, N] contiguous, or null
                      void* dlogits,             // [M, N, C] contiguous
                      Score score, double temperature, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("logit_fusion_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto fusion = make_fusion<T>(logits, present, score, temperature);
    fusion.for_blocks(num_threads, [&](int64_t block, auto* e, auto* w, auto* here) {
      fusion.bwd(block, e, w, here, static_cast<const T*>(dfused), static_cast<const T*>(dweights),
                 static_cast<T*>(dlogits));
    });
  });
}

MMFAST_REGISTER(logit_fusion_fwd)
MMFAST_REGISTER(logit_fusion_bwd)

}  // namespace
}  // namespace mmfast

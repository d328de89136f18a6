// Shapley values of modalities whose partial logits add up, and the utilities of given coalitions' logits.
//
//   z_s = bias + sum_{m in s} z^m,  u_s = utility(z_s, y),  phi = shapley_values(u)
//
// kLanes samples at a time, one in each SIMD lane, their partial logits transposed once into the L1 cache.
// Their coalitions are walked depth first (additive_shapley_walk.h), the last eight at once in registers, as
// products of exponentials (additive_shapley_products.h) or sums of logits (additive_shapley_utilities.h).
// Backward walks again. Samples whose values come out infinite or NaN are walked once more and summed
// modality by modality.
//
// Floor: M exponentials and some 1.4 S operations a class and sample, or 2 S without exponentials, or one
// read. Measured: bench/results/additive_shapley.md.
#include <cmath>
#include <vector>

#include "additive_shapley_few.h"
#include "additive_shapley_table.h"
#include "additive_shapley_walk.h"
#include "integers.h"
#include "labels.h"

namespace mmfast {
namespace {

// Samples whose share of the bias's gradient is summed in one place, whatever the number of threads.
constexpr int64_t kChunk = 256;

template <class T>
struct Shapley {
  using Element = T;
  template <int K>
  using Few = FewModalities<Shapley, K>;
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const T* partial_logits;  // [M, N, C]
  const int64_t* labels;    // [N]
  const A* bias;            // [C] or null
  int64_t M, N, C, stride_m, stride_n, stride_c;
  Utility utility;

  int64_t label(int64_t n) const { return labels[std::min(n, N - 1)]; }
  int rows(int64_t first) const { return static_cast<int>(std::min<int64_t>(L, N - first)); }

  // function(logits) of modality m of the samples from `first` on; the last sample fills missing lanes.
  template <class Function>
  Function load_partials(int64_t m, int64_t first, V* tile, Function function) const {
    const T* end = partial_logits + (M - 1) * stride_m + (N - 1) * stride_n + (C - 1) * stride_c + 1;
    return load_lanes(partial_logits + m * stride_m + first * stride_n, stride_n, N - first, stride_c, C, end,
                      tile, function);
  }

  template <int K>
  void load_labels(int64_t first, Walk<A, K>& walk) const {
    if (first + L <= N) {
      typename VecOf<int64_t, L>::type wide;
      std::memcpy(&wide, labels + first, sizeof wide);
      walk.leaves.labels = __builtin_convertvector(wide, Vec<Int<A>>);
    } else {
      for (int l = 0; l < L; ++l) walk.leaves.labels[l] = static_cast<Int<A>>(label(first + l));
    }
  }

  // Each lane's entry at its label.
  template <int K>
  static V own_entries(const V* tile, const Walk<A, K>& walk) {
    V own;
    for (int l = 0; l < L; ++l) own[l] = reinterpret_cast<const A*>(tile + walk.leaves.labels[l])[l];
    return own;
  }

  // e^z, and the largest z.
  struct Exponential {
    V max = V{} - kInfinity<A>;
    V operator()(V z, int64_t) {
      max = larger<A>(z, max);
      return exp_nonpositive<A>(z);
    }
  };

  // Exponentials of the logits: as they are, where their largest ones are moderate, else less the largest of
  // each modality. The base is 0 at the label's class, and so are all products. Where logits are NaN or
  // infinite, so are sums of products.
  template <int K>
  void load_exponentials(int64_t first, Walk<A, K>& walk) const {
    walk.prepare(), walk.set_base(bias);
    V sum = {};
    for (int64_t m = 0; m < M; ++m) {
      const V max = load_partials(m, first, walk.partials.data() + m * C, Exponential{}).max;
      sum += larger<A>(max, -max);
    }
    for (int64_t m = 0; m < M && any(~(sum <= kModerate<A>)); ++m) {
      V *tile = walk.partials.data() + m * C, max = V{} - kInfinity<A>;
      load_partials(m, first, tile, AsTheyAre{});
      for (int64_t c = 0; c < C; ++c) max = larger<A>(max, tile[c]);
      for (int64_t c = 0; c < C; ++c) tile[c] = exp_nonpositive<A>(tile[c] - max);
    }
    load_labels(first, walk);
    for (int64_t m = 0; m < M; ++m) walk.label_partials[m] = own_entries(walk.partials.data() + m * C, walk);
    for (int64_t c = 0; c < C; ++c) walk.base[c] = walk.is_label(c) ? V{} : walk.base_exponentials[c];
    walk.label_base = own_entries(walk.base_exponentials.data(), walk);
    walk.by_products = true, walk.products.has_failed = false;
  }

  template <int K>
  void load_block(int64_t first, bool is_backward, Walk<A, K>& walk) const {
    walk.prepare();
    walk.by_products = false;
    load_labels(first, walk);
    LabelApart<A> base{walk.leaves.labels, V{} + in_place_of_label<A>(utility, is_backward)};
    for (int64_t c = 0; c < C; ++c) walk.base[c] = base(V{} + (bias == nullptr ? A{} : bias[c]), c);
    walk.label_base = base.own;
    auto is_bounded = base.is_bounded;
    for (int64_t m = 0; m < M; ++m) {
      const auto partials =
          load_partials(m, first, walk.partials.data() + m * C, LabelApart<A>{walk.leaves.labels, {}});
      walk.label_partials[m] = partials.own;
      is_bounded &= partials.is_bounded;
    }
    walk.leaves.is_bounded = !any(~is_bounded);
  }

  // Calls function(K) with the number of modalities whose coalitions fit into registers, as a type.
  template <class Function>
  void with_leaves(Function&& function) const {
    switch (M) {
      case 1:
        return function(std::integral_constant<int, 1>{});
      case 2:
        return function(std::integral_constant<int, 2>{});
      default:
        return function(std::integral_constant<int, 3>{});
    }
  }

  bool is_smooth() const { return utility == kProbability || utility == kLogProbability; }

  // A product of M exponentials rounds M times more than the exponential of a sum, which float64 is not
  // chosen for.
  bool may_multiply() const { return std::is_same_v<A, float> && is_smooth(); }

  // The rows of modality m of the samples from `first` on: where they lie, or in `space`, one behind the
  // other, if their elements lie apart or samples are missing, in whose place the last one stands.
  BlockRows<T> rows(int64_t m, int64_t first, std::vector<T>& space) const {
    const T* row = partial_logits + m * stride_m + first * stride_n;
    if (stride_c == 1 && first + L <= N) {
      const T* end = partial_logits + (M - 1) * stride_m + (N - 1) * stride_n + C;
      return {{row, stride_n}, end, L * stride_n};
    }
    space.resize(M * L * C);
    T* copy = space.data() + m * L * C;
    for (int64_t l = 0; l < L; ++l) {
      const T* source = row + std::min(l, N - 1 - first) * stride_n;
      for (int64_t c = 0; c < C; ++c) copy[l * C + c] = source[c * stride_c];
    }
    return {{copy, C}, space.data() + space.size(), 0};
  }

  // What a block costs, as bytes read from memory in the same time.
  int64_t block_bytes() const {
    return L * M * C * sizeof(T) + (is_smooth() ? 64 * C * (may_multiply() ? M : 1 << M) : 0) + (8 * C << M);
  }

  void fwd(T* phi, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for(ceil_div(N, L), block_bytes(), num_threads, [&](int64_t begin, int64_t end) {
        Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, false);
        Few<leaf_bits> few(*this, walk, false);
        Sums<A> sums;
        V nonfinite = {};
        const int64_t last = std::min(end * L, N);
        for (int64_t first = begin * L; first < last; first += L) {
          if (first % 1024 == 0 && is_interrupted(1024 / L * C * M)) return;
          if (!few.fwd(first, sums)) fwd_block(first, walk, sums);
          store_lanes(sums.halves, M, rows(first), phi + first * M, AsTheyAre{});
          // Stays 0 unless a value is infinite or NaN, which counts never are.
          for (int m = 0; m < M && utility >= kProbability; ++m) nonfinite += sums.halves[m] - sums.halves[m];
        }
        if (!any(nonfinite != 0)) return;
        for (int64_t first = begin * L; first < last; first += L) {
          const T* values = phi + first * M;
          if (std::all_of(values, values + rows(first) * M, [](T x) { return std::isfinite(widen(x)); }))
            continue;
          load_block(first, false, walk);
          walk.fwd_by_formula(sums);
          store_lanes(sums.halves, M, rows(first), phi + first * M, AsTheyAre{});
        }
      });
    });
  }

  template <int K>
  void fwd_block(int64_t first, Walk<A, K>& walk, Sums<A>& sums) const {
    if (may_multiply()) {
      load_exponentials(first, walk);
      walk.fwd(sums);
    }
    if (!may_multiply() || walk.products.has_failed) {
      load_block(first, false, walk);
      walk.fwd(sums);
    }
  }

  void bwd(const T* dphi, T* dpartial_logits, A* dbias, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for(
          ceil_div(N, kChunk), 3 * kChunk / L * block_bytes(), num_threads, [&](int64_t begin, int64_t end) {
            Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, true);
            Few<leaf_bits> few(*this, walk, true);
            for (int64_t chunk = begin; chunk < end && !is_interrupted(kChunk / L * C * M); ++chunk) {
              std::fill(walk.dbias.begin(), walk.dbias.end(), V{});
              const int64_t last = std::min(N, (chunk + 1) * kChunk);
              for (int64_t first = chunk * kChunk; first < last; first += L) {
                const bool is_large = load_dphi(first, dphi, walk);
                if (!is_large || !few.bwd(first, dpartial_logits))
                  bwd_block(first, is_large, dpartial_logits, walk);
              }
              for (int64_t c = 0; dbias != nullptr && c < C; ++c)
                dbias[chunk * C + c] = sum_lanes(walk.dbias[c]);
            }
          });
    });
  }

  template <int K>
  void bwd_block(int64_t first, bool is_large_dphi, T* dpartial_logits, Walk<A, K>& walk) const {
    const bool by_products = is_large_dphi && may_multiply();
    if (by_products) {
      load_exponentials(first, walk);
      walk.bwd();
    }
    if (!by_products || walk.products.has_failed) {
      load_block(first, true, walk);
      walk.bwd();
    }
    for (int64_t c = 0; c < C && bias != nullptr; ++c)
      walk.dbias[c] += walk.dbase[c] + (walk.is_label(c) ? walk.dlabel_base : V{});
    for (int64_t m = 0; m < M; ++m) {
      const V own = walk.dlabel_partials[m];
      const auto labels = walk.leaves.labels;
      store_lanes(walk.dpartials.data() + m * C, C, rows(first), dpartial_logits + (m * N + first) * C,
                  [=](V x, int64_t c) { return x + (labels == static_cast<Int<A>>(c) ? own : V{}); });
    }
  }

  // Returns whether gradients are neither so small nor so large that they cannot be divided by sums of
  // exponentials and multiplied by others, all between 2^-60 and e^20.
  template <int K>
  bool load_dphi(int64_t first, const T* dphi, Walk<A, K>& walk) const {
    if (first + L <= N && M <= 3) {
      read_few_lanes(dphi + first * M, M, walk.dphi);
    } else {
      load_lanes(dphi + first * M, M, N - first, 1, M, dphi + N * M, walk.dphi, AsTheyAre{});
    }
    walk.dphi_sum = V{};
    V largest_sum = {};
    for (int m = 0; m < M; ++m) {
      // Lanes without a sample add nothing to the bias's gradient.
      for (int l = this->rows(first); l < L; ++l) walk.dphi[m][l] = 0;
      walk.dphi_sum += walk.dphi[m];
      largest_sum += walk.dphi[m] < 0 ? -walk.dphi[m] : walk.dphi[m];
    }
    walk.has_unbounded_dphi = largest_sum - largest_sum != 0;
    walk.any_unbounded_dphi = any(walk.has_unbounded_dphi);
    return !any((largest_sum > 0) & ((largest_sum < A(1e-10)) | (largest_sum > A(1e10))));
  }

  static A sum_lanes(V x) {
    A sums[L];
    std::memcpy(sums, &x, sizeof x);
    for (int half = L / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0];
  }
};

template <class T>
Shapley<T> make_shapley(const Strided<3>& partial_logits, const int64_t* labels, const void* bias,
                        Utility utility) {
  const auto& [M, N, C] = partial_logits.sizes;
  const auto& [stride_m, stride_n, stride_c] = partial_logits.strides;
  return {static_cast<const T*>(partial_logits.data),
          labels,
          static_cast<const accumulate_t<T>*>(bias),
          M,
          N,
          C,
          stride_m,
          stride_n,
          stride_c,
          utility};
}

// All four refuse labels outside [0, C).
void coalition_utilities_fwd(const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous
                             void* values,              // [N, S] contiguous
                             Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, logits.sizes[0], logits.sizes[2], num_threads);
  dispatch_dtype("coalition_utilities_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    make_table<T>(logits, labels, utility).fwd(static_cast<T*>(values), num_threads);
  });
}

void coalition_utilities_bwd(const void* dvalues,       // [N, S] contiguous
                             const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous
                             void* dlogits,             // [N, S, C] contiguous
                             Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, logits.sizes[0], logits.sizes[2], num_threads);
  dispatch_dtype("coalition_utilities_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto table = make_table<T>(logits, labels, utility);
    table.bwd(static_cast<const T*>(dvalues), static_cast<T*>(dlogits), num_threads);
  });
}

// Sums over parts of the work, which Python adds up.
struct Parts {
  void* sums;     // [count, ...] in the type of accumulation, or null
  int64_t count;  // of those there is memory for
};

struct BackwardPlan {
  int64_t num_parts;  // of the bias's gradient
  int64_t is_wide;    // whether the gradient is written in the type of accumulation, whatever the dtype
};

BackwardPlan additive_shapley_bwd_plan(int64_t, int64_t N, int64_t, Dtype) {
  return {ceil_div(N, kChunk), false};
}

void additive_shapley_fwd(const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous
                          const void* bias,                  // [C] in the type of accumulation, or null
                          void* phi,                         // [N, M] contiguous
                          const Parts&,                      // none: values are summed in one place
                          Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, partial_logits.sizes[1], partial_logits.sizes[2], num_threads);
  dispatch_dtype("additive_shapley_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    make_shapley<T>(partial_logits, labels, bias, utility).fwd(static_cast<T*>(phi), num_threads);
  });
}

void additive_shapley_bwd(const void* dphi,                  // [N, M] contiguous
                          const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous
                          const void* bias,                  // [C] in the type of accumulation, or null
                          void* dpartial_logits,             // [M, N, C] contiguous
                          const Parts& dbias,                // [num_parts, C] of additive_shapley_bwd_plan
                          Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, partial_logits.sizes[1], partial_logits.sizes[2], num_threads);
  dispatch_dtype("additive_shapley_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto shapley = make_shapley<T>(partial_logits, labels, bias, utility);
    shapley.bwd(static_cast<const T*>(dphi), static_cast<T*>(dpartial_logits),
                static_cast<accumulate_t<T>*>(dbias.sums), num_threads);
  });
}

MMFAST_REGISTER(additive_shapley_bwd_plan)
MMFAST_REGISTER(coalition_utilities_fwd)
MMFAST_REGISTER(coalition_utilities_bwd)
MMFAST_REGISTER(additive_shapley_fwd)
MMFAST_REGISTER(additive_shapley_bwd)

}  // namespace
}  // namespace mmfast

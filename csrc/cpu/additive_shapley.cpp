// Shapley values of modalities whose partial logits add up, and the utilities of given coalitions' logits.
//
//   z_s = bias + sum_{m in s} z^m,  u_s = utility(z_s, y),  phi = shapley_values(u)
//
// kLanes samples at a time, one in each SIMD lane, their partial logits transposed once into the L1 cache.
// Their coalitions are walked depth first (additive_shapley_walk.h), the last eight at once in registers
// (additive_shapley_utilities.h). Backward walks again. Samples whose values come out infinite or NaN are
// walked once more and summed modality by modality.
//
// Floor: S additions, or S exponentials, a class and sample. Measured: bench/results/README.md.
#include <cmath>
#include <vector>

#include "additive_shapley_walk.h"
#include "integers.h"
#include "labels.h"

namespace mmfast {
namespace {

// Samples whose share of the bias's gradient is summed in one place, whatever the number of threads.
constexpr int64_t kChunk = 256;

template <class T>
struct Shapley {
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

  template <int K>
  void load_block(int64_t first, bool is_backward, Walk<A, K>& walk) const {
    const T* end = partial_logits + (M - 1) * stride_m + (N - 1) * stride_n + (C - 1) * stride_c + 1;
    auto is_bounded = ~Vec<Int<A>>{};
    for (int64_t c = 0; c < C; ++c) walk.base[c] = V{} + (bias == nullptr ? A{} : bias[c]);
    for (int64_t c = 0; c < C && bias != nullptr; ++c) is_bounded &= walk.base[c] <= kLargestBounded<A>;
    for (int64_t m = 0; m < M; ++m) {
      V* tile = walk.partials.data() + m * C;
      const T* rows[L];
      for (int l = 0; l < L; ++l)
        rows[l] = partial_logits + m * stride_m + std::min(first + l, N - 1) * stride_n;
      load_lanes(rows, stride_c, C, end, L * stride_n, tile);
      for (int64_t c = 0; c < C; ++c) is_bounded &= tile[c] <= kLargestBounded<A>;
      for (int l = 0; l < L; ++l) {
        A& own = reinterpret_cast<A*>(tile)[label(first + l) * L + l];
        walk.label_partials[m][l] = own;
        own = 0;
      }
    }
    for (int l = 0; l < L; ++l) {
      const int64_t y = label(first + l);
      walk.leaves.labels[l] = static_cast<Int<A>>(y);
      walk.label_base[l] = bias == nullptr ? A{} : bias[y];
      reinterpret_cast<A*>(walk.base.data())[y * L + l] = in_place_of_label<A>(utility, is_backward);
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

  // What a block costs, as bytes read from memory in the same time.
  int64_t block_bytes() const {
    const int64_t per_class = utility == kProbability || utility == kLogProbability ? 64 : 8;
    return L * M * C * sizeof(T) + (per_class * C << M);
  }

  void fwd(T* phi, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for(ceil_div(N, L), block_bytes(), num_threads, [&](int64_t begin, int64_t end) {
        Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, false);
        Sums<A> sums;
        V nonfinite = {};
        const int64_t last = std::min(end * L, N);
        for (int64_t first = begin * L; first < last; first += L) {
          if (first % 1024 == 0 && is_interrupted(1024 / L * C * M)) return;
          load_block(first, false, walk);
          walk.fwd(sums);
          store_lanes(sums.halves, M, rows(first), phi + first * M);
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
          store_lanes(sums.halves, M, rows(first), phi + first * M);
        }
      });
    });
  }

  void bwd(const T* dphi, T* dpartial_logits, A* dbias, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for(
          ceil_div(N, kChunk), 3 * kChunk / L * block_bytes(), num_threads, [&](int64_t begin, int64_t end) {
            Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, true);
            for (int64_t chunk = begin; chunk < end && !is_interrupted(kChunk / L * C * M); ++chunk) {
              std::fill(walk.dbase.begin(), walk.dbase.end(), V{});
              const int64_t last = std::min(N, (chunk + 1) * kChunk);
              for (int64_t first = chunk * kChunk; first < last; first += L)
                bwd_block(first, dphi, dpartial_logits, walk);
              for (int64_t c = 0; dbias != nullptr && c < C; ++c)
                dbias[chunk * C + c] = sum_lanes(walk.dbase[c]);
            }
          });
    });
  }

  template <int K>
  void bwd_block(int64_t first, const T* dphi, T* dpartial_logits, Walk<A, K>& walk) const {
    load_block(first, true, walk);
    walk.dphi_sum = V{};
    V largest_sum = {};
    for (int m = 0; m < M; ++m) {
      // Lanes without a sample add nothing to the bias's gradient.
      for (int l = 0; l < L; ++l) walk.dphi[m][l] = first + l < N ? widen(dphi[(first + l) * M + m]) : A{};
      walk.dphi_sum += walk.dphi[m];
      largest_sum += walk.dphi[m] < 0 ? -walk.dphi[m] : walk.dphi[m];
      walk.dlabel_partials[m] = V{};
    }
    walk.has_unbounded_dphi = largest_sum - largest_sum != 0;
    walk.any_unbounded_dphi = any(walk.has_unbounded_dphi);
    std::fill(walk.dpartials.begin(), walk.dpartials.end(), V{});
    V dlabel_base = {};
    walk.bwd(0, walk.base.data(), walk.label_base, 0, 0, V{}, walk.dbase.data(), dlabel_base);
    for (int l = 0; l < L; ++l) {
      const int64_t own = label(first + l) * L + l;
      for (int64_t m = 0; m < M; ++m)
        reinterpret_cast<A*>(walk.dpartials.data() + m * C)[own] += walk.dlabel_partials[m][l];
      reinterpret_cast<A*>(walk.dbase.data())[own] += dlabel_base[l];
    }
    for (int64_t m = 0; m < M; ++m)
      store_lanes(walk.dpartials.data() + m * C, C, rows(first), dpartial_logits + (m * N + first) * C);
  }

  static A sum_lanes(V x) {
    A sums[L];
    std::memcpy(sums, &x, sizeof x);
    for (int half = L / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0];
  }
};

// The rows of a [N, S, C] table, each a coalition of its own.
template <class T>
struct Table {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const T* logits;        // [N, S, C]
  const int64_t* labels;  // [N]
  int64_t N, S, C, stride_n, stride_s, stride_c;
  Utility utility;

  // Calls function(first row, number of rows, leaf, logits, the label's logits) for blocks of L rows.
  template <class Function>
  void for_blocks(bool is_backward, int64_t num_threads, Function&& function) const {
    const T* last = logits + (N - 1) * stride_n + (S - 1) * stride_s + (C - 1) * stride_c + 1;
    const int64_t num_rows = N * S;
    parallel_for(ceil_div(num_rows, L), 2 * L * C * sizeof(A), num_threads, [&](int64_t begin, int64_t end) {
      std::vector<V> z(C);
      Leaves<A, 0> leaf{z.data(), nullptr, C, utility, {}, true};
      for (int64_t first = begin * L; first < std::min(end * L, num_rows); first += L) {
        const T* rows[L];
        for (int l = 0; l < L; ++l) {
          const int64_t row = std::min(first + l, num_rows - 1);
          rows[l] = logits + row / S * stride_n + row % S * stride_s;
          leaf.labels[l] = static_cast<Int<A>>(labels[row / S]);
        }
        load_lanes(rows, stride_c, C, last, L * stride_s, z.data());
        auto is_bounded = ~Vec<Int<A>>{};
        for (int64_t c = 0; c < C; ++c) is_bounded &= z[c] <= kLargestBounded<A>;
        leaf.is_bounded = !any(~is_bounded);
        V own;
        for (int l = 0; l < L; ++l) {
          A& entry = reinterpret_cast<A*>(z.data())[static_cast<int64_t>(leaf.labels[l]) * L + l];
          own[l] = entry;
          entry = in_place_of_label<A>(utility, is_backward);
        }
        function(first, static_cast<int>(std::min<int64_t>(L, num_rows - first)), leaf, z.data(), own);
      }
    });
  }

  void fwd(T* values, int64_t num_threads) const {
    for_blocks(false, num_threads, [&](int64_t first, int count, const auto& leaf, const V* z, V own) {
      V u;
      leaf.utilities(z, own, &u);
      for (int l = 0; l < count; ++l) {
        const int size = utility == kCardinality ? __builtin_popcountll((first + l) % S) : 1;
        values[first + l] = narrow<T>(u[l] * size);
      }
    });
  }

  void bwd(const T* dvalues, T* dlogits, int64_t num_threads) const {
    for_blocks(true, num_threads, [&](int64_t first, int count, const auto& leaf, V* z, V own) {
      std::vector<V> dz(2 * C);
      V du, dlabel_partials = {};
      for (int l = 0; l < L; ++l) du[l] = widen(dvalues[first + std::min(l, count - 1)]);
      leaf.gradients(z, own, &du, dz.data() + C, dz.data(), &dlabel_partials, nullptr, nullptr);
      for (int l = 0; l < L; ++l)
        reinterpret_cast<A*>(dz.data())[static_cast<int64_t>(leaf.labels[l]) * L + l] += dlabel_partials[l];
      store_lanes(dz.data(), C, count, dlogits + first * C);
    });
  }
};

template <class T>
Table<T> make_table(const Strided<3>& logits, const int64_t* labels, Utility utility) {
  const auto& [N, S, C] = logits.sizes;
  const auto& [stride_n, stride_s, stride_c] = logits.strides;
  return {static_cast<const T*>(logits.data), labels, N, S, C, stride_n, stride_s, stride_c, utility};
}

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

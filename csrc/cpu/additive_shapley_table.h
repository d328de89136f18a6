// Utilities of coalitions whose logits are given, and their gradients: kLanes coalitions at a time, one in
// each SIMD lane.
#pragma once

#include <vector>

#include "additive_shapley_utilities.h"
#include "integers.h"

namespace mmfast {
namespace {

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
        AnyRows<T> rows;
        for (int l = 0; l < L; ++l) {
          const int64_t row = std::min(first + l, num_rows - 1);
          rows.rows[l] = logits + row / S * stride_n + row % S * stride_s;
          leaf.labels[l] = static_cast<Int<A>>(labels[row / S]);
        }
        const auto loaded =
            load_lanes<T>(rows, stride_c, C, last, L * stride_s, z.data(),
                          LabelApart<A>{leaf.labels, V{} + in_place_of_label<A>(utility, is_backward)});
        leaf.is_bounded = !any(~loaded.is_bounded);
        function(first, static_cast<int>(std::min<int64_t>(L, num_rows - first)), leaf, z.data(), loaded.own);
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
      store_lanes(dz.data(), C, count, dlogits + first * C, [&](V x, int64_t c) {
        return x + (leaf.labels == static_cast<Int<A>>(c) ? dlabel_partials : V{});
      });
    });
  }
};

template <class T>
Table<T> make_table(const Strided<3>& logits, const int64_t* labels, Utility utility) {
  const auto& [N, S, C] = logits.sizes;
  const auto& [stride_n, stride_s, stride_c] = logits.strides;
  return {static_cast<const T*>(logits.data), labels, N, S, C, stride_n, stride_s, stride_c, utility};
}

}  // namespace
}  // namespace mmfast

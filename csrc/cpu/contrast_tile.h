// Up to two SIMD vectors of queries against a tile of keys: the products with both sides of what a loss makes
// of the scores, as in attention with values = keys.
//
// Queries lie across the lanes, so both products read the keys by broadcast, from one copy gathered and
// packed once per modality pair, and what is summed over keys needs no sum across lanes. bfloat16 goes
// through dot products of pairs where the CPU has them: the scores are summed in float32; the weights of the
// second product are rounded to bfloat16.
#pragma once

#include <vector>

#include "gemm_tile.h"

namespace mmfast {
namespace {

// Dimensions summed in one go; a second sum adds them up.
constexpr int64_t kSlice = 256;

template <class T>
struct Matrix {
  const T* data;
  int64_t stride_row, stride_dim;

  const T* row(int64_t i) const { return data + i * stride_row; }
};

// Modality `teacher` teaching modality `student` in the dimensions that are effective for the student alone.
template <class A>
struct ModalityPair {
  int64_t teacher, student;
  std::vector<int64_t> dims;
  int64_t padded_dims;
  A* panels;  // [ceil(K / kPanel), padded_dims, kPanel]

  int64_t num_dims() const { return static_cast<int64_t>(dims.size()); }
};

// Two bfloat16 in the place of one float, the first in the lower half.
inline float pair_up(bfloat16 first, bfloat16 second) {
  return float_of(uint32_t{second.bits} << 16 | first.bits);
}
// The same for vectors of float, rounded to nearest; a NaN may come out as any number.
inline Vec<float> pair_up(Vec<float> first, Vec<float> second) {
  const auto low = (reinterpret_cast<Vec<uint32_t>>(first) + 0x8000) >> 16;
  const auto high = (reinterpret_cast<Vec<uint32_t>>(second) + 0x8000) & 0xffff0000;
  return reinterpret_cast<Vec<float>>(low | high);
}

// Up to nv vectors of queries on their way through the keys of one modality pair. With `pairs`, queries hold
// two dimensions and weights two keys in each float, as bfloat16. A loss adds its rows of state.
template <class A, int nv, bool pairs, int num_states>
struct QueryTile {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, W = nv * L, kPack = pairs ? 2 : 1;
  A* query;    // [d / kPack, W]
  A* product;  // [d, W], the sum of weights times keys so far
  A* states;   // [num_states, W]

  static constexpr int64_t size(int64_t padded_dims) { return (2 * padded_dims + num_states) * W; }
  QueryTile(A* memory, int64_t padded_dims)
      : query(memory), product(memory + padded_dims * W), states(memory + 2 * padded_dims * W) {}

  // Gathers the effective dimensions of `count` queries; the lanes of no query hold zeros.
  template <class T>
  void load_queries(const Matrix<T>& queries, const std::vector<int64_t>& dims, int64_t first,
                    int64_t count) {
    for (int i = 0; i < W; ++i) {
      const T* row = queries.row(first + i);
      for (size_t c = 0; c < dims.size(); c += kPack) {
        A& target = query[c / kPack * W + i];
        if (i >= count) {
          target = 0;
        } else if constexpr (pairs) {
          const bool is_last = c + 1 == dims.size();
          target = pair_up(row[dims[c] * queries.stride_dim],
                           is_last ? T{0} : row[dims[c + 1] * queries.stride_dim]);
        } else {
          target = widen(row[dims[c] * queries.stride_dim]);
        }
      }
    }
  }

  // p[j, i] = s_ij = scale * query_i . key_j
  void compute_scores(const ModalityPair<A>& pair, const A* panels, int64_t num_keys, A scale, A* p) const {
    const int64_t num_dims = pair.num_dims();
    for (int64_t first = 0; first < num_dims; first += kSlice) {
      const bool is_last = first + kSlice >= num_dims;
      const int64_t steps = ceil_div(std::min(kSlice, num_dims - first), kPack);
      // Not inlined: there GCC copies registers about in the inner loop of bfloat16, at half the rate.
      for_panels(num_keys, [&](int64_t row, auto rows) __attribute__((noinline)) {
        constexpr int num_rows = decltype(rows)::value;
        V sums[num_rows][nv] = {};
        const A* a = panels + row * pair.padded_dims + first / kPack * kPanel;
        multiply_tile<1, kPanel, pairs>(sums, a, query + first / kPack * W, steps);
#pragma GCC unroll 12
        for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < nv; ++v) {
            A* target = p + (row + r) * W + v * L;
            const V total = first == 0 ? sums[r][v] : load(target) + sums[r][v];
            store(target, is_last ? total * scale : total);
          }
        }
      });
    }
  }

  // product = decay * product + sum_j p_ij key_j
  void accumulate_residual(const ModalityPair<A>& pair, const A* panels, int64_t num_keys, const A* p,
                           bool is_first, const V (&decay)[nv]) const {
    for_panels(pair.num_dims(), [&](int64_t dim, auto rows) {
      constexpr int num_rows = decltype(rows)::value;
      V sums[num_rows][nv] = {};
      constexpr int kSteps = kPanel / kPack;
      const A* a = panels + (pairs ? pair.padded_dims * kSteps : 0) + dim * kSteps;
      int64_t j = 0;
      for (; j + kPanel <= num_keys; j += kPanel)
        multiply_tile<kSteps, 1, pairs>(sums, a + j * pair.padded_dims, p + j / kPack * W, kSteps);
      multiply_tile<kSteps, 1, pairs>(sums, a + j * pair.padded_dims, p + j / kPack * W,
                                      ceil_div(num_keys - j, kPack));
#pragma GCC unroll 12
      for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < nv; ++v) {
          A* target = product + (dim + r) * W + v * L;
          store(target, is_first ? sums[r][v] : load(target) * decay[v] + sums[r][v]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace mmfast

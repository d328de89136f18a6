// Shapley values of M players from the utilities of S = 2^M coalitions, and the transposed map.
//
//   phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s      a, b: csrc/shapley_weights.h
//
// The M half-sums come out of folding the weighted table bit by bit: 2 S additions a row instead of M S.
// Short rows go one into each SIMD lane (shapley_values_small.h); longer ones are folded by whole vectors, in
// chunks of fixed size (shapley_values_large.h), so the result does not depend on the number of threads and
// errors grow little with M.
//
// Floor: S + M elements a row over the bandwidth of memory. Measured: bench/results/shapley_values.md.
#include "codes.h"
#include "integers.h"
#include "shapley_values_large.h"
#include "shapley_values_small.h"

namespace mmfast {
namespace {

// Rows whose values are checked at once, while they are in the cache.
constexpr int64_t kRowsAtOnce = 256;

// Calls function(begin, end) for rows [begin, end), some at a time, and recomputes those it leaves infinite
// or NaN.
template <class T, class Function>
void for_checked_rows(const T* v, T* phi, int64_t begin, int64_t end, int num_players, int64_t stride_row,
                      int64_t stride, Function&& function) {
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const int64_t last = std::min(end, first + kRowsAtOnce);
    function(first, last);
    T* values = phi + first * num_players;
    constexpr auto most = std::numeric_limits<accumulate_t<T>>::max();
    if (!has_unbounded(values, (last - first) * num_players, most)) continue;
    for (int64_t row = first; row < last; ++row)
      recompute_values(v + row * stride_row, stride, num_players, phi + row * num_players);
  }
}

// Recomputes, of chunks [begin, end) of all rows' chunks in a line, those whose sums may be infinite or
// overflow.
template <class T>
void recompute_chunks(const T* dphi, T* dv, int64_t begin, int64_t end, const LargeRow<T>& large,
                      int64_t stride_row, int64_t stride_player) {
  constexpr auto most = std::numeric_limits<accumulate_t<T>>::max() / (2 * kMaxPlayers);
  const int M = large.num_players;
  if (begin == end) return;
  const int64_t first_row = begin / large.num_chunks, last_row = (end - 1) / large.num_chunks;
  if (stride_row == M && stride_player == 1 &&
      !has_unbounded(dphi + first_row * M, (last_row - first_row + 1) * M, most))
    return;
  for (int64_t row = first_row; row <= last_row; ++row) {
    T row_dphi[kMaxPlayers];
    gather(dphi + row * stride_row, stride_player, M, row_dphi);
    if (!has_unbounded(row_dphi, M, most)) continue;
    for (int64_t item = std::max(begin, row * large.num_chunks);
         item < std::min(end, (row + 1) * large.num_chunks); ++item)
      recompute_gradients(row_dphi, M, item % large.num_chunks << large.bits, int64_t{1} << large.bits,
                          dv + (item << large.bits));
  }
}

// Calls function(SmallRows of M players) where that is the faster way, else returns false.
template <class T, int largest, class Function>
bool with_small(int num_players, Function&& function) {
  switch (num_players) {
    case 1:
      return function(SmallRows<T, 1>()), true;
    case 2:
      return function(SmallRows<T, 2>()), true;
    case 3:
      return function(SmallRows<T, 3>()), true;
    case 4:
      return function(SmallRows<T, 4>()), true;
    case 5:
      if constexpr (largest == 5) return function(SmallRows<T, 5>()), true;
  }
  return false;
}

// Rows of several chunks, one after the other, the threads sharing a row's chunks.
template <class T>
void fwd_chunked(const LargeRow<T>& large, const T* v, T* phi, int64_t num_rows, int64_t stride_row,
                 int64_t stride_coalition, int64_t num_threads) {
  std::vector<Partial<accumulate_t<T>>> chunks(large.num_chunks);
  for (int64_t row = 0; row < num_rows; ++row) {
    parallel_for(large.num_chunks, sizeof(T) << large.bits, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        large.fold(v + row * stride_row, stride_coalition, chunk, chunks[chunk]);
      }
    });
    for_checked_rows(v, phi, row, row + 1, large.num_players, stride_row, stride_coalition,
                     [&](int64_t, int64_t) {
                       large.store_values(large.sum_chunks(chunks.data()), phi + row * large.num_players,
                                          large.num_players);
                     });
  }
}

template <class T>
void fwd(const T* v, T* phi, int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_coalition,
         int64_t num_threads) {
  const int64_t row_bytes = sizeof(T) << num_players, L = kLanes<accumulate_t<T>>;
  const bool is_done = with_small<T, 5>(num_players, [&](const auto& small) {
    using Small = std::decay_t<decltype(small)>;
    parallel_for(ceil_div(num_rows, L), L * row_bytes, num_threads, [&](int64_t begin, int64_t end) {
      typename Small::V nonfinite = {};
      Small::template for_blocks<Small::S, Small::M>(v, phi, begin * L, std::min(end * L, num_rows),
                                                     stride_row, stride_coalition, [&](const T* from, T* to) {
                                                       const auto next = small.fwd(from, to);
                                                       if constexpr (Small::M > 1) nonfinite += next;
                                                     });
      if (!any(nonfinite != 0)) return;
      for (int64_t row = begin * L; row < std::min(end * L, num_rows); ++row)
        recompute_values(v + row * stride_row, stride_coalition, num_players, phi + row * num_players);
    });
  });
  if (is_done) return;
  const LargeRow<T> large(num_players);
  if (large.num_chunks > 1)
    return fwd_chunked(large, v, phi, num_rows, stride_row, stride_coalition, num_threads);
  parallel_for(num_rows, sizeof(T) << num_players, num_threads, [&](int64_t begin, int64_t end) {
    for_checked_rows(v, phi, begin, end, num_players, stride_row, stride_coalition,
                     [&](int64_t first, int64_t last) {
                       large.fwd_rows(v, phi, first, last, stride_row, stride_coalition);
                     });
  });
}

template <class T>
void bwd(const T* dphi, T* dv, int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_player,
         int64_t num_threads) {
  const int64_t row_bytes = sizeof(T) << num_players, L = kLanes<accumulate_t<T>>;
  const bool is_done = with_small<T, 4>(num_players, [&](const auto& small) {
    using Small = std::decay_t<decltype(small)>;
    parallel_for(ceil_div(num_rows, L), L * row_bytes, num_threads, [&](int64_t begin, int64_t end) {
      Small::template for_blocks<Small::M, Small::S>(dphi, dv, begin * L, std::min(end * L, num_rows),
                                                     stride_row, stride_player,
                                                     [&](const T* from, T* to) { small.bwd(from, to); });
    });
  });
  if (is_done) return;
  const LargeRow<T> large(num_players);
  parallel_for(num_rows * large.num_chunks, sizeof(T) << large.bits, num_threads,
               [&](int64_t begin, int64_t end) {
                 large.bwd_chunks(dphi, dv, begin, end, stride_row, stride_player);
                 recompute_chunks(dphi, dv, begin, end, large, stride_row, stride_player);
               });
}

void shapley_values_fwd(const Strided<2>& utilities,  // [rows, S]
                        void* phi,                    // [rows, M] contiguous
                        Dtype dtype, int64_t num_threads) {
  const int num_players = players_of("shapley_values_fwd", utilities.sizes[1]);
  dispatch_dtype("shapley_values_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fwd(static_cast<const T*>(utilities.data), static_cast<T*>(phi), utilities.sizes[0], num_players,
        utilities.strides[0], utilities.strides[1], num_threads);
  });
}

void shapley_values_bwd(const Strided<2>& dphi,  // [rows, M]
                        void* dutilities,        // [rows, S] contiguous
                        Dtype dtype, int64_t num_threads) {
  const int num_players = checked_players("shapley_values_bwd", dphi.sizes[1]);
  dispatch_dtype("shapley_values_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bwd(static_cast<const T*>(dphi.data), static_cast<T*>(dutilities), dphi.sizes[0], num_players,
        dphi.strides[0], dphi.strides[1], num_threads);
  });
}

MMFAST_REGISTER(shapley_values_fwd)
MMFAST_REGISTER(shapley_values_bwd)

}  // namespace
}  // namespace mmfast

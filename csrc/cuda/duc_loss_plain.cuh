// The sweep of duc_loss in float32 and float64, off matrix units: 256 threads, of which each holds a piece
// of the scores and of the residual in registers. All operands stream through shared memory in steps of 16
// dimensions for the scores and 16 keys for the residual, copied two steps ahead. Included by duc_loss.cu
// only.
#pragma once

#include "duc_loss.cuh"

namespace mmfast::duc {
namespace {

// Rows, keys and residual columns of a thread; threads lie 16 x 16 over a block's tile.
template <class T_, int rows_, int keys_, int columns_>
struct PlainTile {
  using T = T_;
  static constexpr int thread_rows = rows_, thread_keys = keys_, thread_columns = columns_;
  static constexpr int rows = 16 * rows_, keys = 16 * keys_, columns = 16 * columns_;
  static constexpr int vector = 16 / sizeof(T), step = 16, stages = 3;
  static constexpr int score_stage = step * (rows + keys), weigh_stage = step * columns;
  static constexpr int stage = score_stage > weigh_stage ? score_stage : weigh_stage;
  // Weights by key; the padding spreads what neighbouring threads store over the banks.
  static constexpr int weight_stride = rows + vector;
  static constexpr int shared_bytes = (stages * stage + keys * weight_stride) * static_cast<int>(sizeof(T));
};

// Thread t's i-th row, key or column: whole vectors, 16 threads' side by side.
template <int vector>
__device__ __forceinline__ int spread(int t, int i) {
  return (i / vector * 16 + t) * vector + i % vector;
}

// Where the weights of a key are: 16 threads' first keys side by side, then their second ones.
template <int vector>
__device__ __forceinline__ int place_of(int key) {
  return (key / (16 * vector) * vector + key % vector) * 16 + key / vector % 16;
}

template <int n, class T>
__device__ __forceinline__ void load_spread(T (&x)[n], const T* source, int t) {
  constexpr int vector = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < n; i += vector) {
    const auto pack = load_pack<vector>(source + spread<vector>(t, i));
#pragma unroll
    for (int j = 0; j < vector; ++j) x[i + j] = pack.values[j];
  }
}

// d += a b^T, outer product.
template <int rows, int columns, class T>
__device__ __forceinline__ void add_outer(T (&d)[rows][columns], const T (&a)[rows], const T (&b)[columns]) {
#pragma unroll
  for (int i = 0; i < rows; ++i) {
#pragma unroll
    for (int j = 0; j < columns; ++j) d[i][j] = multiply_add(a[i], b[j], d[i][j]);
  }
}

// Grid: blocks of queries, blocks of the residual's columns, pairs.
template <class Tile>
__global__ void __launch_bounds__(256) duc_plain_kernel(Sweep sweep, KeyRows<typename Tile::T> rows_of_keys) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::thread_rows, kKeys = Tile::thread_keys, kColumns = Tile::thread_columns;
  constexpr int vector = Tile::vector, step = Tile::step, unroll = 32 / sizeof(T);
  const Share share(sweep, Tile::keys);
  const int pair = share.pair, count = sweep.count(pair), first_column = blockIdx.y * Tile::columns;
  if (first_column >= count) return;
  MMFAST_DYNAMIC_SHARED(shared);
  T* const stages = reinterpret_cast<T*>(shared);
  T* const weights = stages + Tile::stages * Tile::stage;

  const int thread_row = threadIdx.x / 16, thread_column = threadIdx.x % 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tile::rows, width = sweep.width;
  const T* const queries =
      static_cast<const T*>(sweep.queries) + pair * sweep.query_stride + first_row * width;
  const T* const keys = static_cast<const T*>(sweep.keys) + pair * sweep.key_stride;
  const T* const values = rows_of_keys.data + pair * rows_of_keys.stride_pair + first_column;
  const int64_t stride_value = rows_of_keys.stride_row;
  const bool has_residual = sweep.residual != nullptr;
  const int score_steps = ceil_div(count, step);
  const int steps = score_steps + (has_residual ? Tile::keys / step : 0);
  const int valid_columns =
      static_cast<int>(min(static_cast<int64_t>(Tile::columns), rows_of_keys.num_columns - first_column));

  // What is copied next: a step of a tile, into a stage.
  int64_t next_tile = share.first_tile;
  int next_step = 0, next_stage = 0, stage = 0;
  const auto copy_next = [&] {
    if (next_tile < share.end_tile) {
      const uint32_t target = shared_address(stages + next_stage * Tile::stage);
      if (next_step < score_steps) {
        const T* const q = queries + static_cast<int64_t>(next_step) * step * Tile::rows;
        const T* const k = keys + (next_tile * width + next_step * step) * Tile::keys;
        constexpr int q_size = step * Tile::rows, size = Tile::score_stage;
        for (int i = threadIdx.x * vector; i < size; i += 256 * vector) {
          cp_async_16(target + i * sizeof(T), i < q_size ? q + i : k + (i - q_size));
        }
      } else {
        const int64_t key = next_tile * Tile::keys + (next_step - score_steps) * step;
        for (int i = threadIdx.x * vector; i < Tile::weigh_stage; i += 256 * vector) {
          const int r = i / Tile::columns, c = i % Tile::columns;
          // Beyond the columns there is nothing to read, and nothing computed from it is kept; weights of
          // keys beyond the last are 0, but 0 times what is there by chance may not be.
          if (c >= valid_columns) continue;
          if (key + r < sweep.num_keys) {
            cp_async_16(target + i * sizeof(T), values + (key + r) * stride_value + c);
          } else {
            store_pack(stages + next_stage * Tile::stage + i, Pack<T, vector>{});
          }
        }
      }
    }
    cp_async_commit();
    next_stage = next_stage + 1 == Tile::stages ? 0 : next_stage + 1;
    if (++next_step == steps) next_step = 0, ++next_tile;
  };
  // Waits for this step's stage, which all threads may then read, and refills the one they have left.
  const auto begin_step = [&] {
    cp_async_wait<Tile::stages - 2>();
    __syncthreads();
    copy_next();
    const T* const current = stages + stage * Tile::stage;
    stage = stage + 1 == Tile::stages ? 0 : stage + 1;
    return current;
  };
  for (int i = 0; i < Tile::stages - 1; ++i) copy_next();

  const T scale = static_cast<T>(sweep.scale);
  const int64_t first_own = sweep.offset + first_row;
  T acc[kRows][kColumns] = {}, row_max[kRows], row_sum[kRows] = {}, own_score[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) row_max[i] = kLowest<T>;
  for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
    T s[kRows][kKeys] = {};
    for (int part = 0; part < score_steps; ++part) {
      const T* const current = begin_step();
#pragma unroll unroll
      for (int d = 0; d < step; ++d) {
        T q[kRows], k[kKeys];
        load_spread(q, current + d * Tile::rows, thread_row);
        load_spread(k, current + step * Tile::rows + d * Tile::keys, thread_column);
        add_outer(s, q, k);
      }
    }
    const int64_t first_key = tile * Tile::keys;
    const bool has_own = first_key < first_own + Tile::rows && first_own < first_key + Tile::keys;
    if (has_own || first_key + Tile::keys > sweep.num_keys) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        const int64_t key = first_key + spread<vector>(thread_column, j);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          if (key == first_own + spread<vector>(thread_row, i)) own_score[i] = s[i][j];
          if (key >= sweep.num_keys) s[i][j] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      T top = row_max[i];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) top = Max()(top, s[i][j]);
      top = warp_reduce<16>(top, Max());
      const T base = T(0.5) * top, twice = 2 * scale;
      const T decay = power_of_two(multiply_add(row_max[i], T(0.5), -base) * twice);
      row_max[i] = top;
      row_sum[i] *= decay;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        // The difference before the scale: a large score's rounding stays out of the exponent.
        s[i][j] = power_of_two(multiply_add(s[i][j], T(0.5), -base) * twice);
        row_sum[i] += s[i][j];
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) acc[i][j] *= decay;
    }
    if (!has_residual) continue;
    // The last reads of the weights lie before the barriers of the steps in between.
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      T* const target = weights + (j * 16 + thread_column) * Tile::weight_stride;
#pragma unroll
      for (int i = 0; i < kRows; i += vector) {
        Pack<T, vector> pack;
#pragma unroll
        for (int v = 0; v < vector; ++v) pack.values[v] = s[i + v][j];
        store_pack(target + spread<vector>(thread_row, i), pack);
      }
    }
    for (int part = 0; part < Tile::keys / step; ++part) {
      const T* const current = begin_step();
#pragma unroll unroll
      for (int key = 0; key < step; ++key) {
        T p[kRows], v[kColumns];
        load_spread(p, weights + place_of<vector>(part * step + key) * Tile::weight_stride, thread_row);
        load_spread(v, current + key * Tile::columns, thread_column);
        add_outer(acc, p, v);
      }
    }
  }
  cp_async_wait<0>();

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    row_sum[i] = warp_reduce<16>(row_sum[i], Sum());
    own_score[i] = warp_reduce<16>(own_score[i], Sum());
    const int64_t row = first_row + spread<vector>(thread_row, i);
    if (row >= sweep.num_queries) continue;
    const int64_t place = share.index * sweep.num_queries + row;
    if (first_column == 0 && thread_column == 0)
      store_loss(sweep, share.index, row, row_sum[i], row_max[i], own_score[i]);
    if (!has_residual) continue;
    const T divisor = divisor_of(sweep, row_sum[i]);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int column = spread<vector>(thread_column, j);
      if (first_column + column >= count) continue;
      const T own = sweep.num_splits == 1 ? values[(sweep.offset + row) * stride_value + column] : T(0);
      static_cast<T*>(sweep.residual)[place * sweep.residual_width + first_column + column] =
          acc[i][j] / divisor - own;
    }
  }
}

}  // namespace
}  // namespace mmfast::duc

// The sweep over keys in float32 and float64, without tensor cores: 256 threads, of which each holds a
// piece of the scores and of the residual in registers. All operands stream through shared memory in steps of
// 16 dimensions for the scores and 16 keys for the residual, copied two steps ahead. Included by
// contrast_call.cuh only.
#pragma once

#include <algorithm>

#include "contrast_engines.cuh"
#include "contrast_pack.cuh"

namespace mmfast::duc {
namespace {

constexpr int kPlainBlock = 256;

// Rows, keys and residual columns of a thread; threads lie 16 x 16 over a block's tile.
template <class T_, int rows_, int keys_, int columns_>
struct PlainTile {
  using T = T_;
  static constexpr int thread_rows = rows_, thread_keys = keys_, thread_columns = columns_;
  static constexpr int rows = 16 * rows_, keys = 16 * keys_, columns = 16 * columns_;
  static constexpr int vector = 16 / sizeof(T), step = 16, stages = 3, unroll = 32 / sizeof(T);
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

// Copies a step of a tile into a stage: dimensions of queries and keys, then keys row by row.
template <class Tile>
struct PlainCopy {
  using T = typename Tile::T;
  static constexpr int vector = Tile::vector, step_size = Tile::step;
  const T *queries, *keys, *values;  // of the pair; from the block's first query and first column on
  int64_t width, stride_value, num_keys;
  int score_steps, valid_columns;
  T* stages;

  __device__ __forceinline__ void operator()(int64_t tile, int step, int stage) const {
    const uint32_t target = shared_address(stages + stage * Tile::stage);
    if (step < score_steps) {
      const T* const q = queries + static_cast<int64_t>(step) * step_size * Tile::rows;
      const T* const k = keys + (tile * width + step * step_size) * Tile::keys;
      constexpr int q_size = step_size * Tile::rows, size = Tile::score_stage;
      for (int i = threadIdx.x * vector; i < size; i += kPlainBlock * vector) {
        cp_async_16(target + i * sizeof(T), i < q_size ? q + i : k + (i - q_size));
      }
    } else {
      const int64_t key = tile * Tile::keys + (step - score_steps) * step_size;
      for (int i = threadIdx.x * vector; i < Tile::weigh_stage; i += kPlainBlock * vector) {
        const int r = i / Tile::columns, c = i % Tile::columns;
        // Beyond the columns there is nothing to read, and nothing computed from it is kept; weights of
        // keys beyond the last are 0, but 0 times what is there by chance may not be.
        if (c >= valid_columns) continue;
        if (key + r < num_keys) {
          cp_async_16(target + i * sizeof(T), values + (key + r) * stride_value + c);
        } else {
          store_pack(stages + stage * Tile::stage + i, Pack<T, vector>{});
        }
      }
    }
  }
};

// A thread's rows, as the online softmax goes on.
template <class T, int rows>
struct PlainRows {
  T max[rows], sum[rows] = {}, positive_score[rows] = {};

  __device__ __forceinline__ PlainRows() {
#pragma unroll
    for (int i = 0; i < rows; ++i) max[i] = kLowest<T>;
  }
};

// s += the product of the rows and keys of a stage over its dimensions.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void add_scores(T (&s)[Tile::thread_rows][Tile::thread_keys], const T* stage,
                                           int thread_row, int thread_column) {
#pragma unroll Tile::unroll
  for (int d = 0; d < Tile::step; ++d) {
    T q[Tile::thread_rows], k[Tile::thread_keys];
    load_spread(q, stage + d * Tile::rows, thread_row);
    load_spread(k, stage + Tile::step * Tile::rows + d * Tile::keys, thread_column);
    add_outer(s, q, k);
  }
}

// Keeps the positive keys' scores and puts -infinity in place of keys behind the last; the tiles with such
// keys alone pay for comparisons.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void mask_scores(T (&s)[Tile::thread_rows][Tile::thread_keys],
                                            PlainRows<T, Tile::thread_rows>& rows, int64_t first_key,
                                            int64_t first_positive, int64_t num_keys, int thread_row,
                                            int thread_column) {
  const bool has_positive =
      first_key < first_positive + Tile::rows && first_positive < first_key + Tile::keys;
  if (!has_positive && first_key + Tile::keys <= num_keys) return;
#pragma unroll
  for (int j = 0; j < Tile::thread_keys; ++j) {
    const int64_t key = first_key + spread<Tile::vector>(thread_column, j);
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; ++i) {
      if (key == first_positive + spread<Tile::vector>(thread_row, i)) rows.positive_score[i] = s[i][j];
      if (key >= num_keys) s[i][j] = -INFINITY;
    }
  }
}

// As online_softmax of duc_loss.cuh; what was summed so far is scaled here.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void plain_softmax(T (&s)[Tile::thread_rows][Tile::thread_keys],
                                              PlainRows<T, Tile::thread_rows>& rows,
                                              T (&acc)[Tile::thread_rows][Tile::thread_columns], T scale) {
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; ++i) {
    T top = rows.max[i];
#pragma unroll
    for (int j = 0; j < Tile::thread_keys; ++j) top = Max()(top, s[i][j]);
    top = warp_reduce<16>(top, Max());
    const T base = T(0.5) * top, twice = 2 * scale;
    const T decay = power_of_two(multiply_add(rows.max[i], T(0.5), -base) * twice);
    rows.max[i] = top;
    rows.sum[i] *= decay;
#pragma unroll
    for (int j = 0; j < Tile::thread_keys; ++j) {
      // The difference before the scale: a large score's rounding stays out of the exponent.
      s[i][j] = power_of_two(multiply_add(s[i][j], T(0.5), -base) * twice);
      rows.sum[i] += s[i][j];
    }
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; ++j) acc[i][j] *= decay;
  }
}

// What a loss makes of scores, here the online softmax: sigmoid_loss_rows.cuh has its own of the same names.
template <class T, int rows>
__device__ __forceinline__ PlainRows<T, rows> begin_plain_rows(const Sweep&) {
  return {};
}

template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void weigh_plain(T (&s)[Tile::thread_rows][Tile::thread_keys],
                                            PlainRows<T, Tile::thread_rows>& rows,
                                            T (&acc)[Tile::thread_rows][Tile::thread_columns],
                                            int64_t first_key, int64_t first_positive, const Sweep& sweep,
                                            int thread_row, int thread_column) {
  mask_scores<Tile>(s, rows, first_key, first_positive, sweep.num_keys, thread_row, thread_column);
  plain_softmax<Tile>(s, rows, acc, static_cast<T>(sweep.scale));
}

// Puts a thread's weights where all can read them, key by key.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void share_weights(T* weights, const T (&s)[Tile::thread_rows][Tile::thread_keys],
                                              int thread_row, int thread_column) {
  constexpr int vector = Tile::vector;
#pragma unroll
  for (int j = 0; j < Tile::thread_keys; ++j) {
    T* const target = weights + (j * 16 + thread_column) * Tile::weight_stride;
#pragma unroll
    for (int i = 0; i < Tile::thread_rows; i += vector) {
      Pack<T, vector> pack;
#pragma unroll
      for (int v = 0; v < vector; ++v) pack.values[v] = s[i + v][j];
      store_pack(target + spread<vector>(thread_row, i), pack);
    }
  }
}

// acc += weights times the keys of a stage, the tile's from `first_key` on.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void add_weighted(T (&acc)[Tile::thread_rows][Tile::thread_columns],
                                             const T* weights, const T* stage, int first_key, int thread_row,
                                             int thread_column) {
#pragma unroll Tile::unroll
  for (int key = 0; key < Tile::step; ++key) {
    T p[Tile::thread_rows], v[Tile::thread_columns];
    load_spread(p, weights + place_of<Tile::vector>(first_key + key) * Tile::weight_stride, thread_row);
    load_spread(v, stage + key * Tile::columns, thread_column);
    add_outer(acc, p, v);
  }
}

// Writes losses and residuals; `values` as PlainCopy has them.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void store_plain(const Sweep& sweep, const Share& share, const T* values,
                                            int64_t stride_value, int count, int first_column,
                                            PlainRows<T, Tile::thread_rows>& rows,
                                            const T (&acc)[Tile::thread_rows][Tile::thread_columns],
                                            int thread_row, int thread_column) {
  constexpr int vector = Tile::vector;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tile::rows;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; ++i) {
    rows.sum[i] = warp_reduce<16>(rows.sum[i], Sum());
    rows.positive_score[i] = warp_reduce<16>(rows.positive_score[i], Sum());
    const int64_t row = first_row + spread<vector>(thread_row, i);
    if (row >= sweep.num_queries) continue;
    const int64_t place = share.index * sweep.num_queries + row;
    if (first_column == 0 && thread_column == 0)
      store_loss(sweep, place, rows.sum[i], rows.max[i], rows.positive_score[i]);
    if (sweep.residual == nullptr) continue;
    const T divisor = divisor_of(sweep, rows.sum[i]);
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; ++j) {
      const int column = spread<vector>(thread_column, j);
      if (first_column + column >= count) continue;
      const T positive = sweep.num_splits == 1 ? values[(sweep.offset + row) * stride_value + column] : T(0);
      static_cast<T*>(sweep.residual)[place * sweep.residual_width + first_column + column] =
          acc[i][j] / divisor - positive;
    }
  }
}

// Grid: blocks of queries, blocks of the residual's columns, pairs.
template <class Tile, class S>
__global__ void __launch_bounds__(kPlainBlock) duc_plain_kernel(S sweep, KeyRows rows_of_keys) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::thread_rows, kKeys = Tile::thread_keys, kColumns = Tile::thread_columns;
  const Share share(sweep, Tile::keys);
  const int pair = share.pair, count = sweep.count(pair), first_column = blockIdx.y * Tile::columns;
  if (first_column >= count) return;
  MMFAST_DYNAMIC_SHARED(shared);
  T* const stages = reinterpret_cast<T*>(shared);
  T* const weights = stages + Tile::stages * Tile::stage;

  const int thread_row = threadIdx.x / 16, thread_column = threadIdx.x % 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tile::rows, width = sweep.width;
  const T* const values =
      static_cast<const T*>(rows_of_keys.data) + pair * rows_of_keys.stride_pair + first_column;
  const bool has_residual = sweep.residual != nullptr;
  const int score_steps = ceil_div(count, Tile::step);
  const int valid_columns =
      static_cast<int>(min(static_cast<int64_t>(Tile::columns), rows_of_keys.num_columns - first_column));
  const PlainCopy<Tile> copy{
      static_cast<const T*>(sweep.queries) + pair * sweep.query_stride + first_row * width,
      static_cast<const T*>(sweep.keys) + pair * sweep.key_stride,
      values,
      width,
      rows_of_keys.stride_row,
      sweep.num_keys,
      score_steps,
      valid_columns,
      stages};
  const int num_steps = score_steps + (has_residual ? Tile::keys / Tile::step : 0);
  StepPipeline<Tile::stages, PlainCopy<Tile>> pipeline(copy, share, num_steps);

  T acc[kRows][kColumns] = {};
  auto rows = begin_plain_rows<T, kRows>(sweep);
  for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
    T s[kRows][kKeys] = {};
    for (int part = 0; part < score_steps; ++part)
      add_scores<Tile>(s, stages + pipeline.begin_step() * Tile::stage, thread_row, thread_column);
    weigh_plain<Tile>(s, rows, acc, tile * Tile::keys, sweep.offset + first_row, sweep, thread_row,
                      thread_column);
    if (!has_residual) continue;
    // The last reads of the weights lie before the barriers of the steps in between.
    share_weights<Tile>(weights, s, thread_row, thread_column);
    for (int part = 0; part < Tile::keys / Tile::step; ++part)
      add_weighted<Tile>(acc, weights, stages + pipeline.begin_step() * Tile::stage, part * Tile::step,
                         thread_row, thread_column);
  }
  cp_async_wait<0>();
  store_plain<Tile>(sweep, share, values, rows_of_keys.stride_row, count, first_column, rows, acc, thread_row,
                    thread_column);
}

template <class Tile, class S>
void launch_plain(const CallOf<S>& call) {
  using T = typename Tile::T;
  const S& sweep = call.sweep;
  launch_pack(call, &duc_pack_plain_kernel<T>, kWarp, Tile::rows, Tile::keys, Tile::step,
              static_cast<T*>(call.queries), static_cast<T*>(call.keys), static_cast<T*>(call.keys_by_row),
              sweep.query_stride, sweep.key_stride, sweep.width, sweep.num_queries, sweep.num_keys);
  const auto kernel = &duc_plain_kernel<Tile, S>;
  allow_shared_memory(call.op, kernel, Tile::shared_bytes);
  const unsigned num_slices = sweep.residual == nullptr ? 1 : grid_blocks(sweep.width, Tile::columns);
  const dim3 grid(grid_blocks(sweep.num_queries, Tile::rows), num_slices, sweep.num_pairs * sweep.num_splits);
  MMFAST_LAUNCH((kernel), grid, kPlainBlock, Tile::shared_bytes, call.stream, sweep, call.rows_of_keys);
}

// Waves of blocks over the SMs, times what a block multiplies for a key: scores and its slice of columns.
template <class Tile, class S>
double duration(const CallOf<S>& call) {
  const Sweep& sweep = call.sweep;
  const int64_t blocks = int64_t{1} * sweep.num_pairs * sweep.num_splits *
                         grid_blocks(sweep.num_queries, Tile::rows) * grid_blocks(sweep.width, Tile::columns);
  return grid_blocks(blocks, call.num_sms) * Tile::rows * (sweep.width + Tile::columns);
}

template <class S>
void sweep_plain(const CallOf<S>& call, int) {
  if (call.dtype == Dtype::kFloat64) return launch_plain<PlainTile<double, 4, 2, 4>>(call);
  using Wide = PlainTile<float, 8, 4, 16>;
  using Large = PlainTile<float, 8, 4, 8>;
  using Small = PlainTile<float, 4, 4, 8>;
  // Small tiles read shared memory more often for what they multiply.
  const double wide = duration<Wide>(call), large = duration<Large>(call),
               small = 1.4 * duration<Small>(call);
  if constexpr (std::is_same_v<S, Sweep>) {
    // The rows of the sigmoid loss would not fit the registers beside so many columns.
    if (call.sweep.residual != nullptr && wide < std::min(large, small)) return launch_plain<Wide>(call);
  }
  if (large < small) return launch_plain<Large>(call);
  launch_plain<Small>(call);
}

}  // namespace
}  // namespace mmfast::duc

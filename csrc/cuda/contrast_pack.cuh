// What goes before and after the sweeps over keys: each pair's columns are listed and closed up, residuals go
// back to their places and are summed over teachers, losses are reduced. Included by contrast_call.cuh and
// contrast_plain.cuh only.
#pragma once

#include <algorithm>

#include "contrast_engines.cuh"

namespace mmfast::duc {
namespace {

constexpr int kBlock = 256, kFinishBlock = 1024;
// Modalities whose addresses fit in the arguments of one launch.
constexpr int kMaxViews = 8;
// Keys are packed up to a multiple of this, which all tiles divide.
constexpr int64_t kKeyMultiple = 384;

struct Views {
  View features[kMaxViews], keys[kMaxViews];
};

// A block lists the columns of one pair.
__global__ void __launch_bounds__(kBlock) duc_columns_kernel(Columns columns) {
  const int num_others = columns.num_modalities - 1, pair = blockIdx.x, teacher = pair / num_others;
  const int student = pair % num_others + (pair % num_others >= teacher);
  const int num_dims = columns.num_dims, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = static_cast<int64_t>(pair) * num_dims;
  const bool* teaches = columns.effective + static_cast<int64_t>(teacher) * num_dims;
  const bool* knows = columns.effective + static_cast<int64_t>(student) * num_dims;
  MMFAST_SHARED(int, taken_by_warp, [kBlock / kWarp]);
  int filled = 0;
  for (int start = 0; start < num_dims; start += kBlock) {
    const int d = start + threadIdx.x;
    const bool is_taken = d < num_dims && teaches[d] && !knows[d];
    const unsigned taken = __ballot_sync(kFullMask, is_taken);
    if (lane == 0) taken_by_warp[warp] = __popc(taken);
    __syncthreads();
    int position = filled + rank_in(taken);
    for (int w = 0; w < kBlock / kWarp; ++w) {
      if (w < warp) position += taken_by_warp[w];
      filled += taken_by_warp[w];
    }
    if (d < num_dims) columns.positions[first + d] = is_taken ? position : -1;
    if (is_taken) columns.columns[first + position] = d;
    __syncthreads();
  }
  if (threadIdx.x == 0) columns.counts[pair] = filled;
}

// A block's part of packing: rows of the keys that `modality` teaches one student with, or of the queries
// with which it learns from one teacher.
struct Part {
  View view;
  int pair;
  bool is_keys;

  __device__ Part(const Columns& columns, const Views& views, int first_modality) {
    const int num_others = max(1, columns.num_modalities - 1), kinds = 2 * num_others;
    const int index = blockIdx.y / kinds, kind = blockIdx.y % kinds, modality = first_modality + index;
    is_keys = kind < num_others;
    const int other = kind % num_others + (kind % num_others >= modality);
    pair = is_keys ? columns.pair(modality, other) : columns.pair(other, modality);
    view = is_keys ? views.keys[index] : views.features[index];
  }
};

// Half precision in panels; a block packs 64 rows, those past the end as zeros.
template <class T>
__global__ void __launch_bounds__(kBlock)
    duc_pack_panels_kernel(Columns columns, Views views, int first_modality,
                           const __grid_constant__ Tiling tiling,
                           T* __restrict__ queries,  // [P, query_stride]
                           T* __restrict__ keys,     // [P, key_stride]
                           int64_t query_stride, int64_t key_stride, int64_t num_queries, int64_t num_keys) {
  const Part part(columns, views, first_modality);
  const int count = columns.count(part.pair), num_panels = tiling.num_panels(count);
  if (count == 0) return;
  const int tile_rows = part.is_keys ? tiling.keys[tiling.bucket(count)] : kQueryRows;
  const int64_t num_rows = part.is_keys ? num_keys : num_queries;
  // Two tiles of queries are always read together.
  const int64_t multiple = part.is_keys ? tile_rows : 2 * kQueryRows;
  const int64_t end = round_up(num_rows, multiple);
  T* target = part.is_keys ? keys + part.pair * key_stride : queries + part.pair * query_stride;
  const T* source = static_cast<const T*>(part.view.data);
  const int chunks = num_panels * (kPanel / 8);
  for (int i = threadIdx.x; i < 64 * chunks; i += kBlock) {
    const int chunk = i % chunks;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 64 + i / chunks;
    if (row >= end) continue;
    Pack<T, 8> packed;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int position = 8 * chunk + j;
      packed.values[j] = T(0.0f);
      if (row < num_rows && position < count) {
        packed.values[j] =
            source[row * part.view.stride_row + columns.column(part.pair, position) * part.view.stride_dim];
      }
    }
    store_pack(target + packed_index(row, 8 * chunk, tile_rows, num_panels), packed);
  }
}

// Wide floats: for the scores transposed, tile after tile of `rows` rows, [W, rows] each; keys also by row,
// [K, W], unless keys_by_row is nullptr. A block takes 32 rows; those past the end of the last tile and the
// columns up to a multiple of `multiple` are zeros.
template <class T>
__global__ void __launch_bounds__(kBlock)
    duc_pack_plain_kernel(Columns columns, Views views, int first_modality, int query_rows, int key_rows,
                          int multiple, T* __restrict__ queries,  // [P, query_stride]
                          T* __restrict__ keys,                   // [P, key_stride]
                          T* __restrict__ keys_by_row,            // [P, key_stride]
                          int64_t query_stride, int64_t key_stride, int64_t width, int64_t num_queries,
                          int64_t num_keys) {
  constexpr int tile = kWarp;
  const Part part(columns, views, first_modality);
  const int count = columns.count(part.pair), lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tile_rows = part.is_keys ? key_rows : query_rows;
  const int64_t num_rows = part.is_keys ? num_keys : num_queries;
  const int64_t end = round_up(num_rows, tile_rows);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * tile;
  if (first_row >= end) return;
  T* target = part.is_keys ? keys + part.pair * key_stride : queries + part.pair * query_stride;
  T* const by_row = part.is_keys && keys_by_row != nullptr ? keys_by_row + part.pair * key_stride : nullptr;
  const T* source = static_cast<const T*>(part.view.data);
  const int filled = round_up(count, multiple);
  MMFAST_SHARED(T, turned, [tile][tile + 1]);
  for (int start = 0; start < filled; start += tile) {
    const int position = start + lane;
    const int64_t column = position < count ? columns.column(part.pair, position) : 0;
    for (int r = warp; r < tile; r += kBlock / kWarp) {
      const int64_t row = first_row + r;
      const bool is_inside = row < num_rows && position < count;
      const T x = is_inside ? source[row * part.view.stride_row + column * part.view.stride_dim] : T(0);
      turned[lane][r] = x;
      if (by_row != nullptr && position < filled) by_row[row * width + position] = x;
    }
    __syncthreads();
    for (int c = warp; c < tile && start + c < filled; c += kBlock / kWarp) {
      const int64_t row = first_row + lane, of_tile = row / tile_rows;
      target[(of_tile * width + start + c) * tile_rows + row % tile_rows] = turned[c][lane];
    }
    __syncthreads();
  }
}

// Launches kernel(columns, views, first_modality, more...) for all modalities; a block for so many rows.
template <class S, class Kernel, class... More>
void launch_pack(const CallOf<S>& call, Kernel* kernel, int rows, const More&... more) {
  const int num_modalities = call.columns.num_modalities, kinds = 2 * std::max(1, num_modalities - 1);
  const int64_t num_rows =
      std::max(round_up(call.sweep.num_queries, kQueryMultiple), round_up(call.sweep.num_keys, kKeyMultiple));
  for (int first = 0; first < num_modalities; first += kMaxViews) {
    const int number = std::min(kMaxViews, num_modalities - first);
    Views some{};
    for (int i = 0; i < number; ++i) {
      some.features[i] = call.views[2 * (first + i)];
      some.keys[i] = call.views[2 * (first + i) + 1];
    }
    const dim3 grid(grid_blocks(num_rows, rows), kinds * number);
    MMFAST_LAUNCH((kernel), grid, kBlock, 0, call.stream, call.columns, some, first, more...);
  }
}

// Puts the splits of the keys together; a warp takes a row of a pair.
template <class T>
__global__ void __launch_bounds__(kBlock)
    duc_merge_kernel(Sweep sweep, const __grid_constant__ Tiling tiling,
                     KeyRows rows_of_keys,                            // in wide floats
                     const accumulate_t<T>* __restrict__ statistics,  // [3, splits, rows]
                     const accumulate_t<T>* __restrict__ partial,     // [splits, rows, W]
                     accumulate_t<T>* __restrict__ losses) {          // [P, N]
  using A = accumulate_t<T>;
  const int64_t result = static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp;
  if (result >= sweep.num_results()) return;
  const int64_t place = sweep.first_result + result, row = place % sweep.num_queries;
  const int lane = threadIdx.x % kWarp, pair = static_cast<int>(place / sweep.num_queries);
  const int count = sweep.count(pair);
  if (count == 0) return;
  // Where some rows alone are split, those of duc_mma_wide_kernel are not.
  if (sweep.first_result > 0 && tiling.bucket(count) == tiling.wide) return;
  const int64_t split_stride = sweep.num_results(), plane = sweep.num_splits * split_stride;
  const bool is_split = lane < sweep.num_splits;
  const A* const mine = statistics + lane * split_stride + result;
  const A max = is_split ? mine[0] : -INFINITY;
  const A top = warp_reduce(max, Max()),
          positive_score = warp_reduce(is_split ? mine[2 * plane] : A(0), Sum());
  const A scale = static_cast<A>(sweep.scale);
  const A sum = is_split ? mine[plane] * power_of_two((A(0.5) * max - A(0.5) * top) * (2 * scale)) : A(0);
  const A total = warp_reduce(sum, Sum());
  if (lane == 0) losses[place] = loss_of(total, top, positive_score, scale);
  if (sweep.residual == nullptr) return;
  const A weight = sum / total;
  const int num_panels = tiling.num_panels(count), tile_keys = tiling.keys[tiling.bucket(count)];
  const T* const keys = static_cast<const T*>(sweep.keys) + pair * sweep.key_stride;
  for (int start = 0; start < count; start += kWarp) {
    const int column = start + lane;
    A residual = 0;
    for (int split = 0; split < sweep.num_splits; ++split) {
      const A factor = __shfl_sync(kFullMask, weight, split);
      if (column < count)
        residual += factor * partial[(split * split_stride + result) * sweep.width + column];
    }
    if (column >= count) continue;
    const int64_t positive_row = sweep.offset + row, target = place * sweep.residual_width + column;
    if constexpr (sizeof(T) == 2) {
      residual -= static_cast<A>(keys[packed_index(positive_row, column, tile_keys, num_panels)]);
    } else {
      residual -= static_cast<const T*>(rows_of_keys.data)[pair * rows_of_keys.stride_pair +
                                                           positive_row * rows_of_keys.stride_row + column];
    }
    if (sweep.is_rounded) {
      static_cast<T*>(sweep.residual)[target] = static_cast<T>(residual);
    } else {
      static_cast<A*>(sweep.residual)[target] = residual;
    }
  }
}

// The first block reduces the losses, each of the others puts the residuals of 32 rows back, a warp a row.
// Sums over teachers and samples have a fixed order.
template <class T>
__global__ void __launch_bounds__(kFinishBlock)
    duc_finish_kernel(Columns columns, const accumulate_t<T>* __restrict__ losses,  // [P, N]
                      const void* __restrict__ packed,                              // [P, N, W]
                      accumulate_t<T>* __restrict__ loss,                           // [] or [N]
                      residual_t<T>* __restrict__ residuals,                        // [M, N, D]
                      int num_pairs, int64_t num_queries, int64_t width, bool is_rounded,
                      Reduction reduction) {
  using A = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (blockIdx.x == 0) {
    double total = 0;
    for (int64_t n = threadIdx.x; n < num_queries; n += kFinishBlock) {
      A sum = 0;
      for (int pair = 0; pair < num_pairs; ++pair) {
        if (columns.count(pair) > 0) sum += losses[pair * num_queries + n];
      }
      if (reduction == Reduction::kNone) loss[n] = sum;
      total += sum;
    }
    if (reduction == Reduction::kNone) return;
    MMFAST_SHARED(double, totals, [kFinishBlock]);
    totals[threadIdx.x] = total;
    for (int half = kFinishBlock / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
      const bool is_mean = reduction == Reduction::kMean;
      *loss = static_cast<A>(is_mean ? totals[0] / static_cast<double>(num_queries) : totals[0]);
    }
    return;
  }
  const int64_t index = static_cast<int64_t>(blockIdx.x - 1) * (kFinishBlock / kWarp) + warp;
  if (index >= columns.num_modalities * num_queries) return;
  const int student = static_cast<int>(index / num_queries);
  const int64_t row = index - student * num_queries;
  const int num_teachers = columns.effective == nullptr ? 1 : columns.num_modalities - 1;
  for (int d = lane; d < columns.num_dims; d += kWarp) {
    A sum = 0;
    for (int other = 0; other < num_teachers; ++other) {
      const int pair = columns.pair(other + (other >= student), student);
      const int position = columns.position(pair, d);
      if (position < 0) continue;
      const int64_t place = (pair * num_queries + row) * width + position;
      sum += is_rounded ? static_cast<A>(static_cast<const T*>(packed)[place])
                        : static_cast<const A*>(packed)[place];
    }
    residuals[index * columns.num_dims + d] = static_cast<residual_t<T>>(sum);
  }
}

}  // namespace
}  // namespace mmfast::duc

// What the losses that sweep packed keys share on the host: how a call lies in memory and is shared out, what
// its sweep reads and writes. Included by duc_loss.cu and sigmoid_loss.cu only.
#pragma once

#include <algorithm>

#include "contrast_mma.cuh"
#include "contrast_pack.cuh"
#include "contrast_plain.cuh"
#include "duc_loss_operands.h"

namespace mmfast::duc {
namespace {

constexpr int64_t kMaxModalities = 256;
// Where a call has fewer blocks, of kQueryMultiple queries of a pair, than a large GPU has SMs (an H100 132),
// the keys are split: at most so often, and into so many at least. Fixed: the same bits on every GPU.
#ifdef MMFAST_EMULATED
// Few, so that small calls take every path.
constexpr int64_t kEnoughBlocks = 4, kEdgeTiles = 0, kMergeTiles = 0;
#else
constexpr int64_t kEnoughBlocks = 132;
// What a block's beginning and end, and a merge, take, in the time of 128 keys; see
// bench/results/duc_loss.md.
constexpr int64_t kEdgeTiles = 6, kMergeTiles = 4;
#endif
// Parts of 128 rows that are written and read again in that time.
constexpr double kPartsPerTile = 40;
constexpr int64_t kMaxSplits = 8, kMinSplitKeys = 256;
static_assert(kMaxSplits <= kWarp, "duc_merge_kernel takes a lane for each split");

constexpr int64_t kMaxPairs = kMaxModalities * (kMaxModalities - 1), kMaxGridZ = 65535;
static_assert(kMaxPairs <= kMaxGridZ && kEnoughBlocks <= kMaxGridZ, "pairs times splits are a grid's depth");

// How a call lies in memory and is shared out. It depends on nothing but the call, and so do all bits.
struct Layout {
  int64_t num_pairs;             // 0: there is nothing to sweep
  int64_t width;                 // columns that a pair's packed rows take
  int64_t query_rows, key_rows;  // of a pair, with those that fill up the last tile
  int64_t num_splits;            // of the keys
  // Of the last blocks of queries, which would begin a round of their own on a large GPU; 1: none. All before
  // them are swept whole.
  int64_t rest_splits, num_whole;
  bool packs_keys_twice;  // float32 and float64: for the scores transposed, and by row
  bool reads_keys;        // by row as they lie
  bool is_direct;         // the sweep writes the residuals to their places
  bool is_rounded;        // it leaves them in the operands' dtype, else in that of sums
  int64_t residual_size;  // bytes of an element of those
};

// Whether rows are in one piece each, and begin and end at multiples of 16 bytes.
bool has_aligned_rows(const View& view, int64_t num_dims, int64_t element_size) {
  const auto is_aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return view.stride_dim == 1 && is_aligned(reinterpret_cast<intptr_t>(view.data)) &&
         is_aligned(view.stride_row * element_size) && is_aligned(num_dims * element_size);
}

View view_of(const DucOperands& operands, int64_t index) {
  const int64_t* const view = operands.views + 3 * index;
  return {reinterpret_cast<const void*>(view[0]), view[1], view[2]};
}

// In how many parts of the keys so many blocks of queries are swept fastest, the only ones left: parts for
// two rounds at most, which take memory.
int64_t splits_of_rest(int64_t num_blocks, int64_t num_keys) {
  const auto duration = [&](int64_t splits) {
    const int64_t rounds = ceil_div(num_blocks * splits, kEnoughBlocks);
    const double merge = splits == 1 ? 0.0 : kMergeTiles + num_blocks * splits / kPartsPerTile;
    return rounds * (num_keys / 128.0 / splits + kEdgeTiles) + merge;
  };
  const int64_t most = std::min({kMaxSplits, num_keys / kMinSplitKeys, 2 * kEnoughBlocks / num_blocks});
  int64_t best = 1;
  for (int64_t splits = 2; splits <= most; ++splits) {
    if (duration(splits) < duration(best)) best = splits;
  }
  return best;
}

Layout layout_of(const DucOperands& operands, const int64_t* sizes, Dtype dtype, bool splits_rest) {
  const int64_t num_modalities = operands.num_modalities, num_samples = operands.num_samples;
  const bool takes_all = operands.effective == nullptr;
  const int64_t most_columns = sizes == nullptr
                                   ? operands.num_dims
                                   : *std::max_element(sizes, sizes + num_modalities * num_modalities);
  Layout layout{};
  if (num_samples == 0 || most_columns == 0) return layout;
  layout.num_pairs = takes_all ? 1 : num_modalities * (num_modalities - 1);
  if (layout.num_pairs == 0) return layout;
  if (num_modalities > kMaxModalities)
    throw std::invalid_argument("more than " + std::to_string(kMaxModalities) + " modalities");
  for (const Engine& engine : kEngines) {
    if (!(engine.dtypes & bit(dtype))) continue;
    const int64_t panels = engine.tiling.num_panels(static_cast<int>(most_columns));
    layout.width = std::max(layout.width, panels * kPanel);
  }
  layout.query_rows = round_up(num_samples, kQueryMultiple);
  layout.key_rows = round_up(operands.num_keys, kKeyMultiple);
  const int64_t num_blocks = layout.num_pairs * (layout.query_rows / kQueryMultiple);
  layout.num_splits = std::max<int64_t>(
      1, std::min({kMaxSplits, operands.num_keys / kMinSplitKeys, kEnoughBlocks / num_blocks}));
  layout.rest_splits = 1, layout.num_whole = num_blocks;
  const int64_t rest = num_blocks % kEnoughBlocks;
  if (splits_rest && num_blocks > kEnoughBlocks && rest > 0) {
    layout.rest_splits = splits_of_rest(rest, operands.num_keys);
    if (layout.rest_splits > 1) layout.num_whole -= rest;
  }
  layout.is_direct = takes_all && operands.num_dims % 2 == 0;
  dispatch_dtype("a contrastive loss", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr bool is_wide = sizeof(T) > 2;
    layout.reads_keys =
        is_wide && takes_all && has_aligned_rows(view_of(operands, 1), operands.num_dims, sizeof(T));
    layout.packs_keys_twice = is_wide && !layout.reads_keys;
    // Sums over several teachers are rounded once, residuals in float16 after their factors.
    layout.is_rounded = (takes_all || num_modalities == 2) && std::is_same_v<residual_t<T>, T>;
    layout.residual_size = layout.is_rounded ? sizeof(T) : sizeof(accumulate_t<T>);
  });
  return layout;
}

// The first row, of all pairs' one after the other, behind the blocks that are swept whole.
int64_t first_result_of(const Layout& layout, int64_t num_queries) {
  const int64_t blocks = layout.query_rows / kQueryMultiple;
  return layout.num_whole / blocks * num_queries + layout.num_whole % blocks * kQueryMultiple;
}

// What Python allocates for a call, a tensor each; all 0: there is nothing to sweep.
struct Plan {
  int64_t packed;           // elements of the operands' dtype
  int64_t residual;         // bytes; 0: none
  int64_t partial, losses;  // elements of the dtype of sums
  int64_t indices;          // int32
};

struct Workspace {
  void* packed;    // [P, N + K, W], or [P, N + 2 K, W] where keys are packed twice; N, K rounded up
  void* residual;  // [P, N, W]
  void* partial;   // [splits, rows, W (if residuals) + 3]; unused for 1 split
  void* losses;    // [P, N]
  void* indices;   // [P (2 D + 1)]
};

Plan plan_of(const DucOperands& operands,
             const int64_t* sizes,  // [M, M] on the host: columns of a pair; nullptr: not known
             bool has_residual, Dtype dtype, bool splits_rest) {
  const Layout layout = layout_of(operands, sizes, dtype, splits_rest);
  if (layout.num_pairs == 0) return {};
  const int64_t num_rows = layout.num_pairs * operands.num_samples;
  const int64_t packed_rows = layout.query_rows + layout.key_rows * (layout.packs_keys_twice ? 2 : 1);
  const int64_t residual = num_rows * layout.width, partial = (has_residual ? layout.width : 0) + 3;
  const int64_t split_rows =
      layout.num_splits > 1 ? layout.num_splits * num_rows
      : layout.rest_splits > 1
          ? layout.rest_splits * (num_rows - first_result_of(layout, operands.num_samples))
          : 0;
  return {
      layout.num_pairs * packed_rows * layout.width,
      has_residual && !layout.is_direct ? residual * layout.residual_size : 0,
      split_rows * partial,
      num_rows,
      layout.num_pairs * (2 * operands.num_dims + 1),
  };
}

// Whether a pair may fall into the bucket.
template <class S>
bool has_bucket(const CallOf<S>& call, const Tiling& tiling, int bucket) {
  const Columns& columns = call.columns;
  if (columns.effective != nullptr && call.sizes == nullptr) return bucket <= tiling.bucket(columns.num_dims);
  return num_pairs_of(call, tiling, bucket) > 0;
}

// Every bucket that may hold a pair gets a launch, in which the blocks of other pairs return at once.
template <class T, class S>
void sweep_panels(const CallOf<S>& call, const Tiling& tiling,
                  void (*launch)(const CallOf<S>& call, int bucket)) {
  const Sweep& sweep = call.sweep;
  launch_pack(call, &duc_pack_panels_kernel<T>, kQueryRows, tiling, static_cast<T*>(call.queries),
              static_cast<T*>(call.keys), sweep.query_stride, sweep.key_stride, sweep.num_queries,
              sweep.num_keys);
  for (int bucket = 0; bucket <= tiling.wide; ++bucket) {
    if (!has_bucket(call, tiling, bucket)) continue;
    if (bucket == tiling.wide) {
      launch_mma_wide<T>(call, tiling);
    } else {
      launch(call, bucket);
    }
  }
}

// Fills in what a sweep reads and writes; `list` is to hold the views.
template <class S>
void fill_call(CallOf<S>& call, const char* op, const DucOperands& operands, const int64_t* sizes,
               const Layout& layout, const Workspace& workspace, void* residuals, View* list, int64_t offset,
               Dtype dtype, Stream stream) {
  const int64_t num_modalities = operands.num_modalities, num_dims = operands.num_dims;
  for (int i = 0; i < 2 * num_modalities; ++i) list[i] = view_of(operands, i);
  int* const indices = static_cast<int*>(workspace.indices);
  int* const positions = indices + layout.num_pairs * num_dims;
  int* const counts = positions + layout.num_pairs * num_dims;
  call.columns = {static_cast<const bool*>(operands.effective),
                  indices,
                  positions,
                  counts,
                  static_cast<int>(num_modalities),
                  static_cast<int>(num_dims)};
  Sweep& sweep = call.sweep;
  sweep.residual = residuals == nullptr || layout.is_direct ? residuals : workspace.residual;
  sweep.losses = workspace.losses;
  sweep.counts = operands.effective == nullptr ? nullptr : counts;
  sweep.query_stride = layout.query_rows * layout.width, sweep.key_stride = layout.key_rows * layout.width;
  sweep.num_queries = operands.num_samples, sweep.num_keys = operands.num_keys;
  sweep.width = layout.width, sweep.offset = offset;
  sweep.residual_width = layout.is_direct ? num_dims : layout.width;
  sweep.num_pairs = static_cast<int>(layout.num_pairs), sweep.num_columns = static_cast<int>(num_dims);
  sweep.num_splits = static_cast<int>(layout.num_splits);
  sweep.is_rounded = layout.is_rounded;
  call.op = op, call.views = list, call.sizes = sizes, call.stream = stream.handle, call.dtype = dtype;
  call.num_sms = device_attribute(op, cudaDevAttrMultiProcessorCount, stream.device);
}

// Puts operands and results in their places, those of a split sweep in parts; returns where the whole goes.
template <class T, class S>
S place_sweep(CallOf<S>& call, const Layout& layout, const Workspace& workspace) {
  using A = accumulate_t<T>;
  S& sweep = call.sweep;
  T* const queries = static_cast<T*>(workspace.packed);
  T* const keys = queries + sweep.num_pairs * sweep.query_stride;
  // Rows of keys that can be read as they lie are not packed once more.
  T* const keys_by_row = layout.reads_keys ? nullptr : keys + sweep.num_pairs * sweep.key_stride;
  call.queries = queries, call.keys = keys, call.keys_by_row = keys_by_row;
  call.rows_of_keys = {keys_by_row, sweep.key_stride, sweep.width, sweep.width};
  if (layout.reads_keys) {
    const View& view = call.views[1];
    call.rows_of_keys = {view.data, 0, view.stride_row, call.columns.num_dims};
  }
  sweep.queries = queries, sweep.keys = keys;
  const S whole = sweep;
  S& parts = call.parts;
  parts = whole, call.num_whole = layout.num_whole;
  if (layout.rest_splits > 1) {
    parts.num_splits = static_cast<int>(layout.rest_splits);
    parts.first_result = first_result_of(layout, whole.num_queries);
  }
  if (parts.num_splits > 1) {
    const bool has_residual = whole.residual != nullptr;
    A* const partial = static_cast<A*>(workspace.partial);
    parts.losses = partial + (has_residual ? parts.num_splits * parts.num_results() * parts.width : 0);
    parts.residual = has_residual ? partial : nullptr;
    parts.is_rounded = false;
    parts.residual_width = parts.width;
    if (sweep.num_splits > 1) sweep = parts, call.num_whole = 0;
  }
  return whole;
}

}  // namespace
}  // namespace mmfast::duc

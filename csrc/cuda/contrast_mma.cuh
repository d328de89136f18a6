// The sweep over keys in half precision on the tensor cores of sm_80 and later: 8 warps of 16 queries each,
// products by mma.sync, the scores' registers turned into weights and used as they lie. Up to 256 columns the
// queries stay in shared memory and whole key tiles go by; beyond, panels of both do, and the residual's
// columns are split over blocks. Included by contrast_call.cuh only.
//
// Machine code: duc_mma_kernel, 80 90 100 120: HMMA LDGSTS
// Machine code: duc_mma_wide_kernel, 80 90 100 120: HMMA LDGSTS
#pragma once

#include "contrast_engines.cuh"

namespace mmfast::duc {
namespace {

constexpr int kMmaBlock = 256, kMmaRows = 128;

// Where a lane's row for ldmatrix begins: 16-byte chunk `chunk` of row `row` of a panel.
__device__ __forceinline__ uint32_t chunk_address(uint32_t panel, int row, int chunk) {
  return panel + row * kPanelRowBytes + ((chunk ^ row % 8) << 4);
}

// Copies so many bytes, as they lie.
__device__ __forceinline__ void copy_bytes(uint32_t target, const void* source, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += kMmaBlock * 16)
    cp_async_16(target + i, static_cast<const unsigned char*>(source) + i);
}

// s += the product of 16 queries, from row `row` of a panel, with a panel of keys, over its 64 dimensions.
template <class T, int keys>
__device__ __forceinline__ void add_scores(float (&s)[keys / 2], uint32_t query_panel, int row,
                                           uint32_t key_panel) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kPanel / 16; ++k) {
    // The four matrices: rows 0-7 and 8-15 of the first eight dimensions, then of the last.
    uint32_t q[4];
    ldmatrix_x4(q, chunk_address(query_panel, row + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int n = 0; n < keys / 16; ++n) {
      // Of eight keys the first and the last eight dimensions, then of the next eight keys.
      uint32_t b[4];
      ldmatrix_x4(b, chunk_address(key_panel, 16 * n + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
      float* const d = s + 8 * n;
      mma_m16n8k16<T>(d[0], d[1], d[2], d[3], q, b[0], b[1]);
      mma_m16n8k16<T>(d[4], d[5], d[6], d[7], q, b[2], b[3]);
    }
  }
}

// acc[.., 32 panel + ..] += weights times a panel of keys.
template <class T, int keys>
__device__ __forceinline__ void add_weighted(float* acc, const uint32_t (&p)[keys / 16][4],
                                             uint32_t key_panel) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < keys / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kPanel / 16; ++n) {
      // Transposed: of eight columns the first and the last eight keys, then of the next eight columns.
      uint32_t b[4];
      ldmatrix_x4_trans(b, chunk_address(key_panel, 16 * k + lane % 16, 2 * n + lane / 16));
      float* const d = acc + 8 * n;
      mma_m16n8k16<T>(d[0], d[1], d[2], d[3], p[k], b[0], b[1]);
      mma_m16n8k16<T>(d[4], d[5], d[6], d[7], p[k], b[2], b[3]);
    }
  }
}

// What a loss makes of scores, here the online softmax: sigmoid_loss_rows.cuh has its own of the same names.
__device__ __forceinline__ SoftmaxRows begin_rows(const Sweep&) { return {}; }

template <class T, int keys>
__device__ __forceinline__ void weigh(float (&s)[keys / 2], SoftmaxRows& rows, float (&decay)[2],
                                      int64_t first_key, int64_t first_positive, const Sweep& sweep) {
  online_softmax<keys>(s, rows, decay, first_key, first_positive, sweep.num_keys,
                       static_cast<float>(sweep.scale));
}

template <int n>
__device__ __forceinline__ void decay_rows(const SoftmaxRows&, float (&acc)[n], const float (&decay)[2]) {
  scale_rows(acc, decay);
}

template <class T>
__device__ __forceinline__ void store_losses(const Sweep& sweep, int index, int64_t first_row,
                                             const SoftmaxRows& rows) {
  store_losses(sweep, index * sweep.num_queries, first_row, rows);
}

template <int panels, int keys, int stages_>
struct MmaTile {
  static constexpr int stages = stages_, query_bytes = kMmaRows * panels * kPanelRowBytes,
                       key_bytes = keys * panels * kPanelRowBytes,
                       shared_bytes = query_bytes + stages * key_bytes;
};

// Pairs of up to 64 << bucket columns. Grid: blocks of queries, 1, pairs.
template <class T, int bucket, int stages, class S>
__global__ void __launch_bounds__(kMmaBlock) duc_mma_kernel(S sweep, const __grid_constant__ Tiling tiling) {
  constexpr int num_panels = 1 << bucket, keys = kMmaTiling.keys[bucket];
  using Tile = MmaTile<num_panels, keys, stages>;
  const Share share(sweep, keys);
  const int count = sweep.count(share.pair);
  if (count == 0 || tiling.bucket(count) != bucket) return;
  MMFAST_DYNAMIC_SHARED(shared);
  const uint32_t queries = shared_address(shared), tiles = queries + Tile::query_bytes;
  const int warp = threadIdx.x / kWarp;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kMmaRows;
  const auto* const source = static_cast<const unsigned char*>(sweep.keys) +
                             share.pair * sweep.key_stride * static_cast<int>(sizeof(T));
  const auto copy_tile = [&](int64_t tile) {
    if (tile < share.end_tile)
      copy_bytes(tiles + static_cast<uint32_t>(tile % stages) * Tile::key_bytes,
                 source + tile * Tile::key_bytes, Tile::key_bytes);
    cp_async_commit();
  };
  copy_bytes(queries,
             static_cast<const T*>(sweep.queries) + share.pair * sweep.query_stride +
                 first_row * num_panels * kPanel,
             Tile::query_bytes);
  for (int i = 0; i < stages - 1; ++i) copy_tile(share.first_tile + i);

  const int64_t first_positive = sweep.offset + first_row + 16 * warp;
  const uint32_t warp_queries = queries + warp / 4 * (num_panels * kQueryRows * kPanelRowBytes);
  float acc[32 * num_panels] = {};
  auto rows = begin_rows(sweep);
  for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
    cp_async_wait<stages - 2>();
    __syncthreads();
    // Into the stage that all have left.
    copy_tile(tile + stages - 1);
    const uint32_t current = tiles + static_cast<uint32_t>(tile % stages) * Tile::key_bytes;
    float s[keys / 2] = {}, decay[2];
#pragma unroll
    for (int panel = 0; panel < num_panels; ++panel) {
      add_scores<T, keys>(s, warp_queries + panel * kQueryRows * kPanelRowBytes, warp % 4 * 16,
                          current + panel * keys * kPanelRowBytes);
    }
    weigh<T, keys>(s, rows, decay, tile * keys, first_positive, sweep);
    if (sweep.residual == nullptr) continue;
    decay_rows(rows, acc, decay);
    uint32_t p[keys / 16][4];
    round_weights<T, keys>(p, s);
#pragma unroll
    for (int panel = 0; panel < num_panels; ++panel)
      add_weighted<T, keys>(acc + 32 * panel, p, current + panel * keys * kPanelRowBytes);
  }
  cp_async_wait<0>();
  finish_rows(rows);
  store_losses<T>(sweep, share.index, first_row + 16 * warp, rows);
  if (sweep.residual == nullptr) return;
  store_residuals<T, 64 * num_panels, keys>(sweep, share, first_row + 16 * warp, rows, acc, 0, count,
                                            num_panels);
}

// Pairs of more columns: for each key tile all panels of queries and keys for the scores, then once more the
// panels of keys in whose columns this block sums the residual. Grid: blocks of queries, of columns, pairs.
constexpr int kWidePanels = 4, kWideStages = 3, kWideKeys = kMmaTiling.keys[3];
constexpr int kWideQueryBytes = kMmaRows * kPanelRowBytes, kWideKeyBytes = kWideKeys * kPanelRowBytes;
constexpr int kWideStage = kWideQueryBytes + kWideKeyBytes, kWideShared = kWideStages * kWideStage;

// Copies a step of a tile into a stage: a panel of queries and of keys, then panels of keys alone.
struct WideCopy {
  const unsigned char *queries, *keys;  // of the pair; queries from this block's first on
  uint32_t stages;
  int num_panels, first_panel;  // panels of the pair; the first in whose columns the block sums the residual

  __device__ __forceinline__ void operator()(int64_t tile, int step, int stage) const {
    const uint32_t target = stages + stage * kWideStage;
    const bool is_score = step < num_panels;
    const int panel = is_score ? step : first_panel + step - num_panels;
    copy_bytes(target + kWideQueryBytes, keys + (tile * num_panels + panel) * kWideKeyBytes, kWideKeyBytes);
    if (is_score) {
      // A block's queries are two tiles.
      constexpr int half = kWideQueryBytes / 2;
      const auto* const source = queries + static_cast<int64_t>(panel) * half;
      copy_bytes(target, source, half);
      copy_bytes(target + half, source + static_cast<int64_t>(num_panels) * half, half);
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(kMmaBlock)
    duc_mma_wide_kernel(S sweep, const __grid_constant__ Tiling tiling) {
  const Share share(sweep, kWideKeys);
  const int count = sweep.count(share.pair), first_panel = blockIdx.y * kWidePanels;
  const int num_panels = ceil_div(count, kPanel);
  if (tiling.bucket(count) != tiling.wide || first_panel >= num_panels) return;
  MMFAST_DYNAMIC_SHARED(shared);
  const uint32_t stages = shared_address(shared);
  const int warp = threadIdx.x / kWarp, block_panels = min(kWidePanels, num_panels - first_panel);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kMmaRows;
  constexpr int size = sizeof(T);
  const WideCopy copy{static_cast<const unsigned char*>(sweep.queries) +
                          (share.pair * sweep.query_stride + first_row * num_panels * kPanel) * size,
                      static_cast<const unsigned char*>(sweep.keys) + share.pair * sweep.key_stride * size,
                      stages, num_panels, first_panel};
  const int num_steps = num_panels + (sweep.residual == nullptr ? 0 : block_panels);
  StepPipeline<kWideStages, WideCopy> pipeline(copy, share, num_steps);

  const int64_t first_positive = sweep.offset + first_row + 16 * warp;
  float acc[32 * kWidePanels] = {};
  auto rows = begin_rows(sweep);
  for (int64_t tile = share.first_tile; tile < share.end_tile; ++tile) {
    float s[kWideKeys / 2] = {}, decay[2];
    for (int panel = 0; panel < num_panels; ++panel) {
      const uint32_t current = stages + pipeline.begin_step() * kWideStage;
      add_scores<T, kWideKeys>(s, current, 16 * warp, current + kWideQueryBytes);
    }
    weigh<T, kWideKeys>(s, rows, decay, tile * kWideKeys, first_positive, sweep);
    if (sweep.residual == nullptr) continue;
    decay_rows(rows, acc, decay);
    uint32_t p[kWideKeys / 16][4];
    round_weights<T, kWideKeys>(p, s);
#pragma unroll
    for (int panel = 0; panel < kWidePanels; ++panel) {
      if (panel < block_panels) {
        const uint32_t current = stages + pipeline.begin_step() * kWideStage;
        add_weighted<T, kWideKeys>(acc + 32 * panel, p, current + kWideQueryBytes);
      }
    }
  }
  cp_async_wait<0>();
  finish_rows(rows);
  if (first_panel == 0) store_losses<T>(sweep, share.index, first_row + 16 * warp, rows);
  if (sweep.residual == nullptr) return;
  store_residuals<T, 64 * kWidePanels, kWideKeys>(sweep, share, first_row + 16 * warp, rows, acc,
                                                  first_panel * kPanel, count, num_panels);
}

template <class T, int bucket, int stages, class S>
void launch_mma_bucket(const CallOf<S>& call) {
  const auto kernel = &duc_mma_kernel<T, bucket, stages, S>;
  constexpr int bytes = MmaTile<1 << bucket, kMmaTiling.keys[bucket], stages>::shared_bytes;
  allow_shared_memory(call.op, kernel, bytes);
  const S& sweep = call.sweep;
  const dim3 grid(grid_blocks(sweep.num_queries, kMmaRows), 1, sweep.num_pairs * sweep.num_splits);
  MMFAST_LAUNCH((kernel), grid, kMmaBlock, bytes, call.stream, sweep, kMmaTiling);
}

template <class T, class S>
void launch_mma_bucket(const CallOf<S>& call, int bucket) {
  if (bucket == 0) return launch_mma_bucket<T, 0, 3>(call);
  if (bucket == 1) return launch_mma_bucket<T, 1, 3>(call);
  launch_mma_bucket<T, 2, 2>(call);
}

// The pairs of the last bucket of any engine's tiling.
template <class T, class S>
void launch_mma_wide(const CallOf<S>& call, const Tiling& tiling) {
  const auto kernel = &duc_mma_wide_kernel<T, S>;
  allow_shared_memory(call.op, kernel, kWideShared);
  const S& sweep = call.sweep;
  const unsigned num_slices = sweep.residual == nullptr ? 1 : grid_blocks(sweep.width, kWidePanels * kPanel);
  const dim3 grid(grid_blocks(sweep.num_queries, kMmaRows), num_slices, sweep.num_pairs * sweep.num_splits);
  MMFAST_LAUNCH((kernel), grid, kMmaBlock, kWideShared, call.stream, sweep, tiling);
}

template <class S>
void sweep_mma(const CallOf<S>& call, int bucket) {
  if (call.dtype == Dtype::kFloat16) return launch_mma_bucket<__half>(call, bucket);
  launch_mma_bucket<__nv_bfloat16>(call, bucket);
}

}  // namespace
}  // namespace mmfast::duc

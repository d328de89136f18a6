// The sweep of duc_loss in half precision on Hopper, compiled for sm_90a alone: one thread has tiles copied
// in bulk, two warpgroups multiply them (wgmma) in turns, one's exponentials beside the other's products.
//
// Layout and descriptors. A panel, [rows][64 columns] of 16 bits with chunk c of 16 bytes of row r at place
// c ^ (r % 8), is what PTX calls the 128-byte swizzle, Swizzle<3, 4, 3>: bits 4-6 of an address are changed
// by bits 7-9, so panels begin at multiples of 1,024 bytes. In elements of 16 bits, T = 8 of them in 16
// bytes, PTX has two canonical layouts under it (PTX ISA, "asynchronous warpgroup level canonical layouts"),
// and a panel is both at once:
//
//   K-major, ((8, m), (T, 2)) : ((8T, SBO), (1, T)), for scores = q k^T; K are the dimensions. A row, of a
//   query or key, takes 8T = 128 bytes; eight rows on is SBO = 1,024 bytes. A product takes 16 of the 64
//   dimensions, 32 bytes; the next 16 begin 32 bytes on, as the swizzle works on addresses. No LBO.
//
//   MN-major, ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)), for p k; K are the keys, 8T = 128 bytes apart,
//   eight of them on is SBO = 1,024 bytes. 64 columns are side by side, the next 64 LBO = one panel of the
//   tile on. The next 16 keys begin 2,048 bytes on.
//
// A descriptor holds address, LBO and SBO in units of 16 bytes at bits 0, 16 and 32, a base offset of 0 at
// bit 49, and at bit 62 the number of the swizzle, 1.
//
// Machine code: duc_hopper_kernel, 90a: HGMMA UBLKCP
#include "duc_loss.cuh"
#include "hopper.cuh"

namespace mmfast::duc {
namespace {

constexpr int kGroup = 128, kConsumers = 2, kBlock = (1 + kConsumers) * kGroup, kPanelRow = 2 * kPanel;

// Up to 256 columns each of the consumers has 64 queries; at 512 both have the same 64 and half the columns.
template <int slot>
struct Hopper {
  static constexpr int panels = 1 << slot, keys = kHopperTiling.keys[slot];
  static constexpr bool is_split = panels > 4;
  static constexpr int own_panels = is_split ? panels / kConsumers : panels, columns = own_panels * kPanel;
  static constexpr int rows = is_split ? kQueryRows : kConsumers * kQueryRows;
  static constexpr int query_bytes = rows * panels * kPanelRow, panel_bytes = keys * kPanelRow,
                       tile_bytes = panels * panel_bytes;
  // What fits, up to four tiles, besides the barriers and the way to a multiple of 1,024.
  static constexpr int fitting = (225 * 1024 - query_bytes) / tile_bytes, stages = fitting < 4 ? fitting : 4;
  static constexpr int shared_bytes = 1024 + query_bytes + stages * tile_bytes;
  static_assert(stages >= 2, "one tile is used while the next is copied");
};

__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading_bytes) {
  constexpr uint64_t stride = 1024, swizzle_128 = 1;
  return (address >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 | (stride >> 4) << 32 |
         swizzle_128 << 62;
}

// The same so many bytes on; shared memory is too small for a carry out of the address.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

// Begins scores = q k^T over all panels of 64 queries and a key tile.
template <class T, class H>
__device__ __forceinline__ void begin_scores(float (&s)[H::keys / 2], uint32_t queries, uint32_t tile) {
  const uint64_t q = descriptor(recomputed(queries), 16), b = descriptor(tile, 16);
#pragma unroll
  for (int k = 0; k < H::panels * 4; ++k) {
    Wgmma<T, H::keys>::scores(s, advanced(q, k / 4 * (kQueryRows * kPanelRow) + k % 4 * 32),
                              advanced(b, k / 4 * H::panel_bytes + k % 4 * 32), k > 0);
  }
  wgmma_commit();
}

// Begins acc += p k over the keys of a tile, from the first of this consumer's panels on.
template <class T, class H>
__device__ __forceinline__ void begin_weighted(float (&acc)[H::columns / 2],
                                               const uint32_t (&p)[H::keys / 16][4], uint32_t tile) {
  const uint64_t b = descriptor(tile, H::panel_bytes);
#pragma unroll
  for (int k = 0; k < H::keys / 16; ++k)
    Wgmma<T, H::columns>::weighted(acc, p[k], advanced(b, k * 16 * kPanelRow));
  wgmma_commit();
}

// Grid: blocks of queries, 1, pairs.
template <class T, int slot, bool has_residual>
__global__ void __launch_bounds__(kBlock, 1)
    duc_hopper_kernel(Sweep sweep, const __grid_constant__ Tiling tiling) {
  using H = Hopper<slot>;
  constexpr int keys = H::keys, stages = H::stages;
  const Share share(sweep, keys);
  const int count = sweep.count(share.pair);
  if (count == 0 || tiling.slot(count) != slot) return;
  MMFAST_DYNAMIC_SHARED(shared);
  MMFAST_SHARED(uint64_t, barriers, [1 + 2 * stages]);
  const uint32_t queries = round_up(shared_address(shared), 1024), tiles = queries + H::query_bytes;
  const uint32_t query_ready = shared_address(barriers), full = query_ready + 8, empty = full + 8 * stages;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * H::rows;
  const int num_tiles = static_cast<int>(share.end_tile - share.first_tile);
  if (threadIdx.x == 0) {
    mbarrier_init(query_ready, 1);
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      // A warp at a time is done with a tile.
      mbarrier_init(empty + 8 * stage, kConsumers * kGroup / kWarp);
    }
    mbarrier_fence();
  }
  __syncthreads();

  // Registers are handed over at the head of the two branches, as setmaxnreg wants it.
  if (threadIdx.x < kGroup) {
    release_registers<24>();
    if (threadIdx.x != 0) return;
    const auto* const query_source = static_cast<const T*>(sweep.queries) + share.pair * sweep.query_stride +
                                     first_row * (H::panels * kPanel);
    const auto* const key_source = static_cast<const T*>(sweep.keys) + share.pair * sweep.key_stride +
                                   share.first_tile * (keys * H::panels * kPanel);
    mbarrier_expect(query_ready, H::query_bytes);
    bulk_copy(queries, query_source, H::query_bytes, query_ready);
    int stage = 0, parity = 1;
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      mbarrier_wait(empty + 8 * stage, parity);
      mbarrier_expect(full + 8 * stage, H::tile_bytes);
      bulk_copy(tiles + stage * H::tile_bytes,
                key_source + static_cast<int64_t>(tile) * (keys * H::panels * kPanel), H::tile_bytes,
                full + 8 * stage);
      if (++stage == stages) stage = 0, parity ^= 1;
    }
  } else {
    claim_registers<240>();
    const int consumer = threadIdx.x / kGroup - 1, warp = threadIdx.x % kGroup / kWarp;
    const float scale = static_cast<float>(sweep.scale);
    const int64_t first_warp_row = first_row + (H::is_split ? 0 : consumer * kQueryRows) + 16 * warp;
    const int64_t first_own = sweep.offset + first_warp_row;
    const uint32_t own_queries =
        queries + (H::is_split ? 0 : consumer * (kQueryRows * H::panels * kPanelRow));
    const uint32_t own_tiles = tiles + (H::is_split ? consumer * (H::own_panels * H::panel_bytes) : 0);
    TwoRows rows;
    float acc[H::columns / 2] = {}, s[keys / 2], decay[2];
    uint32_t p[keys / 16][4];
    const auto begin_turn = [&] { named_barrier_sync(1 + consumer, kConsumers * kGroup); };
    const auto end_turn = [&] { named_barrier_arrive(2 - consumer, kConsumers * kGroup); };
    const auto release = [&](int stage) {
      if (threadIdx.x % kWarp == 0) mbarrier_arrive(empty + 8 * stage);
    };
    const auto add_tile = [&](int tile) {
      const int64_t first_key = (share.first_tile + tile) * keys;
      online_softmax<keys>(s, rows, decay, first_key, first_own, sweep.num_keys, scale);
    };
    // The first consumer begins.
    if (consumer == 1) end_turn();

    // Scores of a tile are under way together with the residual of the tile before, whose weights are ready.
    mbarrier_wait(query_ready, 0);
    mbarrier_wait(full, 0);
    begin_turn();
    wgmma_fence();
    begin_scores<T, H>(s, own_queries, tiles);
    end_turn();
    wgmma_wait<0>();
    hold_registers(s);
    add_tile(0);
    round_weights<T, keys>(p, s);
    int last_stage = 0, stage = 1, parity = 0;
    for (int tile = 1; tile < num_tiles; ++tile) {
      if constexpr (!has_residual) release(last_stage);
      mbarrier_wait(full + 8 * stage, parity);
      begin_turn();
      hold_registers(s);
      hold_registers(acc);
      wgmma_fence();
      begin_scores<T, H>(s, own_queries, tiles + stage * H::tile_bytes);
      if constexpr (has_residual) begin_weighted<T, H>(acc, p, own_tiles + last_stage * H::tile_bytes);
      // The other consumer's products follow while this one takes exponentials.
      end_turn();
      wgmma_wait<has_residual ? 1 : 0>();
      hold_registers(s);
      add_tile(tile);
      if constexpr (has_residual) {
        // The exponentials are taken while the products before are under way.
        hold_registers(s);
        finish_first(rows.sum[0] + rows.sum[1]);
        wgmma_wait<0>();
        hold_registers(acc);
        release(last_stage);
        scale_rows(acc, decay);
        round_weights<T, keys>(p, s);
      }
      last_stage = stage;
      if (++stage == stages) stage = 0, parity ^= 1;
    }
    if constexpr (has_residual) {
      hold_registers(acc);
      wgmma_fence();
      begin_weighted<T, H>(acc, p, own_tiles + last_stage * H::tile_bytes);
      wgmma_wait<0>();
      hold_registers(acc);
    }
    // Takes up the other's last arrival.
    if (consumer == 0) begin_turn();
    finish_rows(rows);
    const int first_column = H::is_split ? consumer * H::columns : 0;
    if (first_column == 0) store_losses(sweep, share.index, first_warp_row, rows);
    if constexpr (has_residual)
      store_residuals<T, H::columns, keys>(sweep, share, first_warp_row, rows, acc, first_column, count,
                                           H::panels);
  }
}

template <class T, int slot, bool has_residual>
void launch(const char* op, const Sweep& sweep, void* stream) {
  using H = Hopper<slot>;
  const auto kernel = &duc_hopper_kernel<T, slot, has_residual>;
  allow_shared_memory(op, kernel, H::shared_bytes);
  const dim3 grid(grid_blocks(sweep.num_queries, H::rows), 1, sweep.num_pairs * sweep.num_splits);
  MMFAST_LAUNCH((kernel), grid, kBlock, H::shared_bytes, stream, sweep, kHopperTiling);
}

template <class T, int slot>
void launch(const char* op, const Sweep& sweep, void* stream) {
  if (sweep.residual == nullptr) return launch<T, slot, false>(op, sweep, stream);
  launch<T, slot, true>(op, sweep, stream);
}

template <class T>
void launch(const char* op, int slot, const Sweep& sweep, void* stream) {
  if (slot == 0) return launch<T, 0>(op, sweep, stream);
  if (slot == 1) return launch<T, 1>(op, sweep, stream);
  if (slot == 2) return launch<T, 2>(op, sweep, stream);
  launch<T, 3>(op, sweep, stream);
}

}  // namespace

void launch_hopper(const char* op, bool is_half, int slot, const Sweep& sweep, void* stream) {
  if (is_half) return launch<__half>(op, slot, sweep, stream);
  launch<__nv_bfloat16>(op, slot, sweep, stream);
}

}  // namespace mmfast::duc

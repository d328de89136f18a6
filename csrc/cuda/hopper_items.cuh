// What duc_loss_sm90a.cu sweeps with: tiles and the operands that wgmma reads out of them, the ring of tiles
// that one thread fills, and the items that blocks take, one after the other.
#pragma once

#include "contrast_engines.cuh"
#include "hopper.cuh"

namespace mmfast::duc {
namespace {

constexpr int kGroup = 128, kConsumers = 2, kBlock = (1 + kConsumers) * kGroup;

// Up to 256 columns each of the consumers has 64 queries; at 512 both have the same 64 and half the columns.
template <int bucket_>
struct Sm90aTile {
  static constexpr int bucket = bucket_, panels = 1 << bucket, keys = kSm90aTiling.keys[bucket];
  static constexpr bool is_split = panels > 4;
  static constexpr int consumer_panels = is_split ? panels / kConsumers : panels;
  static constexpr int columns = consumer_panels * kPanel;
  static constexpr int rows = is_split ? kQueryRows : kConsumers * kQueryRows;
  static constexpr int query_bytes = rows * panels * kPanelRowBytes, panel_bytes = keys * kPanelRowBytes,
                       tile_bytes = panels * panel_bytes;
  // What fits, up to four tiles, besides the barriers and the way to a multiple of 1,024.
  static constexpr int fitting = (225 * 1024 - query_bytes) / tile_bytes, stages = fitting < 4 ? fitting : 4;
  static constexpr int shared_bytes = 1024 + query_bytes + stages * tile_bytes;
  // One of so many exponentials is taken on the FMA pipe, 0: none. Where products are narrow, the pipe of
  // special functions binds: these shares make it as busy as the issue of instructions is, see
  // bench/results/loops.md. Not in tiles with positive keys: a loss that is 0 is that exactly.
  static constexpr int residual_stride = panels == 1 ? 10 : 0;
  static constexpr int loss_stride = panels == 1 ? 6 : panels == 2 ? 8 : 0;
  static_assert(stages >= 2, "one tile is used while the next is copied");
};

// The descriptor of an operand in shared memory: address, LBO and SBO in units of 16 bytes at bits 0, 16 and
// 32, a base offset of 0 at bit 49, and at bit 62 the number of the swizzle, 1.
//
// In elements of 16 bits, T = 8 of them in 16 bytes, PTX has two canonical layouts under the swizzle (PTX
// ISA, "asynchronous warpgroup level canonical layouts"), and a panel is both at once:
//
//   K-major, ((8, m), (T, 2)) : ((8T, SBO), (1, T)), for scores = q k^T; K are the dimensions. A row, of a
//   query or key, takes 8T = 128 bytes; eight rows on is SBO = 1,024 bytes. A product takes 16 of the 64
//   dimensions, 32 bytes; the next 16 begin 32 bytes on, as the swizzle works on addresses. No LBO.
//
//   MN-major, ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)), for p k; K are the keys, 8T = 128 bytes apart,
//   eight of them on is SBO = 1,024 bytes. 64 columns are side by side, the next 64 LBO = one panel of the
//   tile on. The next 16 keys begin 2,048 bytes on.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading_bytes) {
  constexpr uint64_t stride = 1024, swizzle_128 = 1;
  return (address >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 | (stride >> 4) << 32 |
         swizzle_128 << 62;
}

// The same so many bytes on; shared memory is too small for a carry out of the address.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000) | (static_cast<uint32_t>(descriptor) + bytes / 16);
}

// The value that all lanes have, for the compiler to know that they do: it then keeps what follows in uniform
// registers, out of which products take descriptors, and computes it anew in every iteration.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __shfl_sync(kFullMask, value, 0); }

// Begins scores = q k^T over all panels of 64 queries and a key tile.
template <class T, class Tile>
__device__ __forceinline__ void begin_scores(float (&s)[Tile::keys / 2], uint32_t queries, uint32_t tile) {
  const uint64_t q = descriptor(uniform(queries), 16), b = descriptor(uniform(tile), 16);
#pragma unroll
  for (int k = 0; k < Tile::panels * 4; ++k) {
    Wgmma<T, Tile::keys>::scores(s, advanced(q, k / 4 * (kQueryRows * kPanelRowBytes) + k % 4 * 32),
                                 advanced(b, k / 4 * Tile::panel_bytes + k % 4 * 32), k > 0);
  }
  wgmma_commit();
}

// Begins acc += p k over the keys of a tile, from the first of this consumer's panels on.
template <class T, class Tile>
__device__ __forceinline__ void begin_weighted(float (&acc)[Tile::columns / 2],
                                               const uint32_t (&p)[Tile::keys / 16][4], uint32_t tile) {
  const uint64_t b = descriptor(uniform(tile), Tile::panel_bytes);
#pragma unroll
  for (int k = 0; k < Tile::keys / 16; ++k)
    Wgmma<T, Tile::columns>::weighted(acc, p[k], advanced(b, k * 16 * kPanelRowBytes));
  wgmma_commit();
}

// Addresses in shared memory: the queries, a ring of key tiles, and mbarriers: that the queries have come and
// that all warps are done with them, and the same of every stage's tile ("full" and "empty").
template <class Tile>
struct Ring {
  static constexpr int barriers = 2 + 2 * Tile::stages;
  uint32_t queries, tiles, query_ready, query_done, full, empty;

  __device__ __forceinline__ Ring(const void* shared, const uint64_t* barriers)
      : queries(kept(round_up(shared_address(shared), 1024))),
        tiles(queries + Tile::query_bytes),
        query_ready(kept(shared_address(barriers))),
        query_done(query_ready + 8),
        full(query_done + 8),
        empty(full + 8 * Tile::stages) {}

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init() const {
    // A warp at a time is done with what it has read.
    constexpr int warps = kConsumers * kGroup / kWarp;
    mbarrier_init(query_ready, 1);
    mbarrier_init(query_done, warps);
    for (int stage = 0; stage < Tile::stages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, warps);
    }
    mbarrier_fence();
  }
};

// Where a thread is in the ring of key tiles, from one item to the next.
template <class Tile>
struct Place {
  int stage = 0, parity;

  __device__ __forceinline__ void next() {
    if (++stage == Tile::stages) stage = 0, parity ^= 1;
  }
};

// What the host has shared out: `whole` sweeps the first items, of all keys, and `parts` the others.
struct Work {
  Sweep whole, parts;
  int num_whole, num_items;
  int per_pair, per_part;  // items of a pair; of a part of the keys
  float scale;
};

// So many rows of queries of a pair, and a share of its keys.
template <class Tile>
struct Item {
  bool is_part;
  int pair, split;
  int64_t first_row, first_tile, end_tile;

  __device__ __forceinline__ Item(const Work& work, int number) {
    is_part = number >= work.num_whole;
    split = is_part ? (number - work.num_whole) / work.per_part : 0;
    const int unit = number - split * work.per_part;
    pair = unit / work.per_pair;
    first_row = static_cast<int64_t>(unit % work.per_pair) * Tile::rows;
    const int64_t num_tiles = ceil_div(work.whole.num_keys, Tile::keys);
    const int num_splits = is_part ? work.parts.num_splits : 1;
    first_tile = split * num_tiles / num_splits;
    end_tile = (split + 1) * num_tiles / num_splits;
  }

  // Pairs of another number of columns are another kernel's.
  __device__ __forceinline__ bool is_mine(const Work& work, const Tiling& tiling) const {
    const int count = work.whole.count(pair);
    return count > 0 && tiling.bucket(count) == Tile::bucket && first_row < work.whole.num_queries;
  }
  // As that of Share.
  __device__ __forceinline__ int64_t place(const Sweep& sweep) const {
    return split * sweep.num_results() + pair * sweep.num_queries - sweep.first_result;
  }
};

// Every block takes items in strides of the grid: what runs at one time goes over the same keys, and meets
// them in L2.
template <class Tile, class Run>
__device__ __forceinline__ void for_each_item(const Work& work, const Tiling& tiling, const Run& run) {
#pragma unroll 1
  for (int number = blockIdx.x; number < work.num_items; number += gridDim.x) {
    const Item<Tile> item(work, number);
    if (item.is_mine(work, tiling)) run(item, number);
  }
}

// One thread: copies an item's queries, once the item before has no use for its own, then every key tile into
// the next stage that the consumers have left.
template <class T, class Tile>
__device__ __forceinline__ void produce(const Sweep& sweep, const Item<Tile>& item, const Ring<Tile>& ring,
                                        Place<Tile>& place, int query_parity) {
  constexpr int tile_size = Tile::keys * Tile::panels * kPanel;
  const int num_tiles = static_cast<int>(item.end_tile - item.first_tile);
  const auto* const queries = static_cast<const T*>(sweep.queries) + item.pair * sweep.query_stride +
                              item.first_row * (Tile::panels * kPanel);
  const auto* const keys =
      static_cast<const T*>(sweep.keys) + item.pair * sweep.key_stride + item.first_tile * tile_size;
  mbarrier_wait(ring.query_done, query_parity);
  mbarrier_expect(ring.query_ready, Tile::query_bytes);
  bulk_copy(ring.queries, queries, Tile::query_bytes, ring.query_ready);
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile, place.next()) {
    mbarrier_wait(ring.empty + 8 * place.stage, place.parity);
    mbarrier_expect(ring.full + 8 * place.stage, Tile::tile_bytes);
    bulk_copy(ring.tiles + place.stage * Tile::tile_bytes, keys + static_cast<int64_t>(tile) * tile_size,
              Tile::tile_bytes, ring.full + 8 * place.stage);
  }
}

}  // namespace
}  // namespace mmfast::duc

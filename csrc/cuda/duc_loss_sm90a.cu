// The sweep of duc_loss in half precision on Hopper, compiled for sm_90a alone: one thread has tiles copied
// in bulk, two warpgroups multiply them (wgmma) in turns, one's exponentials beside the other's products. A
// block fills an SM, and takes item after item, rows of a pair's queries: the next one's queries come while
// results are written. The last items may be parts of the keys, which duc_merge_kernel puts together.
//
// Layout: a panel, [rows][64 columns] of 16 bits with chunk c of 16 bytes of row r at place c ^ (r % 8), is
// what PTX calls the 128-byte swizzle, Swizzle<3, 4, 3>: bits 4-6 of an address are changed by bits 7-9, so
// panels begin at multiples of 1,024 bytes. descriptor() says how wgmma reads it.
//
// Machine code: duc_hopper_kernel, 90a: HGMMA UBLKCP
#include <algorithm>

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

// Which rows and columns a thread of a consumer has.
template <class Tile>
struct Consumer {
  int index;         // 0 or 1
  uint32_t queries;  // the consumer's 64, in shared memory
  uint32_t panels;   // bytes from the beginning of a key tile to those whose columns it sums

  __device__ __forceinline__ explicit Consumer(const Ring<Tile>& ring)
      : index(threadIdx.x / kGroup - 1),
        queries(ring.queries + (Tile::is_split ? 0 : index * (kQueryRows * Tile::panels * kPanelRowBytes))),
        panels(Tile::is_split ? index * (Tile::consumer_panels * Tile::panel_bytes) : 0) {}

  // The first of its 64 rows, and of the 16 of its warp.
  __device__ __forceinline__ int64_t first_group_row(const Item<Tile>& item) const {
    return item.first_row + (Tile::is_split ? 0 : index * kQueryRows);
  }
  __device__ __forceinline__ int64_t first_row(const Item<Tile>& item) const {
    return first_group_row(item) + 16 * static_cast<int>(threadIdx.x % kGroup / kWarp);
  }
};

// The two warpgroups begin their products in turns.
__device__ __forceinline__ void begin_turn(int consumer) {
  named_barrier_sync(1 + consumer, kConsumers * kGroup);
}
__device__ __forceinline__ void end_turn(int consumer) {
  named_barrier_arrive(2 - consumer, kConsumers * kGroup);
}

// What a warp needs of its item between steady stretches of tiles alone: kept in shared memory, as registers
// are scarce. Tiles and keys are counted from the first of the item's share.
struct Note {
  int number, query_parity;  // of the item; of its queries' barrier
  int num_tiles, num_keys;
  int first_positive;  // positive key of the warp's first row
  // Tiles with positive keys of the warpgroup's queries, and those before the ragged last one. The others
  // need no masks: all four warps of a group multiply what one of them needs.
  int begin, end, num_full;

  // The first that needs masks, from `tile` on.
  __device__ __forceinline__ int next_edge(int tile) const volatile {
    return min(num_full, tile < end ? max(tile, begin) : num_full);
  }
};

// By all of a warp.
template <class Tile>
__device__ __forceinline__ void begin_note(volatile Note& note, const Sweep& sweep, const Item<Tile>& item,
                                           int number, const Consumer<Tile>& consumer) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) {
    const int64_t first = sweep.offset + consumer.first_group_row(item),
                  first_key = item.first_tile * Tile::keys;
    note.number = number;
    note.num_tiles = static_cast<int>(item.end_tile - item.first_tile);
    note.num_keys = static_cast<int>(sweep.num_keys - first_key);
    note.first_positive = static_cast<int>(sweep.offset + consumer.first_row(item) - first_key);
    note.begin = static_cast<int>(first / Tile::keys - item.first_tile);
    note.end = static_cast<int>((first + kQueryRows - 1) / Tile::keys + 1 - item.first_tile);
    note.num_full = static_cast<int>(min(item.end_tile, sweep.num_keys / Tile::keys) - item.first_tile);
  }
  __syncwarp();
}

// A warpgroup: sweeps the key tiles of an item. Scores of a tile are under way together with the residual of
// the tile before, whose weights are ready.
template <class T, class Tile, bool has_residual>
__device__ __forceinline__ void consume(float scale, const Ring<Tile>& ring, const Consumer<Tile>& consumer,
                                        volatile Note& note, Place<Tile>& place, SoftmaxRows& rows,
                                        float (&acc)[Tile::columns / 2]) {
  constexpr int keys = Tile::keys;
  const uint32_t values = ring.tiles + consumer.panels;
  float s[keys / 2], decay[2];
  uint32_t p[keys / 16][4];
  const auto release = [&](uint32_t barrier) {
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(barrier);
  };
  const auto add_tile = [&](auto is_edge, int tile) {
    constexpr bool edge = decltype(is_edge)::value;
    constexpr int stride = edge ? 0 : has_residual ? Tile::residual_stride : Tile::loss_stride;
    if constexpr (edge) {
      online_softmax<keys>(s, rows, decay, tile * keys, note.first_positive, note.num_keys, scale);
    } else {
      online_softmax<keys, false, stride>(s, rows, decay, 0, 0, 0, scale);
    }
  };

  mbarrier_wait(ring.query_ready, note.query_parity);
  mbarrier_wait(ring.full + 8 * place.stage, place.parity);
  begin_turn(consumer.index);
  wgmma_fence();
  begin_scores<T, Tile>(s, consumer.queries, ring.tiles + place.stage * Tile::tile_bytes);
  end_turn(consumer.index);
  wgmma_wait<0>();
  warpgroup_fence_operand(s);
  add_tile(std::true_type(), 0);
  round_weights<T, keys>(p, s);
  int last_stage = place.stage;
  place.next();
  const auto step = [&](auto is_edge, int tile) {
    if constexpr (!has_residual) release(ring.empty + 8 * last_stage);
    mbarrier_wait(ring.full + 8 * place.stage, place.parity);
    begin_turn(consumer.index);
    warpgroup_fence_operand(s);
    warpgroup_fence_operand(acc);
    wgmma_fence();
    begin_scores<T, Tile>(s, consumer.queries, ring.tiles + place.stage * Tile::tile_bytes);
    if constexpr (has_residual) begin_weighted<T, Tile>(acc, p, values + last_stage * Tile::tile_bytes);
    // The other consumer's products follow while this one takes exponentials.
    end_turn(consumer.index);
    wgmma_wait<has_residual ? 1 : 0>();
    warpgroup_fence_operand(s);
    add_tile(is_edge, tile);
    if constexpr (has_residual) {
      // The exponentials are taken while the products before are under way.
      warpgroup_fence_operand(s);
      schedule_barrier(rows.sum[0] + rows.sum[1]);
      wgmma_wait<0>();
      warpgroup_fence_operand(acc);
      release(ring.empty + 8 * last_stage);
      scale_rows(acc, decay);
      round_weights<T, keys>(p, s);
    }
    last_stage = place.stage;
    place.next();
  };
#pragma unroll 1
  for (int tile = 1; tile < note.num_tiles;) {
    const int edge = note.next_edge(tile);
#pragma unroll 1
    for (; tile < edge; ++tile) step(std::false_type(), tile);
    if (tile < note.num_tiles) step(std::true_type(), tile++);
  }
  // The next item's queries come while this one's last product and its results are under way.
  release(ring.query_done);
  if constexpr (has_residual) {
    warpgroup_fence_operand(acc);
    wgmma_fence();
    begin_weighted<T, Tile>(acc, p, values + last_stage * Tile::tile_bytes);
    wgmma_wait<0>();
    warpgroup_fence_operand(acc);
  }
  release(ring.empty + 8 * last_stage);
}

// Writes a consumer's losses and residuals.
template <class T, class Tile, bool has_residual>
__device__ __forceinline__ void finish(const Sweep& sweep, const Item<Tile>& item,
                                       const Consumer<Tile>& consumer, SoftmaxRows& rows,
                                       const float (&acc)[Tile::columns / 2]) {
  finish_rows(rows);
  const int64_t first_row = consumer.first_row(item);
  const int first_column = Tile::is_split ? consumer.index * Tile::columns : 0;
  if (first_column == 0) store_losses(sweep, item.place(sweep), first_row, rows);
  if constexpr (has_residual)
    store_residuals<T, Tile::columns, Tile::keys>(sweep, item, first_row, rows, acc, first_column,
                                                  sweep.count(item.pair), Tile::panels);
}

// Grid: as many blocks as run at one time, or one for each item.
template <class T, int bucket, bool has_residual>
__global__ void __launch_bounds__(kBlock, 1)
    duc_hopper_kernel(const __grid_constant__ Work work, const __grid_constant__ Tiling tiling) {
  using Tile = Sm90aTile<bucket>;
  MMFAST_DYNAMIC_SHARED(shared);
  MMFAST_SHARED(uint64_t, barriers, [Ring<Tile>::barriers]);
  MMFAST_SHARED(Note, notes, [kConsumers * kGroup / kWarp]);
  const Ring<Tile> ring(shared, barriers);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();

  // Registers are handed over at the head of the two branches, as setmaxnreg wants it.
  if (threadIdx.x < kGroup) {
    warpgroup_reg_dealloc<24>();
    if (threadIdx.x != 0) return;
    Place<Tile> place{0, 1};
    int query_parity = 1;
    for_each_item<Tile>(work, tiling, [&](const Item<Tile>& item, int) {
      produce<T>(work.whole, item, ring, place, query_parity);
      query_parity ^= 1;
    });
  } else {
    warpgroup_reg_alloc<240>();
    const Consumer<Tile> consumer(ring);
    volatile Note& note = notes[threadIdx.x / kWarp - kGroup / kWarp];
    Place<Tile> place{0, 0};
    if (threadIdx.x % kWarp == 0) note.query_parity = 0;
    // The first consumer begins, and takes up the other's last arrival at the end.
    if (consumer.index == 1) end_turn(consumer.index);
    for_each_item<Tile>(work, tiling, [&](const Item<Tile>& item, int& number) {
      begin_note(note, work.whole, item, number, consumer);
      SoftmaxRows rows;
      float acc[Tile::columns / 2] = {};
      consume<T, Tile, has_residual>(work.scale, ring, consumer, note, place, rows, acc);
      number = note.number;
      const Item<Tile> same(work, number);
      finish<T, Tile, has_residual>(same.is_part ? work.parts : work.whole, same, consumer, rows, acc);
      if (threadIdx.x % kWarp == 0) note.query_parity ^= 1;
    });
    if (consumer.index == 0) begin_turn(consumer.index);
  }
}

template <class T, int bucket, bool has_residual>
void launch(const Call& call) {
  using Tile = Sm90aTile<bucket>;
  const Sweep& sweep = call.sweep;
  const auto kernel = &duc_hopper_kernel<T, bucket, has_residual>;
  allow_shared_memory(kOp, kernel, Tile::shared_bytes);
  constexpr int per_block = kQueryMultiple / Tile::rows;
  const auto items = [](int64_t blocks) { return static_cast<int>(blocks * per_block); };
  const int64_t blocks = ceil_div(sweep.num_queries, kQueryMultiple),
                rest = blocks * sweep.num_pairs - call.num_whole;
  const int num_items = items(call.num_whole + rest * call.parts.num_splits);
  const Work work{sweep,
                  call.parts,
                  items(call.num_whole),
                  num_items,
                  items(blocks),
                  std::max(1, items(rest)),
                  static_cast<float>(sweep.scale)};
  // Among items of other kernels some blocks would find more of their own than others: then each block takes
  // one, and the GPU hands them out.
  const bool is_alone = num_pairs_of(call, kSm90aTiling, bucket) == sweep.num_pairs;
  const int num_blocks = is_alone ? std::min(num_items, call.num_sms) : num_items;
  MMFAST_LAUNCH((kernel), num_blocks, kBlock, Tile::shared_bytes, call.stream, work, kSm90aTiling);
}

template <class T, int bucket>
void launch(const Call& call) {
  if (call.sweep.residual == nullptr) return launch<T, bucket, false>(call);
  launch<T, bucket, true>(call);
}

template <class T>
void launch(const Call& call, int bucket) {
  if (bucket == 0) return launch<T, 0>(call);
  if (bucket == 1) return launch<T, 1>(call);
  if (bucket == 2) return launch<T, 2>(call);
  launch<T, 3>(call);
}

}  // namespace

void launch_sm90a(const Call& call, int bucket) {
  if (call.dtype == Dtype::kFloat16) return launch<__half>(call, bucket);
  launch<__nv_bfloat16>(call, bucket);
}

}  // namespace mmfast::duc

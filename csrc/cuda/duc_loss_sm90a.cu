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

#include "hopper_items.cuh"

namespace mmfast::duc {
namespace {

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

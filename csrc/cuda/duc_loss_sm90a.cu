// The sweep of duc_loss in half precision on Hopper, compiled for sm_90a alone: one thread has tiles copied
// in bulk, two warpgroups multiply them (wgmma) in turns, one's exponentials beside the other's products.
//
// Layout: a panel, [rows][64 columns] of 16 bits with chunk c of 16 bytes of row r at place c ^ (r % 8), is
// what PTX calls the 128-byte swizzle, Swizzle<3, 4, 3>: bits 4-6 of an address are changed by bits 7-9, so
// panels begin at multiples of 1,024 bytes. descriptor() says how wgmma reads it.
//
// Machine code: duc_hopper_kernel, 90a: HGMMA UBLKCP
#include "contrast_engines.cuh"
#include "hopper.cuh"

namespace mmfast::duc {
namespace {

constexpr int kGroup = 128, kConsumers = 2, kBlock = (1 + kConsumers) * kGroup;

// Up to 256 columns each of the consumers has 64 queries; at 512 both have the same 64 and half the columns.
template <int bucket>
struct Sm90aTile {
  static constexpr int panels = 1 << bucket, keys = kSm90aTiling.keys[bucket];
  static constexpr bool is_split = panels > 4;
  static constexpr int consumer_panels = is_split ? panels / kConsumers : panels;
  static constexpr int columns = consumer_panels * kPanel;
  static constexpr int rows = is_split ? kQueryRows : kConsumers * kQueryRows;
  static constexpr int query_bytes = rows * panels * kPanelRowBytes, panel_bytes = keys * kPanelRowBytes,
                       tile_bytes = panels * panel_bytes;
  // What fits, up to four tiles, besides the barriers and the way to a multiple of 1,024.
  static constexpr int fitting = (225 * 1024 - query_bytes) / tile_bytes, stages = fitting < 4 ? fitting : 4;
  static constexpr int shared_bytes = 1024 + query_bytes + stages * tile_bytes;
  // A thread keeps a tile's scores, its weights of 16 bits and sums of the residual.
  static constexpr bool is_scarce = keys / 2 + keys / 4 + columns / 2 > 192;
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
  const uint64_t q = descriptor(uniform(queries), 16), b = descriptor(tile, 16);
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

// Addresses in shared memory: the queries, a ring of key tiles, and an mbarrier that the queries have come,
// one a stage that its tile has come ("full") and one that all warps are done with it ("empty").
template <class Tile>
struct Ring {
  uint32_t queries, tiles, query_ready, full, empty;

  __device__ __forceinline__ Ring(const void* shared, const uint64_t* barriers)
      : queries(round_up(shared_address(shared), 1024)),
        tiles(queries + Tile::query_bytes),
        query_ready(shared_address(barriers)),
        full(query_ready + 8),
        empty(full + 8 * Tile::stages) {}

  // By one thread, before a barrier of the block.
  __device__ __forceinline__ void init() const {
    mbarrier_init(query_ready, 1);
    for (int stage = 0; stage < Tile::stages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      // A warp at a time is done with a tile.
      mbarrier_init(empty + 8 * stage, kConsumers * kGroup / kWarp);
    }
    mbarrier_fence();
  }
};

// The first row of a block's queries.
template <class Tile>
__device__ __forceinline__ int64_t first_row_of_block() {
  return static_cast<int64_t>(blockIdx.x) * Tile::rows;
}

// One thread: copies the queries, then every key tile into the next stage that the consumers have left.
template <class T, class Tile>
__device__ __forceinline__ void produce(const Sweep& sweep, const Share& share, const Ring<Tile>& ring) {
  constexpr int tile_size = Tile::keys * Tile::panels * kPanel;
  const int num_tiles = static_cast<int>(share.end_tile - share.first_tile);
  const auto* const queries = static_cast<const T*>(sweep.queries) + share.pair * sweep.query_stride +
                              first_row_of_block<Tile>() * (Tile::panels * kPanel);
  const auto* const keys =
      static_cast<const T*>(sweep.keys) + share.pair * sweep.key_stride + share.first_tile * tile_size;
  mbarrier_expect(ring.query_ready, Tile::query_bytes);
  bulk_copy(ring.queries, queries, Tile::query_bytes, ring.query_ready);
  int stage = 0, parity = 1;
#pragma unroll 1
  for (int tile = 0; tile < num_tiles; ++tile) {
    mbarrier_wait(ring.empty + 8 * stage, parity);
    mbarrier_expect(ring.full + 8 * stage, Tile::tile_bytes);
    bulk_copy(ring.tiles + stage * Tile::tile_bytes, keys + static_cast<int64_t>(tile) * tile_size,
              Tile::tile_bytes, ring.full + 8 * stage);
    if (++stage == Tile::stages) stage = 0, parity ^= 1;
  }
}

// Which rows and columns a thread of a consumer has.
template <class Tile>
struct Consumer {
  int index;                // 0 or 1
  int64_t first_group_row;  // of its 64
  int64_t first_row;        // of the 16 of its warp
  uint32_t queries;         // the consumer's 64, in shared memory
  uint32_t panels;          // bytes from the beginning of a key tile to those whose columns it sums

  __device__ __forceinline__ explicit Consumer(const Ring<Tile>& ring)
      : index(threadIdx.x / kGroup - 1),
        first_group_row(first_row_of_block<Tile>() + (Tile::is_split ? 0 : index * kQueryRows)),
        first_row(first_group_row + 16 * static_cast<int>(threadIdx.x % kGroup / kWarp)),
        queries(ring.queries + (Tile::is_split ? 0 : index * (kQueryRows * Tile::panels * kPanelRowBytes))),
        panels(Tile::is_split ? index * (Tile::consumer_panels * Tile::panel_bytes) : 0) {}

  // The two warpgroups begin their products in turns. The other's last arrival is taken up at the end.
  __device__ __forceinline__ void begin_turn() const { named_barrier_sync(1 + index, kConsumers * kGroup); }
  __device__ __forceinline__ void end_turn() const { named_barrier_arrive(2 - index, kConsumers * kGroup); }
};

// Tiles of a share with the positive keys of a consumer's queries, and the ragged last one, whose scores need
// masks: all four warps of a group multiply what one of them needs.
template <class Tile>
struct Edges {
  int begin, end,
      num_full;  // tiles with positive keys, from the share's first on; tiles before the ragged one

  __device__ __forceinline__ Edges(const Sweep& sweep, const Share& share, const Consumer<Tile>& consumer) {
    const int64_t first = sweep.offset + consumer.first_group_row;
    begin = static_cast<int>(first / Tile::keys - share.first_tile);
    end = static_cast<int>((first + kQueryRows - 1) / Tile::keys + 1 - share.first_tile);
    num_full = static_cast<int>(min(share.end_tile, sweep.num_keys / Tile::keys) - share.first_tile);
  }

  // The first that needs masks, from `tile` on.
  __device__ __forceinline__ int next(int tile) const {
    return min(num_full, tile < end ? max(tile, begin) : num_full);
  }
};

// A warpgroup: sweeps the key tiles. Scores of a tile are under way together with the residual of the tile
// before, whose weights are ready.
template <class T, class Tile, bool has_residual>
__device__ __forceinline__ void consume(const Sweep& sweep, const Share& share, const Ring<Tile>& ring,
                                        const Consumer<Tile>& consumer, SoftmaxRows& rows,
                                        float (&acc)[Tile::columns / 2]) {
  constexpr int keys = Tile::keys;
  const float scale = static_cast<float>(sweep.scale);
  const int num_tiles = static_cast<int>(share.end_tile - share.first_tile);
  const uint32_t values = ring.tiles + consumer.panels;
  float s[keys / 2], decay[2];
  uint32_t p[keys / 16][4];
  const auto release = [&](int stage) {
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(ring.empty + 8 * stage);
  };
  const auto add_tile = [&](auto is_edge, int tile) {
    const int64_t first_key = (share.first_tile + tile) * keys;
    constexpr bool edge = decltype(is_edge)::value;
    constexpr int stride = edge ? 0 : has_residual ? Tile::residual_stride : Tile::loss_stride;
    online_softmax<keys, edge, Tile::is_scarce, stride>(
        s, rows, decay, first_key, sweep.offset + consumer.first_row, sweep.num_keys, scale);
  };
  // The first consumer begins.
  if (consumer.index == 1) consumer.end_turn();

  mbarrier_wait(ring.query_ready, 0);
  mbarrier_wait(ring.full, 0);
  consumer.begin_turn();
  wgmma_fence();
  begin_scores<T, Tile>(s, consumer.queries, ring.tiles);
  consumer.end_turn();
  wgmma_wait<0>();
  warpgroup_fence_operand(s);
  add_tile(std::true_type(), 0);
  round_weights<T, keys>(p, s);
  int last_stage = 0, stage = 1, parity = 0;
  const auto step = [&](auto is_edge, int tile) {
    if constexpr (!has_residual) release(last_stage);
    mbarrier_wait(ring.full + 8 * stage, parity);
    consumer.begin_turn();
    warpgroup_fence_operand(s);
    warpgroup_fence_operand(acc);
    wgmma_fence();
    begin_scores<T, Tile>(s, consumer.queries, ring.tiles + stage * Tile::tile_bytes);
    if constexpr (has_residual) begin_weighted<T, Tile>(acc, p, values + last_stage * Tile::tile_bytes);
    // The other consumer's products follow while this one takes exponentials.
    consumer.end_turn();
    wgmma_wait<has_residual ? 1 : 0>();
    warpgroup_fence_operand(s);
    add_tile(is_edge, tile);
    if constexpr (has_residual) {
      // The exponentials are taken while the products before are under way.
      warpgroup_fence_operand(s);
      schedule_barrier(rows.sum[0] + rows.sum[1]);
      wgmma_wait<0>();
      warpgroup_fence_operand(acc);
      release(last_stage);
      scale_rows(acc, decay);
      round_weights<T, keys>(p, s);
    }
    last_stage = stage;
    if (++stage == Tile::stages) stage = 0, parity ^= 1;
  };
  const Edges<Tile> edges(sweep, share, consumer);
#pragma unroll 1
  for (int tile = 1; tile < num_tiles;) {
    const int edge = edges.next(tile);
#pragma unroll 1
    for (; tile < edge; ++tile) step(std::false_type(), tile);
    if (tile < num_tiles) step(std::true_type(), tile++);
  }
  if constexpr (has_residual) {
    warpgroup_fence_operand(acc);
    wgmma_fence();
    begin_weighted<T, Tile>(acc, p, values + last_stage * Tile::tile_bytes);
    wgmma_wait<0>();
    warpgroup_fence_operand(acc);
  }
  if (consumer.index == 0) consumer.begin_turn();
}

// Writes a consumer's losses and residuals.
template <class T, class Tile, bool has_residual>
__device__ __forceinline__ void finish(const Sweep& sweep, const Share& share, int count,
                                       const Consumer<Tile>& consumer, SoftmaxRows& rows,
                                       const float (&acc)[Tile::columns / 2]) {
  finish_rows(rows);
  const int first_column = Tile::is_split ? consumer.index * Tile::columns : 0;
  if (first_column == 0) store_losses(sweep, share.index, consumer.first_row, rows);
  if constexpr (has_residual)
    store_residuals<T, Tile::columns, Tile::keys>(sweep, share, consumer.first_row, rows, acc, first_column,
                                                  count, Tile::panels);
}

// Grid: blocks of queries, 1, pairs.
template <class T, int bucket, bool has_residual>
__global__ void __launch_bounds__(kBlock, 1)
    duc_hopper_kernel(Sweep sweep, const __grid_constant__ Tiling tiling) {
  using Tile = Sm90aTile<bucket>;
  const Share share(sweep, Tile::keys);
  const int count = sweep.count(share.pair);
  if (count == 0 || tiling.bucket(count) != bucket) return;
  MMFAST_DYNAMIC_SHARED(shared);
  MMFAST_SHARED(uint64_t, barriers, [1 + 2 * Tile::stages]);
  const Ring<Tile> ring(shared, barriers);
  if (threadIdx.x == 0) ring.init();
  __syncthreads();

  // Registers are handed over at the head of the two branches, as setmaxnreg wants it.
  if (threadIdx.x < kGroup) {
    warpgroup_reg_dealloc<24>();
    if (threadIdx.x == 0) produce<T>(sweep, share, ring);
  } else {
    warpgroup_reg_alloc<240>();
    const Consumer<Tile> consumer(ring);
    SoftmaxRows rows;
    float acc[Tile::columns / 2] = {};
    consume<T, Tile, has_residual>(sweep, share, ring, consumer, rows, acc);
    finish<T, Tile, has_residual>(sweep, share, count, consumer, rows, acc);
  }
}

template <class T, int bucket, bool has_residual>
void launch(const Call& call) {
  using Tile = Sm90aTile<bucket>;
  const Sweep& sweep = call.sweep;
  const auto kernel = &duc_hopper_kernel<T, bucket, has_residual>;
  allow_shared_memory(kOp, kernel, Tile::shared_bytes);
  const dim3 grid(grid_blocks(sweep.num_queries, Tile::rows), 1, sweep.num_pairs * sweep.num_splits);
  MMFAST_LAUNCH((kernel), grid, kBlock, Tile::shared_bytes, call.stream, sweep, kSm90aTiling);
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

// The sweep of a contrastive loss over the keys of ordered pairs of modalities (m, n), of which m teaches n:
// what a loss makes of the scores is its tile's.
//
// A thread takes a block of queries of one student through all its teachers, a tile of queries and one of
// keys at a time (contrast_tile.h). Nothing it computes depends on how blocks are dealt out, so no bit
// depends on the number of threads. Memory beyond inputs and outputs: the packed keys, K d elements a pair,
// and the tiles of each thread.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "codes.h"
#include "contrast_tile.h"

namespace mmfast {
namespace {

// Keys of a tile, vectors of queries side by side.
constexpr int kKeys = 96;
constexpr int kVectors = 2;
// Query tiles of a block, which meet one key tile after the other: so many that fit the L2 cache.
constexpr int64_t kMaxTiles = 4;
constexpr int64_t kBlockBytes = 1 << 19;
// Waking threads takes longer than so many operations.
constexpr int64_t kMinOperations = 1 << 19;

// The residual's type: its factors, 1 / temperature among them, are still to come, and float16 would not hold
// it before.
template <class T>
using residual_t = std::conditional_t<std::is_same_v<T, float16>, float, T>;

// TileOf<A, nv, pairs> is a QueryTile and what its loss does with the scores: `start`, `weigh`, `loss` and
// `add_residual`; `Options` are the same for all tiles.
template <class T, bool pairs, template <class, int, bool> class TileOf>
class ContrastSweep {
 public:
  using A = accumulate_t<T>;
  using R = residual_t<T>;
  template <int nv>
  using Tile = TileOf<A, nv, pairs>;
  static constexpr int kTile = kVectors * kLanes<A>;

  std::vector<Matrix<T>> queries, keys;  // [N, D], [K, D] per modality
  std::vector<ModalityPair<A>> modality_pairs;
  int64_t num_samples, num_keys, num_dims, offset;
  A scale;
  R* residual;  // [M, N, D] or null
  typename Tile<1>::Options options;

  // Writes the residual and returns losses [M, N].
  const A* run(int64_t num_threads) {
    num_threads = plan(num_threads);
    allocate(num_threads);
    const int64_t num_students = static_cast<int64_t>(queries.size());
    parallel_region(num_threads, [&] {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_panels_ * static_cast<int64_t>(modality_pairs.size()); ++i)
        pack(modality_pairs[i / num_panels_], i % num_panels_);
      A* const memory = tiles_ + omp_get_thread_num() * thread_size_;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_students * num_blocks_; ++i) {
        const int64_t first = i % num_blocks_ * block_;
        run_block(i / num_blocks_, first, std::min(block_, num_samples - first), memory);
      }
    });
    return losses_;
  }

 private:
  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };
  // The packed keys of all modality pairs, the tiles of each thread, the losses.
  std::unique_ptr<A, Free> memory_;
  A *tiles_ = nullptr, *losses_ = nullptr;
  int64_t tile_size_ = 0, num_tiles_ = 0;     // elements of a query tile; query tiles of a block
  int64_t block_ = 0, num_blocks_ = 0;        // queries of a block; blocks of a student
  int64_t num_panels_ = 0, thread_size_ = 0;  // panels of keys; elements of a thread's tiles

  // Sets the sizes of blocks; returns the number of threads that pay.
  int64_t plan(int64_t num_threads) {
    const int64_t num_students = static_cast<int64_t>(queries.size());
    int64_t sum_dims = 0, max_dims = kPanel;
    for (const ModalityPair<A>& pair : modality_pairs) {
      sum_dims += pair.padded_dims;
      max_dims = std::max(max_dims, pair.padded_dims);
    }
    const int64_t operations = 4 * num_samples * num_keys * sum_dims;
    num_threads = std::max<int64_t>(1, std::min(num_threads, operations / kMinOperations));
    num_panels_ = ceil_div(num_keys, kPanel);
    // Blocks enough for all threads to end at about the same time.
    tile_size_ = Tile<kVectors>::size(max_dims);
    num_tiles_ = std::min(kMaxTiles, kBlockBytes / (tile_size_ * static_cast<int64_t>(sizeof(A))));
    num_tiles_ = std::min(num_tiles_, num_samples * num_students / (kTile * num_threads * 4));
    num_tiles_ = std::max<int64_t>(1, num_tiles_);
    block_ = num_tiles_ * kTile, num_blocks_ = ceil_div(num_samples, block_);
    const int64_t row_size = std::is_same_v<R, A> || residual == nullptr ? 0 : block_ * num_dims;
    thread_size_ = round_up(num_tiles_ * tile_size_ + kKeys * kTile + row_size, 64);
    return num_threads;
  }

  void allocate(int64_t num_threads) {
    int64_t panels_size = 0;
    for (const ModalityPair<A>& pair : modality_pairs) panels_size += num_panels_ * kPanel * pair.padded_dims;
    panels_size = round_up(panels_size, 64);
    const int64_t losses_size = round_up(static_cast<int64_t>(queries.size()) * num_samples, 64);
    const int64_t size = panels_size + num_threads * thread_size_ + losses_size;
    memory_.reset(static_cast<A*>(std::aligned_alloc(64, sizeof(A) * size)));
    if (memory_ == nullptr) throw std::bad_alloc();
    A* panels = memory_.get();
    for (ModalityPair<A>& pair : modality_pairs) {
      pair.panels = panels;
      panels += num_panels_ * kPanel * pair.padded_dims;
    }
    tiles_ = memory_.get() + panels_size;
    losses_ = tiles_ + num_threads * thread_size_;
  }

  // Gathers panel `index` of a pair's keys.
  void pack(const ModalityPair<A>& pair, int64_t index) const {
    const Matrix<T>& source = keys[pair.teacher];
    A* panel = pair.panels + index * kPanel * pair.padded_dims;
    const auto key = [&](int64_t r, int64_t c) {
      const int64_t row = index * kPanel + r;
      const bool is_inside = row < num_keys && c < pair.num_dims();
      return is_inside ? source.row(row)[pair.dims[c] * source.stride_dim] : T{};
    };
    if constexpr (pairs) {
      // One half with pairs of dimensions for the scores, the other with pairs of keys.
      A* const second = panel + kPanel / 2 * pair.padded_dims;
      for (int r = 0; r < kPanel; r += 2) {
        for (int64_t c = 0; c < pair.padded_dims; c += 2) {
          const T block[] = {key(r, c), key(r, c + 1), key(r + 1, c), key(r + 1, c + 1)};
          panel[c / 2 * kPanel + r] = pair_up(block[0], block[1]);
          panel[c / 2 * kPanel + r + 1] = pair_up(block[2], block[3]);
          second[(c * kPanel + r) / 2] = pair_up(block[0], block[2]);
          second[((c + 1) * kPanel + r) / 2] = pair_up(block[1], block[3]);
        }
      }
    } else {
      for (int r = 0; r < kPanel; ++r) {
        for (int64_t c = 0; c < pair.padded_dims; ++c) panel[c * kPanel + r] = widen(key(r, c));
      }
    }
  }

  // Samples first .. first + count - 1 of a student with all its teachers.
  void run_block(int64_t student, int64_t first, int64_t count, A* memory) const {
    A* const losses = losses_ + student * num_samples + first;
    std::fill_n(losses, count, A{0});
    R* const target = residual == nullptr ? nullptr : residual + (student * num_samples + first) * num_dims;
    A* rows = nullptr;
    if constexpr (std::is_same_v<R, A>) {
      rows = target;
    } else if (target != nullptr) {
      rows = memory + num_tiles_ * tile_size_ + kKeys * kTile;
    }
    if (rows != nullptr) std::fill_n(rows, count * num_dims, A{0});
    for (const ModalityPair<A>& pair : modality_pairs) {
      if (pair.student == student) run_pair(pair, first, count, memory, losses, rows);
    }
    if constexpr (!std::is_same_v<R, A>) {
      if (rows == nullptr) return;
      for (int64_t i = 0; i < count * num_dims; ++i) target[i] = narrow<R>(rows[i]);
    }
  }

  // Calls function(tile, its first sample within the block, its number of samples).
  template <class Function>
  void for_tiles(const ModalityPair<A>& pair, int64_t count, A* memory, Function&& function) const {
    for (int64_t i = 0; i < count; i += kTile, memory += tile_size_) {
      if (count - i > kTile / 2) {
        function(Tile<kVectors>(memory, pair.padded_dims), i, std::min<int64_t>(kTile, count - i));
      } else {
        function(Tile<kVectors / 2>(memory, pair.padded_dims), i, count - i);
      }
    }
  }

  // Adds the losses of a block with one teacher, and to `rows`, if not null, its residual.
  void run_pair(const ModalityPair<A>& pair, int64_t first, int64_t count, A* memory, A* losses,
                A* rows) const {
    A* const p = memory + num_tiles_ * tile_size_;
    const Matrix<T>& source = keys[pair.teacher];
    for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
      tile.load_queries(queries[pair.student], pair.dims, first + i, tile_count);
      tile.start();
    });
    for (int64_t key = 0; key < num_keys; key += kKeys) {
      if (is_interrupted(count * kKeys * pair.padded_dims)) return;
      const A* panels = pair.panels + key * pair.padded_dims;
      const int64_t tile_keys = std::min<int64_t>(kKeys, num_keys - key);
      for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
        typename decltype(tile)::V decay[tile.W / kLanes<A>];
        tile.compute_scores(pair, panels, tile_keys, scale, p);
        tile.weigh(p, offset + first + i - key, tile_keys, tile_count, options, decay);
        if (rows != nullptr) tile.accumulate_residual(pair, panels, tile_keys, p, key == 0, decay);
      });
    }
    for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
      for (int64_t lane = 0; lane < tile_count; ++lane) {
        losses[i + lane] += tile.loss(lane);
        tile.store_sums(lane, options, first + i + lane);
        if (rows == nullptr) continue;
        const T* positive_key = source.row(offset + first + i + lane);
        tile.add_residual(pair.dims, lane, positive_key, source.stride_dim, rows + (i + lane) * num_dims);
      }
    });
  }
};

// Writes the loss: the losses [M, N] summed over students, then reduced over samples.
template <class A>
void reduce(const A* losses, int64_t num_students, int64_t num_samples, Reduction reduction, A* loss) {
  double total = 0;
  for (int64_t i = 0; i < num_samples; ++i) {
    A sum = 0;
    for (int64_t m = 0; m < num_students; ++m) sum += losses[m * num_samples + i];
    if (reduction == Reduction::kNone) loss[i] = sum;
    total += sum;
  }
  if (reduction == Reduction::kNone) return;
  *loss = static_cast<A>(reduction == Reduction::kMean ? total / num_samples : total);
}

// Calls function(type, whether pairs of bfloat16 are multiplied, as a constant).
template <class Function>
void dispatch_sweep(const char* op, Dtype dtype, Function&& function) {
  dispatch_dtype(op, dtype, [&](auto* type) {
    if constexpr (std::is_same_v<std::remove_pointer_t<decltype(type)>, bfloat16> && MMFAST_ISA == 2) {
      if (has_bfloat16_pairs()) return function(type, std::true_type{});
    }
    function(type, std::false_type{});
  });
}

}  // namespace
}  // namespace mmfast

// The samples in the order of their classes, up to 64 rows of one class at a time, and tiles of their
// columns.
//
// What belongs to the class and what is summed then stays in registers, whatever C is, where a sweep in the
// order of the data reads and writes tables [C, D] at each sample. Rows come from anywhere: those of the next
// 64 are prefetched.
#pragma once

#include <vector>

#include "integers.h"
#include "vec.h"

namespace mmfast {
namespace {

// Rows of a class that go through registers at once; their tile of columns and the next stay in the L2 cache.
constexpr int64_t kBlock = 64;
// Rows of a class summed by one thread: what is kept of each, 16 bytes a column, is 1% of what it reads.
constexpr int64_t kRun = 512;

// Up to kRun samples of one class, as positions in ClassOrder::rows.
struct Run {
  int64_t label, begin, end;
};

// The samples class by class, within a class in the order of the data.
struct ClassOrder {
  std::vector<int64_t> rows;   // [N + kBlock], the last ones repeated for the prefetch
  std::vector<int64_t> first;  // [C + 1] position of each class's first sample
  std::vector<Run> runs;

  // A counting sort, by parts of the samples.
  ClassOrder(const int64_t* labels, int64_t num_samples, int64_t num_classes, int64_t num_threads)
      : rows(num_samples + kBlock), first(num_classes + 1) {
    const int64_t num_parts = std::clamp<int64_t>(num_samples >> 14, 1, num_threads);
    std::vector<int64_t> next(num_parts * num_classes);
    const auto for_part = [&](auto&& function) {
      parallel_for(num_parts, 1 << 17, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          function(next.data() + part * num_classes, num_samples * part / num_parts,
                   num_samples * (part + 1) / num_parts);
        }
      });
    };
    for_part([&](int64_t* count, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++count[labels[i]];
    });
    int64_t position = 0;
    for (int64_t k = 0; k < num_classes; ++k) {
      first[k] = position;
      for (int64_t part = 0; part < num_parts; ++part) {
        position += std::exchange(next[part * num_classes + k], position);
      }
      for (int64_t begin = first[k]; begin < position; begin += kRun) {
        runs.push_back({k, begin, std::min(begin + kRun, position)});
      }
    }
    first[num_classes] = position;
    for_part([&](int64_t* target, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows[target[labels[i]]++] = i;
    });
    std::fill(rows.begin() + num_samples, rows.end(), num_samples > 0 ? rows[num_samples - 1] : 0);
  }

  // Calls function(first run, last run) on threads, each with about as many rows.
  template <class Function>
  void for_runs(int64_t row_bytes, int64_t num_threads, Function&& function) const {
    const int64_t num_samples = first.back();
    const auto at = [&](int64_t position) {
      return std::lower_bound(runs.begin(), runs.end(), position,
                              [](const Run& run, int64_t p) { return run.begin < p; }) -
             runs.begin();
    };
    parallel_for(num_samples, row_bytes, num_threads,
                 [&](int64_t begin, int64_t end) { function(at(begin), at(end)); });
  }
};

// Calls function(position, count) for blocks of about equal size, none above kBlock.
template <class Function>
void for_blocks(const Run& run, Function&& function) {
  const int64_t count = run.end - run.begin, num_blocks = ceil_div(count, kBlock);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = count * block / num_blocks;
    function(run.begin + begin, count * (block + 1) / num_blocks - begin);
  }
}

// Vectors of columns in a tile: three sums or limits of each and the data fit the registers.
constexpr int kTile = MMFAST_ISA == 2 ? 8 : 4;

// Some whole vectors of columns.
template <class A, int num_vectors>
struct Tile {
  static constexpr int vectors = num_vectors, L = kLanes<A>;
  int64_t column;

  int64_t width() const { return vectors * L; }
  template <class T>
  Vec<A> load(const T* row, int j) const {
    return mmfast::load(row + column + j * L);
  }
  template <class T>
  void store(T* row, int j, Vec<A> value) const {
    mmfast::store(row + column + j * L, value);
  }
  template <class T>
  void prefetch(const T* row) const {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(row + column + j * L, 0, 2);
  }
};

// The last columns, fewer than a vector.
template <class A>
struct Edge {
  static constexpr int vectors = 1;
  int64_t column, count;

  int64_t width() const { return count; }
  template <class T>
  Vec<A> load(const T* row, int) const {
    return load_part(row + column, count);
  }
  template <class T>
  void store(T* row, int, Vec<A> value) const {
    store_part(row + column, value, count);
  }
  template <class T>
  void prefetch(const T* row) const {
    __builtin_prefetch(row + column, 0, 2);
  }
};

// Calls function(tile) for tiles that cover all columns.
template <class A, int vectors = kTile, class Function>
void for_tiles(int64_t num_dims, Function&& function, int64_t column = 0) {
  constexpr int64_t width = vectors * kLanes<A>;
  for (; column + width <= num_dims; column += width) function(Tile<A, vectors>{column});
  if constexpr (vectors > 1) {
    for_tiles<A, vectors / 2>(num_dims, function, column);
  } else if (column < num_dims) {
    function(Edge<A>{column, num_dims - column});
  }
}

// Calls function(rows, their number, tile) for blocks of a run and tiles that cover all columns.
template <class A, class Function>
void for_tiles_of_run(const ClassOrder& order, const Run& run, int64_t num_dims, Function&& function) {
  for_blocks(run, [&](int64_t position, int64_t count) {
    const int64_t* rows = order.rows.data() + position;
    for_tiles<A>(num_dims, [&](const auto& tile) { function(rows, count, tile); });
  });
}

}  // namespace
}  // namespace mmfast

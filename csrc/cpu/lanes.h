// Blocks of kLanes rows, transposed: row l becomes lane l of one vector per column, so that sums and maxima
// within a row are plain vector operations whatever its length.
#pragma once

#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

// Transposes a square of vectors in registers: every stage interleaves its two halves. Inlined, or the
// vectors would go through memory.
template <class V>
__attribute__((always_inline)) inline void transpose(V* x) {
  constexpr int L = sizeof(V) / sizeof(x[0][0]);
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
    V next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = zip<false>(x[i], x[L / 2 + i]);
      next[2 * i + 1] = zip<true>(x[i], x[L / 2 + i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = next[i];
  }
}

// A block of L rows, by halves of rows, two to a vector: vector i holds kColumns elements of row row_of(i)
// and as many of the row kBlock behind it. Shuffles that cross the 16-byte blocks of a register cost twice
// those that do not, and so this takes one crossing a vector, and none where a register has two blocks,
// instead of one for each stage of `transpose`.
template <class A>
struct RowHalves {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, kBlock = 16 / static_cast<int>(sizeof(A));
  // A register of one block holds a whole row.
  static constexpr int kColumns = kBlock == L ? L : L / 2;

  static constexpr int row_of(int i) { return i + i / kBlock * kBlock; }

  template <class T, class Rows>
  static V load_pair(const Rows& rows, int64_t column, int i) {
    if constexpr (kBlock == L) {
      return load(rows[i] + column);
    } else {
      return load_halves(rows[row_of(i)] + column, rows[row_of(i) + kBlock] + column);
    }
  }

  // The rows begin `count` elements apart.
  template <class T>
  static void store_pair(V x, T* rows, int64_t count, int i) {
    if constexpr (kBlock == L) {
      store(rows + i * count, x);
    } else {
      store_halves(rows + row_of(i) * count, rows + (row_of(i) + kBlock) * count, x);
    }
  }

  // Of the lower or the upper half of every block, `width` elements of a and b in turn.
  template <int width, bool upper, int... lane>
  static V interleave(V a, V b, std::integer_sequence<int, lane...>) {
    return shuffle<(lane / kBlock * kBlock + upper * kBlock / 2 + lane % kBlock / (2 * width) * width +
                    lane % width + lane / width % 2 * L)...>(a, b);
  }
  template <int width, bool upper>
  static V interleave(V a, V b) {
    return interleave<width, upper>(a, b, lanes_of<V>{});
  }

  // Blocks 0 and 2, or 1 and 3, of a, then those of b.
  template <bool odd, int... lane>
  static V every_other_block(V a, V b, std::integer_sequence<int, lane...>) {
    return shuffle<(lane % (L / 2) / kBlock * 2 * kBlock + odd * kBlock + lane % kBlock +
                    lane / (L / 2) * L)...>(a, b);
  }

  // Blocks 0 and 1, or 2 and 3, of a and b in turn.
  template <bool upper, int... lane>
  static V blocks_in_turn(V a, V b, std::integer_sequence<int, lane...>) {
    return shuffle<(lane / (2 * kBlock) * kBlock + upper * (L / 2) + lane % kBlock +
                    lane / kBlock % 2 * L)...>(a, b);
  }

  // The squares of kBlock by kBlock elements in kBlock vectors.
  __attribute__((always_inline)) static void transpose_blocks(V* x) {
    if constexpr (kBlock == 2) {
      const V a = x[0], b = x[1];
      x[0] = interleave<1, false>(a, b), x[1] = interleave<1, true>(a, b);
    } else {
      const V a = interleave<1, false>(x[0], x[1]), b = interleave<1, true>(x[0], x[1]),
              c = interleave<1, false>(x[2], x[3]), d = interleave<1, true>(x[2], x[3]);
      x[0] = interleave<2, false>(a, c), x[1] = interleave<2, true>(a, c);
      x[2] = interleave<2, false>(b, d), x[3] = interleave<2, true>(b, d);
    }
  }

  __attribute__((always_inline)) static void to_columns(V* x) {
    transpose_blocks(x);
    if constexpr (L == 4 * kBlock) {
      transpose_blocks(x + kBlock);
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) {
        const V a = x[i], b = x[kBlock + i];
        x[i] = every_other_block<false>(a, b, lanes_of<V>{});
        x[kBlock + i] = every_other_block<true>(a, b, lanes_of<V>{});
      }
    }
  }

  // The inverse of to_columns.
  __attribute__((always_inline)) static void to_rows(V* x) {
    if constexpr (L == 4 * kBlock) {
#pragma GCC unroll 4
      for (int i = 0; i < kBlock; ++i) {
        const V a = x[i], b = x[kBlock + i];
        x[i] = blocks_in_turn<false>(a, b, lanes_of<V>{});
        x[kBlock + i] = blocks_in_turn<true>(a, b, lanes_of<V>{});
      }
      transpose_blocks(x + kBlock);
    }
    transpose_blocks(x);
  }
};

// The reduction of each of L vectors, in lane i that of x[i], by an associative operation on vectors.
template <class A, class Operation>
__attribute__((always_inline)) inline Vec<A> reduce_lanes(Vec<A>* x, Operation&& operation) {
  using Halves = RowHalves<A>;
  constexpr int L = Halves::L, kBlock = Halves::kBlock;
#pragma GCC unroll 8
  for (int i = 0; i < L; i += 2)
    x[i / 2] = operation(Halves::template interleave<1, false>(x[i], x[i + 1]),
                         Halves::template interleave<1, true>(x[i], x[i + 1]));
  if constexpr (kBlock == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < L / 2; i += 2)
      x[i / 2] = operation(Halves::template interleave<2, false>(x[i], x[i + 1]),
                           Halves::template interleave<2, true>(x[i], x[i + 1]));
  }
  constexpr auto lanes = lanes_of<Vec<A>>{};
  if constexpr (L == 2 * kBlock) {
    x[0] = operation(Halves::template blocks_in_turn<false>(x[0], x[1], lanes),
                     Halves::template blocks_in_turn<true>(x[0], x[1], lanes));
  } else if constexpr (L == 4 * kBlock) {
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2)
      x[i / 2] = operation(Halves::template every_other_block<false>(x[i], x[i + 1], lanes),
                           Halves::template every_other_block<true>(x[i], x[i + 1], lanes));
    x[0] = operation(Halves::template every_other_block<false>(x[0], x[1], lanes),
                     Halves::template every_other_block<true>(x[0], x[1], lanes));
  }
  return x[0];
}

// Where the L rows of a block begin: as far apart as each other, or anywhere.
template <class T>
struct EvenRows {
  static constexpr int L = kLanes<accumulate_t<T>>;
  const T* first;
  int64_t stride;
  const T* operator[](int l) const { return first + l * stride; }
  const T* highest() const { return first + (L - 1) * stride; }
};
template <class T>
struct AnyRows {
  static constexpr int L = kLanes<accumulate_t<T>>;
  const T* rows[L];
  const T* operator[](int l) const { return rows[l]; }
  const T* highest() const { return *std::max_element(rows, rows + L); }
};

// Reads L rows of `count` elements `stride` apart into lanes[0] .. lanes[count - 1]. What lies between a
// row's end and `end`, the end of the memory that may be read, is read and left out. The rows `ahead`
// elements further are prefetched: no hardware prefetcher follows as many rows as there are lanes. What is
// stored is function(vector, column), which may be called twice for a column. Returns the function, whose
// state is in registers meanwhile.
template <class T, class Rows, class Function>
Function load_lanes(const Rows& rows, int64_t stride, int64_t count, const T* end, int64_t ahead,
                    Vec<accumulate_t<T>>* lanes,  // [count]
                    Function function) {
  using Halves = RowHalves<accumulate_t<T>>;
  constexpr int L = Halves::L, kColumns = Halves::kColumns;
  if (stride != 1) {
    for (int64_t c = 0; c < count; ++c) {
      for (int l = 0; l < L; ++l) lanes[c][l] = widen(rows[l][c * stride]);
      lanes[c] = function(lanes[c], c);
    }
    return function;
  }
  if (count < kColumns && end - rows.highest() < kColumns) {
    T padded[L][kColumns] = {};
    for (int l = 0; l < L; ++l) std::copy_n(rows[l], count, padded[l]);
    return load_lanes<T>(EvenRows<T>{padded[0], kColumns}, 1, count, padded[0] + L * kColumns, 0, lanes,
                         function);
  }
  Vec<accumulate_t<T>> x[kColumns];
  if (count < kColumns) {
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = Halves::template load_pair<T>(rows, 0, i);
    Halves::to_columns(x);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i)
      if (i < count) lanes[i] = function(x[i], i);
    return function;
  }
  for (int64_t next = 0; next < count; next += kColumns) {
    // The last columns overlap those before them.
    const int64_t c = std::min(next, count - kColumns);
    if (next % L == 0) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) __builtin_prefetch(rows[l] + c + ahead);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = Halves::template load_pair<T>(rows, c, i);
    Halves::to_columns(x);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) lanes[c + i] = function(x[i], c + i);
  }
  return function;
}

// The same of rows that begin `row_stride` apart. Where there are fewer than L, the last one is taken again.
template <class T, class Function>
Function load_lanes(const T* first, int64_t row_stride, int64_t num_rows, int64_t stride, int64_t count,
                    const T* end, Vec<accumulate_t<T>>* lanes, Function function) {
  constexpr int L = kLanes<accumulate_t<T>>;
  if (num_rows >= L)
    return load_lanes<T>(EvenRows<T>{first, row_stride}, stride, count, end, L * row_stride, lanes, function);
  AnyRows<T> rows;
  for (int64_t l = 0; l < L; ++l) rows.rows[l] = first + std::min(l, num_rows - 1) * row_stride;
  return load_lanes<T>(rows, stride, count, end, 0, lanes, function);
}

// What a function of the above may be that changes nothing.
struct AsTheyAre {
  template <class V>
  V operator()(V x, int64_t) const {
    return x;
  }
};

// Writes the first `num_rows` lanes of function(lanes[c], c) back as rows of `count` elements, one behind the
// other.
template <class T, class Function>
void store_lanes(const Vec<accumulate_t<T>>* lanes,  // [count]
                 int64_t count, int num_rows,
                 T* rows,  // [num_rows, count]
                 Function function) {
  using Halves = RowHalves<accumulate_t<T>>;
  constexpr int L = Halves::L, kColumns = Halves::kColumns;
  Vec<accumulate_t<T>> x[kColumns];
  if (count < kColumns) {
    for (int i = 0; i < kColumns; ++i) x[i] = i < count ? function(lanes[i], i) : Vec<accumulate_t<T>>{};
    Halves::to_rows(x);
    T halves[L][kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) Halves::store_pair(x[i], halves[0], kColumns, i);
    // Each row's surplus is overwritten by the next row; the last ones' must not reach what is behind them.
    int l = 0;
    for (; (num_rows - l) * count >= kColumns; ++l)
      std::memcpy(rows + l * count, halves[l], sizeof halves[l]);
    for (; l < num_rows; ++l)
      for (int64_t i = 0; i < count; ++i) rows[l * count + i] = halves[l][i];
    return;
  }
  for (int64_t next = 0; next < count; next += kColumns) {
    const int64_t c = std::min(next, count - kColumns);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = function(lanes[c + i], c + i);
    Halves::to_rows(x);
    if (num_rows == L) {
      // What the next block writes: a store that misses holds up those behind it.
      if (next % L == 0) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) __builtin_prefetch(rows + (L + l) * count + c, 1);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) Halves::store_pair(x[i], rows + c, count, i);
    } else {
      T halves[L][kColumns];
      for (int i = 0; i < kColumns; ++i) Halves::store_pair(x[i], halves[0], kColumns, i);
      for (int l = 0; l < num_rows; ++l) std::memcpy(rows + l * count + c, halves[l], sizeof halves[l]);
    }
  }
}

template <class T>
void store_lanes(const Vec<accumulate_t<T>>* lanes, int64_t count, int num_rows, T* rows) {
  store_lanes(lanes, count, num_rows, rows, AsTheyAre{});
}

// Calls function(begin, end) for groups of at most 64 of `count` elements: a sum of few groups' sums rounds
// less than one of as many terms.
template <class Function>
inline void for_groups(int64_t count, Function&& function) {
  constexpr int64_t kGroup = 64;
  for (int64_t begin = 0; begin < count; begin += kGroup) function(begin, std::min(begin + kGroup, count));
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

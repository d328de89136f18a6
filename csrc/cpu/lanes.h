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

  // Row l in the lowest lanes.
  static V row(const V* x, int l) {
    const V pair = x[l / (2 * kBlock) * kBlock + l % kBlock];
    return kBlock == L ? x[l] : l / kBlock % 2 == 0 ? pair : upper_half(pair, lanes_of<V>{});
  }
  template <int... lane>
  static V upper_half(V x, std::integer_sequence<int, lane...>) {
    return shuffle<((lane + L / 2) % L)...>(x, x);
  }

  // Row l, written alone.
  template <class T>
  __attribute__((always_inline)) static void store_row(const V* x, T* target, int l) {
    if constexpr (kBlock == L) {
      store(target, x[l]);
    } else if (l / kBlock % 2 == 0) {
      store_half<false>(target, x[l / (2 * kBlock) * kBlock + l % kBlock]);
    } else {
      store_half<true>(target, x[l / (2 * kBlock) * kBlock + l % kBlock]);
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

// Three vectors' lanes in turn, and back.
template <class V, int part, bool back, int... i>
inline V in_turn(V a, V b, V c, std::integer_sequence<int, i...>) {
  constexpr int L = sizeof...(i);
  if constexpr (back) {
    // Lane i is element 3 i + part of the three, one behind the other.
    const V ab = shuffle<((3 * i + part) % (2 * L))...>(a, b);
    return shuffle<(3 * i + part < 2 * L ? i : 3 * i + part - L)...>(ab, c);
  } else {
    // Element part * L + i of what is a[0], b[0], c[0], a[1], ...
    const V ab = shuffle<((part * L + i) / 3 + ((part * L + i) % 3 == 1) * L)...>(a, b);
    return shuffle<((part * L + i) % 3 == 2 ? L + (part * L + i) / 3 : i)...>(ab, c);
  }
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

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

// Reads L rows of `count` elements `stride` apart into lanes[0] .. lanes[count - 1]. What lies between a
// row's end and `end`, the end of the memory that may be read, is read and left out. The rows `ahead`
// elements further are prefetched: no hardware prefetcher follows as many rows as there are lanes.
template <class T>
void load_lanes(const T* const* rows,  // [L]
                int64_t stride, int64_t count, const T* end, int64_t ahead,
                Vec<accumulate_t<T>>* lanes) {  // [count]
  constexpr int L = kLanes<accumulate_t<T>>;
  if (stride != 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int l = 0; l < L; ++l) lanes[c][l] = widen(rows[l][c * stride]);
    return;
  }
  for (int64_t next = 0; next < count; next += L) {
    // The last square overlaps the one before it.
    const int64_t c = std::max<int64_t>(0, std::min(next, count - L));
    Vec<accumulate_t<T>> x[L];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) {
      __builtin_prefetch(rows[l] + c + ahead);
      if (__builtin_expect(end - rows[l] < L, 0)) {
        x[l] = load_part(rows[l], count);
      } else {
        x[l] = load(rows[l] + c);
      }
    }
    transpose(x);
    if (count - c >= L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) lanes[c + l] = x[l];
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l)
        if (l < count) lanes[l] = x[l];
    }
  }
}

// Writes the first `num_rows` lanes back as rows of `count` elements, one behind the other.
template <class T>
void store_lanes(const Vec<accumulate_t<T>>* lanes,  // [count]
                 int64_t count, int num_rows,
                 T* rows) {  // [num_rows, count]
  constexpr int L = kLanes<accumulate_t<T>>;
  Vec<accumulate_t<T>> x[L];
  if (count < L) {
    for (int l = 0; l < L; ++l) x[l] = l < count ? lanes[l] : Vec<accumulate_t<T>>{};
    transpose(x);
    // Each row's surplus is overwritten by the next; the last one's must not reach the neighbour's rows.
    T padded[L * L];
    for (int l = 0; l < L; ++l) store(padded + l * count, x[l]);
    std::memcpy(rows, padded, num_rows * count * sizeof(T));
    return;
  }
  for (int64_t next = 0; next < count; next += L) {
    const int64_t c = std::min(next, count - L);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) x[l] = lanes[c + l];
    transpose(x);
    if (num_rows == L) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(rows + l * count + c, x[l]);
    } else {
      for (int l = 0; l < num_rows; ++l) store(rows + l * count + c, x[l]);
    }
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

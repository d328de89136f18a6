// Rows of a matrix read into lanes and written back: L rows at a time, row l in lane l (lanes.h).
#pragma once

#include "lanes.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

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

// Calls visit(vector, column), in order, for each column of L rows of `count` elements `stride` apart. What
// lies between a row's end and `end`, the end of the memory that may be read, is read and left out. The rows
// `ahead` elements further are prefetched, unless that is 0: no hardware prefetcher follows as many rows as
// there are lanes.
// Inlined, so that what `visit` sums up stays in registers.
template <class T, class Rows, class Visit>
__attribute__((always_inline)) inline void visit_lanes(const Rows& rows, int64_t stride, int64_t count,
                                                       const T* end, int64_t ahead, Visit&& visit) {
  using V = Vec<accumulate_t<T>>;
  using Halves = RowHalves<accumulate_t<T>>;
  constexpr int L = Halves::L, kColumns = Halves::kColumns;
  if (stride != 1) {
    for (int64_t c = 0; c < count; ++c) {
      V column;
      for (int l = 0; l < L; ++l) column[l] = widen(rows[l][c * stride]);
      visit(column, c);
    }
    return;
  }
  V x[kColumns];
  if (count < kColumns) {
    if (end - rows.highest() < kColumns) {
      T padded[L][kColumns] = {};
      for (int l = 0; l < L; ++l) std::copy_n(rows[l], count, padded[l]);
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i)
        x[i] = Halves::template load_pair<T>(EvenRows<T>{padded[0], kColumns}, 0, i);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) x[i] = Halves::template load_pair<T>(rows, 0, i);
    }
    Halves::to_columns(x);
    V columns[kColumns];
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) columns[i] = x[i];
    for (int i = 0; i < count; ++i) visit(columns[i], i);
    return;
  }
  for (int64_t next = 0; next < count; next += kColumns) {
    const int64_t c = std::min(next, count - kColumns);
    if (ahead != 0 && next % L == 0) {
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) __builtin_prefetch(rows[l] + c + ahead);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = Halves::template load_pair<T>(rows, c, i);
    Halves::to_columns(x);
    if (c == next) {
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) visit(x[i], c + i);
    } else {
      // The last columns, read together with some of those before them. Unrolled behind conditions what is
      // summed up would not stay in registers.
      V columns[kColumns];
#pragma GCC unroll 8
      for (int i = 0; i < kColumns; ++i) columns[i] = x[i];
      for (int64_t i = next; i < count; ++i) visit(columns[i - c], i);
    }
  }
}

// Writes function(vector, column) of those columns into lanes[0] .. lanes[count - 1]. Returns the function,
// whose state is in registers meanwhile.
template <class T, class Rows, class Function>
Function load_lanes(const Rows& rows, int64_t stride, int64_t count, const T* end, int64_t ahead,
                    Vec<accumulate_t<T>>* lanes,  // [count]
                    Function function) {
  visit_lanes<T>(rows, stride, count, end, ahead,
                 [&](Vec<accumulate_t<T>> x, int64_t c) { lanes[c] = function(x, c); });
  return function;
}

// The same of rows that begin `row_stride` apart, those `ahead` rows further prefetched. Where there are
// fewer than L, the last one is taken again.
template <class T, class Function>
Function load_lanes(const T* first, int64_t row_stride, int64_t num_rows, int64_t stride, int64_t count,
                    const T* end, Vec<accumulate_t<T>>* lanes, Function function,
                    int64_t ahead = kLanes<accumulate_t<T>>) {
  constexpr int L = kLanes<accumulate_t<T>>;
  if (num_rows >= L)
    return load_lanes<T>(EvenRows<T>{first, row_stride}, stride, count, end, ahead * row_stride, lanes,
                         function);
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

// write_lanes of at most three columns of L rows.
template <class T, class Column>
__attribute__((always_inline)) inline void write_few_lanes(int64_t count, T* rows, Column&& column) {
  using V = Vec<accumulate_t<T>>;
  constexpr int L = kLanes<accumulate_t<T>>;
  constexpr auto lanes = lanes_of<V>{};
  const V a = column(0), b = column(count > 1), c = column(count - 1);
  if (count == 1) {
    store(rows, a);
  } else if (count == 2) {
    store(rows, zip<false>(a, b)), store(rows + L, zip<true>(a, b));
  } else {
    store(rows, in_turn<V, 0, false>(a, b, c, lanes));
    store(rows + L, in_turn<V, 1, false>(a, b, c, lanes));
    store(rows + 2 * L, in_turn<V, 2, false>(a, b, c, lanes));
  }
}

// The inverse: `count` columns of L rows, one behind the other, at most three.
template <class T>
inline void read_few_lanes(const T* rows, int64_t count,
                           Vec<accumulate_t<T>>* lanes) {  // [count]
  using V = Vec<accumulate_t<T>>;
  constexpr int L = kLanes<accumulate_t<T>>;
  constexpr auto order = lanes_of<V>{};
  const V a = load(rows);
  if (count == 1) {
    lanes[0] = a;
    return;
  }
  const V b = load(rows + L);
  if (count == 2) {
    lanes[0] = unzip<false>(a, b), lanes[1] = unzip<true>(a, b);
    return;
  }
  const V c = load(rows + 2 * L);
  lanes[0] = in_turn<V, 0, true>(a, b, c, order);
  lanes[1] = in_turn<V, 1, true>(a, b, c, order);
  lanes[2] = in_turn<V, 2, true>(a, b, c, order);
}

// Writes the first `num_rows` lanes of column(c), for c from 0 to count - 1, as rows of `count` elements, one
// behind the other. A column may be asked for twice. Rows `ahead` further, which the next call writes, are
// prefetched unless that is 0: a store that misses holds up those behind it.
template <class T, class Column>
__attribute__((always_inline)) inline void write_lanes(int64_t count, int num_rows,
                                                       T* rows,  // [num_rows, count]
                                                       Column&& column,
                                                       int64_t ahead = kLanes<accumulate_t<T>>) {
  using V = Vec<accumulate_t<T>>;
  using Halves = RowHalves<accumulate_t<T>>;
  constexpr int L = Halves::L, kColumns = Halves::kColumns;
  V x[kColumns];
  if (count == 0) return;
  if (count < kColumns) {
    if (num_rows == L && count <= 3) return write_few_lanes(count, rows, column);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = i < count ? column(i) : V{};
    Halves::to_rows(x);
    if (num_rows == L) {
      // Each row's surplus is overwritten by the next row; the last ones' must not reach what is behind them.
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        if ((L - l) * count >= kColumns) {
          Halves::store_row(x, rows + l * count, l);
        } else {
          store_part(rows + l * count, Halves::row(x, l), count);
        }
      }
      return;
    }
    T all[L][kColumns];
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) Halves::store_row(x, all[l], l);
    for (int l = 0; l < num_rows; ++l) std::copy_n(all[l], count, rows + l * count);
    return;
  }
  for (int64_t next = 0; next < count; next += kColumns) {
    const int64_t c = std::min(next, count - kColumns);
#pragma GCC unroll 8
    for (int i = 0; i < kColumns; ++i) x[i] = column(c + i);
    Halves::to_rows(x);
    if (num_rows == L) {
      if (ahead != 0 && next % L == 0) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) __builtin_prefetch(rows + (ahead + l) * count + c, 1);
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

// Writes the columns function(lanes[c], c).
template <class T, class Function>
void store_lanes(const Vec<accumulate_t<T>>* lanes,  // [count]
                 int64_t count, int num_rows,
                 T* rows,  // [num_rows, count]
                 Function function, int64_t ahead = kLanes<accumulate_t<T>>) {
  write_lanes(count, num_rows, rows, [&](int64_t c) { return function(lanes[c], c); }, ahead);
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

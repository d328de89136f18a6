// The exact interval of x, dimension by dimension, in which a class's centroid is the nearest.
//
// The centroids of each dimension are sorted in SIMD lanes, a dimension a lane, by Batcher's merge exchange;
// a limit is the smallest number nearer to the upper one of two neighbours.
#pragma once

#include <limits>
#include <vector>

#include "integers.h"
#include "vec.h"

namespace mmfast {
namespace {

// As many elements of any type as a vector has of float64: columns whose centroids are sorted at once.
constexpr int kColumns = kLanes<double>;
template <class T>
using Columns = typename VecOf<T, kColumns>::type;

// Sorts by value, equal ones by class, in each lane. Source: Knuth, "The art of computer programming",
// volume 3, algorithm 5.2.2M.
template <class K>
void sort_columns(Columns<K>* value, Columns<Int<K>>* order, int64_t count) {
  if (count < 2) return;
  int64_t top = 1;
  while (2 * top < count) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t r = 0, distance = p;
    for (int64_t q = top;; q /= 2) {
      for (int64_t i = 0; i + distance < count; ++i) {
        if ((i & p) != r) continue;
        const Columns<K> a = value[i], b = value[i + distance];
        const Columns<Int<K>> k = order[i], l = order[i + distance];
        const auto swap = (b < a) | ((b == a) & (l < k));
        value[i] = swap ? b : a, value[i + distance] = swap ? a : b;
        order[i] = swap ? l : k, order[i + distance] = swap ? k : l;
      }
      if (q == p) break;
      distance = q - p, r = p;
    }
  }
}

template <class A>
Columns<A> next_up(Columns<A> x) {
  // Adding zero makes +0 of -0.
  x += Columns<A>{};
  Columns<Int<A>> bits;
  std::memcpy(&bits, &x, sizeof x);
  bits += (bits >> (8 * sizeof(A) - 1)) | 1;
  Columns<A> next;
  std::memcpy(&next, &bits, sizeof x);
  return x == std::numeric_limits<A>::infinity() ? x : next;
}

// The smallest number of A nearer to b than to a, where a < b; a midpoint is b's if `tie_to_b`.
template <class A>
Columns<A> first_nearer(Vec<double> a, Vec<double> b, Vec<int64_t> tie_to_b) {
  // A sum out of range is that of two numbers so large that their halves are exact.
  const auto is_large = (a + b) - (a + b) != Vec<double>{};
  a = is_large ? 0.5 * a : a, b = is_large ? 0.5 * b : b;
  // The sum with its rounding error: doubling x is exact where halving the sum is not.
  const Vec<double> twice = a + b, b_rounded = twice - a;
  const Vec<double> error = (a - (twice - b_rounded)) + (b - b_rounded);
  const auto on_b_if_equal = (error < 0) | ((error == 0) & tie_to_b);
  const Vec<double> middle = is_large ? twice : 0.5 * twice;
  const auto end = __builtin_convertvector(middle, Columns<A>);
  const Vec<double> wide = __builtin_convertvector(end, Vec<double>), doubled = is_large ? wide : 2 * wide;
  const auto on_b = (doubled > twice) | ((doubled == twice) & on_b_if_equal);
  return __builtin_convertvector(on_b, Columns<Int<A>>) ? end : next_up<A>(end);
}

// The intervals of kColumns columns.
template <class K, class A>
class IntervalColumns {
 public:
  explicit IntervalColumns(int64_t num_classes)
      : num_classes_(num_classes),
        value_(num_classes),
        order_(num_classes),
        low_(num_classes),
        high_(num_classes) {}

  // Sorts the centroids [C, num_dims] of `width` columns, those that are not finite behind all others.
  void sort(const K* centroids, int64_t num_dims, int64_t width) {
    for (int64_t k = 0; k < num_classes_; ++k) {
      Columns<K> c = {};
      std::memcpy(&c, centroids + k * num_dims, width * sizeof(K));
      value_[k] = is_finite(c) ? c : Columns<K>{} + std::numeric_limits<K>::infinity();
      order_[k] = Columns<Int<K>>{} + static_cast<Int<K>>(k);
    }
    sort_columns<K>(value_.data(), order_.data(), num_classes_);
  }

  // Sets the limits between neighbours that differ.
  void find_limits() {
    // Of equal centroids only the lowest class, which comes first, can win.
    Columns<Int<K>> winner = order_[0];
    low_[0] = Columns<A>{} + std::numeric_limits<A>::lowest();
    for (int64_t k = 1; k < num_classes_; ++k) {
      const Columns<Int<K>> is_new = value_[k] != value_[k - 1];
      const Columns<Int<K>> next = is_new ? order_[k] : winner;
      const auto a = __builtin_convertvector(value_[k - 1], Vec<double>);
      const auto b = __builtin_convertvector(value_[k], Vec<double>);
      const auto limit = first_nearer<A>(a, b, __builtin_convertvector(next < winner, Vec<int64_t>));
      const auto is_limit = __builtin_convertvector(is_new, Columns<Int<A>>);
      high_[k - 1] = is_limit ? limit : Columns<A>{} + kInfinity;
      low_[k] = high_[k - 1];
      winner = next;
    }
    high_[num_classes_ - 1] = Columns<A>{} + kInfinity;
  }

  // Writes the intervals to low and high [C, num_dims]: empty ones for a centroid that is not finite, or that
  // equals one of a lower class.
  void write(A* low, A* high, int64_t num_dims, int64_t width) {
    for (int64_t k = num_classes_ - 1; k >= 0; --k) {
      if (k + 1 < num_classes_) high_[k] = high_[k] < high_[k + 1] ? high_[k] : high_[k + 1];
      auto wins = value_[k] != std::numeric_limits<K>::infinity();
      if (k > 0) wins &= value_[k] != value_[k - 1];
      const auto is_winner = __builtin_convertvector(wins, Columns<Int<A>>);
      const Columns<A> from = is_winner ? low_[k] : Columns<A>{} + kInfinity;
      const Columns<A> to = is_winner ? high_[k] : Columns<A>{} - kInfinity;
      for (int64_t i = 0; i < width; ++i) {
        low[order_[k][i] * num_dims + i] = from[i];
        high[order_[k][i] * num_dims + i] = to[i];
      }
    }
  }

 private:
  static constexpr A kInfinity = std::numeric_limits<A>::infinity();

  int64_t num_classes_;
  std::vector<Columns<K>> value_;       // [C] in ascending order
  std::vector<Columns<Int<K>>> order_;  // [C] their classes
  std::vector<Columns<A>> low_, high_;  // [C]
};

// Centroid k is nearest to x just when low[k] <= x < high[k]; of equal distances the lowest class is nearest.
template <class K, class A>
void class_intervals(const K* centroids, A* low, A* high, int64_t num_classes, int64_t num_dims,
                     int64_t num_threads) {
  parallel_for(ceil_div(num_dims, kColumns), 4 * sizeof(double) * num_classes * kColumns, num_threads,
               [&](int64_t begin, int64_t end) {
                 IntervalColumns<K, A> columns(num_classes);
                 for (int64_t d = begin * kColumns; d < std::min(end * kColumns, num_dims); d += kColumns) {
                   const int64_t width = std::min<int64_t>(kColumns, num_dims - d);
                   columns.sort(centroids + d, num_dims, width);
                   columns.find_limits();
                   columns.write(low + d, high + d, num_dims, width);
                 }
               });
}

}  // namespace
}  // namespace mmfast

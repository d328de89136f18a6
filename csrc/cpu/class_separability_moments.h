// Count, mean and variance of each class and column, and their gradient.
//
// Sums of x - shift and of its square over a block of rows, then Chan's merge in float64. The shift is the
// mean of the rows before, or of the first few, so (shift - mean)^2 is at most 7 times the variance and
// nothing cancels. Blocks and runs are cut by class only: the number of threads changes no bit.
#pragma once

#include <limits>
#include <vector>

#include "class_separability_order.h"

namespace mmfast {
namespace {

// Rows whose mean is the first shift.
constexpr int64_t kShiftRows = 8;

// Some samples of a class: their count, sum and squared deviations from their mean, [D].
struct Sums {
  int64_t count;
  double *sum, *squares;

  // Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances", 1979.
  template <class OtherSum, class OtherSquares>
  void merge(int64_t column, int64_t width, int64_t other_count, OtherSum&& other_sum,
             OtherSquares&& other_squares) const {
    const double scale = count == 0 ? 0 : 1.0 / count, other_scale = 1.0 / other_count;
    const double weight = static_cast<double>(count) * other_count / (count + other_count);
    for (int64_t i = 0; i < width; ++i) {
      const double added = other_sum(i), delta = added * other_scale - sum[column + i] * scale;
      // Among the first samples there is no mean to be away from, and an infinite one must not become NaN.
      squares[column + i] += other_squares(i) + (count == 0 ? 0 : delta * delta * weight);
      sum[column + i] += added;
    }
  }
};

// The mean of some rows, for a first shift. From the first row on: where all are equal, it is exact.
template <class T, class Tile, class V>
__attribute__((always_inline)) inline void mean_of_rows(const T* x, int64_t stride, const int64_t* rows,
                                                        int64_t count, const Tile& tile, V* mean) {
  constexpr int n = Tile::vectors;
  V first[n], sum[n] = {};
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) first[j] = tile.load(x + rows[0] * stride, j);
  for (int64_t r = 1; r < count; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sum[j] += tile.load(x + rows[r] * stride, j) - first[j];
  }
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) mean[j] = first[j] + sum[j] / static_cast<accumulate_t<T>>(count);
}

// The mean of the rows summed so far.
template <class A, class Tile>
__attribute__((always_inline)) inline void mean_so_far(const Sums& sums, const Tile& tile, Vec<A>* mean) {
  constexpr int n = Tile::vectors, L = kLanes<A>;
  A means[n * L] = {};
  const double scale = 1.0 / sums.count;
  for (int64_t i = 0; i < tile.width(); ++i) means[i] = static_cast<A>(sums.sum[tile.column + i] * scale);
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) mean[j] = load(means + j * L);
}

// Merges a tile of `count` rows, given the sums of their deviations from a shift and of the squares.
template <class A, class Tile>
__attribute__((always_inline)) inline void merge_block(const Sums& sums, int64_t count, const Tile& tile,
                                                       const Vec<A>* shift, const Vec<A>* total,
                                                       const Vec<A>* square) {
  constexpr int n = Tile::vectors, L = kLanes<A>;
  A shifts[n * L], totals[n * L], squares[n * L];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    store(shifts + j * L, shift[j]);
    store(totals + j * L, total[j]);
    store(squares + j * L, square[j]);
  }
  const double scale = 1.0 / count;
  sums.merge(
      tile.column, tile.width(), count,
      [&](int64_t i) { return static_cast<double>(count) * shifts[i] + totals[i]; },
      [&](int64_t i) {
        const double rest = squares[i] - static_cast<double>(totals[i]) * totals[i] * scale;
        // Less than infinity: squares left the range, and the sum's.
        return rest < 0 ? (is_finite(rest) ? 0 : -rest) : rest;
      });
}

// Adds `count` rows of a class to one tile of `sums`.
template <class T, class Tile>
void add_block(const T* x, int64_t stride, const int64_t* rows, int64_t count, const Tile& tile,
               const Sums& sums) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int n = Tile::vectors;
  V shift[n], total[n] = {}, square[n] = {};
  if (sums.count == 0) {
    mean_of_rows(x, stride, rows, std::min(count, kShiftRows), tile, shift);
  } else {
    mean_so_far<A>(sums, tile, shift);
  }
  // Infinity less infinity would make a NaN of an infinite mean.
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) shift[j] = is_finite(shift[j]) ? shift[j] : V{};
  for (int64_t r = 0; r < count; ++r) {
    tile.prefetch(x + rows[r + kBlock] * stride);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      const V deviation = tile.load(x + rows[r] * stride, j) - shift[j];
      total[j] += deviation;
      square[j] += deviation * deviation;
    }
  }
  merge_block<A>(sums, count, tile, shift, total, square);
}

// Mean and variance of a column of some samples whose sums overflowed on the way. Squares of float32 fit into
// float64; float64 is taken times a power of two, as only values near its ends come here.
template <class T, class A>
void moments_of_column(const T* x, int64_t stride, const int64_t* rows, int64_t count, A& mean, A& var) {
  constexpr double scale = std::is_same_v<T, double> ? 0x1p-600 : 1;
  const auto value = [&](int64_t r) { return scale * widen(x[rows[r] * stride]); };
  // Of equal values, which may be the largest there is, the mean is one of them.
  const double origin = is_finite(value(0)) ? value(0) : 0;
  double sum = 0, rest = 0, squares = 0;
  for (int64_t r = 0; r < count; ++r) sum += value(r) - origin;
  const double centre = origin + sum / count;
  // Of an infinite sample the mean is infinite, and the deviation from it NaN.
  for (int64_t r = 0; r < count; ++r) {
    const double deviation = value(r) - centre;
    rest += deviation, squares += deviation * deviation;
  }
  // What rounding left of the deviations belongs to the mean.
  const double share = rest / count;
  mean = static_cast<A>((is_finite(share) ? centre + share : centre) / scale);
  const double least = squares - rest * (rest / count);
  var = static_cast<A>((least < 0 ? 0 : least) / count / scale / scale);
}

// Writes mean and variance of columns [begin, end) of a class from the sums of its `samples`.
template <class T, class A>
void write_moments(const T* x, int64_t stride, const int64_t* rows, int64_t samples, const Sums& sums,
                   int64_t begin, int64_t end, A* mean, A* var) {
  if (samples == 0) {
    std::fill(mean + begin, mean + end, std::numeric_limits<A>::quiet_NaN());
    std::fill(var + begin, var + end, std::numeric_limits<A>::quiet_NaN());
    return;
  }
  // In one piece, which the compiler makes vectors of; what overflowed is looked for where there is any.
  Int<A> has_overflow = 0;
  for (int64_t d = begin; d < end; ++d) {
    const A m = static_cast<A>(sums.sum[d] / samples), v = static_cast<A>(sums.squares[d] / samples);
    mean[d] = m, var[d] = v;
    has_overflow |= (int{is_finite(m)} & int{is_finite(v)}) != 0 ? 0 : 1;
  }
  for (int64_t d = begin; has_overflow != 0 && d < end; ++d) {
    if (is_finite(mean[d]) && is_finite(var[d])) continue;
    moments_of_column(x + d, stride, rows, samples, mean[d], var[d]);
  }
}

// The sums of each run of a class, and their merge into moments.
template <class T>
class Moments {
 public:
  using A = accumulate_t<T>;

  Moments(const T* x, int64_t stride, int64_t num_dims, const ClassOrder& order)
      : x_(x),
        stride_(stride),
        num_dims_(num_dims),
        order_(order),
        memory_(2 * static_cast<int64_t>(order.runs.size()) * num_dims) {}

  // A thread takes some of the runs.
  void sum_runs(int64_t num_threads) {
    order_.for_runs(num_dims_ * sizeof(T), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) {
        Sums sums = sums_of(run);
        for_blocks(order_.runs[run], [&](int64_t position, int64_t rows) {
          for_tiles<A>(num_dims_, [&](const auto& tile) {
            add_block(x_, stride_, order_.rows.data() + position, rows, tile, sums);
          });
          sums.count += rows;
        });
      }
    });
  }

  // A thread takes some of the columns, of all classes [C, D].
  void write(A* mean, A* var, int64_t num_classes, int64_t num_threads) {
    const int64_t num_runs = order_.runs.size();
    parallel_for(num_dims_, 16 * (num_runs + num_classes), num_threads, [&](int64_t begin, int64_t end) {
      int64_t run = 0;
      for (int64_t k = 0; k < num_classes; ++k) {
        const int64_t* rows = order_.rows.data() + order_.first[k];
        const int64_t samples = order_.first[k + 1] - order_.first[k];
        const Sums sums = samples == 0 ? Sums{} : merge_runs(k, run, begin, end);
        write_moments(x_, stride_, rows, samples, sums, begin, end, mean + k * num_dims_,
                      var + k * num_dims_);
      }
    });
  }

 private:
  Sums sums_of(int64_t run) {
    double* sum = memory_.data() + 2 * run * num_dims_;
    return {0, sum, sum + num_dims_};
  }

  // Merges columns [begin, end) of the runs of class k, from `run` on, into the first; leaves `run` behind
  // them.
  Sums merge_runs(int64_t k, int64_t& run, int64_t begin, int64_t end) {
    const auto size = [&] { return order_.runs[run].end - order_.runs[run].begin; };
    Sums sums = sums_of(run);
    sums.count = size();
    for (++run; run < static_cast<int64_t>(order_.runs.size()) && order_.runs[run].label == k; ++run) {
      const Sums other = sums_of(run);
      const int64_t added = size();
      sums.merge(
          begin, end - begin, added, [&](int64_t i) { return other.sum[begin + i]; },
          [&](int64_t i) { return other.squares[begin + i]; });
      sums.count += added;
    }
    return sums;
  }

  const T* x_;  // [N, D]
  int64_t stride_, num_dims_;
  const ClassOrder& order_;
  std::vector<double> memory_;  // [runs, 2, D]
};

template <class T>
void moments_fwd(const T* x, const int64_t* labels, int64_t* count, accumulate_t<T>* mean,
                 accumulate_t<T>* var, int64_t num_samples, int64_t num_dims, int64_t num_classes,
                 int64_t stride, int64_t num_threads) {
  const ClassOrder order(labels, num_samples, num_classes, num_threads);
  Moments<T> moments(x, stride, num_dims, order);
  moments.sum_runs(num_threads);
  moments.write(mean, var, num_classes, num_threads);
  for (int64_t k = 0; k < num_classes; ++k) count[k] = order.first[k + 1] - order.first[k];
}

// dx = (dmean_y + 2 (x - mean_y) dvar_y) / count_y
template <class T>
void moments_bwd(const accumulate_t<T>* dmean, const accumulate_t<T>* dvar, const T* x, const int64_t* labels,
                 const int64_t* count, const accumulate_t<T>* mean, T* dx, int64_t num_samples,
                 int64_t num_dims, int64_t num_classes, int64_t stride, int64_t num_threads) {
  using A = accumulate_t<T>;
  const ClassOrder order(labels, num_samples, num_classes, num_threads);
  order.for_runs(2 * num_dims * sizeof(T), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const int64_t k = order.runs[run].label;
      const A scale = static_cast<A>(1.0 / count[k]);
      for_tiles_of_run<A>(order, order.runs[run], num_dims,
                          [&](const int64_t* rows, int64_t num_rows, const auto& tile) {
                            constexpr int n = std::decay_t<decltype(tile)>::vectors;
                            Vec<A> centre[n], offset[n], slope[n];
#pragma GCC unroll 8
                            for (int j = 0; j < n; ++j) {
                              centre[j] = tile.load(mean + k * num_dims, j);
                              offset[j] = tile.load(dmean + k * num_dims, j) * scale;
                              slope[j] = tile.load(dvar + k * num_dims, j) * (2 * scale);
                            }
                            for (int64_t r = 0; r < num_rows; ++r) {
                              tile.prefetch(x + rows[r + kBlock] * stride);
#pragma GCC unroll 8
                              for (int j = 0; j < n; ++j) {
                                const Vec<A> deviation = tile.load(x + rows[r] * stride, j) - centre[j];
                                tile.store(dx + rows[r] * num_dims, j, offset[j] + deviation * slope[j]);
                              }
                            }
                          });
    }
  });
}

}  // namespace
}  // namespace mmfast

// Kernels of the moments of classes; class_separability.cu launches them and says how they work.
#pragma once

#include "class_order.cuh"

namespace mmfast {
namespace {

// Rows that a warp loads before it uses the first; the mean of the first such rows is a segment's shift.
// Packs of eight elements want registers for their sums.
template <int n>
constexpr int kBatch = n == 8 ? 4 : 8;

// The type the means of some samples are kept in until all are merged: rounded to float32, means of values
// far from zero, as 1,000 is in float16, would differ by their rounding.
template <class T>
using part_mean_t = double;

// What remains of squares once the rounding that makes them negative is taken off; a sum that overflowed
// stays out of it.
template <class A>
__device__ A not_negative(A squares) {
  return squares < 0 ? (is_finite(squares) ? A(0) : -squares) : squares;
}

// Mean and sum of squared deviations of some samples of a class, in `n` columns.
template <class T, int n>
struct Moments {
  using A = accumulate_t<T>;
  using M = part_mean_t<T>;
  Pack<M, n> mean;
  Pack<A, n> squares;

  // Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances", 1979.
  __device__ void merge(int count, const M* other_mean, const A* other_squares, int other_count) {
    const A share = static_cast<A>(other_count) / static_cast<A>(count + other_count);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A delta = static_cast<A>(other_mean[i] - mean.values[i]);
      squares.values[i] += other_squares[i] + delta * delta * (static_cast<A>(count) * share);
      // An infinite mean must not become NaN.
      mean.values[i] += is_finite(delta) ? delta * share : other_mean[i];
    }
  }
};

// Sums of the deviations of some rows of one class from a shift near their mean: nothing cancels.
template <class T, int n>
struct Sums {
  using A = accumulate_t<T>;
  A shift[n], sum[n], squares[n];

  // Adds `count` rows of x, up to a warp's, whose first column is this thread's; `is_first` chooses the
  // shift.
  __device__ void add(const T* x, int64_t stride, const int64_t* rows, int count, bool is_first) {
    for (int start = 0; start < count; start += kBatch<n>) {
      const int batch = min(count - start, kBatch<n>);
      Pack<T, n> loaded[kBatch<n>];
#pragma unroll
      for (int r = 0; r < kBatch<n>; ++r) {
        if (r < batch) loaded[r] = load_pack<n>(x + rows[start + r] * stride);
      }
      if (is_first && start == 0) choose_shift(loaded, batch);
#pragma unroll
      for (int r = 0; r < kBatch<n>; ++r) {
        if (r >= batch) continue;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const A deviation = static_cast<A>(loaded[r].values[i]) - shift[i];
          sum[i] += deviation;
          squares[i] += deviation * deviation;
        }
      }
    }
  }

  __device__ Moments<T, n> moments(int count) const {
    const A scale = A(1) / static_cast<A>(count);
    Moments<T, n> result;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const A rest = squares[i] - sum[i] * (sum[i] * scale);
      result.mean.values[i] = static_cast<part_mean_t<T>>(shift[i]) + sum[i] * scale;
      result.squares.values[i] = not_negative(rest);
    }
    return result;
  }

 private:
  __device__ void choose_shift(const Pack<T, n> (&loaded)[kBatch<n>], int batch) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      // From the first row on: where all are equal, the shift is exact.
      const A first = static_cast<A>(loaded[0].values[i]);
      A total = 0;
#pragma unroll
      for (int r = 1; r < kBatch<n>; ++r) {
        if (r < batch) total += static_cast<A>(loaded[r].values[i]) - first;
      }
      total = first + total / static_cast<A>(batch);
      // Infinity less infinity would make a NaN of an infinite mean.
      shift[i] = is_finite(total) ? total : A(0);
      sum[i] = squares[i] = 0;
    }
  }
};

// What a block's warps leave of classes that began in the warp before: at most one segment a warp.
template <class T, int n>
struct Carried {
  part_mean_t<T> (&mean)[kWarps][kWarp * n];
  accumulate_t<T> (&squares)[kWarps][kWarp * n];
  int (&labels)[kWarps];
  int (&counts)[kWarps];

  __device__ __forceinline__ void put(int warp, int lane, int k, int count,
                                      const Moments<T, n>& moments) const {
    if (lane == 0) labels[warp] = k, counts[warp] = count;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      mean[warp][lane * n + i] = moments.mean.values[i];
      squares[warp][lane * n + i] = moments.squares.values[i];
    }
  }

  // Merges the rest of class k, from the warps it went on in.
  __device__ __forceinline__ void merge(int warp, int lane, int k, int count, Moments<T, n>& moments) const {
    for (int other = warp + 1; other < kWarps; ++other) {
      if (counts[other] == 0 || labels[other] != k) continue;
      moments.merge(count, mean[other] + lane * n, squares[other] + lane * n, counts[other]);
      count += counts[other];
    }
  }
};

// Sums a warp's stretch of the listed rows, segment by segment; write(moments, k) stores those of a whole
// one.
template <class T, int n, class Write>
__device__ __forceinline__ void sum_segments(const T* x, int64_t stride,
                                             const int64_t* rows,  // shared [num_listed]
                                             const int* classes,   // shared [num_listed]
                                             int num_listed, bool has_columns, const Carried<T, n>& carried,
                                             Write&& write) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int begin = num_listed * warp / kWarps, end = num_listed * (warp + 1) / kWarps;
  Sums<T, n> sums{};
  int k = -1, count = 0;
  // Whether the segment in hand continues the last one of a warp before.
  bool is_carried = false;
  if (lane == 0) carried.counts[warp] = 0;
  for (int position = begin; position < end;) {
    const int next = classes[position];
    if (next != k && count > 0) {
      const Moments<T, n> moments = sums.moments(count);
      is_carried ? carried.put(warp, lane, k, count, moments) : write(moments, k);
      count = 0;
    }
    if (count == 0) {
      k = next;
      is_carried = position == begin && begin > 0 && classes[begin - 1] == k;
    }
    const bool is_same = position + lane < end && classes[position + lane] == k;
    const unsigned others = ~__ballot_sync(kFullMask, is_same);
    const int length = others == 0 ? kWarp : __ffs(static_cast<int>(others)) - 1;
    if (has_columns) sums.add(x, stride, rows + position, length, count == 0);
    count += length;
    position += length;
  }
  Moments<T, n> moments;
  if (count > 0) {
    moments = sums.moments(count);
    if (is_carried) carried.put(warp, lane, k, count, moments);
  }
  __syncthreads();
  if (count == 0 || is_carried) return;
  carried.merge(warp, lane, k, count, moments);
  write(moments, k);
}

// A block's share of the moments: `rows_per_block` rows, and the columns of one warp's packs. Its part for
// class k lies at block * C + k where blocks order their rows, else at block + k: along rows in order of
// class each step to another part is one to another block, another class or both.
template <class T, int n>
__global__ void __launch_bounds__(kBlock, 2)
    class_moments_fwd_kernel(const T* __restrict__ x,                 // [N, D]
                             const int64_t* __restrict__ labels,      // [N], or null where `order` is given
                             const int64_t* __restrict__ order,       // [N] rows by class, or null
                             const int* __restrict__ sorted_labels,   // [N], or null
                             part_mean_t<T>* __restrict__ part_mean,  // [parts, D]
                             accumulate_t<T>* __restrict__ part_squares,  // [parts, D]
                             int* __restrict__ part_count,                // [blocks, C], or null
                             int64_t num_rows, int64_t num_columns, int num_classes, int64_t stride,
                             int rows_per_block, unsigned num_slabs) {
  MMFAST_SHARED(int64_t, rows, [kMaxRows]);
  MMFAST_SHARED(int, classes, [kMaxRows]);
  MMFAST_SHARED(int, places, [kWarps * kMaxOrderedClasses]);
  MMFAST_SHARED(int, num_known, [1]);
  MMFAST_SHARED(part_mean_t<T>, carried_mean, [kWarps][kWarp * n]);
  MMFAST_SHARED(accumulate_t<T>, carried_squares, [kWarps][kWarp * n]);
  MMFAST_SHARED(int, carried_class, [kWarps]);
  MMFAST_SHARED(int, carried_count, [kWarps]);

  const int lane = threadIdx.x % kWarp;
  const int64_t block = blockIdx.x / num_slabs, slab = blockIdx.x % num_slabs, first = block * rows_per_block;
  const int64_t column = (slab * kWarp + lane) * n;
  const bool has_columns = column < num_columns;
  int num_listed = static_cast<int>(min(num_rows - first, static_cast<int64_t>(rows_per_block)));
  if (order == nullptr) {
    // Each slab orders the same rows, and writes the same counts.
    num_listed = order_rows(labels, first, num_listed, num_classes, places, rows, classes, num_known,
                            part_count + block * num_classes);
  } else {
    for (int r = threadIdx.x; r < num_listed; r += kBlock) {
      rows[r] = order[first + r];
      classes[r] = sorted_labels[first + r];
    }
    __syncthreads();
  }
  const Carried<T, n> carried{carried_mean, carried_squares, carried_class, carried_count};
  sum_segments(x + column, stride, rows, classes, num_listed, has_columns, carried,
               [&](const Moments<T, n>& moments, int k) {
                 if (!has_columns || k < 0 || k >= num_classes) return;
                 const int64_t part = order == nullptr ? block * num_classes + k : block + k;
                 store_pack(part_mean + part * num_columns + column, moments.mean);
                 store_pack(part_squares + part * num_columns + column, moments.squares);
               });
}

// Moments of a class of one column in float64, from parts that come in a fixed order.
struct Total {
  int64_t count = 0;
  double origin = 0, sum = 0, squares = 0;

  __device__ void add(int64_t added, double mean, double added_squares) {
    if (added == 0) return;
    // Infinity less infinity would make a NaN of an infinite mean.
    if (count == 0 && is_finite(mean)) origin = mean;
    const double deviation = mean - origin, number = static_cast<double>(added);
    sum += number * deviation;
    squares += added_squares + number * deviation * deviation;
    count += added;
  }
  // Zero divided by zero: the NaN of a class without samples.
  __device__ double mean() const { return origin + sum / static_cast<double>(count); }
  __device__ double squares_about_mean() const {
    return not_negative(squares - sum / static_cast<double>(count) * sum);
  }
};

// Where in `sorted`, [N] in rising order, the labels from k on begin.
__device__ inline int64_t lower_bound(const int* sorted, int64_t size, int64_t k) {
  int64_t low = 0;
  while (low < size) {
    const int64_t middle = low + (size - low) / 2;
    if (sorted[middle] < k) {
      low = middle + 1;
    } else {
      size = middle;
    }
  }
  return low;
}

// Mean and variance of a column of class k whose sums overflowed on the way. Squares of
// float32 fit into float64; float64 is taken times a power of two, as only values near its ends come here.
template <class T>
__device__ void moments_in_range(const T* x, int64_t stride,
                                 const int64_t* labels,  // [N], of which those that are k count; or null
                                 const int64_t* order,   // the rows of the class, or null
                                 int64_t num_rows, int64_t k, int64_t count, accumulate_t<T>& mean,
                                 accumulate_t<T>& var) {
  constexpr double scale = std::is_same_v<T, double> ? 0x1p-600 : 1;
  const auto for_numbers = [&](auto&& function) {
    for (int64_t r = 0; r < num_rows; ++r) {
      if (order == nullptr && labels[r] != k) continue;
      function(scale * static_cast<double>(
                           static_cast<accumulate_t<T>>(x[(order == nullptr ? r : order[r]) * stride])));
    }
  };
  // Of equal values, which may be the largest there is, the mean is one of them.
  const double number = static_cast<double>(count);
  double origin = INFINITY, sum = 0, rest = 0, squares = 0;
  for_numbers([&](double value) {
    if (!is_finite(origin)) origin = is_finite(value) ? value : 0;
    sum += value - origin;
  });
  const double centre = origin + sum / number;
  // Of an infinite sample the mean is infinite, and the deviation from it NaN.
  for_numbers([&](double value) { rest += value - centre, squares += (value - centre) * (value - centre); });
  // What rounding left of the deviations belongs to the mean.
  const double share = rest / number;
  mean = static_cast<accumulate_t<T>>((is_finite(share) ? centre + share : centre) / scale);
  var = static_cast<accumulate_t<T>>(not_negative(squares - rest * share) / number / scale / scale);
}

// Where the parts of one class lie: in blocks `begin` to `end`.
struct ClassParts {
  int64_t first = 0, last = 0;  // its rows, where they come in order of class
  int64_t begin = 0, end;

  __device__ ClassParts(const int* sorted_labels, int64_t num_rows, int64_t k, int64_t num_blocks,
                        int rows_per_block)
      : end(num_blocks) {
    if (sorted_labels == nullptr) return;
    first = lower_bound(sorted_labels, num_rows, k);
    last = lower_bound(sorted_labels, num_rows, k + 1);
    begin = first / rows_per_block;
    end = first == last ? begin : (last - 1) / rows_per_block + 1;
  }
};

// Merges the parts of class k that this warp takes, one column a lane.
template <class T>
__device__ __forceinline__ Total merge_parts(const part_mean_t<T>* part_mean,
                                             const accumulate_t<T>* part_squares, const int* part_count,
                                             bool is_sorted, const ClassParts& parts, int64_t k,
                                             int64_t column, int64_t num_columns, int num_classes,
                                             int rows_per_block) {
  constexpr int batch = 4;
  const int warp = threadIdx.x / kWarp;
  const bool has_column = column < num_columns;
  Total total;
  for (int64_t start = parts.begin + warp; start < parts.end; start += batch * kWarps) {
    int64_t added[batch];
    part_mean_t<T> means_of[batch];
    accumulate_t<T> squares_of[batch];
    // All loads first. A part without samples is loaded, too, and left out.
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      const int64_t block = start + i * kWarps;
      added[i] = 0;
      if (block >= parts.end) continue;
      if (is_sorted) {
        added[i] = min(parts.last, (block + 1) * rows_per_block) - max(parts.first, block * rows_per_block);
      } else {
        added[i] = part_count[block * num_classes + k];
      }
      if (!has_column) continue;
      const int64_t at = (is_sorted ? block + k : block * num_classes + k) * num_columns + column;
      means_of[i] = part_mean[at];
      squares_of[i] = part_squares[at];
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      if (has_column) {
        total.add(added[i], means_of[i], squares_of[i]);
      } else {
        total.count += added[i];
      }
    }
  }
  return total;
}

// Merges the parts of one class, a column a lane; the warps share the parts.
template <class T>
__global__ void __launch_bounds__(kBlock, 2)
    class_moments_merge_kernel(const part_mean_t<T>* __restrict__ part_mean,      // [parts, D]
                               const accumulate_t<T>* __restrict__ part_squares,  // [parts, D]
                               const int* __restrict__ part_count,                // [blocks, C], or null
                               const int* __restrict__ sorted_labels,             // [N], or null
                               const T* __restrict__ x,                           // [N, D]
                               const int64_t* __restrict__ labels,                // [N], or null
                               const int64_t* __restrict__ order,                 // [N], or null
                               int64_t stride,
                               int64_t* __restrict__ count,         // [C]
                               accumulate_t<T>* __restrict__ mean,  // [C, D]
                               accumulate_t<T>* __restrict__ var,   // [C, D]
                               int64_t num_rows, int64_t num_columns, int num_classes, int64_t num_blocks,
                               int rows_per_block, unsigned num_groups) {
  using A = accumulate_t<T>;
  MMFAST_SHARED(int64_t, counts, [kWarps][kWarp]);
  MMFAST_SHARED(double, means, [kWarps][kWarp]);
  MMFAST_SHARED(double, squares, [kWarps][kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t k = blockIdx.x / num_groups, group = blockIdx.x % num_groups, column = group * kWarp + lane;
  const bool has_column = column < num_columns;

  const ClassParts parts(sorted_labels, num_rows, k, num_blocks, rows_per_block);
  const Total total = merge_parts<T>(part_mean, part_squares, part_count, sorted_labels != nullptr, parts, k,
                                     column, num_columns, num_classes, rows_per_block);
  counts[warp][lane] = total.count;
  means[warp][lane] = total.mean();
  squares[warp][lane] = total.squares_about_mean();
  __syncthreads();
  if (warp != 0) return;
  Total all;
  for (int w = 0; w < kWarps; ++w) all.add(counts[w][lane], means[w][lane], squares[w][lane]);
  if (lane == 0 && column == 0) count[k] = all.count;
  if (!has_column) return;
  A class_mean = static_cast<A>(all.mean());
  A class_var = static_cast<A>(all.squares_about_mean() / static_cast<double>(all.count));
  if (all.count > 0 && !(is_finite(class_mean) && is_finite(class_var))) {
    moments_in_range(x + column, stride, labels, order == nullptr ? order : order + parts.first,
                     order == nullptr ? num_rows : parts.last - parts.first, k, all.count, class_mean,
                     class_var);
  }
  mean[k * num_columns + column] = class_mean;
  var[k * num_columns + column] = class_var;
}

}  // namespace
}  // namespace mmfast

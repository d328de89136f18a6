// In which interval each class's centroid is the nearest one, dimension by dimension, exactly.
#pragma once

#include "class_order.cuh"

namespace mmfast {
namespace {

// The next larger value; infinity's is itself. Adding zero makes +0 of -0.
__device__ inline float next_up(float x) {
  if (x == kInfinity<float>) return x;
  const int bits = __float_as_int(x + 0.0f);
  return __int_as_float(bits + (bits < 0 ? -1 : 1));
}
__device__ inline double next_up(double x) {
  if (x == kInfinity<double>) return x;
  const long long bits = __double_as_longlong(x + 0.0);
  return __longlong_as_double(bits + (bits < 0 ? -1 : 1));
}

// The smallest value of A nearer to b than to a, where a < b; a midpoint is b's if `tie_to_b`.
template <class A>
__device__ A first_nearer(double a, double b, bool tie_to_b) {
  // A sum out of range is that of two values so large that their halves are exact.
  const bool is_large = !is_finite(a + b);
  if (is_large) a *= 0.5, b *= 0.5;
  // The sum with its rounding error: doubling x is exact where halving the sum is not.
  const double twice = a + b, b_rounded = twice - a;
  const double error = (a - (twice - b_rounded)) + (b - b_rounded);
  const A end = static_cast<A>(is_large ? twice : 0.5 * twice);
  const double doubled = (is_large ? 1 : 2) * static_cast<double>(end);
  const bool is_on_b = doubled > twice || (doubled == twice && (error < 0 || (error == 0 && tie_to_b)));
  return is_on_b ? end : next_up(end);
}

// Classes of a thread of the intervals, columns and groups of classes of a block.
constexpr int kClassesPerThread = 2, kIntervalColumns = 64, kClassGroups = kBlock / kIntervalColumns;

// Centroid k is nearest to x just when low[k] <= x < high[k]; of equal distances the lowest class is nearest.
template <class K, class A>
__global__ void __launch_bounds__(kBlock, 2)
    class_intervals_kernel(const K* __restrict__ centroids,  // [C, D]
                           A* __restrict__ low,              // [C, D]
                           A* __restrict__ high,             // [C, D]
                           int num_classes, int64_t num_columns, unsigned num_slabs) {
  const K infinity = kInfinity<K>;
  const int64_t slab = blockIdx.x % num_slabs;
  const int64_t column = slab * kIntervalColumns + threadIdx.x % kIntervalColumns;
  const int first = static_cast<int>(blockIdx.x / num_slabs * kClassGroups + threadIdx.x / kIntervalColumns) *
                    kClassesPerThread;
  if (column >= num_columns || first >= num_classes) return;
  const auto centroid = [&](int k) {
    const K c = centroids[k * num_columns + column];
    return is_finite(c) ? c : infinity;
  };
  K centroid_here[kClassesPerThread], below[kClassesPerThread], above[kClassesPerThread];
#pragma unroll
  for (int i = 0; i < kClassesPerThread; ++i) {
    centroid_here[i] = first + i < num_classes ? centroid(first + i) : infinity;
    below[i] = -infinity, above[i] = infinity;
  }
#pragma unroll 4
  for (int k = 0; k < num_classes; ++k) {
    const K other = centroid(k);
#pragma unroll
    for (int i = 0; i < kClassesPerThread; ++i) {
      if (other < centroid_here[i]) below[i] = max(below[i], other);
      if (other > centroid_here[i]) above[i] = min(above[i], other);
    }
  }
  // Of those that share a centroid only the lowest class can win: who among the lower ones holds these three?
  bool is_beaten[kClassesPerThread] = {}, is_below_lower[kClassesPerThread] = {},
       is_above_lower[kClassesPerThread] = {};
  const auto compare = [&](int i, K other) {
    is_beaten[i] = is_beaten[i] || other == centroid_here[i];
    is_below_lower[i] = is_below_lower[i] || other == below[i];
    is_above_lower[i] = is_above_lower[i] || other == above[i];
  };
#pragma unroll 4
  for (int k = 0; k < first; ++k) {
    const K other = centroid(k);
#pragma unroll
    for (int i = 0; i < kClassesPerThread; ++i) compare(i, other);
  }
#pragma unroll
  for (int i = 0; i < kClassesPerThread; ++i) {
#pragma unroll
    for (int j = 0; j < i; ++j) compare(i, centroid_here[j]);
  }
#pragma unroll
  for (int i = 0; i < kClassesPerThread; ++i) {
    const int k = first + i;
    if (k >= num_classes) continue;
    // Empty, where the centroid is not finite or a lower class's.
    A from = kInfinity<A>, to = -kInfinity<A>;
    if (!is_beaten[i] && centroid_here[i] < infinity) {
      from = below[i] == -infinity ? kLowest<A>
                                   : first_nearer<A>(below[i], centroid_here[i], !is_below_lower[i]);
      to = above[i] == infinity ? kInfinity<A>
                                : first_nearer<A>(centroid_here[i], above[i], is_above_lower[i]);
    }
    low[k * num_columns + column] = from;
    high[k * num_columns + column] = to;
  }
}

}  // namespace
}  // namespace mmfast

// Moments of classes, their gradient, and in how many samples the centroid of their class is nearest,
// dimension by dimension.
//
// All three first order the samples by class and take up to 64 rows of one class through registers, a tile of
// columns at a time (class_separability_order.h). A sample is a hit where low <= x < high, the interval in
// which its class's centroid is nearest (class_separability_intervals.h).
//
// Floors: N D elements read once (gradient: read and written) over the bandwidth of memory; 4 operations an
// element for the moments, 3 for hits and gradient, and a sort of C centroids, about C log^2 C / 4 exchanges
// a dimension. Measured: bench/results/class_separability.md.
#include <limits>
#include <vector>

#include "class_separability_intervals.h"
#include "class_separability_moments.h"
#include "class_separability_operands.h"
#include "codes.h"
#include "labels.h"

namespace mmfast {
namespace {

// In how many samples low[label] <= x < high[label], dimension by dimension.
template <class T>
void dimension_hits(const T* x, const int64_t* labels, const accumulate_t<T>* low,
                    const accumulate_t<T>* high, int64_t* hits, int64_t num_samples, int64_t num_dims,
                    int64_t num_classes, int64_t stride, int64_t num_threads) {
  using A = accumulate_t<T>;
  const ClassOrder order(labels, num_samples, num_classes, num_threads);
  order.for_runs(num_dims * sizeof(T), num_threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> thread_hits(num_dims);
    for (int64_t run = begin; run < end; ++run) {
      const int64_t k = order.runs[run].label;
      for_tiles_of_run<A>(order, order.runs[run], num_dims,
                          [&](const int64_t* rows, int64_t num_rows, const auto& tile) {
                            constexpr int n = std::decay_t<decltype(tile)>::vectors, L = kLanes<A>;
                            Vec<A> from[n], to[n];
                            Vec<Int<A>> inside[n] = {};
                            Int<A> counts[n * L];
#pragma GCC unroll 8
                            for (int j = 0; j < n; ++j) {
                              from[j] = tile.load(low + k * num_dims, j);
                              to[j] = tile.load(high + k * num_dims, j);
                            }
                            for (int64_t r = 0; r < num_rows; ++r) {
                              tile.prefetch(x + rows[r + kBlock] * stride);
#pragma GCC unroll 8
                              for (int j = 0; j < n; ++j) {
                                const Vec<A> value = tile.load(x + rows[r] * stride, j);
                                inside[j] -= (value >= from[j]) & (value < to[j]);
                              }
                            }
                            std::memcpy(counts, inside, sizeof counts);
                            for (int64_t i = 0; i < tile.width(); ++i)
                              thread_hits[tile.column + i] += counts[i];
                          });
    }
    for (int64_t d = 0; d < num_dims; ++d) {
#pragma omp atomic
      hits[d] += thread_hits[d];
    }
  });
}

// All three refuse labels outside [0, C).
void class_separability_moments_fwd(const Strided<2>& features,  // [N, D], rows contiguous
                                    const int64_t* labels,       // [N]
                                    int64_t num_classes, const ClassMoments& out, Dtype dtype,
                                    int64_t num_threads) {
  check_labels(labels, features.sizes[0], num_classes, num_threads);
  dispatch_dtype("class_separability_moments_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    moments_fwd(static_cast<const T*>(features.data), labels, out.count, static_cast<A*>(out.mean),
                static_cast<A*>(out.var), features.sizes[0], features.sizes[1], num_classes,
                features.strides[0], num_threads);
  });
}

void class_separability_moments_bwd(const ClassGradients& gradients,
                                    const Strided<2>& features,  // [N, D], rows contiguous
                                    const int64_t* labels,       // [N]
                                    void* dfeatures,             // [N, D] contiguous
                                    int64_t num_classes, Dtype dtype, int64_t num_threads) {
  check_labels(labels, features.sizes[0], num_classes, num_threads);
  dispatch_dtype("class_separability_moments_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    moments_bwd(static_cast<const A*>(gradients.dmean), static_cast<const A*>(gradients.dvar),
                static_cast<const T*>(features.data), labels, gradients.count,
                static_cast<const A*>(gradients.mean), static_cast<T*>(dfeatures), features.sizes[0],
                features.sizes[1], num_classes, features.strides[0], num_threads);
  });
}

// Whether there is a class that can be the nearest: one centroid that is a number is enough.
template <class A>
bool has_finite(const A* centroids, int64_t size) {
  return size == 0 || std::any_of(centroids, centroids + size, [](A c) { return c - c == 0; });
}

void class_separability_hits(const Strided<2>& features,  // [N, D], rows contiguous
                             const int64_t* labels,       // [N]
                             const void* centroids,       // [C, D] contiguous, float32 or float64
                             Dtype centroid_dtype, int64_t num_classes,
                             int64_t* hits,  // [D], written
                             Dtype dtype, int64_t num_threads) {
  const int64_t num_samples = features.sizes[0], num_dims = features.sizes[1];
  check_labels(labels, num_samples, num_classes, num_threads);
  dispatch_dtype("class_separability_hits", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const bool is_double = centroid_dtype == Dtype::kFloat64;
    const int64_t size = num_classes * num_dims;
    if (is_double ? !has_finite(static_cast<const double*>(centroids), size)
                  : !has_finite(static_cast<const float*>(centroids), size)) {
      throw std::invalid_argument("centroids must hold a class with samples, got none finite in [" +
                                  std::to_string(num_classes) + ", " + std::to_string(num_dims) + "]");
    }
    std::fill(hits, hits + num_dims, 0);
    std::vector<A> low(num_classes * num_dims), high(num_classes * num_dims);
    if (is_double) {
      class_intervals(static_cast<const double*>(centroids), low.data(), high.data(), num_classes, num_dims,
                      num_threads);
    } else {
      class_intervals(static_cast<const float*>(centroids), low.data(), high.data(), num_classes, num_dims,
                      num_threads);
    }
    dimension_hits(static_cast<const T*>(features.data), labels, low.data(), high.data(), hits, num_samples,
                   num_dims, num_classes, features.strides[0], num_threads);
  });
}

MMFAST_REGISTER(class_separability_moments_fwd)
MMFAST_REGISTER(class_separability_moments_bwd)
MMFAST_REGISTER(class_separability_hits)

}  // namespace
}  // namespace mmfast

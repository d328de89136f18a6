// A tile of samples and its nearest centroids: samples lie in the SIMD lanes, so that the argmin needs no
// reduction over lanes and clusters need no padding.
#pragma once

#include <limits>
#include <vector>

#include "lanes.h"

namespace mmfast {
namespace {

// Vectors of samples, and centroids, whose products are in registers at once.
constexpr int kSampleVectors = 3;
constexpr int kCentroids = MMFAST_ISA == 2 ? 8 : 4;
// Dimensions of a tile that are transposed at once: 24 KB with AVX-512, so that they stay in the L1 cache.
constexpr int64_t kDepth = 128;

// The features less their mean over all samples, in the type of accumulation.
template <class T>
struct Centred {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>;
  const T* features;  // [N, D], rows `stride` elements apart
  int64_t stride, num_dims;
  std::vector<A> offset;  // [width]

  const T* row(int64_t i) const { return features + i * stride; }
  // L dimensions from d on; those past the last are zero.
  Vec<A> at(const T* row, int64_t d) const {
    if (d + L <= num_dims) return load(row + d) - load(offset.data() + d);
    return load_part(row + d, std::max<int64_t>(0, num_dims - d)) - load(offset.data() + d);
  }
  A squared_distance(int64_t i, const A* centroid) const {
    Vec<A> sum = {};
    for (int64_t d = 0; d < num_dims; d += L) {
      const Vec<A> difference = at(row(i), d) - load(centroid + d);
      sum += difference * difference;
    }
    A total = 0;
    for (int lane = 0; lane < L; ++lane) total += sum[lane];
    return total;
  }
};

// A tile's samples in lanes, with their scores |c|^2 / 2 - x.c and the nearest centroid so far.
template <class T>
struct Tile {
  using A = accumulate_t<T>;
  static constexpr int L = kLanes<A>, samples = kSampleVectors * L;
  std::vector<A> columns;  // [kDepth, samples]
  std::vector<A> scores;   // [K, samples], of the dimensions before
  Vec<A> lowest[kSampleVectors];
  Vec<Int<A>> nearest[kSampleVectors];

  explicit Tile(int64_t num_clusters) : columns(kDepth * samples), scores(num_clusters * samples) {}

  // Of fewer samples than a tile's the last one is repeated.
  __attribute__((noinline)) void load_columns(const Centred<T>& x, int64_t begin, int64_t count,
                                              int64_t first_dim, int64_t end_dim) {
    for (int v = 0; v < kSampleVectors; ++v) {
      for (int64_t d = first_dim; d < end_dim; d += L) {
        Vec<A> rows[L];
        const auto row = [&](int i) { return x.row(begin + std::min<int64_t>(v * L + i, count - 1)); };
        if (d + L <= x.num_dims) {
          const Vec<A> offset = load(x.offset.data() + d);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            // The next tile's, into L2 alone: L1 has too few outstanding misses, and holds this tile.
            __builtin_prefetch(row(i) + samples * x.stride + d, 0, 2);
            rows[i] = load(row(i) + d) - offset;
          }
        } else {
          for (int i = 0; i < L; ++i) rows[i] = x.at(row(i), d);
        }
        transpose(rows);
        A* target = columns.data() + (d - first_dim) * samples + v * L;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(target + i * samples, rows[i]);
      }
    }
  }

  void start() {
    for (int v = 0; v < kSampleVectors; ++v) {
      lowest[v] = Vec<A>{} + std::numeric_limits<A>::infinity();
      nearest[v] = Vec<Int<A>>{};
    }
  }

  // Adds `depth` dimensions to the scores of n centroids from number `first` on, and after the last dimension
  // takes the nearest. Not inlined: the registers are all taken.
  template <int n>
  __attribute__((noinline)) void compare(const A* centroids,  // [depth, n]
                                         const A* half_norms, int64_t first, int64_t depth, bool is_first,
                                         bool is_last) {
    Vec<A> s[n][kSampleVectors];
    A* kept = scores.data() + first * samples;
    if (is_first) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) s[k][0] = s[k][1] = s[k][2] = Vec<A>{} + half_norms[first + k];
    } else {
      load_scores(kept, s);
    }
    const A* x = columns.data();
    for (int64_t d = 0; d < depth; ++d, x += samples, centroids += n) {
      const Vec<A> x0 = load(x), x1 = load(x + L), x2 = load(x + 2 * L);
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
        const A c = centroids[k];
        s[k][0] -= x0 * c, s[k][1] -= x1 * c, s[k][2] -= x2 * c;
      }
    }
    if (is_last) {
      take_nearest(first, s);
    } else {
      store_scores(s, kept);
    }
  }

  template <int n = kCentroids, class... Arguments>
  void compare_some(int64_t count, const Arguments&... arguments) {
    if (count == n) return compare<n>(arguments...);
    if constexpr (n > 1) compare_some<n - 1>(count, arguments...);
  }

 private:
  template <int n>
  static __attribute__((always_inline)) void load_scores(const A* source, Vec<A> (&s)[n][kSampleVectors]) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < kSampleVectors; ++v) s[k][v] = load(source + (k * kSampleVectors + v) * L);
    }
  }

  template <int n>
  static __attribute__((always_inline)) void store_scores(const Vec<A> (&s)[n][kSampleVectors], A* target) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < kSampleVectors; ++v) store(target + (k * kSampleVectors + v) * L, s[k][v]);
    }
  }

  // Of equal distances the lowest centroid stays.
  template <int n>
  __attribute__((always_inline)) void take_nearest(int64_t first, const Vec<A> (&s)[n][kSampleVectors]) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      const Vec<Int<A>> number = Vec<Int<A>>{} + static_cast<Int<A>>(first + k);
#pragma GCC unroll 3
      for (int v = 0; v < kSampleVectors; ++v) {
        const auto closer = s[k][v] < lowest[v];
        lowest[v] = closer ? s[k][v] : lowest[v];
        nearest[v] = closer ? number : nearest[v];
      }
    }
  }
};

}  // namespace
}  // namespace mmfast

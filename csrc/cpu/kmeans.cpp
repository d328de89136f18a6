// Lloyd's iterations: every sample to its nearest centroid, every centroid to the mean of its samples; and
// the purity of a clustering.
//
// An iteration reads the samples once, in place: those of a tile, three vectors of them, are centred, widened
// and transposed in registers, so that SIMD lanes are samples; |c|^2 / 2 - x.c for up to eight centroids at a
// time stays in registers and so does the argmin, which needs no reduction over lanes and no padding of the
// clusters; then the rows, still in the cache, are added to their clusters.
// Sums are float32 over 512 samples and float64 over all, merged in an order that depends on the sizes alone:
// the number of threads changes no bit.
//
// An iteration must read N D numbers and do 2 N D K operations. At N = 20,000, D = 64, float32 that is 5 MB,
// 0.26 ms at 20 GB/s, and 164 Mflop at K = 64, 1.4 ms at the 118 GFLOP/s of one 512-bit FMA a cycle; for one
// core of a 2-core AMD EPYC with AVX-512 this predicts 0.5 ms an iteration at K = 10 and 1.6 ms at K = 64.
// Measured on both cores, nothing else running, from the same start and with purity (bench/results), D = 512:
//   K = 6, N = 50,000      70.4 ms, 8 iterations      scikit-learn 2.13 times that
//   K = 64, N = 50,000     283 ms, 10 iterations      scikit-learn 1.28 times that
// The latter is 116 GFLOP/s with all passes, where torch.mm had 179 in that run and scikit-learn's product
// 91: at that rate, without any other pass, the ratio would be 1.97. Tried and left: a centred copy of the
// samples (one iteration at D = 512: 48 ms with it, 42 ms without); centroids broadcast as Vec{} + c, which
// compiles to an addition and a shuffle beside every third FMA.
#include <limits>
#include <vector>

#include "codes.h"
#include "vec.h"

namespace mmfast {
namespace {

// Samples summed in the type of the data before they go into float64.
constexpr int64_t kChunk = 512;
// Parts of the samples with float64 sums of their own: at most this many, and fewer where sums are large.
constexpr int64_t kMaxParts = 64, kMinParts = 8, kMaxSums = 1 << 23;
// Vectors of samples, and centroids, whose products are in registers at once.
constexpr int kSampleVectors = 3;
constexpr int kCentroids = MMFAST_ISA == 2 ? 8 : 4;
// Dimensions of a tile that are transposed at once: 24 KB with AVX-512, so that they stay in the L1 cache.
constexpr int64_t kDepth = 128;
// Rows of centroids and sums are padded with zeros to a multiple of this, a vector of any instruction set.
constexpr int64_t kPadding = 16;

template <class A>
using Index = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// Each round turns the bits of (vector, lane) by one place; after log2(L) rounds they have changed places.
template <int rounds, class V, int L = sizeof(V) / sizeof(std::declval<V>()[0])>
inline void transpose(V* x) {
  if constexpr (rounds > 1) {
    V turned[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      turned[2 * i] = zip<false>(x[i], x[i + L / 2]);
      turned[2 * i + 1] = zip<true>(x[i], x[i + L / 2]);
    }
    transpose<rounds / 2>(turned);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) x[i] = turned[i];
  }
}

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
    T numbers[L] = {};
    if (d < num_dims) std::memcpy(numbers, row + d, (num_dims - d) * sizeof(T));
    return load(numbers) - load(offset.data() + d);
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
  Vec<Index<A>> nearest[kSampleVectors];

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
        transpose<L>(rows);
        A* target = columns.data() + (d - first_dim) * samples + v * L;
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(target + i * samples, rows[i]);
      }
    }
  }

  void start() {
    for (int v = 0; v < kSampleVectors; ++v) {
      lowest[v] = Vec<A>{} + std::numeric_limits<A>::infinity();
      nearest[v] = Vec<Index<A>>{};
    }
  }

  // Adds `depth` dimensions to the scores of n centroids from number `first` on, and after the last dimension
  // compares; of equal distances the lowest stays. Not inlined: the registers are all taken.
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
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
#pragma GCC unroll 3
        for (int v = 0; v < kSampleVectors; ++v) s[k][v] = load(kept + (k * kSampleVectors + v) * L);
      }
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
    if (!is_last) {
#pragma GCC unroll 8
      for (int k = 0; k < n; ++k) {
#pragma GCC unroll 3
        for (int v = 0; v < kSampleVectors; ++v) store(kept + (k * kSampleVectors + v) * L, s[k][v]);
      }
      return;
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      const Vec<Index<A>> number = Vec<Index<A>>{} + static_cast<Index<A>>(first + k);
#pragma GCC unroll 3
      for (int v = 0; v < kSampleVectors; ++v) {
        const auto closer = s[k][v] < lowest[v];
        lowest[v] = closer ? s[k][v] : lowest[v];
        nearest[v] = closer ? number : nearest[v];
      }
    }
  }

  template <int n = kCentroids, class... Arguments>
  void compare_some(int64_t count, const Arguments&... arguments) {
    if (count == n) return compare<n>(arguments...);
    if constexpr (n > 1) compare_some<n - 1>(count, arguments...);
  }
};

template <class T>
struct Lloyd {
  using A = accumulate_t<T>;
  const int64_t num_samples, num_dims, num_clusters, num_threads, width, num_parts;
  Centred<T> x;
  int64_t* const assignments;   // [N]
  std::vector<A> centroids;     // [K, width] centred
  std::vector<A> packed;        // [D, n] for each group of n centroids
  std::vector<A> half_norms;    // [K]
  std::vector<double> totals;   // [parts, K, width]
  std::vector<int64_t> counts;  // [parts, K]
  std::vector<char> changed;    // [parts]
  std::vector<double> squares;  // [parts] squared distances of the samples to their centroids

  Lloyd(const T* features, int64_t stride, int64_t* assignments, int64_t num_samples, int64_t num_dims,
        int64_t num_clusters, int64_t num_threads)
      : num_samples(num_samples),
        num_dims(num_dims),
        num_clusters(num_clusters),
        num_threads(num_threads),
        width((num_dims + kPadding - 1) / kPadding * kPadding),
        num_parts(std::min(
            (num_samples + kChunk - 1) / kChunk,
            std::clamp(kMaxSums / std::max<int64_t>(1, num_clusters * width), kMinParts, kMaxParts))),
        x{features, stride, num_dims, std::vector<A>(width)},
        assignments(assignments),
        centroids(num_clusters * width),
        packed(num_clusters * num_dims),
        half_norms(num_clusters),
        totals(num_parts * num_clusters * width),
        counts(num_parts * num_clusters),
        changed(num_parts),
        squares(num_parts) {}

  // Calls function(part, first sample, last sample) on threads.
  template <class Function>
  void for_parts(Function&& function) {
    const int64_t bytes = num_samples / num_parts * (num_dims * sizeof(T) + 1);
    parallel_for(num_parts, bytes, num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        function(part, num_samples * part / num_parts, num_samples * (part + 1) / num_parts);
      }
    });
  }

  // Finds the mean of the samples; returns the mean over dimensions of their variance. One read: a chunk's
  // deviations from its own mean are summed while it is in the cache, and chunks merge as Chan et al. do.
  double centre() {
    std::vector<double> means(num_parts * width), numbers(num_parts);
    std::fill(squares.begin(), squares.end(), 0.0);
    for_parts([&](int64_t part, int64_t begin, int64_t end) {
      Centred<T> chunk{x.features, x.stride, num_dims, std::vector<A>(width)};
      std::vector<double> sum(width);
      const std::vector<A> zero(width);
      for (int64_t first = begin; first < end && !is_interrupted(kChunk * num_dims); first += kChunk) {
        const int64_t last = std::min(first + kChunk, end);
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int64_t i = first; i < last; ++i) add(x.row(i), sum.data());
        for (int64_t d = 0; d < num_dims; ++d) {
          sum[d] /= last - first;
          chunk.offset[d] = static_cast<A>(sum[d]);
        }
        double square = 0;
        for (int64_t i = first; i < last; ++i) square += chunk.squared_distance(i, zero.data());
        merge(means.data() + part * width, squares[part], numbers[part], sum.data(), square, last - first);
      }
    });
    for (int64_t part = 1; part < num_parts; ++part)
      merge(means.data(), squares[0], numbers[0], means.data() + part * width, squares[part], numbers[part]);
    for (int64_t d = 0; d < num_dims; ++d) x.offset[d] = static_cast<A>(means[d]);
    return squares[0] / num_samples / num_dims;
  }

  // Merges mean, summed squared deviation and number of other samples into those of some.
  void merge(double* mean, double& square, double& number, const double* other_mean, double other_square,
             double other_number) const {
    const double share = other_number / (number + other_number);
    double gap = 0;
    for (int64_t d = 0; d < num_dims; ++d) {
      const double difference = other_mean[d] - mean[d];
      gap += difference * difference;
      mean[d] += share * difference;
    }
    square += other_square + gap * number * share;
    number += other_number;
  }

  // By whole vectors, so that half precision is widened quickly; `sum` is [width].
  void add(const T* row, double* sum) const {
    constexpr int L = kLanes<A>;
    for (int64_t d = 0; d < num_dims; d += L) {
      A numbers[L];
      store(numbers, x.at(row, d));
      for (int i = 0; i < L; ++i) sum[d + i] += numbers[i];
    }
  }

  void pack() {
    const int64_t num_groups = (num_clusters + kCentroids - 1) / kCentroids;
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t first = num_clusters * group / num_groups;
      const int64_t n = num_clusters * (group + 1) / num_groups - first;
      for (int64_t k = 0; k < n; ++k) {
        const A* row = centroids.data() + (first + k) * width;
        A* target = packed.data() + first * num_dims + k;
        double square = 0;
        for (int64_t d = 0; d < num_dims; ++d) {
          target[d * n] = row[d];
          square += static_cast<double>(row[d]) * row[d];
        }
        half_norms[first + k] = static_cast<A>(square / 2);
      }
    }
  }

  // Assigns `count` samples from `begin` on, at most a tile, and adds them to `sums` [K, width] if there are
  // any; returns whether an assignment changed.
  bool assign_tile(Tile<T>& tile, int64_t begin, int64_t count, A* sums, int64_t* members) {
    constexpr int samples = Tile<T>::samples;
    const int64_t num_groups = (num_clusters + kCentroids - 1) / kCentroids;
    tile.start();
    for (int64_t d = 0; d == 0 || d < num_dims; d += kDepth) {
      const int64_t end = std::min(d + kDepth, num_dims);
      tile.load_columns(x, begin, count, d, end);
      for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t first = num_clusters * group / num_groups;
        const int64_t n = num_clusters * (group + 1) / num_groups - first;
        tile.compare_some(n, packed.data() + first * num_dims + d * n, half_norms.data(), first, end - d,
                          d == 0, end == num_dims);
      }
    }
    Index<A> nearest[samples];
    std::memcpy(nearest, tile.nearest, sizeof nearest);
    int64_t differences = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = nearest[i];
      differences |= assignments[begin + i] ^ k;
      assignments[begin + i] = k;
      if (sums == nullptr) continue;
      ++members[k];
      const T* row = x.row(begin + i);
      A* sum = sums + k * width;
      int64_t d = 0;
      for (; d + kLanes<A> <= num_dims; d += kLanes<A>)
        store(sum + d, load(sum + d) + (load(row + d) - load(x.offset.data() + d)));
      if (d < num_dims) store(sum + d, load(sum + d) + x.at(row, d));
    }
    return differences != 0;
  }

  // Assigns every sample; with `accumulate` leaves the clusters' sums and sizes in the first part's, else the
  // squared distances to the centroids. Returns whether an assignment changed.
  bool assign(bool accumulate) {
    pack();
    for_parts([&](int64_t part, int64_t begin, int64_t end) {
      const int64_t size = num_clusters * width;
      double* total = totals.data() + part * size;
      int64_t* count = counts.data() + part * num_clusters;
      std::fill(total, total + size, 0.0);
      std::fill(count, count + num_clusters, 0);
      Tile<T> tile(num_clusters);
      std::vector<A> sums(accumulate ? size : 0);
      changed[part] = false;
      squares[part] = 0;
      for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t chunk_end = std::min(chunk + kChunk, end);
        for (int64_t i = chunk; i < chunk_end; i += Tile<T>::samples) {
          if (is_interrupted(Tile<T>::samples * num_dims * num_clusters)) return;
          changed[part] |= assign_tile(tile, i, std::min<int64_t>(Tile<T>::samples, chunk_end - i),
                                       accumulate ? sums.data() : nullptr, count);
        }
        if (!accumulate) {
          add_distances(part, chunk, chunk_end);
          continue;
        }
        for (int64_t j = 0; j < size; ++j) total[j] += sums[j];
        std::fill(sums.begin(), sums.end(), A{0});
      }
    });
    bool any_changed = false;
    for (int64_t part = 0; part < num_parts; ++part) any_changed |= changed[part];
    if (!accumulate) return any_changed;
    parallel_for(num_clusters, num_parts * width * sizeof(double), num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t part = 1; part < num_parts; ++part) {
                     const double* total = totals.data() + part * num_clusters * width;
                     for (int64_t j = begin * width; j < end * width; ++j) totals[j] += total[j];
                     for (int64_t k = begin; k < end; ++k) counts[k] += counts[part * num_clusters + k];
                   }
                 });
    return any_changed;
  }

  // Moves the samples farthest from their centroids, one each, to the clusters without samples.
  void fill_empty(const std::vector<int64_t>& empty) {
    std::vector<A> distance(num_samples);
    for_parts([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        distance[i] = x.squared_distance(i, centroids.data() + assignments[i] * width);
    });
    std::vector<int64_t> far(num_samples);
    for (int64_t i = 0; i < num_samples; ++i) far[i] = i;
    std::partial_sort(far.begin(), far.begin() + empty.size(), far.end(), [&](int64_t i, int64_t j) {
      return distance[i] != distance[j] ? distance[i] > distance[j] : i < j;
    });
    for (std::size_t n = 0; n < empty.size(); ++n) {
      const T* row = x.row(far[n]);
      const int64_t from = assignments[far[n]];
      --counts[from], ++counts[empty[n]];
      for (int64_t d = 0; d < num_dims; ++d) {
        const A number = widen(row[d]) - x.offset[d];
        totals[from * width + d] -= number;
        totals[empty[n] * width + d] += number;
      }
    }
  }

  // Moves the centroids to the means of their samples; returns the summed squared movement.
  double move() {
    double shift = 0;
    for (int64_t k = 0; k < num_clusters; ++k) {
      if (counts[k] == 0) continue;
      for (int64_t d = 0; d < num_dims; ++d) {
        A& c = centroids[k * width + d];
        const A mean = static_cast<A>(totals[k * width + d] / counts[k]);
        shift += static_cast<double>(mean - c) * (mean - c);
        c = mean;
      }
    }
    return shift;
  }

  // Returns the number of iterations.
  int64_t iterate(int64_t max_iter, double threshold) {
    std::fill(assignments, assignments + num_samples, -1);
    std::vector<int64_t> empty;
    for (int64_t num_iter = 1; num_iter <= max_iter; ++num_iter) {
      const bool any_changed = assign(true);
      empty.clear();
      for (int64_t k = 0; k < num_clusters; ++k) {
        if (counts[k] == 0) empty.push_back(k);
      }
      if (!empty.empty()) fill_empty(empty);
      const double shift = move();
      const bool is_settled = empty.empty() && !any_changed;
      if (!is_settled && shift > threshold && num_iter < max_iter) continue;
      if (is_settled) {
        std::fill(squares.begin(), squares.end(), 0.0);
        for_parts([&](int64_t part, int64_t begin, int64_t end) { add_distances(part, begin, end); });
      } else {
        assign(false);
      }
      return num_iter;
    }
    return max_iter;
  }

  void add_distances(int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      squares[part] += x.squared_distance(i, centroids.data() + assignments[i] * width);
  }

  // Of the last assignment.
  double inertia() const {
    double total = 0;
    for (const double square : squares) total += square;
    return total;
  }
};

// What a clustering is: written.
struct Clustering {
  void* centroids;       // [K, D] in the type of accumulation
  int64_t* assignments;  // [N]
  void* inertia;         // [] in that type
  int64_t* num_iter;     // []
};

void kmeans_lloyd(const Strided<2>& features,  // [N, D], rows contiguous
                  const void* start,           // [K, D] contiguous in the type of accumulation
                  int64_t num_clusters, const Clustering& out, int64_t max_iter, double tol, Dtype dtype,
                  int64_t num_threads) {
  const int64_t num_samples = features.sizes[0], num_dims = features.sizes[1];
  dispatch_dtype("kmeans_lloyd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    Lloyd<T> lloyd(static_cast<const T*>(features.data), features.strides[0], out.assignments, num_samples,
                   num_dims, num_clusters, num_threads);
    const double threshold = tol * lloyd.centre();
    const auto for_coordinates = [&](auto&& function) {
      for (int64_t k = 0; k < num_clusters; ++k) {
        for (int64_t d = 0; d < num_dims; ++d)
          function(k * num_dims + d, lloyd.centroids[k * lloyd.width + d], lloyd.x.offset[d]);
      }
    };
    for_coordinates([&](int64_t i, A& c, A offset) { c = static_cast<const A*>(start)[i] - offset; });
    *out.num_iter = lloyd.iterate(max_iter, threshold);
    *static_cast<A*>(out.inertia) = static_cast<A>(lloyd.inertia());
    for_coordinates([&](int64_t i, A c, A offset) { static_cast<A*>(out.centroids)[i] = c + offset; });
  });
}

void kmeans_purity(const int64_t* assignments,  // [N] in [0, K)
                   const int64_t* labels,       // [N] in [0, C)
                   double* purity,              // []
                   int64_t num_samples, int64_t num_clusters, int64_t num_classes) {
  std::vector<int64_t> table(num_clusters * num_classes);
  for (int64_t i = 0; i < num_samples; ++i) ++table[assignments[i] * num_classes + labels[i]];
  int64_t hits = 0;
  for (int64_t k = 0; k < num_clusters; ++k)
    hits += *std::max_element(table.data() + k * num_classes, table.data() + (k + 1) * num_classes);
  *purity = static_cast<double>(hits) / num_samples;
}

MMFAST_REGISTER(kmeans_lloyd)
MMFAST_REGISTER(kmeans_purity)

}  // namespace
}  // namespace mmfast

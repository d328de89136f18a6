// Lloyd's iterations: every sample to its nearest centroid, every centroid to the mean of its samples; and
// the purity of a clustering.
//
// An iteration reads the samples once, in place. Those of a tile are centred, widened and transposed in
// registers; |c|^2 / 2 - x.c for up to eight centroids at a time stays in registers (kmeans_tile.h); then the
// rows, still in the cache, are added to their clusters. Sums are float32 over 512 samples and float64 over
// all, merged in an order that depends on the sizes alone: the number of threads changes no bit.
//
// Floor of an iteration: N D elements over the bandwidth of memory, or 2 N D K operations over the rate of
// FMA. Measured: bench/results/kmeans.md.
#include <limits>
#include <vector>

#include "codes.h"
#include "integers.h"
#include "kmeans_tile.h"

namespace mmfast {
namespace {

// Samples summed in the type of accumulation before they go into float64.
constexpr int64_t kChunk = 512;
// Parts of the samples with float64 sums of their own: at most this many, and fewer where sums are large.
constexpr int64_t kMaxParts = 64, kMinParts = 8, kMaxSums = 1 << 23;
// Rows of centroids and sums are padded with zeros to a multiple of this, a vector of any instruction set.
constexpr int64_t kPadding = 16;

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
        width(round_up(num_dims, kPadding)),
        num_parts(std::min(
            ceil_div(num_samples, kChunk),
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
    std::vector<double> means(num_parts * width), sizes(num_parts);
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
        merge(means.data() + part * width, squares[part], sizes[part], sum.data(), square, last - first);
      }
    });
    for (int64_t part = 1; part < num_parts; ++part)
      merge(means.data(), squares[0], sizes[0], means.data() + part * width, squares[part], sizes[part]);
    for (int64_t d = 0; d < num_dims; ++d) x.offset[d] = static_cast<A>(means[d]);
    return squares[0] / num_samples / num_dims;
  }

  // Merges mean, summed squared deviation and count of other samples into those of some.
  void merge(double* mean, double& square, double& size, const double* other_mean, double other_square,
             double other_size) const {
    const double share = other_size / (size + other_size);
    double gap = 0;
    for (int64_t d = 0; d < num_dims; ++d) {
      const double difference = other_mean[d] - mean[d];
      gap += difference * difference;
      mean[d] += share * difference;
    }
    square += other_square + gap * size * share;
    size += other_size;
  }

  // By whole vectors, so that half precision is widened quickly; `sum` is [width].
  void add(const T* row, double* sum) const {
    constexpr int L = kLanes<A>;
    for (int64_t d = 0; d < num_dims; d += L) {
      A elements[L];
      store(elements, x.at(row, d));
      for (int i = 0; i < L; ++i) sum[d + i] += elements[i];
    }
  }

  // Calls function(first, n) for groups of n centroids from number `first` on.
  template <class Function>
  void for_centroid_groups(Function&& function) const {
    const int64_t num_groups = ceil_div(num_clusters, kCentroids);
    for (int64_t group = 0; group < num_groups; ++group) {
      const int64_t first = num_clusters * group / num_groups;
      function(first, num_clusters * (group + 1) / num_groups - first);
    }
  }

  // Copies the centroids for Tile::compare.
  void pack() {
    for_centroid_groups([&](int64_t first, int64_t n) {
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
    });
  }

  // Leaves the nearest centroids of `count` samples from `begin` on, at most a tile, in tile.nearest.
  void find_nearest(Tile<T>& tile, int64_t begin, int64_t count) const {
    tile.start();
    for (int64_t d = 0; d == 0 || d < num_dims; d += kDepth) {
      const int64_t end = std::min(d + kDepth, num_dims);
      tile.load_columns(x, begin, count, d, end);
      for_centroid_groups([&](int64_t first, int64_t n) {
        tile.compare_some(n, packed.data() + first * num_dims + d * n, half_norms.data(), first, end - d,
                          d == 0, end == num_dims);
      });
    }
  }

  // Assigns the samples of a tile and adds them to `sums` [K, width] if there are any; returns whether an
  // assignment changed.
  bool assign_tile(Tile<T>& tile, int64_t begin, int64_t count, A* sums, int64_t* members) {
    find_nearest(tile, begin, count);
    Int<A> nearest[Tile<T>::samples];
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
    for_parts([&](int64_t part, int64_t begin, int64_t end) { assign_part(part, begin, end, accumulate); });
    if (accumulate) merge_parts();
    return std::any_of(changed.begin(), changed.end(), [](char is_changed) { return is_changed; });
  }

  void assign_part(int64_t part, int64_t begin, int64_t end, bool accumulate) {
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
  }

  // Adds all parts' sums and sizes to those of the first; a thread takes some of the clusters.
  void merge_parts() {
    parallel_for(num_clusters, num_parts * width * sizeof(double), num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t part = 1; part < num_parts; ++part) {
                     const double* total = totals.data() + part * num_clusters * width;
                     for (int64_t j = begin * width; j < end * width; ++j) totals[j] += total[j];
                     for (int64_t k = begin; k < end; ++k) counts[k] += counts[part * num_clusters + k];
                   }
                 });
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
        const A element = widen(row[d]) - x.offset[d];
        totals[from * width + d] -= element;
        totals[empty[n] * width + d] += element;
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

// Moments of classes, their gradient, and in how many samples the own class's centroid is nearest, dimension
// by dimension.
//
// All three first order the samples by class (a counting sort of the labels), then take up to 64 rows of one
// class through registers, a tile of columns at a time. What belongs to the class (shift, interval ends,
// gradients) and what is summed stays in registers, whatever C is, where a sweep in the order of the data
// reads and writes tables [C, D] at each sample. Rows come from anywhere: those of the next 64 are
// prefetched.
//
// Moments: sums of x - shift and of its square over a block, then Chan's merge in float64. The shift is the
// mean of the rows before, or of the first few, so (shift - mean)^2 is at most 7 times the variance and
// nothing cancels. Blocks and runs are cut by class only: the number of threads changes no bit.
// Hits: low <= x < high, the exact interval in which a class's centroid is nearest; the centroids of each
// dimension are sorted in SIMD lanes by Batcher's merge exchange.
//
// Bytes that must move: N D numbers once (the gradient: twice). Operations an element: 4 for the moments, 3
// for the hits, 3 for the gradient; the sort of C centroids adds about C log^2 C / 4 exchanges a dimension.
// At N = 20,000, D = 512, float32 (41 MB) reading at 20 GB/s a core predicts 2.0 ms on one core, 1.0 ms on
// two. Measured on a 2-core AMD EPYC with AVX-512 that others were using, best of interleaved runs:
//   two cores, C = 10: hits 2.1 ms (19 GB/s), moments 1.8 ms (23 GB/s); brute force under torch.compile
//   187 ms, intervals under torch.compile 22 ms, reference 144 ms and 97 ms. C = 31: 2.1 ms and 2.5 ms; 497
//   ms, 17 ms, 65 ms and 83 ms
//   one core, C = 10 and 309: moments 18 and 15 GB/s, hits 17 and 14 GB/s and 1.2 ms for the sort of 309
//   one core, data in the L2 cache: moments 25 GB/s, hits 44 GB/s, gradient 37 GB/s both ways
// Tried and slower: prefetching into L1, whose few outstanding misses hold rows to 7 GB/s where L2 takes 22;
// no prefetch, 4 to 9 GB/s; rows in the order of the data without prefetch, 10 GB/s under the same load.
#include <limits>
#include <vector>

#include "class_separability_operands.h"
#include "codes.h"
#include "labels.h"
#include "vec.h"

namespace mmfast {
namespace {

// Rows of a class that go through registers at once; their tile of columns and the next stay in the L2 cache.
constexpr int64_t kBlock = 64;
// Rows of a class summed by one thread: what is kept of each, 16 bytes a column, is 1% of what it reads.
constexpr int64_t kRun = 512;
// Rows whose mean is the first shift.
constexpr int64_t kShiftRows = 8;
// Vectors of columns in a tile: three sums or limits of each and the data fit the registers.
constexpr int kTile = MMFAST_ISA == 2 ? 8 : 4;

// Up to kRun samples of one class, as positions in ClassOrder::rows.
struct Run {
  int64_t label, begin, end;
};

// The samples class by class, within a class in the order of the data.
struct ClassOrder {
  std::vector<int64_t> rows;   // [N + kBlock], the last ones repeated for the prefetch
  std::vector<int64_t> first;  // [C + 1] position of each class's first sample
  std::vector<Run> runs;

  ClassOrder(const int64_t* labels, int64_t num_samples, int64_t num_classes, int64_t num_threads)
      : rows(num_samples + kBlock), first(num_classes + 1) {
    const int64_t num_parts = std::clamp<int64_t>(num_samples >> 14, 1, num_threads);
    std::vector<int64_t> next(num_parts * num_classes);
    const auto for_part = [&](auto&& function) {
      parallel_for(num_parts, 1 << 17, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          function(next.data() + part * num_classes, num_samples * part / num_parts,
                   num_samples * (part + 1) / num_parts);
        }
      });
    };
    for_part([&](int64_t* count, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++count[labels[i]];
    });
    int64_t position = 0;
    for (int64_t k = 0; k < num_classes; ++k) {
      first[k] = position;
      for (int64_t part = 0; part < num_parts; ++part) {
        position += std::exchange(next[part * num_classes + k], position);
      }
      for (int64_t begin = first[k]; begin < position; begin += kRun) {
        runs.push_back({k, begin, std::min(begin + kRun, position)});
      }
    }
    first[num_classes] = position;
    for_part([&](int64_t* target, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) rows[target[labels[i]]++] = i;
    });
    std::fill(rows.begin() + num_samples, rows.end(), num_samples > 0 ? rows[num_samples - 1] : 0);
  }

  // Calls function(first run, last run) on threads, each with about as many rows.
  template <class Function>
  void for_runs(int64_t row_bytes, int64_t num_threads, Function&& function) const {
    const int64_t num_samples = first.back();
    const auto at = [&](int64_t position) {
      return std::lower_bound(runs.begin(), runs.end(), position,
                              [](const Run& run, int64_t p) { return run.begin < p; }) -
             runs.begin();
    };
    parallel_for(num_samples, row_bytes, num_threads,
                 [&](int64_t begin, int64_t end) { function(at(begin), at(end)); });
  }
};

// Calls function(position, count) for blocks of about equal size, none above kBlock.
template <class Function>
void for_blocks(const Run& run, Function&& function) {
  const int64_t count = run.end - run.begin, num_blocks = (count + kBlock - 1) / kBlock;
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = count * block / num_blocks;
    function(run.begin + begin, count * (block + 1) / num_blocks - begin);
  }
}

template <class T>
using Signed = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Some whole vectors of columns.
template <class A, int num_vectors>
struct Tile {
  static constexpr int vectors = num_vectors, L = kLanes<A>;
  int64_t column;

  int64_t width() const { return vectors * L; }
  template <class T>
  Vec<A> load(const T* row, int j) const {
    return mmfast::load(row + column + j * L);
  }
  template <class T>
  void store(T* row, int j, Vec<A> value) const {
    mmfast::store(row + column + j * L, value);
  }
  template <class T>
  void prefetch(const T* row) const {
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(row + column + j * L, 0, 2);
  }
};

// The last columns, fewer than a vector.
template <class A>
struct Edge {
  static constexpr int vectors = 1, L = kLanes<A>;
  int64_t column, count;

  int64_t width() const { return count; }
  template <class T>
  Vec<A> load(const T* row, int) const {
#if MMFAST_ISA == 2
    if constexpr (std::is_same_v<T, float>)
      return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps((1u << count) - 1, row + column));
    if constexpr (std::is_same_v<T, double>)
      return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd((1u << count) - 1, row + column));
#endif
    T numbers[L] = {};
    std::memcpy(numbers, row + column, count * sizeof(T));
    return mmfast::load(numbers);
  }
  template <class T>
  void store(T* row, int, Vec<A> value) const {
    T numbers[L];
    mmfast::store(numbers, value);
    std::memcpy(row + column, numbers, count * sizeof(T));
  }
  template <class T>
  void prefetch(const T* row) const {
    __builtin_prefetch(row + column, 0, 2);
  }
};

// Calls function(tile) for tiles that cover all columns.
template <class A, int vectors = kTile, class Function>
void for_tiles(int64_t num_dims, Function&& function, int64_t column = 0) {
  constexpr int64_t width = vectors * kLanes<A>;
  for (; column + width <= num_dims; column += width) function(Tile<A, vectors>{column});
  if constexpr (vectors > 1) {
    for_tiles<A, vectors / 2>(num_dims, function, column);
  } else if (column < num_dims) {
    function(Edge<A>{column, num_dims - column});
  }
}

// What is known of some samples of a class: their number, sum and squared deviations from their mean, [D].
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

// Adds `count` rows of a class to one tile of `sums`.
template <class T, class Tile>
void add_block(const T* x, int64_t stride, const int64_t* rows, int64_t count, const Tile& tile,
               const Sums& sums) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int n = Tile::vectors, L = kLanes<A>;
  A shifts[n * L] = {}, totals[n * L], squares[n * L];
  V shift[n] = {}, total[n] = {}, square[n] = {};
  if (sums.count == 0) {
    const int64_t num_rows = std::min(count, kShiftRows);
    // From the first row on: where all are equal, the shift is exact.
    V first[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) first[j] = tile.load(x + rows[0] * stride, j);
    for (int64_t r = 1; r < num_rows; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) shift[j] += tile.load(x + rows[r] * stride, j) - first[j];
    }
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) shift[j] = first[j] + shift[j] / static_cast<A>(num_rows);
  } else {
    const double scale = 1.0 / sums.count;
    for (int64_t i = 0; i < tile.width(); ++i) {
      shifts[i] = static_cast<A>(sums.sum[tile.column + i] * scale);
    }
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) shift[j] = load(shifts + j * L);
  }
  // Infinity less infinity would make a NaN of an infinite mean.
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) shift[j] = shift[j] - shift[j] == V{} ? shift[j] : V{};
  for (int64_t r = 0; r < count; ++r) {
    tile.prefetch(x + rows[r + kBlock] * stride);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      const V deviation = tile.load(x + rows[r] * stride, j) - shift[j];
      total[j] += deviation;
      square[j] += deviation * deviation;
    }
  }
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
        return rest < 0 ? (rest - rest == 0 ? 0 : -rest) : rest;
      });
}

// Mean and variance of a column of some samples whose sums left the range of numbers on the way. Squares of
// float32 fit into float64; float64 is taken times a power of two, as only numbers near its ends come here.
template <class T, class A>
void moments_in_range(const T* x, int64_t stride, const int64_t* rows, int64_t count, A& mean, A& var) {
  constexpr double scale = std::is_same_v<T, double> ? 0x1p-600 : 1;
  const auto number = [&](int64_t r) { return scale * widen(x[rows[r] * stride]); };
  // Of equal numbers, which may be the largest there is, the mean is one of them.
  const double origin = number(0) - number(0) == 0 ? number(0) : 0;
  double sum = 0, rest = 0, squares = 0;
  for (int64_t r = 0; r < count; ++r) sum += number(r) - origin;
  const double centre = origin + sum / count;
  // Of an infinite sample the mean is infinite, and the deviation from it no number.
  for (int64_t r = 0; r < count; ++r) {
    const double deviation = number(r) - centre;
    rest += deviation, squares += deviation * deviation;
  }
  // What rounding left of the deviations belongs to the mean.
  const double share = rest / count;
  mean = static_cast<A>((share - share == 0 ? centre + share : centre) / scale);
  const double least = squares - rest * (rest / count);
  var = static_cast<A>((least < 0 ? 0 : least) / count / scale / scale);
}

template <class T>
void moments_fwd(const T* x, const int64_t* labels, int64_t* count, accumulate_t<T>* mean,
                 accumulate_t<T>* var, int64_t num_samples, int64_t num_dims, int64_t num_classes,
                 int64_t stride, int64_t num_threads) {
  using A = accumulate_t<T>;
  const ClassOrder order(labels, num_samples, num_classes, num_threads);
  const int64_t num_runs = order.runs.size();
  std::vector<double> kept(2 * num_runs * num_dims);
  const auto sums_of = [&](int64_t run) {
    double* sum = kept.data() + 2 * run * num_dims;
    return Sums{0, sum, sum + num_dims};
  };
  order.for_runs(num_dims * sizeof(T), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      Sums sums = sums_of(run);
      for_blocks(order.runs[run], [&](int64_t position, int64_t rows) {
        for_tiles<A>(num_dims, [&](const auto& tile) {
          add_block(x, stride, order.rows.data() + position, rows, tile, sums);
        });
        sums.count += rows;
      });
    }
  });
  // Into the first run of each class, in order; a thread takes a part of the columns.
  parallel_for(num_dims, 16 * (num_runs + num_classes), num_threads, [&](int64_t begin, int64_t end) {
    int64_t run = 0;
    for (int64_t k = 0; k < num_classes; ++k) {
      const int64_t samples = order.first[k + 1] - order.first[k];
      if (samples == 0) {
        std::fill(mean + k * num_dims + begin, mean + k * num_dims + end,
                  std::numeric_limits<A>::quiet_NaN());
        std::fill(var + k * num_dims + begin, var + k * num_dims + end, std::numeric_limits<A>::quiet_NaN());
        continue;
      }
      Sums sums = sums_of(run);
      sums.count = order.runs[run].end - order.runs[run].begin;
      for (++run; run < num_runs && order.runs[run].label == k; ++run) {
        const Sums other = sums_of(run);
        const int64_t added = order.runs[run].end - order.runs[run].begin;
        sums.merge(
            begin, end - begin, added, [&](int64_t i) { return other.sum[begin + i]; },
            [&](int64_t i) { return other.squares[begin + i]; });
        sums.count += added;
      }
      A* const own_mean = mean + k * num_dims;
      A* const own_var = var + k * num_dims;
      // In one piece, which the compiler makes vectors of; what left the range is looked for where there is
      // any.
      Signed<A> is_lost = 0;
      for (int64_t d = begin; d < end; ++d) {
        const A m = static_cast<A>(sums.sum[d] / samples), v = static_cast<A>(sums.squares[d] / samples);
        own_mean[d] = m, own_var[d] = v;
        is_lost |= (m - m == 0) & (v - v == 0) ? 0 : 1;
      }
      for (int64_t d = begin; is_lost != 0 && d < end; ++d) {
        if (own_mean[d] - own_mean[d] == 0 && own_var[d] - own_var[d] == 0) continue;
        moments_in_range(x + d, stride, order.rows.data() + order.first[k], samples, own_mean[d], own_var[d]);
      }
    }
  });
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
      for_blocks(order.runs[run], [&](int64_t position, int64_t num_rows) {
        const int64_t* rows = order.rows.data() + position;
        for_tiles<A>(num_dims, [&](const auto& tile) {
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
      });
    }
  });
}

// As many numbers of any type as there are float64 in a vector: columns whose centroids are sorted at once.
constexpr int kColumns = kLanes<double>;
template <class T>
using Columns = typename VecOf<T, kColumns>::type;

// Sorts by value, equal ones by class, in each lane. Source: Knuth, "The art of computer programming",
// volume 3, algorithm 5.2.2M.
template <class K>
void sort_columns(Columns<K>* value, Columns<Signed<K>>* order, int64_t count) {
  if (count < 2) return;
  int64_t top = 1;
  while (2 * top < count) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t r = 0, distance = p;
    for (int64_t q = top;; q /= 2) {
      for (int64_t i = 0; i + distance < count; ++i) {
        if ((i & p) != r) continue;
        const Columns<K> a = value[i], b = value[i + distance];
        const Columns<Signed<K>> k = order[i], l = order[i + distance];
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
  Columns<Signed<A>> bits;
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
  return __builtin_convertvector(on_b, Columns<Signed<A>>) ? end : next_up<A>(end);
}

// Centroid k is nearest to x just when low[k] <= x < high[k]; of equal distances the lowest class is nearest.
template <class K, class A>
void class_intervals(const K* centroids, A* low, A* high, int64_t num_classes, int64_t num_dims,
                     int64_t num_threads) {
  constexpr A infinity = std::numeric_limits<A>::infinity();
  const int64_t num_groups = (num_dims + kColumns - 1) / kColumns;
  parallel_for(
      num_groups, 4 * sizeof(double) * num_classes * kColumns, num_threads, [&](int64_t begin, int64_t end) {
        std::vector<Columns<K>> value(num_classes);
        std::vector<Columns<Signed<K>>> order(num_classes);
        std::vector<Columns<A>> lows(num_classes), highs(num_classes);
        for (int64_t column = begin * kColumns; column < std::min(end * kColumns, num_dims);
             column += kColumns) {
          const int64_t width = std::min<int64_t>(kColumns, num_dims - column);
          for (int64_t k = 0; k < num_classes; ++k) {
            Columns<K> c = {};
            std::memcpy(&c, centroids + k * num_dims + column, width * sizeof(K));
            value[k] = c - c == Columns<K>{} ? c : Columns<K>{} + std::numeric_limits<K>::infinity();
            order[k] = Columns<Signed<K>>{} + static_cast<Signed<K>>(k);
          }
          sort_columns<K>(value.data(), order.data(), num_classes);
          // Of equal centroids only the lowest class, which comes first, can win.
          Columns<Signed<K>> winner = order[0];
          Columns<A> last_end = Columns<A>{} + std::numeric_limits<A>::lowest();
          lows[0] = last_end;
          for (int64_t k = 1; k < num_classes; ++k) {
            const Columns<Signed<K>> is_new = value[k] != value[k - 1];
            const Columns<Signed<K>> next = is_new ? order[k] : winner;
            const auto a = __builtin_convertvector(value[k - 1], Vec<double>);
            const auto b = __builtin_convertvector(value[k], Vec<double>);
            const auto limit = first_nearer<A>(a, b, __builtin_convertvector(next < winner, Vec<int64_t>));
            const auto is_limit = __builtin_convertvector(is_new, Columns<Signed<A>>);
            highs[k - 1] = is_limit ? limit : Columns<A>{} + infinity;
            lows[k] = highs[k - 1];
            winner = next;
          }
          highs[num_classes - 1] = Columns<A>{} + infinity;
          for (int64_t k = num_classes - 1; k >= 0; --k) {
            // An equal centroid's interval is empty, and so is that of one that is not finite.
            if (k + 1 < num_classes) highs[k] = highs[k] < highs[k + 1] ? highs[k] : highs[k + 1];
            auto wins = value[k] != std::numeric_limits<K>::infinity();
            if (k > 0) wins &= value[k] != value[k - 1];
            const auto is_winner = __builtin_convertvector(wins, Columns<Signed<A>>);
            const Columns<A> from = is_winner ? lows[k] : Columns<A>{} + infinity;
            const Columns<A> to = is_winner ? highs[k] : Columns<A>{} - infinity;
            for (int64_t i = 0; i < width; ++i) {
              low[order[k][i] * num_dims + column + i] = from[i];
              high[order[k][i] * num_dims + column + i] = to[i];
            }
          }
        }
      });
}

template <class T>
void dimension_hits(const T* x, const int64_t* labels, const accumulate_t<T>* low,
                    const accumulate_t<T>* high, int64_t* hits, int64_t num_samples, int64_t num_dims,
                    int64_t num_classes, int64_t stride, int64_t num_threads) {
  using A = accumulate_t<T>;
  using Count = Signed<A>;
  const ClassOrder order(labels, num_samples, num_classes, num_threads);
  order.for_runs(num_dims * sizeof(T), num_threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(num_dims);
    for (int64_t run = begin; run < end; ++run) {
      const int64_t k = order.runs[run].label;
      for_blocks(order.runs[run], [&](int64_t position, int64_t num_rows) {
        const int64_t* rows = order.rows.data() + position;
        for_tiles<A>(num_dims, [&](const auto& tile) {
          constexpr int n = std::decay_t<decltype(tile)>::vectors, L = kLanes<A>;
          Vec<A> from[n], to[n];
          Vec<Count> inside[n] = {};
          Count counts[n * L];
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
          for (int64_t i = 0; i < tile.width(); ++i) own[tile.column + i] += counts[i];
        });
      });
    }
    for (int64_t d = 0; d < num_dims; ++d) {
#pragma omp atomic
      hits[d] += own[d];
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

// The dimension-decoupled unidirectional contrastive loss: loss and gradient of every ordered pair (m, n) in
// one sweep over the keys, as attention with values = keys.
//
//   s_ij = q_i . k_j / temperature,  loss_i = log sum_j exp(s_ij) - s_ii
//   residual_i = sum_j p_ij k_j - k_i,  p = softmax(s)
//
// Queries lie across the lanes, so both products read the keys by broadcast, from one copy gathered and
// packed once per pair, and the softmax over keys needs no sum across lanes. A thread takes a block of
// queries of one student through all its teachers; nothing it computes depends on how blocks are dealt out,
// so no bit depends on the number of threads. bfloat16 goes through dot products of pairs where the processor
// has them: the scores are summed in float32; the weights of the second product are rounded to bfloat16, but
// not the largest so far, exp(0) = 1, so the residual of a sample that is all but learnt keeps its digits.
//
// Floors: 4 N^2 d operations; bytes, one read of the queries and the keys and one write of the residual,
// which is nothing beside them from N = 16 on. Memory beyond inputs and outputs: the packed keys, K d numbers
// a pair, and the tiles of each thread. A core of the machine below executes 117 GFLOP/s of float32 and 234
// of bfloat16 pairs (bench/register_limit.cpp). Predicted: bound by that rate, with 8% for the exponentials
// at d = 64, 4% at 128. Two cores of an AMD EPYC with AVX-512, nothing else running, interleaved medians, one
// pair of N = 4,096 samples, loss and residual. aten is its flash kernel with v = k, eager cross_entropy and
// its autograd:
//   d                  float32: 64    128    256    512    bfloat16: 128    512
//   GFLOP/s                    185    196    210    199              337    383
//   of the two cores' rate     79%    84%    90%    85%              73%    83%
//   / aten                    1.23   1.13   1.13   1.07             2.02   2.16
//   / eager                    7.3    4.3    2.7    1.9              3.3    1.9
// (`mmfast bench duc_loss --fresh-memory`, in bench/results with more sizes.) In float32 aten's 150 to 186
// GFLOP/s leave a kernel at the limit 1.25 to 1.55 of it. Tried and slower: bfloat16 converted to float32
// when packed (1.14 and 1.10 of aten).
#include <omp.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#include "codes.h"
#include "duc_loss_operands.h"
#include "exp.h"
#include "gemm_tile.h"

namespace mmfast {
namespace {

// Keys of a tile, dimensions summed in one go (a second sum adds them up), vectors of queries side by side.
constexpr int kKeys = 96;
constexpr int64_t kSlice = 256;
constexpr int kVectors = 2;
// Query tiles of a block, which meet one key tile after the other: so many that fit the second cache.
constexpr int64_t kMaxTiles = 4;
constexpr int64_t kBlockBytes = 1 << 19;
// Waking threads takes longer than so many operations.
constexpr int64_t kMinOperations = 1 << 19;

// The residual's type: its factors, 1 / temperature among them, are still to come, and float16 would not hold
// it before.
template <class T>
using residual_t = std::conditional_t<std::is_same_v<T, float16>, float, T>;

template <class T>
struct Matrix {
  const T* data;
  int64_t stride_row, stride_dim;

  const T* row(int64_t i) const { return data + i * stride_row; }
};

// Modality `teacher` teaching modality `student`.
template <class A>
struct Pair {
  int64_t teacher, student;
  std::vector<int64_t> dims;
  int64_t padded_dims;
  A* panels;  // [ceil(K / kPanel), padded_dims, kPanel]

  int64_t num_dims() const { return static_cast<int64_t>(dims.size()); }
};

// Two numbers as bfloat16 in the place of one float, the first in the lower half.
inline float pair_up(bfloat16 first, bfloat16 second) {
  return float_of(uint32_t{second.bits} << 16 | first.bits);
}
// The same for vectors of float that are not negative, rounded to nearest.
inline Vec<float> pair_up(Vec<float> first, Vec<float> second) {
  const auto low = (reinterpret_cast<Vec<uint32_t>>(first) + 0x8000) >> 16;
  const auto high = (reinterpret_cast<Vec<uint32_t>>(second) + 0x8000) & 0xffff0000;
  return reinterpret_cast<Vec<float>>(low | high);
}

// Up to nv vectors of queries on their way through the keys of one pair. With `pairs`, queries hold two
// dimensions and weights two keys in each float, as bfloat16.
template <class A, int nv, bool pairs>
struct QueryTile {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, W = nv * L, kGroup = pairs ? 2 : 1;
  A* query;    // [d / kGroup, W]
  A* product;  // [d, W], sum_j exp(s_ij - top_i) k_j so far
  A* top;      // [W], the largest score so far
  A* sum;      // [W], sum_j exp(s_ij - top_i) so far
  A* own;      // [W], s_ii

  static constexpr int64_t size(int64_t padded_dims) { return (2 * padded_dims + 3) * W; }
  QueryTile(A* memory, int64_t padded_dims)
      : query(memory),
        product(memory + padded_dims * W),
        top(memory + 2 * padded_dims * W),
        sum(top + W),
        own(sum + W) {}

  template <class T>
  void start(const Matrix<T>& queries, const std::vector<int64_t>& dims, int64_t first, int64_t count) {
    for (int i = 0; i < W; ++i) {
      const T* row = queries.row(first + i);
      for (size_t c = 0; c < dims.size(); c += kGroup) {
        A& target = query[c / kGroup * W + i];
        if (i >= count) {
          target = 0;
        } else if constexpr (pairs) {
          const bool is_last = c + 1 == dims.size();
          target = pair_up(row[dims[c] * queries.stride_dim],
                           is_last ? T{0} : row[dims[c + 1] * queries.stride_dim]);
        } else {
          target = widen(row[dims[c] * queries.stride_dim]);
        }
      }
      // Not -infinity: as long as all scores are, their difference from it would be NaN.
      top[i] = std::numeric_limits<A>::lowest(), sum[i] = 0, own[i] = 0;
    }
  }

  // p[j, i] = scale * query_i . key_j
  void score(const Pair<A>& pair, const A* panels, int64_t num_keys, A scale, A* p) const {
    const int64_t num_dims = pair.num_dims();
    for (int64_t first = 0; first < num_dims; first += kSlice) {
      const bool is_last = first + kSlice >= num_dims;
      const int64_t steps = (std::min(kSlice, num_dims - first) + kGroup - 1) / kGroup;
      // Not inlined: there GCC copies registers about in the inner loop of bfloat16, at half the rate.
      for_panels(num_keys, [&](int64_t row, auto rows) __attribute__((noinline)) {
        constexpr int num_rows = decltype(rows)::value;
        V sums[num_rows][nv] = {};
        const A* a = panels + row * pair.padded_dims + first / kGroup * kPanel;
        multiply_tile<1, kPanel, pairs>(sums, a, query + first / kGroup * W, steps);
#pragma GCC unroll 12
        for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < nv; ++v) {
            A* target = p + (row + r) * W + v * L;
            const V total = first == 0 ? sums[r][v] : load(target) + sums[r][v];
            store(target, is_last ? total * scale : total);
          }
        }
      });
    }
  }

  // From scores to exp(s_ij - top_i) in place, tops and sums brought up to date; `decay` is what all sums so
  // far are multiplied by.
  void exponentiate(A* p, int64_t num_keys, V (&decay)[nv]) const {
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) {
      A* column = p + v * L;
      const V last = load(top + v * L);
      V highest = last, total = {};
      for (int64_t j = 0; j < num_keys; ++j) {
        const V score = load(column + j * W);
        highest = score > highest ? score : highest;
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < num_keys; j += kGroup) {
        const V weight = exp_nonpositive<A>(load(column + j * W) - highest);
        total += weight;
        if constexpr (pairs) {
          V second = {};
          if (j + 1 < num_keys) second = exp_nonpositive<A>(load(column + (j + 1) * W) - highest);
          total += second;
          store(column + j / 2 * W, pair_up(weight, second));
        } else {
          store(column + j * W, weight);
        }
      }
      decay[v] = exp_nonpositive<A>(last - highest);
      store(top + v * L, highest);
      store(sum + v * L, load(sum + v * L) * decay[v] + total);
    }
  }

  // product = decay * product + sum_j p_ij key_j
  void accumulate(const Pair<A>& pair, const A* panels, int64_t num_keys, const A* p, bool is_first,
                  const V (&decay)[nv]) const {
    for_panels(pair.num_dims(), [&](int64_t dim, auto rows) {
      constexpr int num_rows = decltype(rows)::value;
      V sums[num_rows][nv] = {};
      constexpr int kSteps = kPanel / kGroup;
      const A* a = panels + (pairs ? pair.padded_dims * kSteps : 0) + dim * kSteps;
      int64_t j = 0;
      for (; j + kPanel <= num_keys; j += kPanel)
        multiply_tile<kSteps, 1, pairs>(sums, a + j * pair.padded_dims, p + j / kGroup * W, kSteps);
      multiply_tile<kSteps, 1, pairs>(sums, a + j * pair.padded_dims, p + j / kGroup * W,
                                      (num_keys - j + kGroup - 1) / kGroup);
#pragma GCC unroll 12
      for (int r = 0; r < num_rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < nv; ++v) {
          A* target = product + (dim + r) * W + v * L;
          store(target, is_first ? sums[r][v] : load(target) * decay[v] + sums[r][v]);
        }
      }
    });
  }
};

template <class T, bool pairs>
class DucLoss {
 public:
  using A = accumulate_t<T>;
  using R = residual_t<T>;
  template <int nv>
  using Tile = QueryTile<A, nv, pairs>;
  static constexpr int kTile = kVectors * kLanes<A>;

  std::vector<Matrix<T>> queries, keys;  // [N, D], [K, D] per modality
  std::vector<Pair<A>> all_pairs;
  int64_t num_samples, num_keys, num_dims, offset;
  A scale;
  R* residual;  // [M, N, D] or null

  // Writes the residual and returns losses [M, N].
  const A* run(int64_t num_threads) {
    const int64_t num_students = static_cast<int64_t>(queries.size());
    const int64_t num_panels = (num_keys + kPanel - 1) / kPanel;
    int64_t sum_dims = 0, max_dims = kPanel;
    for (const Pair<A>& pair : all_pairs) {
      sum_dims += pair.padded_dims;
      max_dims = std::max(max_dims, pair.padded_dims);
    }
    const int64_t operations = 4 * num_samples * num_keys * sum_dims;
    num_threads = std::max<int64_t>(1, std::min(num_threads, operations / kMinOperations));
    // Blocks enough for all threads to end at about the same time.
    tile_size_ = Tile<kVectors>::size(max_dims);
    num_tiles_ = std::min(kMaxTiles, kBlockBytes / (tile_size_ * static_cast<int64_t>(sizeof(A))));
    num_tiles_ = std::min(num_tiles_, num_samples * num_students / (kTile * num_threads * 4));
    num_tiles_ = std::max<int64_t>(1, num_tiles_);
    const int64_t block = num_tiles_ * kTile, num_blocks = (num_samples + block - 1) / block;
    const int64_t row_size = std::is_same_v<R, A> || residual == nullptr ? 0 : block * num_dims;
    const int64_t thread_size = round_up(num_tiles_ * tile_size_ + kKeys * kTile + row_size, 64);
    const int64_t panels_size = round_up(num_panels * kPanel * sum_dims, 64);
    memory_.reset(static_cast<A*>(std::aligned_alloc(
        64,
        sizeof(A) * (panels_size + num_threads * thread_size + round_up(num_students * num_samples, 64)))));
    if (memory_ == nullptr) throw std::bad_alloc();
    A* panels = memory_.get();
    for (Pair<A>& pair : all_pairs) {
      pair.panels = panels;
      panels += num_panels * kPanel * pair.padded_dims;
    }
    A* const tiles = memory_.get() + panels_size;
    A* const losses = tiles + num_threads * thread_size;
    Watch watch;
    const Watcher* const caller = &watcher;
#pragma omp parallel num_threads(static_cast<int>(num_threads))
    {
      const Watching watching(watch, &watcher == caller);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_panels * static_cast<int64_t>(all_pairs.size()); ++i)
        pack(all_pairs[i / num_panels], i % num_panels);
      A* const mine = tiles + omp_get_thread_num() * thread_size;
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < num_students * num_blocks; ++i) {
        const int64_t first = i % num_blocks * block;
        run_block(i / num_blocks, first, std::min(block, num_samples - first), mine, losses);
      }
    }
    watch.finish();
    return losses;
  }

 private:
  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };
  std::unique_ptr<A, Free> memory_;
  int64_t tile_size_ = 0, num_tiles_ = 0;

  void pack(const Pair<A>& pair, int64_t index) const {
    const Matrix<T>& source = keys[pair.teacher];
    A* panel = pair.panels + index * kPanel * pair.padded_dims;
    const auto key = [&](int64_t r, int64_t c) {
      const int64_t row = index * kPanel + r;
      const bool is_inside = row < num_keys && c < pair.num_dims();
      return is_inside ? source.row(row)[pair.dims[c] * source.stride_dim] : T{};
    };
    if constexpr (pairs) {
      // One half with pairs of dimensions for the scores, the other with pairs of keys.
      A* const second = panel + kPanel / 2 * pair.padded_dims;
      for (int r = 0; r < kPanel; r += 2) {
        for (int64_t c = 0; c < pair.padded_dims; c += 2) {
          const T block[] = {key(r, c), key(r, c + 1), key(r + 1, c), key(r + 1, c + 1)};
          panel[c / 2 * kPanel + r] = pair_up(block[0], block[1]);
          panel[c / 2 * kPanel + r + 1] = pair_up(block[2], block[3]);
          second[(c * kPanel + r) / 2] = pair_up(block[0], block[2]);
          second[((c + 1) * kPanel + r) / 2] = pair_up(block[1], block[3]);
        }
      }
    } else {
      for (int r = 0; r < kPanel; ++r) {
        for (int64_t c = 0; c < pair.padded_dims; ++c) panel[c * kPanel + r] = widen(key(r, c));
      }
    }
  }

  // Samples first .. first + count - 1 of a student with all its teachers.
  void run_block(int64_t student, int64_t first, int64_t count, A* memory, A* losses) const {
    losses += student * num_samples + first;
    std::fill_n(losses, count, A{0});
    R* const target = residual == nullptr ? nullptr : residual + (student * num_samples + first) * num_dims;
    A* rows = nullptr;
    if constexpr (std::is_same_v<R, A>) {
      rows = target;
    } else if (target != nullptr) {
      rows = memory + num_tiles_ * tile_size_ + kKeys * kTile;
    }
    if (rows != nullptr) std::fill_n(rows, count * num_dims, A{0});
    for (const Pair<A>& pair : all_pairs) {
      if (pair.student == student) run_pair(pair, first, count, memory, losses, rows);
    }
    if constexpr (!std::is_same_v<R, A>) {
      if (rows == nullptr) return;
      for (int64_t i = 0; i < count * num_dims; ++i) target[i] = narrow<R>(rows[i]);
    }
  }

  // Calls function(tile, its first sample within the block, its number of samples).
  template <class Function>
  void for_tiles(const Pair<A>& pair, int64_t count, A* memory, Function&& function) const {
    for (int64_t i = 0; i < count; i += kTile, memory += tile_size_) {
      if (count - i > kTile / 2) {
        function(Tile<kVectors>(memory, pair.padded_dims), i, std::min<int64_t>(kTile, count - i));
      } else {
        function(Tile<kVectors / 2>(memory, pair.padded_dims), i, count - i);
      }
    }
  }

  void run_pair(const Pair<A>& pair, int64_t first, int64_t count, A* memory, A* losses, A* rows) const {
    A* const p = memory + num_tiles_ * tile_size_;
    for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
      tile.start(queries[pair.student], pair.dims, first + i, tile_count);
    });
    for (int64_t key = 0; key < num_keys; key += kKeys) {
      if (is_interrupted(count * kKeys * pair.padded_dims)) return;
      const A* panels = pair.panels + key * pair.padded_dims;
      const int64_t tile_keys = std::min<int64_t>(kKeys, num_keys - key);
      for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
        tile.score(pair, panels, tile_keys, scale, p);
        const int64_t own = offset + first + i - key;
        for (int64_t lane = std::max<int64_t>(0, -own); lane < std::min(tile_count, tile_keys - own); ++lane)
          tile.own[lane] = p[(own + lane) * tile.W + lane];
        typename decltype(tile)::V decay[tile.W / kLanes<A>];
        tile.exponentiate(p, tile_keys, decay);
        if (rows != nullptr) tile.accumulate(pair, panels, tile_keys, p, key == 0, decay);
      });
    }
    for_tiles(pair, count, memory, [&](auto tile, int64_t i, int64_t tile_count) {
      for (int64_t lane = 0; lane < tile_count; ++lane) {
        // The difference first: where scores are large, a logarithm added to one of them would be lost.
        losses[i + lane] += std::log(tile.sum[lane]) + (tile.top[lane] - tile.own[lane]);
        if (rows == nullptr) continue;
        const Matrix<T>& source = keys[pair.teacher];
        const T* key = source.row(offset + first + i + lane);
        A* row = rows + (i + lane) * num_dims;
        const A share = 1 / tile.sum[lane];
        for (int64_t c = 0; c < pair.num_dims(); ++c) {
          const int64_t dim = pair.dims[c];
          row[dim] += tile.product[c * tile.W + lane] * share - widen(key[dim * source.stride_dim]);
        }
      }
    });
  }
};

// Writes the loss: the losses [M, N] summed over students, then reduced over samples.
template <class A>
void reduce(const A* losses, int64_t num_students, int64_t num_samples, Reduction reduction, A* loss) {
  double total = 0;
  for (int64_t i = 0; i < num_samples; ++i) {
    A sum = 0;
    for (int64_t m = 0; m < num_students; ++m) sum += losses[m * num_samples + i];
    if (reduction == Reduction::kNone) loss[i] = sum;
    total += sum;
  }
  if (reduction == Reduction::kNone) return;
  *loss = static_cast<A>(reduction == Reduction::kMean ? total / num_samples : total);
}

template <class T, bool pairs>
void run_op(const int64_t* views, const uint8_t* effective, void* loss, void* residual,
            int64_t num_modalities, int64_t num_samples, int64_t num_keys, int64_t num_dims,
            double temperature, int64_t offset, Reduction reduction, int64_t num_threads) {
  using A = accumulate_t<T>;
  DucLoss<T, pairs> op;
  op.num_samples = num_samples, op.num_keys = num_keys, op.num_dims = num_dims, op.offset = offset;
  op.scale = static_cast<A>(1 / temperature);
  op.residual = static_cast<residual_t<T>*>(residual);
  for (int64_t m = 0; m < num_modalities; ++m) {
    const int64_t* view = views + 6 * m;
    op.queries.push_back({reinterpret_cast<const T*>(view[0]), view[1], view[2]});
    op.keys.push_back({reinterpret_cast<const T*>(view[3]), view[4], view[5]});
    for (int64_t n = 0; n < num_modalities; ++n) {
      Pair<A> pair{m, n, {}, 0, nullptr};
      for (int64_t c = 0; c < num_dims; ++c) {
        if (effective == nullptr || (effective[m * num_dims + c] && !effective[n * num_dims + c]))
          pair.dims.push_back(c);
      }
      pair.padded_dims = round_up(pair.num_dims(), kPanelPart);
      if (pair.num_dims() > 0) op.all_pairs.push_back(std::move(pair));
    }
  }
  reduce(op.run(num_threads), num_modalities, num_samples, reduction, static_cast<A*>(loss));
}

void duc_loss_fwd(const DucOperands& operands, const DucResults& out, double temperature, int64_t offset,
                  Reduction reduction, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("duc_loss", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* run = &run_op<T, false>;
    if constexpr (std::is_same_v<T, bfloat16> && MMFAST_ISA == 2) {
      if (has_bfloat16_pairs()) run = &run_op<T, true>;
    }
    run(operands.views, static_cast<const uint8_t*>(operands.effective), out.loss, out.residuals,
        operands.num_modalities, operands.num_samples, operands.num_keys, operands.num_dims, temperature,
        offset, reduction, num_threads);
  });
}

MMFAST_REGISTER(duc_loss_fwd)

}  // namespace
}  // namespace mmfast

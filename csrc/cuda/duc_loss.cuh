// What the kernels of duc_loss share: the sweep's operands, where packed elements lie, the online softmax.
#pragma once

#include "math.cuh"
#include "tensor_core.cuh"
#include "warp.cuh"

namespace mmfast::duc {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The residual's type: its factors, 1 / temperature among them, are still to come, and float16 would not hold
// it before.
template <class T>
using residual_t = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// What one sweep over the keys reads and writes, for P pairs.
struct Sweep {
  const void* queries;  // packed, query_stride elements a pair
  const void* keys;     // packed, key_stride elements a pair
  void* residual;       // [splits, rows, residual_width]; nullptr: not wanted
  void* losses;  // [rows]; for several splits [3, splits, rows]: maximum, sum and positive score of each row
  const int* counts;  // [P], columns in use; nullptr: num_columns in every pair
  int64_t query_stride, key_stride;
  int64_t num_queries, num_keys, width, residual_width, offset;
  // Results are of the rows of all pairs, one after the other, from this one on: where it is not 0, others
  // are swept whole.
  int64_t first_result;
  int num_pairs, num_columns, num_splits;
  bool is_rounded;  // the residual is in the operands' dtype, otherwise in that of sums, as always of float16
  double scale;     // log2(e) / temperature: exp(s / temperature) = 2^(s scale)

  __host__ __device__ int64_t num_results() const { return num_pairs * num_queries - first_result; }
  __device__ int count(int pair) const { return counts == nullptr ? num_columns : counts[pair]; }
};

// A block's pair and key tiles. Where queries are few their keys are split over blocks, each of which then
// leaves the residual relative to its own maximum and sum and without the positive key, for duc_merge_kernel.
struct Share {
  int pair, index;  // of the block's results: split P + pair
  int64_t first_tile, end_tile;

  __device__ Share(const Sweep& sweep, int tile_keys) {
    const int split = blockIdx.z / sweep.num_pairs;
    const int64_t num_tiles = ceil_div(sweep.num_keys, tile_keys);
    pair = blockIdx.z % sweep.num_pairs;
    index = blockIdx.z;
    first_tile = split * num_tiles / sweep.num_splits;
    end_tile = (split + 1) * num_tiles / sweep.num_splits;
  }

  // Among the results: that of the pair's first row.
  __device__ int64_t place(const Sweep& sweep) const { return index * sweep.num_queries; }
};

// The keys row by row, whose rows begin at multiples of 16 bytes.
struct KeyRows {
  const void* data;
  int64_t stride_pair, stride_row, num_columns;
};

// Half precision lies in panels of 64 columns, so that a row of a panel is 128 bytes, of which chunk c of
// 16 bytes in row r stands at place c ^ (r % 8): eight rows' equal chunks are in different banks.
constexpr int kPanel = 64, kPanelRowBytes = 2 * kPanel, kQueryRows = 64;

// Pairs are bucketed by their number of columns: up to 64, 128, 256, 512 and more.
constexpr int kNumBuckets = 5;

// Keys of a tile for every bucket; buckets from `wide` on are one, whose panels are taken one after the
// other.
struct Tiling {
  int keys[kNumBuckets], wide;

  constexpr __host__ __device__ int bucket(int count) const {
    int bucket = 0;
    while (bucket < wide && count > kPanel << bucket) ++bucket;
    return bucket;
  }
  constexpr __host__ __device__ int num_panels(int count) const {
    const int s = bucket(count);
    return s < wide ? 1 << s : ceil_div(count, kPanel);
  }
};

// Where element (row, column) of a matrix stands, packed in tiles of `rows` rows and so many panels.
__host__ __device__ inline int64_t packed_index(int64_t row, int column, int rows, int num_panels) {
  const int64_t tile = row / rows;
  const int r = static_cast<int>(row - tile * rows), panel = column / kPanel, c = column % kPanel;
  return ((tile * num_panels + panel) * rows + r) * kPanel + ((c / 8 ^ r % 8) * 8 + c % 8);
}

// The state of the online softmax of one thread's two rows. In the accumulators of tensor cores these are
// rows g and g + 8 with g = lane / 4, whose columns 8 i + 2 (lane % 4) and the next are elements 4 i + 2 h
// and the next for row g + 8 h.
struct SoftmaxRows {
  // Of the largest score half, and weights are 2^slack times what they should be: see online_softmax.
  float half_max[2] = {0.5f * kLowest<float>, 0.5f * kLowest<float>}, slack[2] = {};
  float sum[2] = {}, positive_score[2] = {};
};

// Steps of a sweep, some for every key tile, through a ring of stages in shared memory: copy(tile, step,
// stage) begins by cp.async what a later step reads.
template <int num_stages, class Copy>
struct StepPipeline {
  const Copy& copy;
  int64_t next_tile, end_tile;
  int num_steps;  // of a tile
  int next_step = 0, next_stage = 0, stage = 0;

  __device__ __forceinline__ StepPipeline(const Copy& copy, const Share& share, int num_steps)
      : copy(copy), next_tile(share.first_tile), end_tile(share.end_tile), num_steps(num_steps) {
    for (int i = 0; i < num_stages - 1; ++i) copy_next();
  }

  __device__ __forceinline__ void copy_next() {
    if (next_tile < end_tile) copy(next_tile, next_step, next_stage);
    cp_async_commit();
    next_stage = next_stage + 1 == num_stages ? 0 : next_stage + 1;
    if (++next_step == num_steps) next_step = 0, ++next_tile;
  }

  // Waits for this step's stage, which all threads may then read, and refills the one they have left.
  __device__ __forceinline__ int begin_step() {
    cp_async_wait<num_stages - 2>();
    __syncthreads();
    copy_next();
    const int current = stage;
    stage = stage + 1 == num_stages ? 0 : stage + 1;
    return current;
  }
};

// 2^x for x below 1, as exact as exp2_approx (2 units in the last place, 1.7e-7), by instructions of the FMA
// pipe instead of the special functions': x = n + f, |f| <= 1/2, by a sum whose last bits are n + 127, and a
// polynomial of f that is 1 at 0. NaN stays NaN; from -127 down it is 0.
__device__ __forceinline__ float exp2_polynomial(float x) {
  constexpr float kShift = 1.5f * (1 << 23) + 127;
  x = max_or_nan(x, -127.0f);
  const float shifted = x + kShift, f = x - (shifted - kShift);
  float p = 1.3264727e-3f;
  p = fmaf(p, f, 9.6715130e-3f);
  p = fmaf(p, f, 5.5507336e-2f);
  p = fmaf(p, f, 2.4022242e-1f);
  p = fmaf(p, f, 6.9314700e-1f);
  p = fmaf(p, f, 1.0f);
  return p * __uint_as_float(static_cast<unsigned>(__float_as_int(shifted)) << 23);
}

// Exponents are one multiply-add, s scale - M, whose only rounding is the result's. M = max scale is rounded,
// so all weights of a row are 2^slack times too large, slack = max scale - M: it cancels in the residual, and
// the loss divides by the weight of the maximum. Up to this M |slack| <= 2^-13, half a unit in the last place
// of M: less than the rounding of weights, 2^-12 of them in float16. For rows beyond, and infinities, slack
// is 0.
constexpr float kLargestReference = 4096;

// Turns scores into 2^((s - max) scale), and gives the factors that what was summed so far must get. Where
// one of a warp's rows is beyond kLargestReference, scores are subtracted before they are scaled: a large
// one's rounding stays out of the exponent; halves of them, as the difference may be out of range where the
// product is not. A row's sum is that of this thread's columns. A tile that is not `is_edge` has no positive
// key of these rows and no place without a key. Of so many exponentials of a row, `stride`, one is taken by
// exp2_polynomial.
template <int keys, bool is_edge = true, int stride = 0>
__device__ __forceinline__ void online_softmax(float (&s)[keys / 2], SoftmaxRows& rows, float (&decay)[2],
                                               int64_t first_key, int64_t first_positive, int64_t num_keys,
                                               float scale) {
  const int lane = threadIdx.x % kWarp;
  // Of 16 rows of a warp; the tiles with positive keys and the ragged last one alone pay for comparisons.
  if (is_edge && ((first_key < first_positive + 16 && first_positive < first_key + keys) ||
                  first_key + keys > num_keys)) {
    const int64_t positive = first_positive - first_key + lane / 4, left = num_keys - first_key;
#pragma unroll
    for (int i = 0; i < keys / 2; ++i) {
      const int key = i / 4 * 8 + 2 * (lane % 4) + i % 2, h = i / 2 % 2;
      if (key == positive + 8 * h) rows.positive_score[h] = s[i];
      if (key >= left) s[i] = -INFINITY;
    }
  }
  const float twice = 2 * scale;
  bool is_large = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int i = 1; i < keys / 8; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
    top = quad_reduce(top, Max());
    const float base = fmaxf(0.5f * top, rows.half_max[h]), reference = base * twice;
    const bool fits = fabsf(reference) <= kLargestReference;
    const float slack = fits ? fmaf(base, twice, -reference) : 0.0f;
    decay[h] = exp2_approx((rows.half_max[h] - base) * twice + (slack - rows.slack[h]));
    rows.half_max[h] = base, rows.slack[h] = slack;
    is_large |= !fits;
  }
  is_large = __any_sync(kFullMask, is_large);
  if (is_large) {
#pragma unroll
    for (int i = 0; i < keys / 2; ++i) {
      const int h = i / 2 % 2;
      s[i] = fmaf(s[i], 0.5f, -rows.half_max[h]) * twice + rows.slack[h];
    }
  }
  const float factor = is_large ? 1.0f : scale;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float reference = is_large ? 0.0f : rows.half_max[h] * twice;
    float sum = rows.sum[h] * decay[h];
#pragma unroll
    for (int i = 0; i < keys / 8; ++i) {
#pragma unroll
      for (int j = 4 * i + 2 * h; j < 4 * i + 2 * h + 2; ++j) {
        const float x = fmaf(s[j], factor, -reference);
        const bool is_polynomial = stride != 0 && (2 * i + j % 2) % max(stride, 1) == stride / 2;
        s[j] = is_polynomial ? exp2_polynomial(x) : exp2_approx(x);
        sum += s[j];
      }
    }
    rows.sum[h] = sum;
  }
}

// Weights as the left operand: the layouts of accumulators and operands agree.
template <class T, int keys>
__device__ __forceinline__ void round_weights(uint32_t (&p)[keys / 16][4], const float (&s)[keys / 2]) {
#pragma unroll
  for (int i = 0; i < keys / 4; ++i) p[i / 4][i % 4] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
}

template <int n>
__device__ __forceinline__ void scale_rows(float (&acc)[n], const float (&factor)[2]) {
  // After a few tiles maxima seldom change.
  if (!__any_sync(kFullMask, factor[0] != 1 || factor[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < n; ++i) acc[i] *= factor[i / 2 % 2];
}

// Sums over the four threads of a row, after the last tile.
__device__ inline void finish_rows(SoftmaxRows& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows.sum[h] = quad_reduce(rows.sum[h], Sum());
    rows.positive_score[h] = quad_reduce(rows.positive_score[h], Sum());
  }
}

// The maximum and the positive score come from the same product: where they are one, this is log(sum)
// exactly.
template <class A>
__device__ A loss_of(A sum, A max, A positive_score, A scale) {
  return natural_log(sum) + (A(0.5) * max - A(0.5) * positive_score) * (2 * scale * static_cast<A>(kLn2));
}

// What a row's residual is divided by. A part of the keys with scores of -infinity alone has sum 0, and its
// residual counts for nothing where another part has more; of all keys it is NaN.
template <class A>
__device__ __forceinline__ A divisor_of(const Sweep& sweep, A sum) {
  return sum == 0 && sweep.num_splits > 1 ? A(1) : sum;
}

// Writes a row's loss, or what it will be made of.
template <class A>
__device__ void store_loss(const Sweep& sweep, int64_t place, A sum, A max, A positive_score) {
  A* const target = static_cast<A*>(sweep.losses) + place;
  if (sweep.num_splits == 1) {
    *target = loss_of(sum, max, positive_score, static_cast<A>(sweep.scale));
  } else {
    const int64_t plane = sweep.num_splits * sweep.num_results();
    target[0] = max, target[plane] = sum, target[2 * plane] = positive_score;
  }
}

// Writes the losses of a warp's 16 rows; `place` as Share has it.
__device__ __forceinline__ void store_losses(const Sweep& sweep, int64_t place, int64_t first_row,
                                             const SoftmaxRows& rows) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_row + lane / 4 + 8 * h;
    if (lane % 4 != 0 || row >= sweep.num_queries) continue;
    const float sum = rows.sum[h] / exp2_approx(rows.slack[h]);
    store_loss(sweep, place + row, sum, 2 * rows.half_max[h], rows.positive_score[h]);
  }
}

// Writes, from first_column on, factor acc + own key's factor k of a warp's 16 rows, k their own keys.
template <class T, int columns, int tile_keys, class Shared, class Own>
__device__ __forceinline__ void store_sums(const Sweep& sweep, const Shared& share, int64_t first_row,
                                           const float (&factor)[2], const Own& own,
                                           const float (&acc)[columns / 2], int first_column, int count,
                                           int num_panels) {
  const int lane = threadIdx.x % kWarp, t = lane % 4, left = count - first_column - 2 * t;
  const T* keys = static_cast<const T*>(sweep.keys) + share.pair * sweep.key_stride;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_row + lane / 4 + 8 * h;
    if (row >= sweep.num_queries) continue;
    // The row's positive key in the first of these panels: chunk i of each stands at place i ^ r % 8.
    const int64_t positive_row = sweep.offset + row, tile = positive_row / tile_keys;
    const int r = static_cast<int>(positive_row - tile * tile_keys);
    const T* const positive =
        keys + ((tile * num_panels + first_column / kPanel) * tile_keys + r) * kPanel + 2 * t;
    const int64_t target = ((share.place(sweep) + row) * sweep.residual_width + first_column) / 2 + t;
    const auto store = [&](auto* residual) {
#pragma unroll
      for (int i = 0; i < columns / 8; ++i) {
        if (8 * i >= left) continue;
        const auto k = load_pack<2>(positive + i / 8 * (tile_keys * kPanel) + (i % 8 ^ r % 8) * 8);
        const float low = acc[4 * i + 2 * h] * factor[h] + own(h, static_cast<float>(k.values[0]));
        const float high = acc[4 * i + 2 * h + 1] * factor[h] + own(h, static_cast<float>(k.values[1]));
        if constexpr (sizeof(*residual) == 4) {
          residual[target + 4 * i] = pack_pair<T>(low, high);
        } else {
          residual[target + 4 * i] = {low, high};
        }
      }
    };
    if (std::is_same_v<residual_t<T>, T> && sweep.is_rounded) {
      store(static_cast<uint32_t*>(sweep.residual));
    } else {
      store(static_cast<Pack<float, 2>*>(sweep.residual));
    }
  }
}

// The same of the residuals p k - positive key.
template <class T, int columns, int tile_keys, class Shared>
__device__ __forceinline__ void store_residuals(const Sweep& sweep, const Shared& share, int64_t first_row,
                                                const SoftmaxRows& rows, const float (&acc)[columns / 2],
                                                int first_column, int count, int num_panels) {
  const float positive_factor = sweep.num_splits == 1 ? 1.0f : 0.0f;
  const float inverse[2] = {1 / divisor_of(sweep, rows.sum[0]), 1 / divisor_of(sweep, rows.sum[1])};
  const auto own = [&](int, float k) { return -positive_factor * k; };
  store_sums<T, columns, tile_keys>(sweep, share, first_row, inverse, own, acc, first_column, count,
                                    num_panels);
}

}  // namespace mmfast::duc

// What the sigmoid loss makes of scores, in the place of the online softmax of duc_loss: overloads of what
// the sweeps of contrast_mma.cuh and contrast_plain.cuh call. Included by sigmoid_loss.cu only.
#pragma once

#include "contrast_call.cuh"

namespace mmfast::duc {
namespace {

struct SigmoidSweep : Sweep {
  const double* numbers;  // [2], temperature and bias; nullptr: the two that follow
  double inverse_temperature, bias;
  void* sums;  // [2, N]: of each row's weights, and of these times scores less the bias
};

// A thread's share of a row: log(1 + exp(t)) = max(t, 0) + log(1 + e), e = exp(-|t|). The factors 1 + e are
// multiplied, as their product less 1, which keeps the digits of small e as a sum would.
template <class A>
struct SigmoidRow {
  A loss = 0, factors = 0, weights = 0, heated = 0;

  // Returns e of a score t, and adds what the loss has of it.
  __device__ __forceinline__ void add_loss(A t, A e) {
    loss += t > 0 ? t : A(0);
    factors = multiply_add(factors, e, factors + e);
  }
  __device__ __forceinline__ void add_weight(A weight, A score) {
    weights += weight;
    heated = multiply_add(weight, score, heated);
  }
  // After a tile, of 16 of the thread's factors at most: before the product leaves the range of float.
  __device__ __forceinline__ void end_tile() {
    if (factors > A(1e18)) take_logarithm();
  }
  __device__ __forceinline__ void take_logarithm() {
    loss += natural_log_of_one_and(factors);
    factors = 0;
  }
};

// A score that with any bias is so low that it weighs nothing, and is finite itself: for own keys, which are
// taken one by one, and keys that are not there.
template <class A>
constexpr A kNothing = A(-3e30);

template <class A>
__device__ __forceinline__ void read_numbers(const SigmoidSweep& sweep, A& scale, A& bias) {
  const bool is_known = sweep.numbers == nullptr;
  scale = static_cast<A>(is_known ? sweep.inverse_temperature : 1 / sweep.numbers[0]);
  bias = static_cast<A>(is_known ? sweep.bias : sweep.numbers[1]);
}

// Writes the loss and the two sums of a row.
template <class A>
__device__ __forceinline__ void store_row(const SigmoidSweep& sweep, int split, int64_t row,
                                          const SigmoidRow<A>& sums) {
  A* const losses = static_cast<A*>(sweep.losses);
  if (sweep.num_splits == 1) {
    A* const target = static_cast<A*>(sweep.sums) + row;
    losses[row] = sums.loss, target[0] = sums.weights, target[sweep.num_queries] = sums.heated;
  } else {
    A* const target = losses + split * sweep.num_queries + row;
    const int64_t plane = sweep.num_splits * sweep.num_queries;
    target[0] = sums.loss, target[plane] = sums.weights, target[2 * plane] = sums.heated;
  }
}

// The largest weights become 2^15 in float16, whose least numbers those of e^-20 would be next to otherwise.
template <class T>
constexpr float kEnlarged = std::is_same_v<T, __half> ? 32768.0f : 1.0f;

// Two rows of a thread of duc_mma_kernel.
struct SigmoidRows {
  SigmoidRow<float> sums[2];
  float own_weight[2] = {}, scale, bias;
};

__device__ __forceinline__ SigmoidRows begin_rows(const SigmoidSweep& sweep) {
  SigmoidRows rows;
  read_numbers(sweep, rows.scale, rows.bias);
  return rows;
}

// From products to weights of a tile. Own keys of 16 rows of a warp and keys past the end are looked for in
// the tiles that have some alone.
template <class T, int keys>
__device__ __forceinline__ void weigh(float (&s)[keys / 2], SigmoidRows& rows, float (&)[2],
                                      int64_t first_key, int64_t first_positive, const SigmoidSweep& sweep) {
  const int lane = threadIdx.x % kWarp;
  const bool is_edge = (first_key < first_positive + 16 && first_positive < first_key + keys) ||
                       first_key + keys > sweep.num_keys;
  const int64_t positive = first_positive - first_key + lane / 4, left = sweep.num_keys - first_key;
  const auto weight_of = [&](float t, float e) {
    return (t > 0 ? kEnlarged<T> : kEnlarged<T> * e) * reciprocal_approx(1 + e);
  };
  const auto exponential_of = [](float t) { return exp2_approx(-fabsf(t) * static_cast<float>(kLog2E)); };
  float own[2] = {};
#pragma unroll
  for (int i = 0; i < keys / 2; ++i) s[i] *= rows.scale;
  if (is_edge) {
#pragma unroll
    for (int i = 0; i < keys / 2; ++i) {
      const int key = i / 4 * 8 + 2 * (lane % 4) + i % 2, h = i / 2 % 2;
      if (key == positive + 8 * h) own[h] = s[i];
      if (key == positive + 8 * h || key >= left) s[i] = kNothing<float>;
    }
  }
#pragma unroll
  for (int i = 0; i < keys / 2; ++i) {
    SigmoidRow<float>& sums = rows.sums[i / 2 % 2];
    const float t = s[i] + rows.bias, e = exponential_of(t), weight = weight_of(t, e);
    sums.add_loss(t, e);
    sums.add_weight(weight, s[i]);
    s[i] = weight;
  }
  if (is_edge) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t key = positive + 8 * h;
      if (key < 0 || key >= keys || key % 8 / 2 != lane % 4) continue;
      SigmoidRow<float>& sums = rows.sums[h];
      const float t = -(own[h] + rows.bias), e = exponential_of(t), weight = -weight_of(t, e);
      sums.add_loss(t, e);
      sums.add_weight(weight, own[h]);
      rows.own_weight[h] = weight;
#pragma unroll
      for (int i = 2 * h; i < keys / 2; i += 4) {
        if (key == i / 4 * 8 + 2 * (lane % 4)) s[i] = weight;
        if (key == i / 4 * 8 + 2 * (lane % 4) + 1) s[i + 1] = weight;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) rows.sums[h].end_tile();
}

// Sums are not relative to anything.
template <int n>
__device__ __forceinline__ void decay_rows(const SigmoidRows&, float (&)[n], const float (&)[2]) {}

__device__ inline void finish_rows(SigmoidRows& rows) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    SigmoidRow<float>& sums = rows.sums[h];
    sums.take_logarithm();
    sums.loss = quad_reduce(sums.loss, Sum());
    sums.weights = quad_reduce(sums.weights, Sum());
    sums.heated = quad_reduce(sums.heated, Sum());
    rows.own_weight[h] = quad_reduce(rows.own_weight[h], Sum());
  }
}

template <class T>
__device__ __forceinline__ void store_losses(const SigmoidSweep& sweep, int split, int64_t first_row,
                                             const SigmoidRows& rows) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t row = first_row + lane / 4 + 8 * h;
    if (lane % 4 != 0 || row >= sweep.num_queries) continue;
    SigmoidRow<float> sums = rows.sums[h];
    sums.weights *= 1 / kEnlarged<T>, sums.heated *= 1 / kEnlarged<T>;
    store_row(sweep, split, row, sums);
  }
}

// At first by far the largest, the own key's weight is taken in float32: what rounding it lost is added, save
// of infinite keys, which have had their effect.
template <class T, int columns, int tile_keys>
__device__ __forceinline__ void store_residuals(const SigmoidSweep& sweep, const Share& share,
                                                int64_t first_row, const SigmoidRows& rows,
                                                const float (&acc)[columns / 2], int first_column, int count,
                                                int num_panels) {
  constexpr float factor = 1 / kEnlarged<T>;
  const float factors[2] = {factor, factor};
  float lost[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float weight = rows.own_weight[h];
    lost[h] = (weight - static_cast<float>(static_cast<T>(weight))) * factor;
  }
  const auto own = [&](int h, float k) { return is_finite(k) ? lost[h] * k : 0.0f; };
  store_sums<T, columns, tile_keys>(sweep, share, first_row, factors, own, acc, first_column, count,
                                    num_panels);
}

// The rows of a thread of duc_plain_kernel.
template <class T, int rows>
struct PlainSigmoidRows {
  SigmoidRow<T> sums[rows];
  T scale, bias;
};

template <class T, int rows>
__device__ __forceinline__ PlainSigmoidRows<T, rows> begin_plain_rows(const SigmoidSweep& sweep) {
  PlainSigmoidRows<T, rows> begun;
  read_numbers(sweep, begun.scale, begun.bias);
  return begun;
}

template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void weigh_plain(T (&s)[Tile::thread_rows][Tile::thread_keys],
                                            PlainSigmoidRows<T, Tile::thread_rows>& rows,
                                            T (&)[Tile::thread_rows][Tile::thread_columns], int64_t first_key,
                                            int64_t first_positive, const SigmoidSweep& sweep, int thread_row,
                                            int thread_column) {
  const bool is_edge = (first_key < first_positive + Tile::rows && first_positive < first_key + Tile::keys) ||
                       first_key + Tile::keys > sweep.num_keys;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; ++i) {
    SigmoidRow<T>& sums = rows.sums[i];
    const int64_t own = first_positive + spread<Tile::vector>(thread_row, i) - first_key;
#pragma unroll
    for (int j = 0; j < Tile::thread_keys; ++j) {
      const int key = spread<Tile::vector>(thread_column, j);
      T score = s[i][j] * rows.scale;
      if (is_edge && first_key + key >= sweep.num_keys) score = kNothing<T>;
      const bool is_own = is_edge && key == own;
      const T shifted = score + rows.bias, t = is_own ? -shifted : shifted;
      const T e = exponential(t > 0 ? -t : t), weight = (t > 0 ? T(1) : e) / (1 + e);
      sums.add_loss(t, e);
      s[i][j] = is_own ? -weight : weight;
      sums.add_weight(s[i][j], score);
    }
    sums.end_tile();
  }
}

// Writes losses, sums and residuals.
template <class Tile, class T = typename Tile::T>
__device__ __forceinline__ void store_plain(const SigmoidSweep& sweep, const Share& share, const T*, int64_t,
                                            int count, int first_column,
                                            PlainSigmoidRows<T, Tile::thread_rows>& rows,
                                            const T (&acc)[Tile::thread_rows][Tile::thread_columns],
                                            int thread_row, int thread_column) {
  constexpr int vector = Tile::vector;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Tile::rows;
#pragma unroll
  for (int i = 0; i < Tile::thread_rows; ++i) {
    SigmoidRow<T>& sums = rows.sums[i];
    sums.take_logarithm();
    sums.loss = warp_reduce<16>(sums.loss, Sum());
    sums.weights = warp_reduce<16>(sums.weights, Sum());
    sums.heated = warp_reduce<16>(sums.heated, Sum());
    const int64_t row = first_row + spread<vector>(thread_row, i);
    if (row >= sweep.num_queries) continue;
    if (first_column == 0 && thread_column == 0) store_row(sweep, share.index, row, sums);
    if (sweep.residual == nullptr) continue;
    T* const target = static_cast<T*>(sweep.residual) +
                      (share.index * sweep.num_queries + row) * sweep.residual_width + first_column;
#pragma unroll
    for (int j = 0; j < Tile::thread_columns; ++j) {
      const int column = spread<vector>(thread_column, j);
      if (first_column + column < count) target[column] = acc[i][j];
    }
  }
}

}  // namespace
}  // namespace mmfast::duc

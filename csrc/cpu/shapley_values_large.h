// Shapley values of many players: a row is folded by whole vectors, in chunks of 4,096 coalitions.
#pragma once

#include <vector>

#include "shapley_values_exact.h"
#include "subsets.h"

namespace mmfast {
namespace {

constexpr int kChunkBits = 12;

// The weights of whole vectors of coalitions: lane i of a[p] weighs a coalition of p players above the lane
// bits and those in i.
template <class A>
struct VectorWeights {
  Vec<A> a[kMaxPlayers + 1], b[kMaxPlayers + 1];

  explicit VectorWeights(int num_players) {
    const ShapleyWeights<double> weights(num_players);
    for (int p = 0; p + log2_of(kLanes<A>) <= num_players; ++p) {
      for (int i = 0; i < kLanes<A>; ++i) {
        a[p][i] = static_cast<A>(weights.a[p + count_bits(i)]);
        b[p][i] = static_cast<A>(weights.b[p + count_bits(i)]);
      }
    }
  }
};

// A chunk of coalitions after folding all bits above those of the lane.
template <class A>
struct Partial {
  // The last few stay zero: `store_values` reads whole vectors of players.
  Vec<A> total, shared, half_sums[2 * kMaxPlayers];
};

// fold_subsets for a number of bits known at run time only.
template <class V>
inline void fold_blocks(V* totals, int bits, V* half_sums) {
  for (int bit = bits - 1; bit >= 0; --bit) {
    V sum = {};
    for (int i = 0; i < 1 << bit; ++i) {
      sum += totals[(1 << bit) + i];
      totals[i] += totals[(1 << bit) + i];
    }
    half_sums[bit] = sum;
  }
}

// Folds 2^bits coalitions, 2^block_bits vectors at a time in registers. `a` and `b` are the weights at the
// chunk's number of players above `bits`.
template <class T, int block_bits>
void fold_chunk(const T* v, accumulate_t<T> origin, int bits, const Vec<accumulate_t<T>>* a,
                const Vec<accumulate_t<T>>* b, Partial<accumulate_t<T>>& out) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int L = kLanes<A>, block = 1 << block_bits;
  const int outer_bits = bits - log2_of(L) - block_bits, num_blocks = 1 << outer_bits;
  V totals[(1 << kChunkBits) / (L * block)], half_sums[block_bits] = {}, shared[4] = {};
  for (int j = 0; j < num_blocks; ++j) {
    const int players = __builtin_popcount(j);
    const T* source = v + j * block * L;
    V x[block], halves[block_bits];
    MMFAST_UNROLL
    for (int i = 0; i < block; ++i) {
      const V utility = load(source + i * L) - origin;
      const int size = players + count_bits(i);
      shared[i % 4] += b[size] * utility;
      x[i] = a[size] * utility;
    }
    fold_subsets<block_bits>(x, halves);
    MMFAST_UNROLL
    for (int bit = 0; bit < block_bits; ++bit) half_sums[bit] += halves[bit];
    totals[j] = x[0];
  }
  for (int bit = 0; bit < block_bits; ++bit) out.half_sums[bit] = half_sums[bit];
  fold_blocks(totals, outer_bits, out.half_sums + block_bits);
  out.total = totals[0];
  out.shared = (shared[0] + shared[1]) + (shared[2] + shared[3]);
}

// Sums the lanes of each of n vectors: sum i ends in lane i of the result.
template <int n, class V>
inline V sum_lanes(V* x) {
  constexpr int L = sizeof(V) / sizeof(x[0][0]);
  MMFAST_UNROLL
  for (int count = n; count > 1; count /= 2) {
    MMFAST_UNROLL
    for (int i = 0; i < count / 2; ++i) {
      x[i] = unzip<false>(x[2 * i], x[2 * i + 1]) + unzip<true>(x[2 * i], x[2 * i + 1]);
    }
  }
  MMFAST_UNROLL
  for (int left = L / n; left > 1; left /= 2) x[0] = unzip<false>(x[0], x[0]) + unzip<true>(x[0], x[0]);
  return x[0];
}

// More than four players: vectors within the row.
template <class T>
struct LargeRow {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, lane_bits = log2_of(L);
  int num_players, bits, num_chunks;
  VectorWeights<A> weights;

  explicit LargeRow(int num_players)
      : num_players(num_players),
        bits(std::min(num_players, kChunkBits)),
        num_chunks(1 << (num_players - bits)),
        weights(num_players) {}

  void fold(const T* v, int64_t stride, int64_t chunk, Partial<A>& out) const {
    const int players = __builtin_popcountll(chunk);
    const T* source = v + (chunk << bits) * stride;
    T gathered[1 << kChunkBits];
    // A number added to all utilities changes no value. Less the empty coalition's nothing cancels; less the
    // mean of it and the full one, sums stay smaller, too: worth its time in long rows.
    A origin = widen(*v);
    if (num_players >= 8) {
      const int64_t full = (int64_t{1} << num_players) - 1;
      origin = A(0.5) * origin + A(0.5) * widen(v[full * stride]);
    }
    if (stride != 1) {
      gather(source, stride, int64_t{1} << bits, gathered);
      source = gathered;
    }
    const V *a = weights.a + players, *b = weights.b + players;
    switch (std::min(3, bits - lane_bits)) {
      case 1:
        return fold_chunk<T, 1>(source, origin, bits, a, b, out);
      case 2:
        return fold_chunk<T, 2>(source, origin, bits, a, b, out);
      default:
        return fold_chunk<T, 3>(source, origin, bits, a, b, out);
    }
  }

  // Lane sums of vectors first .. first + n - 1: those of the players below the lanes mask the total.
  template <int n>
  V sum_players(const Partial<A>& part, int first) const {
    V x[n];
    MMFAST_UNROLL
    for (int i = 0; i < n; ++i) {
      const int bit = first + i;
      x[i] = (bit < lane_bits ? mask(part.total, bit) : part.half_sums[bit - lane_bits]) - part.shared;
    }
    return sum_lanes<n>(x);
  }

  // The lanes of x whose index has the bit set, else 0.
  static V mask(V x, int bit) {
    Vec<Int<A>> lanes;
    MMFAST_UNROLL
    for (int i = 0; i < L; ++i) lanes[i] = -(i >> bit & 1);
    return from_bits<A>(bits_of<A>(x) & lanes);
  }

  // Writes a row's M values; up to `room` elements from phi on may be overwritten.
  void store_values(const Partial<A>& part, T* phi, int64_t room) const {
    constexpr int few = L < 8 ? L : 8;
    for (int first = 0; first < num_players; first += L) {
      const V sums = num_players <= few ? sum_players<few>(part, first) : sum_players<L>(part, first);
      if (room - first >= L) {
        store(phi + first, sums);
      } else {
        store_part(phi + first, sums, std::min(L, num_players - first));
      }
    }
  }

  void fwd_rows(const T* v, T* phi, int64_t begin, int64_t end, int64_t stride_row,
                int64_t stride_coalition) const {
    Partial<A> part = {};
    for (int64_t row = begin; row < end; ++row) {
      fold(v + row * stride_row, stride_coalition, 0, part);
      // Whole vectors run over into rows that this thread writes next.
      store_values(part, phi + row * num_players, (end - row) * num_players);
    }
  }

  // Adds up the chunks of a row in their order.
  Partial<A> sum_chunks(const Partial<A>* chunks) const {
    Partial<A> sum = {};
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const Partial<A>& part = chunks[chunk];
      for (int bit = 0; bit < bits - lane_bits; ++bit) sum.half_sums[bit] += part.half_sums[bit];
      for (int bit = bits; bit < num_players; ++bit) {
        if (chunk >> (bit - bits) & 1) sum.half_sums[bit - lane_bits] += part.total;
      }
      sum.total += part.total;
      sum.shared += part.shared;
    }
    return sum;
  }

  // Gradients of the utilities of chunks [begin, end) of all rows' chunks in a line.
  void bwd_chunks(const T* dphi, T* dv, int64_t begin, int64_t end, int64_t stride_row,
                  int64_t stride_player) const {
    RowGradient row;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % num_chunks;
      if (item == begin || chunk == 0) start_row(dphi + item / num_chunks * stride_row, stride_player, row);
      V below = row.lane_sums;
      for (int m = bits; m < num_players; ++m) {
        if (chunk >> (m - bits) & 1) below += row.dphi[m];
      }
      const int players = __builtin_popcountll(chunk), num_vectors = 1 << (bits - lane_bits);
      T* target = dv + (item << bits);
      for (int j = 0; j < num_vectors; ++j) {
        const int size = players + __builtin_popcount(j);
        store(target + j * L, weights.a[size] * (below + row.vector_sums[j]) - row.shared[size]);
      }
    }
  }

 private:
  // Of a row: its gradients, and sums of them over the players of a lane and of a vector within a chunk.
  struct RowGradient {
    A dphi[kMaxPlayers], vector_sums[(1 << kChunkBits) / L];
    V lane_sums, shared[kMaxPlayers + 1];
  };

  void start_row(const T* dphi, int64_t stride_player, RowGradient& row) const {
    A total = 0;
    for (int m = 0; m < num_players; ++m) {
      row.dphi[m] = widen(dphi[m * stride_player]);
      total += row.dphi[m];
    }
    row.lane_sums = V{};
    for (int i = 0; i < L; ++i) {
      for (int m = 0; m < lane_bits; ++m) row.lane_sums[i] += i >> m & 1 ? row.dphi[m] : 0;
    }
    row.vector_sums[0] = 0;
    for (int m = lane_bits; m < bits; ++m) {
      const int half = 1 << (m - lane_bits);
      for (int i = 0; i < half; ++i) row.vector_sums[half + i] = row.vector_sums[i] + row.dphi[m];
    }
    for (int p = 0; p <= num_players - lane_bits; ++p) row.shared[p] = weights.b[p] * total;
  }
};

}  // namespace
}  // namespace mmfast

// Shapley values of M players from the utilities of S = 2^M coalitions, and the transposed map.
//
//   phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s
//   b_k = k! (M-k-1)! / M!,  b_M = 0,  a_k = b_{k-1} + b_k
//
// The M half-sums come out of folding the weighted table bit by bit: 2 S additions a row instead of M S. Rows
// of up to 32 coalitions go one into each SIMD lane (transposed in registers); a longer one is folded by
// whole vectors, in chunks of 4,096 coalitions, so the result does not depend on the number of threads and
// errors grow little with M.
//
// Bytes that must move: S + M numbers a row. One core of a 2-core AMD EPYC with AVX-512, float32, 64 MB of
// utilities, medians of interleaved runs, where a plain sum reads 20 GB/s and a copy moves 21 GB/s:
//   M              2    3    4    5    6    7    8    9   10   11   12
//   fwd, GB/s     18   16   19   13    8   14   19   23   22   22   27    of utilities read
//   / torch.mm   6.5  5.6  4.4  4.4  2.5  5.0  5.3  9.0  8.0  9.2  6.3    v @ W
//   bwd, GB/s     19   21   22   15   17   22   25   25   25   24   25    of gradient written
//   / torch.mm   9.2  8.8  2.0  2.2  2.8  5.6  6.7  7.3  4.2  3.3  3.7    dphi @ W^T
// An infinite utility makes no number of the folds, and large ones may overflow there though their weighted
// means do not: rows whose values come out so are computed once more, player by player.
// Tried and slower: one row at a time at M = 5 (45 ns a row instead of 10), loops left rolled (twice the time
// to M = 7).
#include <cmath>
#include <limits>
#include <vector>

#include "codes.h"
#include "vec_math.h"

namespace mmfast {
namespace {

constexpr int kChunkBits = 12;
constexpr int kMaxPlayers = 20;

// GCC leaves loops of more than 16 turns rolled, and arrays of vectors in memory with them.
#define MMFAST_UNROLL _Pragma("GCC unroll 32")

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
constexpr int count_bits(unsigned n) { return n == 0 ? 0 : static_cast<int>(n & 1) + count_bits(n >> 1); }
constexpr int reverse_bits(int n, int width) {
  return width == 0 ? 0 : (n & 1) << (width - 1) | reverse_bits(n >> 1, width - 1);
}

// a_k and b_k of the formula.
struct Weights {
  double a[kMaxPlayers + 1], b[kMaxPlayers + 1];

  explicit Weights(int num_players) {
    double last = 0, next = 1.0 / num_players;
    for (int k = 0; k <= num_players; ++k) {
      a[k] = last + next, b[k] = next;
      last = next;
      next = k + 1 < num_players ? next * (k + 1) / (num_players - 1 - k) : 0;
    }
  }
};

// The same for whole vectors: lane i of a[p] weighs a coalition of p players above the lane bits and those in
// i.
template <class A>
struct VectorWeights {
  Vec<A> a[kMaxPlayers + 1], b[kMaxPlayers + 1];

  explicit VectorWeights(int num_players) {
    const Weights weights(num_players);
    for (int p = 0; p + log2_of(kLanes<A>) <= num_players; ++p) {
      for (int i = 0; i < kLanes<A>; ++i) {
        a[p][i] = static_cast<A>(weights.a[p + count_bits(i)]);
        b[p][i] = static_cast<A>(weights.b[p + count_bits(i)]);
      }
    }
  }
};

// Copies `count` numbers that lie `stride` apart.
template <class T>
void gather(const T* source, int64_t stride, int64_t count, T* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i * stride];
}

// Whether any of `count` numbers is NaN, infinite, or above `most` in magnitude.
template <class T>
__attribute__((noinline)) bool has_unbounded(const T* x, int64_t count, accumulate_t<T> most) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>, kSums = 4;
  // What is above `most` is infinite after this; 0 times it, and all that is added to that, is NaN.
  const A reach = std::numeric_limits<A>::max() / most;
  Vec<A> doubt[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * L <= count; i += kSums * L) {
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) doubt[j] += load(x + i + j * L) * reach * A(0);
  }
  A rest = 0;
  for (; i < count; ++i) rest += widen(x[i]) * reach * A(0);
  return rest != 0 || any((doubt[0] + doubt[1]) + (doubt[2] + doubt[3]) != 0);
}

// The values of a row by the formula itself, if any of them is NaN or infinite as the fold left it.
template <class T>
__attribute__((noinline, cold)) void mend_values(const T* v, int64_t stride, int num_players, T* phi) {
  using A = accumulate_t<T>;
  if (!has_unbounded(phi, num_players, std::numeric_limits<A>::max())) return;
  // Every coalition counts for every player: one that is worth infinity lifts those within it and sinks the
  // others, and so the reverse. Who is both lifted and sunk has NaN.
  uint32_t lifted = 0, sunk = 0;
  const uint32_t size = uint32_t{1} << num_players;
  for (uint32_t s = 0; s < size; ++s) {
    const A utility = widen(v[s * stride]);
    if (std::isfinite(utility)) continue;
    if (!(utility < 0)) lifted |= s, sunk |= ~s;
    if (!(utility > 0)) lifted |= ~s, sunk |= s;
  }
  const bool is_infinite = (lifted | sunk) != 0;
  const Weights weights(num_players);
  for (int m = 0; m < num_players; ++m) {
    // Halves, so that nothing overflows that a value does not.
    double with = 0, without = 0;
    for (uint32_t s = 0; s < size && !is_infinite; ++s) {
      const double half = 0.5 * widen(v[s * stride]);
      const int players = __builtin_popcount(s);
      if (s >> m & 1) {
        with += weights.b[players - 1] * half;
      } else {
        without += weights.b[players] * half;
      }
    }
    A value = static_cast<A>(2 * (with - without));
    if (is_infinite) value = (lifted >> m & 1 ? kInfinity<A> : A(0)) - (sunk >> m & 1 ? kInfinity<A> : A(0));
    phi[m] = narrow<T>(value);
  }
}

// The gradients of `count` coalitions from `first` on by the formula itself.
template <class T>
__attribute__((noinline, cold)) void mend_gradients(const T* dphi, int num_players, int64_t first,
                                                    int64_t count, T* dv) {
  const Weights weights(num_players);
  for (int64_t i = 0; i < count; ++i) {
    const int players = __builtin_popcountll(first + i);
    double sum = 0;
    for (int m = 0; m < num_players; ++m) {
      const double share = widen(dphi[m]);
      sum += (first + i) >> m & 1 ? weights.b[players - 1] * share : -weights.b[players] * share;
    }
    dv[i] = narrow<T>(static_cast<accumulate_t<T>>(sum));
  }
}

// From vectors of interleaved rows of n numbers to one vector per number, at the position of reversed bits;
// `zip_rows` undoes it.
template <int n, class V>
inline void unzip_rows(V* x) {
  if constexpr (n > 1) {
    V halves[n];
    MMFAST_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      halves[i] = unzip<false>(x[2 * i], x[2 * i + 1]);
      halves[n / 2 + i] = unzip<true>(x[2 * i], x[2 * i + 1]);
    }
    unzip_rows<n / 2>(halves);
    unzip_rows<n / 2>(halves + n / 2);
    MMFAST_UNROLL
    for (int i = 0; i < n; ++i) x[i] = halves[i];
  }
}
template <int n, class V>
inline void zip_rows(V* x) {
  if constexpr (n > 1) {
    zip_rows<n / 2>(x);
    zip_rows<n / 2>(x + n / 2);
    V rows[n];
    MMFAST_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      rows[2 * i] = zip<false>(x[i], x[n / 2 + i]);
      rows[2 * i + 1] = zip<true>(x[i], x[n / 2 + i]);
    }
    MMFAST_UNROLL
    for (int i = 0; i < n; ++i) x[i] = rows[i];
  }
}

// Lane `lane` of vector `vector` when n numbers of each row lie side by side (Rows), or when vector i holds
// number i of all rows (Columns): which vector of the other form it is in, and at which lane.
template <int n, int L>
struct Rows {
  static constexpr int vector(int vector, int lane) { return (vector * L + lane) % n; }
  static constexpr int lane(int vector, int lane) { return (vector * L + lane) / n; }
};
template <int n, int L>
struct Columns {
  static constexpr int vector(int vector, int lane) { return (lane * n + vector) / L; }
  static constexpr int lane(int vector, int lane) { return (lane * n + vector) % L; }
};

// Vector i of the form `To`, taken together from the n vectors x of the other form, one shuffle for each
// after the first.
template <class To, int i, int k, class V, int... lane>
inline V merge(V merged, V next, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  return shuffle<(To::vector(i, lane) == k             ? L + To::lane(i, lane)
                  : k == 1 && To::vector(i, lane) == 0 ? To::lane(i, lane)
                                                       : lane)...>(merged, next);
}
template <class To, int i, class V, int... k>
inline V convert_one(const V* x, std::integer_sequence<int, k...>) {
  V merged = x[0];
  ((merged = merge<To, i, k + 1>(merged, x[k + 1], lanes_of<V>{})), ...);
  return merged;
}
template <class To, class V, int... i>
inline void convert(const V* x, V* out, std::integer_sequence<int, i...>) {
  ((out[i] = convert_one<To, i>(x, std::make_integer_sequence<int, sizeof...(i) - 1>{})), ...);
}

// Few players: kLanes rows at once, one in each lane.
template <class T, int num_players>
struct SmallRows {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  using Players = std::make_integer_sequence<int, num_players>;
  static constexpr int M = num_players, S = 1 << M, L = kLanes<A>;
  A a[M + 1], b[M + 1];

  SmallRows() {
    const Weights weights(M);
    for (int k = 0; k <= M; ++k) a[k] = static_cast<A>(weights.a[k]), b[k] = static_cast<A>(weights.b[k]);
  }

  // L rows of S numbers to L rows of M numbers. What it returns is 0 unless a value was NaN or infinite and
  // may have to be mended.
  V fwd(const T* v, T* phi) const {
    V x[S], values[M], rows[M], doubt = {};
    MMFAST_UNROLL
    for (int i = 0; i < S; ++i) x[i] = load(v + i * L);
    unzip_rows<S>(x);
    if constexpr (M == 1) {
      values[0] = x[1] - x[0];
    } else {
      doubt = by_folds(x, values);
    }
    convert<Rows<M, L>>(values, rows, Players{});
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) store(phi + m * L, rows[m]);
    return doubt;
  }

  V by_folds(V* x, V* values) const {
    V shared, sum_of_values;
    // A number added to all utilities changes no value: without the empty coalition's, nothing cancels.
    const V origin = x[0];
    // The empty one is then worth nothing, and of five players left in all the same: GCC makes better code of
    // it.
    constexpr int first = M < 5;
    MMFAST_UNROLL
    for (int i = first; i < S; ++i) {
      const int size = count_bits(i);
      const V utility = x[i] - origin;
      // b is 0 for all players together.
      if (i != S - 1) shared = i == first ? b[size] * utility : shared + b[size] * utility;
      x[i] = a[size] * utility;
    }
    // The top bit is folded first.
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) {
      const int half = S >> (m + 1);
      V sum = x[half];
      MMFAST_UNROLL
      for (int i = 1; i < half; ++i) sum += x[half + i];
      MMFAST_UNROLL
      for (int i = first; i < half; ++i) x[i] += x[half + i];
      values[m] = sum - shared;
      sum_of_values = m == 0 ? values[m] : sum_of_values + values[m];
    }
    return sum_of_values - sum_of_values;
  }

  // b_k / b_0 = 1 / binom(M-1, k)
  static constexpr A relative_b(int k) { return k == 0 ? A(1) : relative_b(k - 1) * k / (M - k); }

  // L rows of M numbers to L rows of S numbers.
  void bwd(const T* dphi, T* dv) const {
    V rows[M], columns[M], x[S] = {}, zipped[S];
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) rows[m] = load(dphi + m * L);
    convert<Columns<M, L>>(rows, columns, Players{});
    MMFAST_UNROLL
    for (int m = 0; m < M; ++m) {
      // By b_0 beforehand, so that no sum overflows.
      columns[m] *= A(1) / M;
      MMFAST_UNROLL
      for (int i = 0; i < 1 << m; ++i) x[(1 << m) + i] = x[i] + columns[m];
    }
    // The players of a coalition and the others apart: infinities remain what they are.
    zipped[0] = -x[S - 1];
    zipped[S - 1] = x[S - 1];
    MMFAST_UNROLL
    for (int s = 1; s < S - 1; ++s) {
      const int size = count_bits(s);
      zipped[reverse_bits(s, M)] = relative_b(size - 1) * x[s] - relative_b(size) * x[S - 1 - s];
    }
    zip_rows<S>(zipped);
    MMFAST_UNROLL
    for (int i = 0; i < S; ++i) store(dv + i * L, zipped[i]);
  }

  // Calls step(source rows, target rows) for L rows at a time, through copies where rows are strided or fewer
  // than L.
  template <int source_size, int target_size, class Step>
  static void for_blocks(const T* source, T* target, int64_t begin, int64_t end, int64_t stride_row,
                         int64_t stride, Step&& step) {
    T sources[L * source_size] = {}, targets[L * target_size];
    for (int64_t row = begin; row < end; row += L) {
      const int64_t count = std::min<int64_t>(L, end - row);
      const T* block = source + row * stride_row;
      if (count < L || stride_row != source_size || stride != 1) {
        for (int64_t r = 0; r < count; ++r)
          gather(block + r * stride_row, stride, source_size, sources + r * source_size);
        block = sources;
      }
      step(block, count == L ? target + row * target_size : targets);
      if (count < L) std::memcpy(target + row * target_size, targets, count * target_size * sizeof(T));
    }
  }
};

// What is left of a chunk of coalitions after folding its bits above the lanes.
template <class A>
struct Partial {
  // The last few stay zero: `finish` reads whole vectors of players.
  Vec<A> total, shared, half_sums[2 * kMaxPlayers];
};

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
    V x[block];
    MMFAST_UNROLL
    for (int i = 0; i < block; ++i) {
      const V utility = load(source + i * L) - origin;
      const int size = players + count_bits(i);
      shared[i % 4] += b[size] * utility;
      x[i] = a[size] * utility;
    }
    MMFAST_UNROLL
    for (int bit = block_bits - 1; bit >= 0; --bit) {
      V sum = x[1 << bit];
      MMFAST_UNROLL
      for (int i = 1; i < 1 << bit; ++i) sum += x[(1 << bit) + i];
      MMFAST_UNROLL
      for (int i = 0; i < 1 << bit; ++i) x[i] += x[(1 << bit) + i];
      half_sums[bit] += sum;
    }
    totals[j] = x[0];
  }
  for (int bit = 0; bit < block_bits; ++bit) out.half_sums[bit] = half_sums[bit];
  for (int bit = outer_bits - 1; bit >= 0; --bit) {
    V sum = {};
    for (int i = 0; i < 1 << bit; ++i) {
      sum += totals[(1 << bit) + i];
      totals[i] += totals[(1 << bit) + i];
    }
    out.half_sums[block_bits + bit] = sum;
  }
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
    using Bits = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
    Bits lanes;
    MMFAST_UNROLL
    for (int i = 0; i < L; ++i) lanes[i] = -(i >> bit & 1);
    return reinterpret_cast<V>(reinterpret_cast<Bits>(x) & lanes);
  }

  // Writes a row's M values; up to `room` numbers behind phi may be overwritten.
  void finish(const Partial<A>& part, T* phi, int64_t room) const {
    constexpr int few = L < 8 ? L : 8;
    for (int first = 0; first < num_players; first += L) {
      const V sums = num_players <= few ? sum_players<few>(part, first) : sum_players<L>(part, first);
      if (room - first >= L) {
        store(phi + first, sums);
        continue;
      }
      T last[L];
      store(last, sums);
      std::memcpy(phi + first, last, std::min(L, num_players - first) * sizeof(T));
    }
  }

  void fwd_rows(const T* v, T* phi, int64_t begin, int64_t end, int64_t stride_row,
                int64_t stride_coalition) const {
    Partial<A> part = {};
    for (int64_t row = begin; row < end; ++row) {
      fold(v + row * stride_row, stride_coalition, 0, part);
      // Whole vectors run over into rows that this thread writes next.
      finish(part, phi + row * num_players, (end - row) * num_players);
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

  // Chunks [begin, end) of all rows' chunks in a line.
  void bwd_chunks(const T* dphi, T* dv, int64_t begin, int64_t end, int64_t stride_row,
                  int64_t stride_player) const {
    // Sums of dphi over the players of j, for the bits between the lanes and the chunk.
    A sums[(1 << kChunkBits) / L], row_dphi[kMaxPlayers], row_total = 0;
    V lane_sums = {}, shared[kMaxPlayers + 1];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / num_chunks, chunk = item % num_chunks;
      if (item == begin || chunk == 0) {
        row_total = 0;
        for (int m = 0; m < num_players; ++m) {
          row_dphi[m] = widen(dphi[row * stride_row + m * stride_player]);
          row_total += row_dphi[m];
        }
        lane_sums = V{};
        for (int i = 0; i < L; ++i) {
          for (int m = 0; m < lane_bits; ++m) lane_sums[i] += i >> m & 1 ? row_dphi[m] : 0;
        }
        sums[0] = 0;
        for (int m = lane_bits; m < bits; ++m) {
          const int half = 1 << (m - lane_bits);
          for (int i = 0; i < half; ++i) sums[half + i] = sums[i] + row_dphi[m];
        }
        for (int p = 0; p <= num_players - lane_bits; ++p) shared[p] = weights.b[p] * row_total;
      }
      V below = lane_sums;
      for (int m = bits; m < num_players; ++m) {
        if (chunk >> (m - bits) & 1) below += row_dphi[m];
      }
      const int players = __builtin_popcountll(chunk), num_vectors = 1 << (bits - lane_bits);
      T* target = dv + (item << bits);
      for (int j = 0; j < num_vectors; ++j) {
        const int size = players + __builtin_popcount(j);
        store(target + j * L, weights.a[size] * (below + sums[j]) - shared[size]);
      }
    }
  }
};

// Rows after which those that need it are mended, while they are in the cache.
constexpr int64_t kRowsAtOnce = 256;

// Calls function(begin, end) for rows [begin, end), some at a time, mending what it leaves of them.
template <class T, class Function>
void for_mended_rows(const T* v, T* phi, int64_t begin, int64_t end, int num_players, int64_t stride_row,
                     int64_t stride, Function&& function) {
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const int64_t last = std::min(end, first + kRowsAtOnce);
    function(first, last);
    T* values = phi + first * num_players;
    constexpr auto most = std::numeric_limits<accumulate_t<T>>::max();
    if (!has_unbounded(values, (last - first) * num_players, most)) continue;
    for (int64_t row = first; row < last; ++row)
      mend_values(v + row * stride_row, stride, num_players, phi + row * num_players);
  }
}

// Of chunks [begin, end) of all rows' chunks in a line, those whose sums may be infinite or overflow.
template <class T>
void mend_chunks(const T* dphi, T* dv, int64_t begin, int64_t end, const LargeRow<T>& large,
                 int64_t stride_row, int64_t stride_player) {
  constexpr auto most = std::numeric_limits<accumulate_t<T>>::max() / (2 * kMaxPlayers);
  const int M = large.num_players;
  if (begin == end) return;
  const int64_t first_row = begin / large.num_chunks, last_row = (end - 1) / large.num_chunks;
  if (stride_row == M && stride_player == 1 &&
      !has_unbounded(dphi + first_row * M, (last_row - first_row + 1) * M, most))
    return;
  for (int64_t row = first_row; row <= last_row; ++row) {
    T row_dphi[kMaxPlayers];
    gather(dphi + row * stride_row, stride_player, M, row_dphi);
    if (!has_unbounded(row_dphi, M, most)) continue;
    for (int64_t item = std::max(begin, row * large.num_chunks);
         item < std::min(end, (row + 1) * large.num_chunks); ++item)
      mend_gradients(row_dphi, M, item % large.num_chunks << large.bits, int64_t{1} << large.bits,
                     dv + (item << large.bits));
  }
}

// Calls function(SmallRows of M players) where that is the faster way, else returns false.
template <class T, int largest, class Function>
bool with_small(int num_players, Function&& function) {
  switch (num_players) {
    case 1:
      return function(SmallRows<T, 1>()), true;
    case 2:
      return function(SmallRows<T, 2>()), true;
    case 3:
      return function(SmallRows<T, 3>()), true;
    case 4:
      return function(SmallRows<T, 4>()), true;
    case 5:
      if constexpr (largest == 5) return function(SmallRows<T, 5>()), true;
  }
  return false;
}

template <class T>
void fwd(const T* v, T* phi, int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_coalition,
         int64_t num_threads) {
  const int64_t row_bytes = sizeof(T) << num_players, L = kLanes<accumulate_t<T>>;
  const bool is_done = with_small<T, 5>(num_players, [&](const auto& small) {
    using Small = std::decay_t<decltype(small)>;
    parallel_for((num_rows + L - 1) / L, L * row_bytes, num_threads, [&](int64_t begin, int64_t end) {
      typename Small::V doubt = {};
      Small::template for_blocks<Small::S, Small::M>(v, phi, begin * L, std::min(end * L, num_rows),
                                                     stride_row, stride_coalition, [&](const T* from, T* to) {
                                                       const auto next = small.fwd(from, to);
                                                       if constexpr (Small::M > 1) doubt += next;
                                                     });
      if (!any(doubt != 0)) return;
      for (int64_t row = begin * L; row < std::min(end * L, num_rows); ++row)
        mend_values(v + row * stride_row, stride_coalition, num_players, phi + row * num_players);
    });
  });
  if (is_done) return;
  const LargeRow<T> large(num_players);
  if (large.num_chunks == 1) {
    return parallel_for(num_rows, row_bytes, num_threads, [&](int64_t begin, int64_t end) {
      for_mended_rows(v, phi, begin, end, num_players, stride_row, stride_coalition,
                      [&](int64_t first, int64_t last) {
                        large.fwd_rows(v, phi, first, last, stride_row, stride_coalition);
                      });
    });
  }
  std::vector<Partial<accumulate_t<T>>> chunks(large.num_chunks);
  for (int64_t row = 0; row < num_rows; ++row) {
    parallel_for(large.num_chunks, row_bytes / large.num_chunks, num_threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t chunk = begin; chunk < end; ++chunk) {
                     large.fold(v + row * stride_row, stride_coalition, chunk, chunks[chunk]);
                   }
                 });
    for_mended_rows(v, phi, row, row + 1, num_players, stride_row, stride_coalition, [&](int64_t, int64_t) {
      large.finish(large.sum_chunks(chunks.data()), phi + row * num_players, num_players);
    });
  }
}

template <class T>
void bwd(const T* dphi, T* dv, int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_player,
         int64_t num_threads) {
  const int64_t row_bytes = sizeof(T) << num_players, L = kLanes<accumulate_t<T>>;
  const bool is_done = with_small<T, 4>(num_players, [&](const auto& small) {
    using Small = std::decay_t<decltype(small)>;
    parallel_for((num_rows + L - 1) / L, L * row_bytes, num_threads, [&](int64_t begin, int64_t end) {
      Small::template for_blocks<Small::M, Small::S>(dphi, dv, begin * L, std::min(end * L, num_rows),
                                                     stride_row, stride_player,
                                                     [&](const T* from, T* to) { small.bwd(from, to); });
    });
  });
  if (is_done) return;
  const LargeRow<T> large(num_players);
  parallel_for(num_rows * large.num_chunks, sizeof(T) << large.bits, num_threads,
               [&](int64_t begin, int64_t end) {
                 large.bwd_chunks(dphi, dv, begin, end, stride_row, stride_player);
                 mend_chunks(dphi, dv, begin, end, large, stride_row, stride_player);
               });
}

void shapley_values_fwd(const Strided<2>& utilities,  // [rows, S]
                        void* phi,                    // [rows, M] contiguous
                        Dtype dtype, int64_t num_threads) {
  const int num_players = players_of("shapley_values_fwd", utilities.sizes[1]);
  dispatch_dtype("shapley_values_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    fwd(static_cast<const T*>(utilities.data), static_cast<T*>(phi), utilities.sizes[0], num_players,
        utilities.strides[0], utilities.strides[1], num_threads);
  });
}

void shapley_values_bwd(const Strided<2>& dphi,  // [rows, M]
                        void* dutilities,        // [rows, S] contiguous
                        Dtype dtype, int64_t num_threads) {
  const int num_players = checked_players("shapley_values_bwd", dphi.sizes[1]);
  dispatch_dtype("shapley_values_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    bwd(static_cast<const T*>(dphi.data), static_cast<T*>(dutilities), dphi.sizes[0], num_players,
        dphi.strides[0], dphi.strides[1], num_threads);
  });
}

MMFAST_REGISTER(shapley_values_fwd)
MMFAST_REGISTER(shapley_values_bwd)

}  // namespace
}  // namespace mmfast

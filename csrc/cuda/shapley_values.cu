// Shapley values of M players from the utilities of S = 2^M coalitions, and the transposed map.
//
//   phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s, weights in csrc/shapley_weights.h
//
// The table is read once, four coalitions at a time by neighbouring threads: 1 to 32 threads a row up to M =
// 11, a block a row above. Bits of the coalition index are, from the lowest: the four of a vector, the
// thread, the turn of the loop. A thread folds its bits in registers; then the row's threads exchange halves
// of their M partial values, about M shuffles instead of M log2(threads). Where a value is not finite,
// because a utility is infinite or sums overflow, the row is looked through once more. Floor: the table read
// once, or for the gradient written once.
#include "codes.h"
#include "shapley.cuh"

namespace mmfast {
namespace {

constexpr int kBlock = 256;

constexpr __host__ __device__ int log2_up(int n) { return n <= 1 ? 0 : 1 + log2_up((n + 1) / 2); }

// How a row is spread: `threads` of them, `players` at most. `is_exact` says that a row has exactly `players`
// and one turn.
template <int threads_, int players_, bool is_exact_>
struct Plan {
  static constexpr int threads = threads_, players = players_, rows_per_block = kBlock / threads;
  static constexpr bool is_exact = is_exact_;
  static constexpr int vector_bits = players == 1 ? 1 : 2, vector = 1 << vector_bits,
                       thread_bits = log2_up(threads);
  static constexpr int turn_bit = vector_bits + thread_bits, max_turn_bits = players - turn_bit;
  // Lanes of a warp for a row, and sums that they exchange.
  static constexpr int lanes = threads < kWarp ? threads : kWarp, padded = 1 << log2_up(players);
};

// Sums n values over `threads` lanes. Lane l ends with the sums of values l * left .. + left, left = max(1,
// n / threads), or, with more lanes than values, every lane of a group of threads / n with the sum of its
// group's value. `count` values are left. A recursion, because nvcc puts x into memory where it does not
// unroll both loops of a nest.
template <int threads, int count, int n, class A>
__device__ __forceinline__ void sum_over_lanes(A (&x)[n], int lane) {
  if constexpr (threads > 1) {
    constexpr int distance = threads / 2, half = count / 2;
    if constexpr (count > 1) {
      const bool is_upper = lane & distance;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const A sent = is_upper ? x[i] : x[half + i], kept = is_upper ? x[half + i] : x[i];
        x[i] = kept + __shfl_xor_sync(kFullMask, sent, distance);
      }
    } else {
      x[0] += __shfl_xor_sync(kFullMask, x[0], distance);
    }
    sum_over_lanes<distance, (count > 1 ? half : 1)>(x, lane);
  }
}

// A player's value by the formula itself. Rarely needed.
template <class T>
__device__ MMFAST_NOINLINE accumulate_t<T> value_by_formula(const T* v, int64_t stride,
                                                            const accumulate_t<T>* b,  // [num_players + 1]
                                                            int num_players, int player, Fates fates) {
  using A = accumulate_t<T>;
  if (fates.any()) return fates.value<A>(player);
  // Halves, so that nothing overflows that a value does not.
  double with = 0, without = 0;
#pragma unroll 1
  for (unsigned s = 0; s < 1u << num_players; ++s) {
    const double half = 0.5 * static_cast<double>(static_cast<A>(v[s * stride]));
    const int size = __popc(s);
    if (s >> player & 1) {
      with += static_cast<double>(b[size - 1]) * half;
    } else {
      without += static_cast<double>(b[size]) * half;
    }
  }
  return static_cast<A>(2 * (with - without));
}

// Adds up a thread's part of the values, sums[m] of player m, over the coalitions it reads of a row.
template <class T, class P, class A>
__device__ __forceinline__ void fold_row(const T* source, int64_t stride, int num_players, bool is_packed,
                                         int turns, int thread, const A* a, const A* b,  // [num_players + 1]
                                         A (&sums)[P::padded]) {
  // Taken from all utilities, which changes no value: less the mean of the empty and the full coalition's,
  // sums stay small.
  const int64_t full = (int64_t{1} << num_players) - 1;
  const A origin = A(0.5) * static_cast<A>(source[0]) + A(0.5) * static_cast<A>(source[full * stride]);
  A total = 0, shared = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t coalition = (static_cast<int64_t>(turn) * P::threads + thread) * P::vector;
    Pack<T, P::vector> loaded;
    if (is_packed) {
      loaded = load_pack<P::vector>(source + coalition);
    } else {
#pragma unroll
      for (int i = 0; i < P::vector; ++i) loaded.values[i] = source[(coalition + i) * stride];
    }
    const int size = __popcll(coalition);
    A x[P::vector];
#pragma unroll
    for (int i = 0; i < P::vector; ++i) {
      const A utility = static_cast<A>(loaded.values[i]) - origin;
      const int more = (i & 1) + (i >> 1);
      // b is 0 for all players together.
      if (size + more < num_players) shared += b[size + more] * utility;
      x[i] = a[size + more] * utility;
    }
    A folded = x[0] + x[1];
    sums[0] += x[1];
    if constexpr (P::vector == 4) {
      sums[0] += x[3];
      sums[1] += x[2] + x[3];
      folded += x[2] + x[3];
    }
    if constexpr (!P::is_exact) {
#pragma unroll
      for (int bit = 0; bit < P::max_turn_bits; ++bit) {
        if (turn >> bit & 1) sums[P::turn_bit + bit] += folded;
      }
    }
    total += folded;
  }
#pragma unroll
  for (int bit = 0; bit < P::thread_bits; ++bit)
    sums[P::vector_bits + bit] = thread >> bit & 1 ? total : A(0);
#pragma unroll
  for (int m = 0; m < P::players; ++m) sums[m] -= shared;
}

// What the coalitions that a thread reads of a row lift and sink.
template <class T, class P>
__device__ __forceinline__ Fates fates_of_thread(const T* source, int64_t stride, int turns, int thread) {
  Fates fates{0, 0};
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll 1
    for (int i = 0; i < P::vector; ++i) {
      const unsigned s = static_cast<unsigned>((turn * P::threads + thread) * P::vector + i);
      fates.add(s, static_cast<accumulate_t<T>>(source[s * stride]));
    }
  }
  return fates;
}

// Sums over the lanes of a row and writes its values.
template <class T, class P, class A>
__device__ __forceinline__ void finish_by_lanes(const T* source, int64_t stride, int num_players, int turns,
                                                int thread, const A* b, A (&sums)[P::padded], bool is_live,
                                                T* target) {
  constexpr int lanes = P::lanes, padded = P::padded;
  constexpr int left = padded > lanes ? padded / lanes : 1, group = lanes > padded ? lanes / padded : 1;
  const int lane = thread % lanes;
  sum_over_lanes<lanes, padded>(sums, lane);
  bool is_bad = false;
#pragma unroll
  for (int i = 0; i < left; ++i) is_bad |= !is_finite(sums[i]);
  if (__any_sync(kFullMask, is_bad)) {
    Fates fates = fates_of_thread<T, P>(source, stride, turns, thread);
    // That the row is bad travels along.
    if (is_bad) fates.lifted |= 1u << 31;
    fates.share(lanes);
    is_bad = fates.lifted >> 31;
    fates.lifted &= Fates::kAll;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const int player = lane / group * left + i;
      if (is_bad && player < num_players)
        sums[i] = value_by_formula(source, stride, b, num_players, player, fates);
    }
  }
  if (!is_live || lane % group != 0) return;
#pragma unroll
  for (int i = 0; i < left; ++i) {
    const int player = lane / group * left + i;
    if (player < num_players) target[player] = static_cast<T>(sums[i]);
  }
}

// The same of a row that takes a block.
template <class T, class P, class A>
__device__ __forceinline__ void finish_by_block(const T* source, int64_t stride, int num_players, int turns,
                                                int thread, const A* b, A (&sums)[P::padded], T* target) {
  static_assert(P::padded == kWarp, "one lane a player");
  const int lane = thread % kWarp;
  sum_over_lanes<kWarp, P::padded>(sums, lane);
  MMFAST_SHARED(A, warps, [P::threads / kWarp][kWarp]);
  warps[thread / kWarp][lane] = sums[0];
  MMFAST_SHARED(Fates, fates_of, [P::threads / kWarp]);
  MMFAST_SHARED(int, is_bad, [1]);
  __syncthreads();
  A sum = 0;
  if (thread < kWarp) {
#pragma unroll
    for (int warp = 0; warp < P::threads / kWarp; ++warp) sum += warps[warp][thread];
    const int is_bad_here = __any_sync(kFullMask, !is_finite(sum));
    if (thread == 0) is_bad[0] = is_bad_here;
  }
  __syncthreads();
  if (is_bad[0]) {
    Fates fates = fates_of_thread<T, P>(source, stride, turns, thread);
    fates.share(kWarp);
    if (lane == 0) fates_of[thread / kWarp] = fates;
    __syncthreads();
    Fates all{0, 0};
#pragma unroll 1
    for (int warp = 0; warp < P::threads / kWarp; ++warp)
      all = {all.lifted | fates_of[warp].lifted, all.sunk | fates_of[warp].sunk};
    if (thread < num_players) sum = value_by_formula(source, stride, b, num_players, thread, all);
  }
  if (thread < num_players) target[thread] = static_cast<T>(sum);
}

template <class T, class P>
__global__ void __launch_bounds__(kBlock)
    shapley_values_fwd_kernel(const T* __restrict__ v,  // [rows, S]
                              T* __restrict__ phi,      // [rows, M]
                              int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_coalition,
                              bool is_packed, ShapleyWeights<accumulate_t<T>> weights) {
  using A = accumulate_t<T>;
  MMFAST_SHARED(A, a, [kMaxPlayers + 1]);
  MMFAST_SHARED(A, b, [kMaxPlayers + 1]);
  share_weights(weights, a, b);

  const int thread = threadIdx.x % P::threads;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * P::rows_per_block + threadIdx.x / P::threads;
  // A thread without a row works on the last one, since all lanes take part in the exchange.
  const int64_t row = wanted < num_rows ? wanted : num_rows - 1;
  const T* source = v + row * stride_row;
  const int turns = P::is_exact ? 1 : 1 << (num_players - P::turn_bit);
  A sums[P::padded] = {};
  fold_row<T, P>(source, stride_coalition, num_players, is_packed, turns, thread, a, b, sums);
  T* target = phi + row * num_players;
  if constexpr (P::threads <= kWarp) {
    finish_by_lanes<T, P>(source, stride_coalition, num_players, turns, thread, b, sums, wanted < num_rows,
                          target);
  } else {
    finish_by_block<T, P>(source, stride_coalition, num_players, turns, thread, b, sums, target);
  }
}

// What a thread writes of a row of gradients, by the formula itself: where gradients are infinite, or
// overflow in sums. Rarely needed.
template <class T, class P>
__device__ MMFAST_NOINLINE void gradients_by_formula(const T* dphi, int64_t stride, T* target, int players,
                                                     int turns, int thread,
                                                     const accumulate_t<T>* b) {  // [num_players + 1]
  using A = accumulate_t<T>;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll 1
    for (int i = 0; i < P::vector; ++i) {
      const int64_t coalition = (static_cast<int64_t>(turn) * P::threads + thread) * P::vector + i;
      const int size = __popcll(coalition);
      A sum = 0;
#pragma unroll 1
      for (int m = 0; m < players; ++m) {
        const A share = static_cast<A>(dphi[m * stride]);
        sum += coalition >> m & 1 ? b[size - 1] * share : -b[size] * share;
      }
      target[coalition] = static_cast<T>(sum);
    }
  }
}

template <class T, class P>
__global__ void __launch_bounds__(kBlock)
    shapley_values_bwd_kernel(const T* __restrict__ dphi,  // [rows, M]
                              T* __restrict__ dv,          // [rows, S]
                              int64_t num_rows, int num_players, int64_t stride_row, int64_t stride_player,
                              bool is_packed, ShapleyWeights<accumulate_t<T>> weights) {
  using A = accumulate_t<T>;
  MMFAST_SHARED(A, a, [kMaxPlayers + 1]);
  MMFAST_SHARED(A, b, [kMaxPlayers + 1]);
  share_weights(weights, a, b);

  const int thread = threadIdx.x % P::threads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * P::rows_per_block + threadIdx.x / P::threads;
  if (row >= num_rows) return;

  const int players = P::is_exact ? P::players : num_players;
  A row_dphi[P::players], total = 0, below = 0;
#pragma unroll
  for (int m = 0; m < P::players; ++m) {
    row_dphi[m] = m < players ? static_cast<A>(dphi[row * stride_row + m * stride_player]) : A(0);
    total += row_dphi[m];
  }
#pragma unroll
  for (int bit = 0; bit < P::thread_bits; ++bit)
    below += thread >> bit & 1 ? row_dphi[P::vector_bits + bit] : A(0);

  T* target = dv + (row << players);
  const int turns = P::is_exact ? 1 : 1 << (players - P::turn_bit);
  bool is_finite_here = true;
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    const int64_t coalition = (static_cast<int64_t>(turn) * P::threads + thread) * P::vector;
    A sum = below;
    if constexpr (!P::is_exact) {
#pragma unroll
      for (int bit = 0; bit < P::max_turn_bits; ++bit)
        sum += turn >> bit & 1 ? row_dphi[P::turn_bit + bit] : A(0);
    }
    const int size = __popcll(coalition);
    Pack<T, P::vector> stored;
#pragma unroll
    for (int i = 0; i < P::vector; ++i) {
      const int more = (i & 1) + (i >> 1);
      A members = sum + (i & 1 ? row_dphi[0] : A(0));
      if constexpr (P::vector == 4) members += i & 2 ? row_dphi[1] : A(0);
      const A value = a[size + more] * members - b[size + more] * total;
      is_finite_here = is_finite_here && is_finite(value);
      stored.values[i] = static_cast<T>(value);
    }
    if (is_packed) {
      store_pack(target + coalition, stored);
    } else {
#pragma unroll
      for (int i = 0; i < P::vector; ++i) target[coalition + i] = stored.values[i];
    }
  }
  if (!is_finite_here) {
    const auto* source = dphi + row * stride_row;
    gradients_by_formula<T, P>(source, stride_player, target, players, turns, thread, b);
  }
}

// Calls function(Plan) with the plan for M players.
template <class Function>
void with_plan(int num_players, Function&& function) {
  switch (num_players) {
    case 1:
      return function(Plan<1, 1, true>{});
    case 2:
      return function(Plan<1, 2, true>{});
    case 3:
      return function(Plan<2, 3, true>{});
    case 4:
      return function(Plan<4, 4, true>{});
    case 5:
      return function(Plan<8, 5, true>{});
    case 6:
      return function(Plan<16, 6, true>{});
    case 7:
      return function(Plan<32, 7, true>{});
    case 8:
    case 9:
    case 10:
    case 11:
      return function(Plan<32, 11, false>{});
    default:
      return function(Plan<kBlock, kMaxPlayers, false>{});
  }
}

template <class T, class P>
bool fits_packs(const void* address, int64_t stride_row, int64_t stride) {
  return stride == 1 && stride_row % P::vector == 0 && is_aligned_for_packs<T, P::vector>(address);
}

void shapley_values_fwd(const Strided<2>& utilities,  // [rows, S]
                        void* phi,                    // [rows, M] contiguous
                        Dtype dtype, Stream stream) {
  constexpr const char* op = "shapley_values_fwd";
  const int players = players_of(op, utilities.sizes[1]);
  if (utilities.sizes[0] == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_dtype(op, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_plan(players, [&](auto plan) {
      using P = decltype(plan);
      MMFAST_LAUNCH((shapley_values_fwd_kernel<T, P>), grid_blocks(utilities.sizes[0], P::rows_per_block),
                    kBlock, 0, stream.handle, static_cast<const T*>(utilities.data), static_cast<T*>(phi),
                    utilities.sizes[0], players, utilities.strides[0], utilities.strides[1],
                    fits_packs<T, P>(utilities.data, utilities.strides[0], utilities.strides[1]),
                    ShapleyWeights<accumulate_t<T>>(players));
    });
  });
  check_cuda(op, cudaGetLastError());
}

void shapley_values_bwd(const Strided<2>& dphi,  // [rows, M]
                        void* dutilities,        // [rows, S] contiguous
                        Dtype dtype, Stream stream) {
  constexpr const char* op = "shapley_values_bwd";
  const int players = checked_players(op, dphi.sizes[1]);
  if (dphi.sizes[0] == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_dtype(op, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_plan(players, [&](auto plan) {
      using P = decltype(plan);
      MMFAST_LAUNCH((shapley_values_bwd_kernel<T, P>), grid_blocks(dphi.sizes[0], P::rows_per_block), kBlock,
                    0, stream.handle, static_cast<const T*>(dphi.data), static_cast<T*>(dutilities),
                    dphi.sizes[0], players, dphi.strides[0], dphi.strides[1],
                    fits_packs<T, P>(dutilities, int64_t{1} << players, 1),
                    ShapleyWeights<accumulate_t<T>>(players));
    });
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(shapley_values_fwd)
MMFAST_REGISTER(shapley_values_bwd)

}  // namespace
}  // namespace mmfast

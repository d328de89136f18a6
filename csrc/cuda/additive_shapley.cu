// Shapley values of modalities whose partial logits add up, and their gradients.
//
//   z_s = bias + sum_{m in s} z^m,  u_s = utility(z_s, y),  phi = shapley_values(u)
//
// A team of 1 to 32 lanes holds the classes of a sample, a vector of 16 bytes a lane and modality, so the
// partial logits are read once. The last three modalities (two if there are no more, and in float64) are
// decided in registers: a tree of sums, one addition a class and coalition. The sum over the modalities
// before them is made anew for each of their coalitions, in the order of m, from columns of shared memory
// that belong to one thread each. As in csrc/cpu/additive_shapley.cpp nothing is subtracted: no rounding
// accumulates, -inf survives. In place of Gray-code order, whose single chain of sums has a subtraction in
// every second step. Eight coalitions' maxima or sums are exchanged by halves, about one shuffle each instead
// of log2(lanes), and each ends with one lane, which knows the label's logit and works out the utility,
// weighs and adds it up.
//
// Softmax: exp(z^m - max z^m) is taken once a modality; a coalition's exponentials are products of these, one
// multiplication and one addition a class, without a maximum. Where modalities contradict each other so much
// that their product is small (kLeastSum), and for ties, NaN and +inf, the coalition is computed again, class
// by class from memory, by all lanes of the warp. Products round M + 1 times, once more for each modality.
//
// More than 128 classes (256 of 16 bits): a block to a sample, partial logits read again for every four
// coalitions out of the L1 cache, exponentials of sums.
// Few samples and many modalities: blocks share the coalitions of a sample, a sum over them follows in torch.
//
// Backward walks the same way and folds the coalitions' gradients as they come, the earlier modalities' into
// columns of their own. A block takes one group of samples after the other and adds up the bias's gradient on
// its way; torch sums over blocks. No atomics: the same bits in every run.
//
// Without columns, blocks stay and take one group of samples after the other in both directions.
//
// Floors: N = 1,000,000, C = 32, M = 2, float32: 256 MB of partial logits and 16 MB of labels and values,
// 91 us on an H100 at 3.0 TB/s; about 0.7 G additions and comparisons of classes, 25 us. What is done once a
// sample weighs more: a warp takes four samples, 1 KB, for which the memory leaves it about 300 instructions,
// and that is about what it needs. Predicted 120 us, 75% of the bandwidth; with few classes or 16 bits, fewer
// bytes for the same instructions, less.
// M = 8: 8.2 G elements of coalitions, two operations each, 16 G, 0.5 ms at 30 T a second (no multiply-adds)
// where the bytes take 0.35 ms; predicted 0.9 ms.
// Measured on an H100, host included: N = 100,000, C = 31, M = 2 34 us forward, a quarter of the bandwidth.
#include <algorithm>

#include "additive_gradients.cuh"
#include "additive_sample.cuh"
#include "coalition_utilities.cuh"
#include "shapley.cuh"

namespace mmfast {
namespace {

// Coalitions of outer modalities after which sums begin anew, so that no long one rounds away what is added.
constexpr unsigned kRestart = 256;
// Of the utilities, so that no sum of them overflows where values do not.
template <class A>
constexpr A kScale = A(0.0625);
// What columns may take of shared memory, so that with the forward kernel's own arrays it is no more than a
// block has without asking.
constexpr int64_t kShared = 47 << 10;

template <class P>
__global__ void __launch_bounds__(P::max_threads, P::min_blocks) additive_shapley_fwd_kernel(
    const __grid_constant__ Problem<typename P::T> problem, typename P::T* __restrict__ phi,  // [N, M]
    accumulate_t<typename P::T>* __restrict__ parts,  // [splits, N, M] if not null
    ShapleyWeights<accumulate_t<typename P::T>> weights) {
  using T = typename P::T;
  using A = accumulate_t<T>;
  constexpr int K = P::K, J = 1 << K, H = P::H;
  MMFAST_SHARED(A, a, [kMaxPlayers + 1]);
  MMFAST_SHARED(A, b, [kMaxPlayers + 1]);
  MMFAST_SHARED(double, scratch, [P::is_block ? kMaxLeaves * kMaxWarps : 1]);
  MMFAST_DYNAMIC_SHARED(columns);
  share_weights(weights, a, b);

  const Team<P::is_block> team(problem.threads, scratch);
  const Classes<H> classes(problem.C, problem.is_packed, problem.format, team);
  const int samples = team.teams();
  const int64_t num_groups = ceil_div(problem.N, samples);
#pragma unroll 1
  for (int64_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    const int64_t wanted = group * samples + team.place();
    // A team without a sample works on the last one, since all lanes take part in the exchanges.
    const int64_t n = wanted < problem.N ? wanted : problem.N - 1;
    Sample<P> sample(problem, team, classes, reinterpret_cast<A*>(columns) + threadIdx.x, n);
    const int M = problem.M, first = team.template first<J>(), left = team.template left<J>();
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m) sample.column(m, P::sum) = sample.column(m, P::earlier) = 0;

    // A number added to all utilities changes no value: without the empty coalition's, nothing cancels.
    const bool is_smooth = problem.utility >= kProbability;
    A total[J] = {}, shared = 0, origin = 0;
    Fates fates{0, 0};
    const unsigned count = P::has_outer ? (1u << sample.outer) / gridDim.y : 1u,
                   begin = P::has_outer ? blockIdx.y * count : 0u;
    const bool is_long = P::has_outer && count > kRestart;
    if (is_long) {
#pragma unroll
      for (int i = 0; i < P::extra; ++i) sample.extra(i) = 0;
    }
    // A block that begins elsewhere comes to the empty coalition for its utility alone.
    bool is_visit = is_smooth && begin != 0;
#pragma unroll 1
    for (unsigned others = is_visit ? 0 : begin; others < begin + count;) {
      sample.visit(others);
      A u[J] = {};
      sample.utilities(u);
      if (others == 0 && is_smooth) {
        origin = __shfl_sync(kFullMask, u[0], static_cast<int>(threadIdx.x) % kWarp - team.lane);
        origin = is_finite(origin) ? kScale<A> * origin : A(0);
      }
      if (P::has_outer && is_visit) {
        is_visit = false;
        others = begin;
        continue;
      }
      const int size = __popc(others);
      A folded = 0;
#pragma unroll
      for (int i = 0; i < J; ++i) {
        if (i >= left || first + i >= 1 << M) continue;
        const int players = size + __popc(first + i);
        A utility = kScale<A> * u[i] - origin;
        if (!is_finite(utility)) {
          fates.add(sample.with_last(first + i), utility);
          utility = 0;
        }
        // b is 0 for all players together.
        if (players < M) shared += b[players] * utility;
        const A weighted = a[players] * utility;
        total[i] += weighted;
        folded += weighted;
      }
#pragma unroll 1
      for (unsigned rest = others; rest != 0; rest &= rest - 1)
        sample.column(__ffs(static_cast<int>(rest)) - 1, P::sum) += folded;
      ++others;
      if (is_long && others % kRestart == 0) {
#pragma unroll 1
        for (int m = 0; m < sample.outer; ++m) {
          sample.column(m, P::earlier) += sample.column(m, P::sum);
          sample.column(m, P::sum) = 0;
        }
#pragma unroll
        for (int i = 0; i < J; ++i) {
          sample.extra(i) += total[i];
          total[i] = 0;
        }
        sample.extra(J) += shared;
        shared = 0;
      }
    }
    if (is_long) {
#pragma unroll
      for (int i = 0; i < J; ++i) total[i] = sample.extra(i);
      shared = sample.extra(J);
    }

    if (__any_sync(kFullMask, fates.any())) fates.share(team.threads);
    const bool is_live = wanted < problem.N && team.warp == 0;
    const auto store = [&](int m, A value) {
      value = fates.any() ? fates.value<A>(m) : value / kScale<A>;
      if (!is_live || m >= M || team.lane != (m & (team.threads - 1))) return;
      if (parts == nullptr) {
        phi[n * M + m] = problem.format.template narrow<T>(value);
      } else {
        parts[(blockIdx.y * problem.N + n) * M + m] = value;
      }
    };
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m)
      store(m, team.template sum_parts<J>(sample.column(m, P::sum) + sample.column(m, P::earlier) - shared));
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A value = -shared;
#pragma unroll
      for (int i = 0; i < J; ++i) value += (first + i) >> k & 1 && i < left ? total[i] : A(0);
      store(sample.outer + k, team.template sum_parts<J>(value));
    }
  }
}

// Calls function(Plan) with the plan for T, M and C.
template <class T, bool is_backward, class Function>
void with_plan(int64_t M, int64_t C, int64_t utility, Function&& function) {
  const auto with_utility = [&](auto is_softmax) {
    if (C > kWarp * kHeld<T>) return function(Plan<T, 2, is_softmax, true, is_backward>{});
    // Eight coalitions in float64 do not fit into registers.
    if constexpr (sizeof(T) == 8) {
      return function(Plan<T, 2, is_softmax, false, is_backward>{});
    } else {
      if (M < 3) return function(Plan<T, 2, is_softmax, false, is_backward>{});
      return function(Plan<T, 3, is_softmax, false, is_backward>{});
    }
  };
  if (utility == kProbability || utility == kLogProbability) return with_utility(std::true_type{});
  return with_utility(std::false_type{});
}

struct Geometry {
  int block;
  int64_t shared, num_groups;  // groups: of samples, one for each team of a block
};

template <class P>
Geometry make_geometry(const Problem<typename P::T>& problem) {
  const int outer = problem.M > P::K ? problem.M - P::K : 0;
  const int extra = int64_t{1} << outer > kRestart ? P::extra : 0;
  const int64_t bytes = (int64_t{outer} * P::entries + extra) * sizeof(accumulate_t<typename P::T>);
  int block = kBlock, samples = 1;
  if constexpr (P::is_block) {
    block = kWarp * (problem.C <= 64 * P::H ? 2 : problem.C <= 512 * P::H ? 4 : kMaxWarps);
    while (block * bytes > kShared) block /= 2;
  } else {
    while (block > kWarp && (block * bytes > kShared || block / 2 >= problem.N * problem.threads)) block /= 2;
    samples = block / problem.threads;
  }
  return {block, block * bytes, ceil_div(problem.N, samples)};
}

void check_problem(const char* op, int64_t M, int64_t C) {
  if (M < 1 || M > kMaxPlayers) {
    throw std::invalid_argument(std::string(op) + ": M must lie in [1, 20], got " + std::to_string(M));
  }
  if (C > std::numeric_limits<int>::max() / 2) {
    throw std::invalid_argument(std::string(op) + ": too many classes, " + std::to_string(C));
  }
}

template <class T>
Problem<T> make_problem(const void* partial_logits, const int64_t* labels, const void* bias, int64_t N,
                        int64_t stride_m, int64_t stride_n, int64_t stride_c, int64_t M, int64_t C,
                        int64_t utility, bool is_packed, Format format) {
  return {static_cast<const T*>(partial_logits),
          labels,
          static_cast<const accumulate_t<T>*>(bias),
          N,
          stride_m,
          stride_n,
          stride_c,
          static_cast<int>(M),
          static_cast<int>(C),
          static_cast<int>(utility),
          lanes_for<kHeld<T>>(C),
          is_packed,
          format};
}

void additive_shapley_fwd(const void* partial_logits,  // [M, N, C], strides in elements
                          const int64_t* labels,       // [N] contiguous, in [0, C)
                          const void* bias,            // [C] contiguous in the type of accumulation, or null
                          void* phi,                   // [N, M] contiguous
                          void* parts,                 // [splits, N, M] in that type, to be summed, or null
                          int64_t M, int64_t N, int64_t C, int64_t stride_m, int64_t stride_n,
                          int64_t stride_c, int64_t utility, int64_t dtype,
                          int64_t splits,  // a power of two, at most 2^(M-3); 1 if `parts` is null
                          int64_t device, void* stream) {
  constexpr const char* op = "additive_shapley_fwd";
  check_problem(op, M, C);
  if (N == 0) return;
  const DeviceGuard guard(op, static_cast<int>(device));
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const bool is_packed = fits_packs<T, kHeld<T>>(partial_logits, C, stride_c) && stride_m % kHeld<T> == 0 &&
                           stride_n % kHeld<T> == 0;
    const Problem<T> problem = make_problem<T>(partial_logits, labels, bias, N, stride_m, stride_n, stride_c,
                                               M, C, utility, is_packed, format);
    with_plan<T, false>(M, C, utility, [&](auto plan) {
      using P = decltype(plan);
      const Geometry geometry = make_geometry<P>(problem);
      int64_t blocks = geometry.num_groups;
      if (!P::is_block && geometry.shared == 0) {
        // As many as run at once: where reading is all the work, to start a block for every group costs time.
        const int64_t num_sms = device_attribute(op, cudaDevAttrMultiProcessorCount, device);
        blocks = std::min(blocks, num_sms * P::min_blocks);
      }
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(splits));
      MMFAST_LAUNCH((additive_shapley_fwd_kernel<P>), grid, geometry.block, geometry.shared, stream, problem,
                    static_cast<T*>(phi), static_cast<A*>(parts),
                    ShapleyWeights<A>(problem.M, utility == kCardinality));
    });
  });
  check_cuda(op, cudaGetLastError());
}

void additive_shapley_bwd(const void* dphi,            // [N, M] contiguous
                          const void* partial_logits,  // [M, N, C], strides in elements
                          const int64_t* labels,       // [N] contiguous, in [0, C)
                          const void* bias,            // [C] contiguous in the type of accumulation, or null
                          void* dpartial_logits,       // [M, N, C] contiguous; in that type if C > 128
                          void* dbias,                 // [rows, C] in that type, to be summed, or null
                          int64_t M, int64_t N, int64_t C, int64_t stride_m, int64_t stride_n,
                          int64_t stride_c, int64_t utility, int64_t dtype,
                          int64_t rows,  // at least 1
                          int64_t device, void* stream) {
  constexpr const char* op = "additive_shapley_bwd";
  check_problem(op, M, C);
  if (N * C == 0) return;
  const DeviceGuard guard(op, static_cast<int>(device));
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    with_plan<T, true>(M, C, utility, [&](auto plan) {
      using P = decltype(plan);
      using Out = typename Gradients<P>::Out;
      const bool is_packed = fits_packs<T, kHeld<T>>(partial_logits, C, stride_c) &&
                             stride_m % kHeld<T> == 0 && stride_n % kHeld<T> == 0 &&
                             fits_packs<Out, kHeld<T>>(dpartial_logits, C, 1) &&
                             fits_packs<A, kHeld<T>>(dbias, C, 1);
      const Problem<T> problem = make_problem<T>(partial_logits, labels, bias, N, stride_m, stride_n,
                                                 stride_c, M, C, utility, is_packed, format);
      const Geometry geometry = make_geometry<P>(problem);
      const int64_t most = dbias == nullptr ? int64_t{1} << 30 : rows;
      const int64_t grid = geometry.num_groups < most ? geometry.num_groups : most;
      if (dbias != nullptr && grid < rows) {
        check_cuda(op, cudaMemsetAsync(static_cast<A*>(dbias) + grid * C, 0, (rows - grid) * C * sizeof(A),
                                       static_cast<cudaStream_t>(stream)));
      }
      const auto kernel = &additive_shapley_bwd_kernel<P>;
      // Its own arrays and the largest columns are more together than a block has without asking.
      allow_shared_memory(op, kernel, kShared);
      MMFAST_LAUNCH((kernel), static_cast<unsigned>(grid), geometry.block, geometry.shared, stream,
                    static_cast<const T*>(dphi), problem, static_cast<Out*>(dpartial_logits),
                    static_cast<A*>(dbias), ShapleyWeights<A>(problem.M));
    });
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(additive_shapley_fwd)
MMFAST_REGISTER(additive_shapley_bwd)

}  // namespace
}  // namespace mmfast

// Shapley values of modalities whose partial logits add up, and their gradients.
//
//   z_s = bias + sum_{m in s} z^m,  u_s = utility(z_s, y),  phi = shapley_values(u)
//
// A team of 1 to 32 lanes holds the classes of a sample, 16 bytes a lane and modality, so partial logits are
// read once. The last three modalities (two if there are no more, and in float64) are decided in registers,
// the sum over the others is made anew for each of their coalitions from columns of shared memory: no
// subtraction, so nothing cancels. More classes than a warp holds: a block to a sample. Softmax multiplies
// exponentials of the modalities; where such a product is too small (kLeastSum) the coalition is computed
// again. Backward walks the same way. No atomics: the same bits in every run. Floors: the partial logits read
// once; 2^M C additions and as many comparisons or multiplications a sample.
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

// What a thread adds up of a sample's values over the coalitions that it comes to.
template <class P>
struct Values {
  using T = typename P::T;
  using A = accumulate_t<T>;
  static constexpr int K = P::K, J = 1 << K;

  const Sample<P>& sample;
  const A *a, *b;  // the weights, [M + 1] each
  A total[J] = {}, shared = 0;
  // Taken from all utilities, which changes no value: without the empty coalition's, nothing cancels.
  A origin = 0;
  Fates fates{0, 0};

  __device__ __forceinline__ Values(const Sample<P>& sample, const A* a, const A* b)
      : sample(sample), a(a), b(b) {
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m) sample.column(m, P::sum) = sample.column(m, P::earlier) = 0;
  }

  // Takes the utility of the empty coalition, which the team's first lane has.
  __device__ __forceinline__ void take_origin(A utility) {
    origin = __shfl_sync(kFullMask, utility, static_cast<int>(threadIdx.x) % kWarp - sample.team.lane);
    origin = is_finite(origin) ? kScale<A> * origin : A(0);
  }

  // Adds the utilities of the last modalities' coalitions together with `others`.
  __device__ __forceinline__ void add(unsigned others, const A (&u)[J]) {
    const int M = sample.problem.M, size = __popc(others);
    const int first = sample.team.template first<J>(), left = sample.team.template left<J>();
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
  }

  // For sums of more than kRestart coalitions of outer modalities: begin, restart after so many, end.
  __device__ __forceinline__ void begin_long() {
#pragma unroll
    for (int i = 0; i < P::extra; ++i) sample.extra(i) = 0;
  }
  __device__ __forceinline__ void restart() {
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
  __device__ __forceinline__ void end_long() {
#pragma unroll
    for (int i = 0; i < J; ++i) total[i] = sample.extra(i);
    shared = sample.extra(J);
  }
};

// Writes the values of sample n, or this block's part of them. All lanes come along.
template <class P, class T = typename P::T, class A = accumulate_t<T>>
__device__ __forceinline__ void store_values(const Problem<T>& problem, const Team<P::is_block>& team,
                                             Sample<P>& sample, Values<P>& values, int64_t n, bool is_live,
                                             T* phi,      // [N, M]
                                             A* parts) {  // [splits, N, M] if not null
  constexpr int K = P::K, J = 1 << K;
  const int M = problem.M, first = team.template first<J>(), left = team.template left<J>();
  if (__any_sync(kFullMask, values.fates.any())) values.fates.share(team.threads);
  const auto store_one = [&](int m, A value) {
    value = values.fates.any() ? values.fates.template value<A>(m) : value / kScale<A>;
    if (!is_live || m >= M || team.lane != (m & (team.threads - 1))) return;
    if (parts == nullptr) {
      phi[n * M + m] = problem.format.template narrow<T>(value);
    } else {
      parts[(blockIdx.y * problem.N + n) * M + m] = value;
    }
  };
#pragma unroll 1
  for (int m = 0; m < sample.outer; ++m)
    store_one(m, team.template sum_parts<J>(sample.column(m, P::sum) + sample.column(m, P::earlier) -
                                            values.shared));
#pragma unroll
  for (int k = 0; k < K; ++k) {
    A value = -values.shared;
#pragma unroll
    for (int i = 0; i < J; ++i) value += (first + i) >> k & 1 && i < left ? values.total[i] : A(0);
    store_one(sample.outer + k, team.template sum_parts<J>(value));
  }
}

template <class P>
__global__ void __launch_bounds__(P::max_threads, P::min_blocks) additive_shapley_fwd_kernel(
    const __grid_constant__ Problem<typename P::T> problem, typename P::T* __restrict__ phi,  // [N, M]
    accumulate_t<typename P::T>* __restrict__ parts,  // [splits, N, M] if not null
    ShapleyWeights<accumulate_t<typename P::T>> weights) {
  using T = typename P::T;
  using A = accumulate_t<T>;
  constexpr int J = 1 << P::K;
  MMFAST_SHARED(A, a, [kMaxPlayers + 1]);
  MMFAST_SHARED(A, b, [kMaxPlayers + 1]);
  MMFAST_SHARED(double, scratch, [P::is_block ? kMaxLeaves * kMaxWarps : 1]);
  MMFAST_DYNAMIC_SHARED(columns);
  share_weights(weights, a, b);

  const Team<P::is_block> team(problem.threads, scratch);
  const Classes<P::H> classes(problem.C, problem.is_packed, problem.format, team);
  const int samples = team.teams();
  const int64_t num_groups = ceil_div(problem.N, samples);
#pragma unroll 1
  for (int64_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    const int64_t wanted = group * samples + team.place();
    // A team without a sample works on the last one, since all lanes take part in the exchanges.
    const int64_t n = wanted < problem.N ? wanted : problem.N - 1;
    Sample<P> sample(problem, team, classes, reinterpret_cast<A*>(columns) + threadIdx.x, n);
    Values<P> values(sample, a, b);

    const bool is_smooth = problem.utility >= kProbability;
    const unsigned count = P::has_outer ? (1u << sample.outer) / gridDim.y : 1u,
                   begin = P::has_outer ? blockIdx.y * count : 0u;
    const bool is_long = P::has_outer && count > kRestart;
    if (is_long) values.begin_long();
    // A block that begins elsewhere comes to the empty coalition for its utility alone.
    bool is_visit = is_smooth && begin != 0;
#pragma unroll 1
    for (unsigned others = is_visit ? 0 : begin; others < begin + count;) {
      sample.visit(others);
      A u[J] = {};
      sample.utilities(u);
      if (others == 0 && is_smooth) values.take_origin(u[0]);
      if (P::has_outer && is_visit) {
        is_visit = false;
        others = begin;
        continue;
      }
      values.add(others, u);
      ++others;
      if (is_long && others % kRestart == 0) values.restart();
    }
    if (is_long) values.end_long();

    const bool is_live = wanted < problem.N && team.warp == 0;
    store_values<P>(problem, team, sample, values, n, is_live, phi, parts);
  }
}

// Calls function(Plan) with the plan for T, M and C.
template <class T, bool is_backward, class Function>
void with_plan(int64_t M, int64_t C, Utility utility, Function&& function) {
  const auto with_utility = [&](auto is_softmax) {
    if (C > kWarp * kClassesPerThread<T>) return function(Plan<T, 2, is_softmax, true, is_backward>{});
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
  checked_players(op, M, "M");
  if (C > std::numeric_limits<int>::max() / 2) {
    throw std::invalid_argument(std::string(op) + ": too many classes, " + std::to_string(C));
  }
}

template <class T>
Problem<T> make_problem(const Strided<3>& partial_logits, const int64_t* labels, const void* bias,
                        Utility utility, bool is_packed, Format format) {
  const auto& [M, N, C] = partial_logits.sizes;
  const auto& [stride_m, stride_n, stride_c] = partial_logits.strides;
  return {static_cast<const T*>(partial_logits.data),
          labels,
          static_cast<const accumulate_t<T>*>(bias),
          N,
          stride_m,
          stride_n,
          stride_c,
          static_cast<int>(M),
          static_cast<int>(C),
          static_cast<int>(utility),
          lanes_for<kClassesPerThread<T>>(C),
          is_packed,
          format};
}

template <class T>
bool is_packed(const Strided<3>& partial_logits) {
  const auto& [stride_m, stride_n, stride_c] = partial_logits.strides;
  return fits_packs<T, kClassesPerThread<T>>(partial_logits.data, partial_logits.sizes[2], stride_c) &&
         stride_m % kClassesPerThread<T> == 0 && stride_n % kClassesPerThread<T> == 0;
}

// Sums over parts of the work, which Python adds up.
struct Parts {
  void* sums;     // [count, ...] in the type of accumulation, or null
  int64_t count;  // of those there is memory for; 1 if `sums` is null
};

// Threads that fill the largest GPU; with fewer, blocks share the coalitions of a sample, 64 to a block at
// least.
constexpr int64_t kEnoughThreads = int64_t{1} << 17;

// In how many parts the values of a sample are summed: a power of two.
int64_t additive_shapley_fwd_plan(int64_t M, int64_t N, int64_t C, Dtype) {
  checked_players("additive_shapley_fwd", M, "M");
  const int64_t num_threads = N * std::min<int64_t>(128, ceil_div(C, 4));
  int64_t splits = 1;
  while (64 * splits < int64_t{1} << M && splits * num_threads < kEnoughThreads) splits *= 2;
  return splits;
}

struct BackwardPlan {
  int64_t num_parts;  // of the bias's gradient
  int64_t is_wide;    // whether the gradient is written in the type of accumulation, whatever the dtype
};

BackwardPlan additive_shapley_bwd_plan(int64_t, int64_t N, int64_t C, Dtype dtype) {
  constexpr int64_t most_parts = 1024;
  // Of more classes than the lanes of a warp hold, gradients are added up in memory.
  const bool is_half = dtype == kBFloat16 || dtype == kFloat16;
  return {std::min(N, most_parts),
          C > kWarp * (is_half ? kClassesPerThread<Half16> : kClassesPerThread<float>)};
}

void additive_shapley_fwd(const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous, in [0, C)
                          const void* bias,    // [C] contiguous in the type of accumulation, or null
                          void* phi,           // [N, M] contiguous
                          const Parts& parts,  // [splits, N, M] of additive_shapley_fwd_plan
                          Utility utility, Dtype dtype, Stream stream) {
  constexpr const char* op = "additive_shapley_fwd";
  const auto& [M, N, C] = partial_logits.sizes;
  check_problem(op, M, C);
  if (N == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const Problem<T> problem =
        make_problem<T>(partial_logits, labels, bias, utility, is_packed<T>(partial_logits), format);
    with_plan<T, false>(problem.M, problem.C, utility, [&](auto plan) {
      using P = decltype(plan);
      const Geometry geometry = make_geometry<P>(problem);
      int64_t blocks = geometry.num_groups;
      if (!P::is_block && geometry.shared == 0) {
        // As many as run at once: where reading is all the work, to start a block for every group costs time.
        const int64_t num_sms = device_attribute(op, cudaDevAttrMultiProcessorCount, stream.device);
        blocks = std::min(blocks, num_sms * P::min_blocks);
      }
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts.count));
      MMFAST_LAUNCH((additive_shapley_fwd_kernel<P>), grid, geometry.block, geometry.shared, stream.handle,
                    problem, static_cast<T*>(phi), static_cast<A*>(parts.sums),
                    ShapleyWeights<A>(problem.M, utility == kCardinality));
    });
  });
  check_cuda(op, cudaGetLastError());
}

void additive_shapley_bwd(const void* dphi,                  // [N, M] contiguous
                          const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous, in [0, C)
                          const void* bias,       // [C] contiguous in the type of accumulation, or null
                          void* dpartial_logits,  // [M, N, C] contiguous; in that type if is_wide
                          const Parts& dbias,     // [num_parts, C] of additive_shapley_bwd_plan
                          Utility utility, Dtype dtype, Stream stream) {
  constexpr const char* op = "additive_shapley_bwd";
  const auto& [M, N, C] = partial_logits.sizes;
  check_problem(op, M, C);
  if (N * C == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const int64_t num_classes = partial_logits.sizes[2];
    with_plan<T, true>(partial_logits.sizes[0], num_classes, utility, [&](auto plan) {
      using P = decltype(plan);
      using Out = typename Gradients<P>::Out;
      const bool are_packed = is_packed<T>(partial_logits) &&
                              fits_packs<Out, kClassesPerThread<T>>(dpartial_logits, num_classes, 1) &&
                              fits_packs<A, kClassesPerThread<T>>(dbias.sums, num_classes, 1);
      const Problem<T> problem = make_problem<T>(partial_logits, labels, bias, utility, are_packed, format);
      const Geometry geometry = make_geometry<P>(problem);
      const int64_t most = dbias.sums == nullptr ? int64_t{1} << 30 : dbias.count;
      const int64_t grid = std::min(geometry.num_groups, most);
      if (dbias.sums != nullptr && grid < dbias.count) {
        check_cuda(op, cudaMemsetAsync(static_cast<A*>(dbias.sums) + grid * num_classes, 0,
                                       (dbias.count - grid) * num_classes * sizeof(A),
                                       static_cast<cudaStream_t>(stream.handle)));
      }
      const auto kernel = &additive_shapley_bwd_kernel<P>;
      // Its own arrays and the largest columns are more together than a block has without asking.
      allow_shared_memory(op, kernel, kShared);
      MMFAST_LAUNCH((kernel), static_cast<unsigned>(grid), geometry.block, geometry.shared, stream.handle,
                    static_cast<const T*>(dphi), problem, static_cast<Out*>(dpartial_logits),
                    static_cast<A*>(dbias.sums), ShapleyWeights<A>(problem.M));
    });
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(additive_shapley_fwd_plan)
MMFAST_REGISTER(additive_shapley_bwd_plan)
MMFAST_REGISTER(additive_shapley_fwd)
MMFAST_REGISTER(additive_shapley_bwd)

}  // namespace
}  // namespace mmfast

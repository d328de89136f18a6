// The backward kernel of additive_shapley.cu.
#pragma once

#include "additive_sample.cuh"
#include "shapley.cuh"

namespace mmfast {
namespace {

// The gradients of a sample with respect to its classes' partial logits, as a thread adds them up.
template <class P>
struct Gradients {
  using T = typename P::T;
  using A = accumulate_t<T>;
  using Out = std::conditional_t<P::is_block, A, T>;
  static constexpr int K = P::K, J = 1 << K, H = P::H;

  const Sample<P>& sample;
  Out* dpartial_logits;  // [M, N, C], those of the sample
  int64_t stride;        // N C
  A* dbias_row;          // [C] of the block, if is_block
  A* dbase;              // [H] unless is_block
  A dpart[K][H], label_part[K], label_base, here[H];

  __device__ Gradients(const Sample<P>& sample, Out* dpartial_logits, int64_t stride, A* dbias_row, A* dbase)
      : sample(sample), dpartial_logits(dpartial_logits), stride(stride), dbias_row(dbias_row), dbase(dbase) {
    label_base = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      label_part[k] = 0;
#pragma unroll
      for (int i = 0; i < H; ++i) dpart[k][i] = 0;
    }
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m) {
      sample.column(m, P::sum) = 0;
      if constexpr (!P::is_block) {
#pragma unroll
        for (int i = 0; i < H; ++i) sample.column(m, P::gradients + i) = 0;
      }
    }
  }

  // Adds x[j], the gradient with respect to coalition j's logit of one class.
  __device__ void add(int chunk, int i, const A (&x)[J]) {
    A sum[J];
#pragma unroll
    for (int j = 0; j < J; ++j) sum[j] = x[j];
    A halves[K];
#pragma unroll
    for (int k = K - 1; k >= 0; --k) {
      halves[k] = sum[1 << k];
#pragma unroll
      for (int j = 1; j < 1 << k; ++j) halves[k] += sum[(1 << k) + j];
#pragma unroll
      for (int j = 0; j < 1 << k; ++j) sum[j] += sum[(1 << k) + j];
    }
    here[i] = sum[0];
    if constexpr (P::is_block) {
      const int c = sample.classes.class_of(chunk, i);
      if (c >= sample.classes.C) return;
      // Only this thread comes to this class; the first coalition finds nothing there yet.
      if (dbias_row != nullptr) dbias_row[c] += sum[0];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (sample.outer + k >= sample.problem.M) continue;
        Out& target = dpartial_logits[(sample.outer + k) * stride + c];
        target = sample.members == 0 ? halves[k] : target + halves[k];
      }
    } else {
      dbase[i] += sum[0];
#pragma unroll
      for (int k = 0; k < K; ++k) dpart[k][i] += halves[k];
    }
  }

  // After the classes of a chunk: adds to the outer modalities what the coalition holds of them.
  __device__ void add_outer(int chunk) {
    if constexpr (P::is_block) {
      const Classes<H>& classes = sample.classes;
#pragma unroll 1
      for (int m = 0; m < sample.outer; ++m) {
        if (sample.members != 0 && !(sample.members >> m & 1)) continue;
        Out* row = dpartial_logits + m * stride;
#pragma unroll
        for (int i = 0; i < H; ++i) {
          const int c = classes.class_of(chunk, i);
          if (c < classes.C) row[c] = sample.members == 0 ? A(0) : row[c] + here[i];
        }
      }
    } else {
      add_to_columns(here);
    }
  }

  __device__ void add_to_columns(const A (&gradient)[H]) const {
#pragma unroll 1
    for (unsigned rest = sample.members; rest != 0; rest &= rest - 1) {
      const int m = __ffs(static_cast<int>(rest)) - 1;
#pragma unroll
      for (int i = 0; i < H; ++i) sample.column(m, P::gradients + i) += gradient[i];
    }
  }

  // Adds the gradient with respect to the thread's logits of coalition j, unless is_block.
  __device__ void add_one(int j, const A (&gradient)[H]) {
#pragma unroll
    for (int i = 0; i < H; ++i) {
      dbase[i] += gradient[i];
#pragma unroll
      for (int k = 0; k < K; ++k) dpart[k][i] += j >> k & 1 ? gradient[i] : A(0);
    }
    add_to_columns(gradient);
  }

  // The label's logit: du (1 - p) or du p (1 - p), of which nothing is left where the label is sure. With
  // "margin" its gradient is du_s, and the sum of these over the coalitions that hold m is dphi_m (that over
  // all of them is 0): none is added up, so that nothing cancels.
  __device__ void add_label_softmax(int j, A scale, A others) {
    // Of an infinite du, and so scale, the formula du - du p would make NaN.
    add_label(j, scale * others + (scale - scale));
  }

  __device__ void add_label(int j, A gradient) {
    label_base += gradient;
#pragma unroll
    for (int k = 0; k < K; ++k) label_part[k] += j >> k & 1 ? gradient : A(0);
#pragma unroll 1
    for (unsigned rest = sample.members; rest != 0; rest &= rest - 1)
      sample.column(__ffs(static_cast<int>(rest)) - 1, P::sum) += gradient;
  }

  // What a thread added up of the label's goes to the thread of the label's class.
  template <class Dphi>
  __device__ void finish(bool is_live, bool overflows, Dphi&& dphi_of) {
    const bool is_rest = sample.problem.utility == kMargin && !overflows;
    const auto& team = sample.team;
    finish_label(team.template sum_parts<J>(label_base), dbias_row, dbase);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int m = sample.outer + k;
      Out* row = dpartial_logits + m * stride;
      const A label_gradient = team.template sum_parts<J>(label_part[k]);
      if (m < sample.problem.M)
        finish_row(is_rest ? label_gradient + dphi_of(m) : label_gradient, row, dpart[k], is_live);
    }
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m) {
      A gradients[H];
      if constexpr (!P::is_block) {
#pragma unroll
        for (int i = 0; i < H; ++i) gradients[i] = sample.column(m, P::gradients + i);
      }
      const A label_gradient = team.template sum_parts<J>(sample.column(m, P::sum));
      finish_row(is_rest ? label_gradient + dphi_of(m) : label_gradient, dpartial_logits + m * stride,
                 gradients, is_live);
    }
  }

  template <class Row>
  __device__ void finish_label(A label_gradient, Row* row, A* held) const {
    const Classes<H>& classes = sample.classes;
    if constexpr (P::is_block) {
      if (row == nullptr) return;
#pragma unroll 1
      for (int chunk = 0; chunk < classes.chunks(); ++chunk) {
#pragma unroll
        for (int i = 0; i < H; ++i) {
          if (classes.class_of(chunk, i) == sample.label) row[sample.label] += label_gradient;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < H; ++i) held[i] += classes.class_of(0, i) == sample.label ? label_gradient : A(0);
    }
  }

  __device__ void finish_row(A label_gradient, Out* row, A (&held)[H], bool is_live) const {
    finish_label(label_gradient, row, held);
    if constexpr (!P::is_block) {
      if (is_live) sample.classes.store(row, 0, held);
    }
  }
};

// Adds the gradients of the last modalities' coalition j with exponentials of sums, where products were too
// small. All lanes of the warp come along; those whose team needs it not add zeros.
template <class P, class A>
__device__ void add_exact(const Sample<P>& sample, A du, int j, bool is_mine, Gradients<P>& gradients) {
  constexpr int H = P::H;
  const auto& problem = sample.problem;
  const bool is_needed = sample.team.all(is_mine ? 1 : 0, Sum()) > 0;
  const Coalition<typename P::T> source{problem, sample.classes, sample.data, sample.with_last(j)};
  const Softmax<A> softmax = softmax_of(source, sample.label, source.logit_of(sample.label), sample.team);
  const A total = softmax.label + softmax.others;
  const A weight = (problem.utility == kProbability ? du * (softmax.label / total) : du) / total;
  A z[H];
  source.load(0, z);
#pragma unroll
  for (int i = 0; i < H; ++i)
    z[i] = is_needed && sample.is_other(0, i) ? -weight * exponential(z[i] - softmax.top) : A(0);
  gradients.add_one(j, z);
  if (is_mine) gradients.add_label_softmax(j, weight, softmax.others);
}

// Writes a block's part of the bias's gradient: the sums of `dbase` over its teams, in a fixed order.
template <class A, int H>
__device__ void sum_bias(const Team<false>& team, const Classes<H>& classes, A (&dbase)[H], A* row) {
  MMFAST_SHARED(A, sums, [kBlock / kWarp][kWarp][H]);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, num_warps = static_cast<int>(blockDim.x) / kWarp;
#pragma unroll
  for (int i = 0; i < H; ++i) {
    dbase[i] = warp_sum_modulo(dbase[i], team.threads);
    if (static_cast<int>(threadIdx.x) % kWarp < team.threads) sums[warp][team.lane][i] = dbase[i];
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= team.threads) return;
#pragma unroll
  for (int i = 0; i < H; ++i) {
#pragma unroll 1
    for (int w = 1; w < num_warps; ++w) dbase[i] += sums[w][team.lane][i];
  }
  classes.store(row, 0, dbase);
}

// The gradient with respect to a coalition's utility by the formula itself. Rarely needed.
template <class T>
__device__ accumulate_t<T> du_by_formula(const Problem<T>& problem, const T* dphi, const accumulate_t<T>* b,
                                         unsigned coalition) {
  const int players = __popc(coalition);
  accumulate_t<T> sum = 0;
#pragma unroll 1
  for (int m = 0; m < problem.M; ++m) {
    const auto share = problem.format.widen(dphi[m]);
    sum += coalition >> m & 1 ? b[players - 1] * share : -b[players] * share;
  }
  return sum;
}

// The gradient with respect to a sample's values, and what it makes of that with respect to utilities.
template <class P>
struct UtilityGradients {
  using T = typename P::T;
  using A = accumulate_t<T>;
  static constexpr int K = P::K;

  const Sample<P>& sample;
  const T* dphi;   // [M], those of the sample
  const A *a, *b;  // the weights, [M + 1] each
  bool is_live;    // a team without a sample adds nothing to the bias's gradient
  A dphi_sum, last_dphi[K];
  // Of the coalition that visit() was called for.
  A outer_sum;
  int size;

  __device__ UtilityGradients(const Sample<P>& sample, const T* dphi, const A* a, const A* b, bool is_live)
      : sample(sample), dphi(dphi), a(a), b(b), is_live(is_live), dphi_sum(0) {
    A largest_sum = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      dphi_sum += last_dphi[k] = of_value(sample.outer + k);
      largest_sum += fabs(last_dphi[k]);
    }
#pragma unroll 1
    for (int m = 0; m < sample.outer; ++m) {
      dphi_sum += of_value(m);
      largest_sum += fabs(of_value(m));
    }
    // Infinite, or such that sums overflow: their sum says so, which takes no register of its own.
    if (!is_finite(largest_sum)) dphi_sum = largest_sum - largest_sum;
  }

  __device__ A of_value(int m) const {
    return is_live && m < sample.problem.M ? sample.problem.format.widen(dphi[m]) : A(0);
  }
  __device__ bool overflows() const { return !is_finite(dphi_sum); }

  // Goes to a coalition of outer modalities.
  __device__ void visit(unsigned others) {
    size = __popc(others);
    outer_sum = 0;
#pragma unroll 1
    for (unsigned rest = others; rest != 0; rest &= rest - 1)
      outer_sum += of_value(__ffs(static_cast<int>(rest)) - 1);
  }

  // With respect to the utility of that coalition together with the last modalities' j.
  __device__ A of_utility(int j) const {
    if (j >= 1 << sample.problem.M) return A(0);
    if (overflows()) return du_by_formula(sample.problem, dphi, b, sample.with_last(j));
    A inside = outer_sum;
#pragma unroll
    for (int k = 0; k < K; ++k) inside += j >> k & 1 ? last_dphi[k] : A(0);
    const int players = size + __popc(j);
    return a[players] * inside - b[players] * dphi_sum;
  }
};

// Adds the gradients of "probability" or "log_probability" for the coalitions that `sample` visits.
template <class P>
__device__ __forceinline__ void add_softmax_gradients(const Team<P::is_block>& team, const Sample<P>& sample,
                                                      const UtilityGradients<P>& du,
                                                      Gradients<P>& gradients) {
  using A = accumulate_t<typename P::T>;
  constexpr int J = 1 << P::K;
  const int first = team.template first<J>(), left = team.template left<J>();
  A scale[J] = {}, y[J], others_sum[J], tops[J];
  unsigned flags = 0;
  sample.find_sums(y, others_sum, tops);
#pragma unroll
  for (int i = 0; i < J; ++i) {
    if (i >= left) continue;
    const A e = exponential(y[i]), total = e + others_sum[i], du_i = du.of_utility(first + i);
    if (P::is_product && !(total >= kLeastSum<A>)) {
      flags |= 1u << i;
      continue;
    }
    scale[i] = (sample.problem.utility == kProbability ? du_i * (e / total) : du_i) / total;
    gradients.add_label_softmax(first + i, scale[i], others_sum[i]);
  }
  team.template gather<J>(scale);
  sample.for_leaves(
      [&](int chunk, int i, A(&x)[J]) {
#pragma unroll
        for (int j = 0; j < J; ++j) x[j] = -scale[j] * (P::is_product ? x[j] : exponential(x[j] - tops[j]));
        gradients.add(chunk, i, x);
      },
      [&](int chunk) { gradients.add_outer(chunk); });
  if constexpr (P::is_product) {
    sample.for_flagged(
        flags, [&](int j, bool is_mine) { add_exact(sample, du.of_utility(j), j, is_mine, gradients); });
  }
}

// Finds the class of the largest logit but the label's, for every coalition: in all lanes.
template <class P, class A, int J>
__device__ __forceinline__ void find_runners_up(const Sample<P>& sample, int (&runner_up)[J]) {
  const auto& classes = sample.classes;
  const auto& team = sample.team;
  A tops[J];
  sample.find_tops(tops);
  team.template gather<J>(tops);
#pragma unroll
  for (int j = 0; j < J; ++j) runner_up[j] = kNoClass;
  sample.for_leaves([&](int chunk, int i, const A(&x)[J]) {
    const int c = classes.class_of(chunk, i);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (c < classes.C && x[j] == tops[j]) runner_up[j] = Min()(runner_up[j], c);
    }
    if (sample.is_bounded || c >= classes.C || c == sample.label) return;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (x[j] != x[j]) runner_up[j] = Min()(runner_up[j], runner_up_key(c, x[j], x[j]));
    }
  });
  team.template scatter<J>(runner_up, Min());
  // It is the label where that is class 0 and all others are -inf: the lowest of those is meant.
#pragma unroll
  for (int i = 0; i < J; ++i) {
    runner_up[i] = class_of_key(runner_up[i]);
    if (runner_up[i] == sample.label) runner_up[i] = sample.label + 1;
  }
}

// Adds the gradients of "margin" for the coalitions that `sample` visits.
template <class P>
__device__ __forceinline__ void add_margin_gradients(const Team<P::is_block>& team, const Sample<P>& sample,
                                                     const UtilityGradients<P>& du, Gradients<P>& gradients) {
  using A = accumulate_t<typename P::T>;
  constexpr int J = 1 << P::K;
  const int first = team.template first<J>(), left = team.template left<J>();
  A scale[J] = {};
  int runner_up[J];
  find_runners_up<P, A>(sample, runner_up);
#pragma unroll
  for (int i = 0; i < J; ++i) {
    if (i >= left) continue;
    scale[i] = du.of_utility(first + i);
    if (du.overflows()) gradients.add_label(first + i, scale[i]);
  }
  team.template gather<J>(runner_up);
  team.template gather<J>(scale);
  sample.for_leaves(
      [&](int chunk, int i, A(&x)[J]) {
        const int c = sample.classes.class_of(chunk, i);
#pragma unroll
        for (int j = 0; j < J; ++j) x[j] = c == runner_up[j] ? -scale[j] : A(0);
        gradients.add(chunk, i, x);
      },
      [&](int chunk) { gradients.add_outer(chunk); });
}

template <class P>
__global__ void __launch_bounds__(P::max_threads, P::min_blocks)
    additive_shapley_bwd_kernel(const typename P::T* __restrict__ dphi,  // [N, M]
                                const __grid_constant__ Problem<typename P::T> problem,
                                typename Gradients<P>::Out* dpartial_logits,  // [M, N, C]
                                accumulate_t<typename P::T>* dbias,           // [blocks, C] or null
                                ShapleyWeights<accumulate_t<typename P::T>> weights) {
  using A = accumulate_t<typename P::T>;
  constexpr int H = P::H;
  MMFAST_SHARED(A, a, [kMaxPlayers + 1]);
  MMFAST_SHARED(A, b, [kMaxPlayers + 1]);
  MMFAST_SHARED(double, scratch, [P::is_block ? kMaxLeaves * kMaxWarps : 1]);
  MMFAST_DYNAMIC_SHARED(columns);
  share_weights(weights, a, b);

  const Team<P::is_block> team(problem.threads, scratch);
  const Classes<H> classes(problem.C, problem.is_packed, problem.format, team);
  const int samples = team.teams();
  A* const dbias_row =
      P::is_block && dbias != nullptr ? dbias + blockIdx.x * static_cast<int64_t>(problem.C) : nullptr;
  A dbase[H] = {};
  if (dbias_row != nullptr) {
#pragma unroll 1
    for (int chunk = 0; chunk < classes.chunks(); ++chunk) classes.store(dbias_row, chunk, dbase);
  }

  const int64_t num_groups = ceil_div(problem.N, samples);
#pragma unroll 1
  for (int64_t group = blockIdx.x; group < num_groups; group += gridDim.x) {
    const int64_t wanted = group * samples + team.place();
    const bool is_live = wanted < problem.N;
    const int64_t n = is_live ? wanted : problem.N - 1;
    Sample<P> sample(problem, team, classes, reinterpret_cast<A*>(columns) + threadIdx.x, n);
    Gradients<P> gradients(sample, dpartial_logits + n * problem.C, problem.N * problem.C, dbias_row, dbase);
    UtilityGradients<P> du(sample, dphi + n * problem.M, a, b, is_live);
#pragma unroll 1
    for (unsigned others = 0; others < (P::has_outer ? 1u << sample.outer : 1u); ++others) {
      sample.visit(others);
      du.visit(others);
      if constexpr (P::is_softmax) {
        add_softmax_gradients(team, sample, du, gradients);
      } else {
        add_margin_gradients(team, sample, du, gradients);
      }
    }
    gradients.finish(is_live, du.overflows(), [&](int m) { return du.of_value(m); });
  }
  if constexpr (!P::is_block) {
    if (dbias != nullptr)
      sum_bias(team, classes, dbase, dbias + blockIdx.x * static_cast<int64_t>(problem.C));
  }
}

}  // namespace
}  // namespace mmfast

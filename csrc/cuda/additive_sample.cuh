// A sample of additive_shapley.cu: its partial logits as a thread holds them, and passes over a coalition's
// logits and those of the 2^K that the last K modalities make of it.
#pragma once

#include "additive_shapley.cuh"

namespace mmfast {
namespace {

template <class T>
struct Problem {
  const T* partial_logits;      // [M, N, C]
  const int64_t* labels;        // [N]
  const accumulate_t<T>* bias;  // [C] or null
  int64_t N, stride_m, stride_n, stride_c;
  int M, C, utility, threads;
  bool is_packed;
  Format format;
};

constexpr int kBlock = 128;

// Below it, products of exponentials may have lost what counts.
template <class A>
constexpr A kLeastSum = std::is_same_v<A, double> ? 0x1p-200 : 0x1p-60f;
// So many partial logits as there may be, and a bias, do not add up to infinity below it.
template <class A>
constexpr A kLargestPart = std::numeric_limits<A>::max() / 32;

// The logits of one coalition, summed anew from memory in the order of the modalities.
template <class T>
struct Coalition {
  using A = accumulate_t<T>;
  static constexpr int H = kClassesPerThread<T>;
  const Problem<T>& problem;
  const Classes<H>& classes;
  const T* sample;
  unsigned members;

  __device__ void load(int chunk, A (&z)[H]) const {
    if (problem.bias != nullptr) {
      classes.load_scalars(problem.bias, chunk, z);
    } else {
#pragma unroll
      for (int i = 0; i < H; ++i) z[i] = 0;
    }
#pragma unroll 1
    for (unsigned rest = members; rest != 0; rest &= rest - 1) {
      A part[H];
      classes.load(sample + (__ffs(static_cast<int>(rest)) - 1) * problem.stride_m, problem.stride_c, chunk,
                   part);
#pragma unroll
      for (int i = 0; i < H; ++i) z[i] += part[i];
    }
  }

  __device__ A logit_of(int label) const {
    if (label < 0) return 0;
    A sum = problem.bias == nullptr ? A(0) : problem.bias[label];
#pragma unroll 1
    for (unsigned rest = members; rest != 0; rest &= rest - 1)
      sum += classes.format.widen(
          sample[(__ffs(static_cast<int>(rest)) - 1) * problem.stride_m + label * problem.stride_c]);
    return sum;
  }
};

// How a kernel runs: K modalities decided in registers, by a team of lanes that hold all classes or by a
// block that loops over them; `entries` elements a modality and thread in shared memory.
template <class T_, int K_, bool is_softmax_, bool is_block_, bool is_backward>
struct Plan {
  using T = T_;
  static constexpr int K = K_, H = kClassesPerThread<T>;
  static constexpr bool is_softmax = is_softmax_, is_block = is_block_;
  // Exponentials of the modalities are multiplied, instead of logits added.
  static constexpr bool is_product = is_softmax && !is_block;
  // Whether there may be more than K modalities.
  static constexpr bool has_outer = is_block || K == 3 || sizeof(T) == 8;
  // Blocks of an SM at once, as many as no register need be spilled for.
  static constexpr int most_blocks() {
    if (is_block) return sizeof(T) == 8 ? 1 : 2;
    if (sizeof(T) == 8) return is_backward ? 2 : 3;
    if (is_backward) return is_softmax ? (K == 2 ? 5 : 3) - (H > 4) : (K == 2 ? 5 : 4) - (H > 4 ? 5 - K : 0);
    return K == 2 ? (H > 4 ? 6 : 8) : H > 4 ? 3 : 4;
  }
  static constexpr int max_threads = is_block ? kMaxWarps * kWarp : kBlock;
  static constexpr int min_blocks = most_blocks();
  // In a column of shared memory: what adds up over coalitions, the label's partial logit, those of the
  // thread's classes, then their gradients or the sums before the last restart.
  static constexpr int sum = 0, label_logit = 1, parts = 2, gradients = parts + H,
                       earlier = is_block ? 1 : gradients;
  static constexpr int entries = is_backward ? (is_block ? 1 : gradients + H) : earlier + 1;
  // Below the columns: such sums for the last modalities, and those all modalities share.
  static constexpr int extra = is_backward || !has_outer ? 0 : (1 << K) + 1;
};

template <class P>
struct Sample {
  using T = typename P::T;
  using A = accumulate_t<T>;
  static constexpr int K = P::K, J = 1 << K, H = P::H;

  const Problem<T>& problem;
  const Team<P::is_block>& team;
  const Classes<H>& classes;
  A* columns;  // [D, entries, threads of the block], those of this thread
  const T* data;
  int label, outer;  // outer: D = M - K modalities, not decided in registers
  bool is_bounded;   // no NaN, no +inf, and nothing that may add up to them
  A part[K][H], base[H], label_part[K], label_base;
  // Of the coalition that visit() was called for.
  unsigned members;
  A z[H], label_logit;

  __device__ A& column(int m, int entry) const {
    return columns[(m * P::entries + entry) * static_cast<int>(blockDim.x)];
  }

  __device__ A& extra(int i) const {
    return columns[(outer * P::entries + i) * static_cast<int>(blockDim.x)];
  }

  // What a partial logit beyond the last class is, so that it does not show.
  static constexpr A pad = P::is_product ? -kInfinity<A> : A(0);

  // 0 beyond the last modality.
  __device__ A label_logit_of(int m) const {
    return m < problem.M && label >= 0
               ? classes.format.widen(data[m * problem.stride_m + label * problem.stride_c])
               : A(0);
  }

  __device__ void load_part(int m, int chunk, A (&z)[H]) const {
    if (m < problem.M) {
      classes.load(data + m * problem.stride_m, problem.stride_c, chunk, z, pad);
    } else {
#pragma unroll
      for (int i = 0; i < H; ++i) z[i] = 0;
    }
  }

  __device__ void load_base(int chunk, A (&z)[H]) const {
    if (problem.bias != nullptr) return classes.load_scalars(problem.bias, chunk, z, pad);
#pragma unroll
    for (int i = 0; i < H; ++i) z[i] = 0;
  }

  __device__ bool is_other(int chunk, int i) const {
    const int c = classes.class_of(chunk, i);
    return c < classes.C && c != label;
  }

  // Puts `excluded` where there is the label or no class.
  __device__ void exclude(int chunk, A excluded, A (&z)[H]) const {
#pragma unroll
    for (int i = 0; i < H; ++i) z[i] = is_other(chunk, i) ? z[i] : excluded;
  }

  __device__ Sample(const Problem<T>& problem, const Team<P::is_block>& team, const Classes<H>& classes,
                    A* columns, int64_t n)
      : problem(problem),
        team(team),
        classes(classes),
        columns(columns),
        data(problem.partial_logits + n * problem.stride_n),
        outer(P::has_outer && problem.M > K ? problem.M - K : 0),
        is_bounded(true),
        members(0) {
    // Labels on a GPU are not checked; -1 stands for those that lie outside.
    const int64_t y = problem.labels[n];
    label = y >= 0 && y < problem.C ? static_cast<int>(y) : -1;
    if constexpr (P::is_block) {
      label_base = problem.bias != nullptr && label >= 0 ? problem.bias[label] : A(0);
#pragma unroll
      for (int k = 0; k < K; ++k) label_part[k] = label_logit_of(outer + k);
      if constexpr (!P::is_softmax) check_all();
    } else {
      hold();
    }
  }

  __device__ void check(const A (&z)[H]) {
#pragma unroll
    for (int i = 0; i < H; ++i) is_bounded &= z[i] < kLargestPart<A>;
  }

  __device__ void check_all() {
    A loaded[H];
#pragma unroll 1
    for (int chunk = 0; chunk < classes.chunks(); ++chunk) {
      load_base(chunk, loaded);
      check(loaded);
#pragma unroll 1
      for (int m = 0; m < problem.M; ++m) {
        load_part(m, chunk, loaded);
        check(loaded);
      }
    }
    is_bounded = team.all(is_bounded ? 1 : 0, Min()) != 0;
  }

  __device__ A largest(const A (&z)[H]) const {
    A top = z[0];
#pragma unroll
    for (int i = 1; i < H; ++i) top = Max()(top, z[i]);
    return top;
  }

  // The label's logit if this thread holds it, else 0.
  __device__ A label_logit_in(const A (&z)[H]) const {
    A label_logit = 0;
#pragma unroll
    for (int i = 0; i < H; ++i) label_logit = classes.class_of(0, i) == label ? z[i] : label_logit;
    return label_logit;
  }

  // exp(z - top), also where there is the label.
  __device__ void exponentiate(A top, A (&z)[H]) const {
#pragma unroll
    for (int i = 0; i < H; ++i) z[i] = exponential(z[i] - top);
  }

  // Takes all classes into registers and, of the outer modalities, into the columns.
  __device__ void hold() {
    load_base(0, base);
#pragma unroll
    for (int k = 0; k < K; ++k) load_part(outer + k, 0, part[k]);
    // Not loaded by itself: that would have to wait for the label.
    A label_logits[4] = {label_logit_in(base), label_logit_in(part[0]), label_logit_in(part[1]),
                         K == 3 ? label_logit_in(part[K - 1]) : A(0)};
    team.template scatter<4>(label_logits, Sum());
    team.template gather<4>(label_logits);
    label_base = label_logits[0];
#pragma unroll
    for (int k = 0; k < K; ++k) label_part[k] = label_logits[1 + k];
    if constexpr (P::is_product) {
      A tops[4] = {problem.bias == nullptr ? A(0) : largest(base), largest(part[0]), largest(part[1]),
                   K == 3 ? largest(part[K - 1]) : A(0)};
      team.template scatter<4>(tops, Max());
      team.template gather<4>(tops);
      // Where it is 0, so are all products: the label's logits are kept apart.
      exponentiate(tops[0], base);
      exclude(0, 0, base);
      label_base -= tops[0];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        exponentiate(tops[1 + k], part[k]);
        label_part[k] -= tops[1 + k];
      }
    } else {
      check(base);
      exclude(0, -kInfinity<A>, base);
#pragma unroll
      for (int k = 0; k < K; ++k) check(part[k]);
    }
#pragma unroll 1
    for (int m = 0; m < outer; ++m) {
      A loaded[H], top = 0;
      load_part(m, 0, loaded);
      const A label_loaded = team.all(label_logit_in(loaded), Sum());
      if constexpr (P::is_product) {
        top = team.all(largest(loaded), Max());
        exponentiate(top, loaded);
      } else {
        check(loaded);
      }
      column(m, P::label_logit) = label_loaded - top;
#pragma unroll
      for (int i = 0; i < H; ++i) column(m, P::parts + i) = loaded[i];
    }
    // Of all teams of the warp, which come along in any case.
    if constexpr (!P::is_softmax) is_bounded = !__any_sync(kFullMask, !is_bounded);
  }

  // Goes to a coalition of outer modalities.
  __device__ void visit(unsigned coalition) {
    members = coalition;
    label_logit = label_base;
#pragma unroll
    for (int i = 0; i < H; ++i) z[i] = P::is_block ? A(0) : base[i];
#pragma unroll 1
    for (unsigned rest = coalition; rest != 0; rest &= rest - 1) {
      const int m = __ffs(static_cast<int>(rest)) - 1;
      if constexpr (P::is_block) {
        label_logit += label_logit_of(m);
      } else {
        label_logit += column(m, P::label_logit);
#pragma unroll
        for (int i = 0; i < H; ++i) {
          const A term = column(m, P::parts + i);
          z[i] = P::is_product ? z[i] * term : z[i] + term;
        }
      }
    }
  }

  // The label's logit, or what it is above the sum of the modalities' maxima, with the last ones' coalition
  // j.
  __device__ A label_logit_with(int j) const {
    A y = label_logit;
#pragma unroll
    for (int k = 0; k < K; ++k) y = j >> k & 1 ? y + label_part[k] : y;
    return y;
  }

  // Calls function(chunk, i, x) for the thread's classes: x[j] is the logit of coalition j, or its
  // exponential if P::is_product.
  template <class Function, class After>
  __device__ void for_leaves(Function&& function, After&& after) const {
    if constexpr (P::is_block) {
#pragma unroll 1
      for (int chunk = 0; chunk < classes.chunks(); ++chunk) {
        A first[H], last[K][H];
        Coalition<T>{problem, classes, data, members}.load(chunk, first);
        exclude(chunk, -kInfinity<A>, first);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          load_part(outer + k, chunk, last[k]);
        }
        spread(chunk, first, last, function);
        after(chunk);
      }
    } else {
      spread(0, z, part, function);
      after(0);
    }
  }
  template <class Function>
  __device__ void for_leaves(Function&& function) const {
    for_leaves(function, [](int) {});
  }

  template <class Function>
  __device__ void spread(int chunk, const A (&first)[H], const A (&last)[K][H], Function&& function) const {
#pragma unroll
    for (int i = 0; i < H; ++i) {
      A x[J];
      x[0] = first[i];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int j = 0; j < 1 << k; ++j)
          x[(1 << k) + j] = P::is_product ? x[j] * last[k][i] : x[j] + last[k][i];
      }
      function(chunk, i, x);
    }
  }

  // The largest logits but the label's: of all coalitions j, or of those left with the thread.
  __device__ void find_tops(A (&top)[J]) const {
#pragma unroll
    for (int j = 0; j < J; ++j) top[j] = -kInfinity<A>;
    for_leaves([&](int, int, const A(&x)[J]) {
#pragma unroll
      for (int j = 0; j < J; ++j) top[j] = Max()(top[j], x[j]);
    });
    team.template scatter<J>(top, Max());
  }

  // For the coalitions left with the thread: `y`, the label's logit above some reference, and the sum of the
  // others' exponentials, each less that reference before. `all_tops` are those references of all j, if
  // is_block.
  __device__ void find_sums(A (&y)[J], A (&others)[J], A (&all_tops)[J]) const {
    const int first = team.template first<J>(), left = team.template left<J>();
#pragma unroll
    for (int i = 0; i < J; ++i) y[i] = i < left ? label_logit_with(first + i) : A(0);
    if constexpr (P::is_block) {
      find_tops(all_tops);
#pragma unroll
      for (int i = 0; i < J; ++i) {
        all_tops[i] = Max()(all_tops[i], y[i]);
        y[i] -= all_tops[i];
      }
      team.template gather<J>(all_tops);
    }
#pragma unroll
    for (int j = 0; j < J; ++j) others[j] = 0;
    for_leaves([&](int, int, const A(&x)[J]) {
#pragma unroll
      for (int j = 0; j < J; ++j) others[j] += P::is_product ? x[j] : exponential(x[j] - all_tops[j]);
    });
    team.template scatter<J>(others, Sum());
  }

  // Of fewer than K modalities, those beyond the last are left out.
  __device__ unsigned with_last(int j) const {
    return (members | static_cast<unsigned>(j) << outer) & ((1u << problem.M) - 1);
  }

  // Calls function(j, is_mine) for every coalition that `flags` names in some thread of the warp, `is_mine`
  // if in this one; bit i stands for the i-th of those left with the thread. All lanes come along.
  template <class Function>
  __device__ void for_flagged(unsigned flags, Function&& function) const {
    if (!__any_sync(kFullMask, flags != 0)) return;
    const int first = team.template first<J>(), left = team.template left<J>();
#pragma unroll 1
    for (int j = 0; j < J; ++j) {
      const bool is_mine = j >= first && j < first + left && (flags >> (j - first) & 1);
      if (__any_sync(kFullMask, is_mine)) function(j, is_mine);
    }
  }

  // Rarely needed. All lanes of the warp come along.
  __device__ A exact_utility(unsigned coalition) const {
    const Coalition<T> source{problem, classes, data, coalition};
    const A label_logit = source.logit_of(label);
    if constexpr (P::is_softmax) return softmax_utility(source, label, label_logit, problem.utility, team);
    return largest_utility(source, label, label_logit, problem.utility, team);
  }

  // Of the coalitions left with the thread, "cardinality" as "correct".
  __device__ void utilities(A (&u)[J]) const {
    const int first = team.template first<J>(), left = team.template left<J>();
    unsigned flags = 0;
    if constexpr (P::is_softmax) {
      A y[J], others[J], tops[J];
      find_sums(y, others, tops);
#pragma unroll
      for (int i = 0; i < J; ++i) {
        if (i >= left) continue;
        const A e = exponential(y[i]), total = e + others[i];
        u[i] = problem.utility == kProbability ? e / total : y[i] - logarithm(total);
        if (P::is_product && !(total >= kLeastSum<A>)) flags |= 1u << i;
      }
    } else {
      A top[J];
      find_tops(top);
      const bool is_counting = problem.utility != kMargin;
#pragma unroll
      for (int i = 0; i < J; ++i) {
        if (i >= left) continue;
        const A y = label_logit_with(first + i);
        u[i] = is_counting ? (y > top[i] ? A(1) : A(0)) : y - top[i];
        const bool is_empty = first + i == 0 && members == 0 && problem.bias == nullptr;
        // Without a bias all logits of the empty coalition are 0, and the first class is the largest.
        if (is_counting && is_empty) u[i] = label == 0 ? A(1) : A(0);
        if (!is_bounded || (is_counting && !is_empty && y == top[i])) flags |= 1u << i;
      }
    }
    for_flagged(flags, [&](int j, bool is_mine) {
      const A exact = exact_utility(with_last(j));
#pragma unroll
      for (int i = 0; i < J; ++i) u[i] = is_mine && i == j - first ? exact : u[i];
    });
  }
};

}  // namespace
}  // namespace mmfast

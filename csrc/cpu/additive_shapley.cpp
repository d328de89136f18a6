// Shapley values of modalities whose partial logits add up, and the utilities of given coalitions' logits.
//
//   z_s = bias + sum_{m in s} z^m,  u_s = utility(z_s, y),  phi = shapley_values(u)
//
// kLanes samples at a time, one in each SIMD lane, their partial logits transposed once into the cache. The
// coalitions are walked depth first, modality 0 decided first: a level's logits are those of the level above,
// or those plus one partial, so that a coalition costs one addition a class as in Gray-code order. Nothing is
// ever subtracted: no rounding accumulates, every z_s is the sum in order of m, to the last bit, and -inf
// survives. The last three levels are eight sums in registers. Utilities fold into Shapley values on the way
// back up. Backward walks again and adds up gradients on the way back.
//
// The label's class is kept apart, -inf stands in its place: the maximum is then that of the others, and one
// comparison decides. Gradients of "margin" have NaN there, which equals no maximum, where all others are
// -inf. A tie is looked into class by class, for of equal logits the lowest class counts. Samples whose
// values come out infinite or NaN are walked once more and weighed modality by modality.
#include <cmath>
#include <vector>

#include "codes.h"
#include "labels.h"
#include "lanes.h"
#include "vec_math.h"

namespace mmfast {
namespace {

#define MMFAST_UNROLL _Pragma("GCC unroll 8")

constexpr int kMaxPlayers = 20;
// Samples whose share of the bias's gradient is summed in one place, whatever the number of threads.
constexpr int64_t kChunk = 256;
// Classes of a group: a sum of few groups' sums rounds less than one of C terms.
constexpr int64_t kGroup = 64;

// A sample is tame if none of its numbers is NaN or above this: then no logit of a coalition, a sum of up to
// 21 of them, is NaN or +inf. Among them may be -inf.
template <class A>
constexpr A kMostOfTame = std::numeric_limits<A>::max() / 32;

template <class A>
constexpr A in_place_of_label(Utility utility, bool is_backward) {
  return is_backward && utility == kMargin ? std::numeric_limits<A>::quiet_NaN() : -kInfinity<A>;
}

// The last K modalities' 2^K coalitions, given the logits z of the modalities before them.
template <class A, int K>
struct Leaves {
  using V = Vec<A>;
  using Mask = Vec<Bits<A>>;
  static constexpr int J = 1 << K;

  const V* partials;  // [K, C]
  const V* own;       // [K] the label's
  int64_t C;
  Utility utility;
  Mask labels;
  bool is_tame;

  // All sums x[j] of the K numbers `terms`, `stride` apart, and `first`.
  static void spread(V first, const V* terms, int64_t stride, V* x) {
    x[0] = first;
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) {
      const V term = terms[i * stride];
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[(1 << i) + j] = x[j] + term;
    }
  }

  // The folds of x: sums over the halves of j with bit i set, and the total in x[0].
  static void fold(V* x, V* halves) {
    MMFAST_UNROLL
    for (int i = K - 1; i >= 0; --i) {
      V sum = x[1 << i];
      MMFAST_UNROLL
      for (int j = 1; j < 1 << i; ++j) sum += x[(1 << i) + j];
      MMFAST_UNROLL
      for (int j = 0; j < 1 << i; ++j) x[j] += x[(1 << i) + j];
      halves[i] = sum;
    }
  }

  void find_maxima(const V* z, V* maxima) const {
    V top[J], x[J];
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) top[j] = V{} - kInfinity<A>;
    for (int64_t c = 0; c < C; ++c) {
      spread(z[c], partials + c, C, x);
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) top[j] = larger<A>(x[j], top[j]);
    }
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) maxima[j] = top[j];
  }

  // 1 where the first of the largest logits is the label's; a NaN counts as largest, as torch has it.
  void find_argmax(const V* z, const V* y, V* u) const {
    V best[J], x[J];
    Mask arg[J] = {};
    for (int j = 0; j < J; ++j) best[j] = V{} - kInfinity<A>;
    for (int64_t c = 0; c < C; ++c) {
      spread(z[c], partials + c, C, x);
      const Mask is_label = labels == static_cast<Bits<A>>(c);
      for (int j = 0; j < J; ++j) {
        const V value = is_label ? y[j] : x[j];
        const Mask is_more = (value > best[j]) | ((value != value) & (best[j] == best[j]));
        best[j] = is_more ? value : best[j];
        arg[j] = is_more ? Mask{} + static_cast<Bits<A>>(c) : arg[j];
      }
    }
    for (int j = 0; j < J; ++j) u[j] = arg[j] == labels ? V{} + 1 : V{};
  }

  // Takes the 1 from a label that a lower class equals. Without a bias that is looked into for every sample:
  // the empty coalition's logits are all 0.
  void settle_ties(const V* z, const V* y, V* u) const {
    Mask is_beaten[J] = {};
    V x[J];
    for (int64_t c = 0; c < C; ++c) {
      spread(z[c], partials + c, C, x);
      const Mask is_lower = labels > static_cast<Bits<A>>(c);
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) is_beaten[j] |= is_lower & (x[j] == y[j]);
    }
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) u[j] = is_beaten[j] ? V{} : u[j];
  }

  // The utility of each coalition, for "cardinality" as for "correct".
  void utilities(const V* z, V z_own, V* u) const {
    V y[J], maxima[J], x[J];
    spread(z_own, own, 1, y);
    find_maxima(z, maxima);
    if (utility == kMargin) {
      for (int j = 0; j < J; ++j) u[j] = y[j] - maxima[j];
      // The maximum passes over a NaN.
      for (int64_t c = 0; c < C && !is_tame; ++c) {
        spread(z[c], partials + c, C, x);
        for (int j = 0; j < J; ++j) u[j] = x[j] != x[j] ? x[j] : u[j];
      }
    } else if (utility == kCorrect || utility == kCardinality) {
      if (!is_tame) return find_argmax(z, y, u);
      Mask is_tie = {};
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        u[j] = y[j] >= maxima[j] ? V{} + 1 : V{};
        is_tie |= y[j] == maxima[j];
      }
      if (any(is_tie)) settle_ties(z, y, u);
    } else {
      V sums[J];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        maxima[j] = larger<A>(y[j], maxima[j]);
        y[j] -= maxima[j];
        sums[j] = exp_nonpositive<A>(y[j]);
        u[j] = sums[j];
      }
      for (int64_t begin = 0; begin < C; begin += kGroup) {
        V group[J] = {};
        for (int64_t c = begin; c < std::min(begin + kGroup, C); ++c) {
          spread(z[c], partials + c, C, x);
          MMFAST_UNROLL
          for (int j = 0; j < J; ++j) group[j] += exp_nonpositive<A>(x[j] - maxima[j]);
        }
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) sums[j] += group[j];
      }
      // The logarithm takes a NaN for a number.
      for (int j = 0; j < J && !is_tame; ++j) y[j] += sums[j] - sums[j];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j)
        u[j] = utility == kProbability ? u[j] / sums[j] : y[j] - log_positive<A>(sums[j]);
    }
  }

  // As `gradients` of "margin" for samples that are not tame: a NaN is larger than all numbers.
  __attribute__((noinline, cold)) void wild_margin_gradients(const V* z, const V* maxima, const V* du, V* dz,
                                                             V* dz_own, V* dpartials, V* down) const {
    V x[J], halves[K + 1];
    Mask has_nan[J] = {}, runner_up[J] = {};
    for (int64_t c = C - 1; c >= 0; --c) {
      spread(z[c], partials + c, C, x);
      const Mask is_other = labels != static_cast<Bits<A>>(c);
      for (int j = 0; j < J; ++j) {
        const Mask is_nan = x[j] != x[j], is_top = is_other & (is_nan | (~has_nan[j] & (x[j] == maxima[j])));
        has_nan[j] |= is_other & is_nan;
        runner_up[j] = is_top ? Mask{} + static_cast<Bits<A>>(c) : runner_up[j];
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      for (int j = 0; j < J; ++j) x[j] = runner_up[j] == static_cast<Bits<A>>(c) ? -du[j] : V{};
      fold(x, halves);
      dz[c] += x[0];
      for (int i = 0; i < K; ++i) dpartials[i * C + c] += halves[i];
    }
    for (int j = 0; j < J; ++j) x[j] = du[j];
    fold(x, halves);
    *dz_own += x[0];
    for (int i = 0; i < K; ++i) down[i] += halves[i];
  }

  // Adds the gradients of sum_j du[j] u[j] with respect to z and to the partials, the label's apart.
  void gradients(const V* z, V z_own, const V* du,
                 V* e,  // [C, J] for what is computed on the way
                 V* dz, V* dz_own, V* dpartials, V* down) const {
    V y[J], maxima[J], scale[J], own_gradient[J], x[J], halves[K + 1];
    Mask is_open[J];
    spread(z_own, own, 1, y);
    find_maxima(z, maxima);
    if (__builtin_expect(utility == kMargin && !is_tame, 0)) {
      // Copies, for what a function is given the address of does not stay in registers.
      V found[J], given[J];
      std::copy_n(maxima, J, found);
      std::copy_n(du, J, given);
      return wild_margin_gradients(z, found, given, dz, dz_own, dpartials, down);
    }
    if (utility == kMargin) {
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) is_open[j] = ~Mask{}, own_gradient[j] = du[j];
    } else {
      V sums[J];
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        maxima[j] = larger<A>(y[j], maxima[j]);
        sums[j] = y[j] = exp_nonpositive<A>(y[j] - maxima[j]);
      }
      for (int64_t begin = 0; begin < C; begin += kGroup) {
        V group[J] = {};
        for (int64_t c = begin; c < std::min(begin + kGroup, C); ++c) {
          spread(z[c], partials + c, C, x);
          MMFAST_UNROLL
          for (int j = 0; j < J; ++j) {
            e[c * J + j] = exp_nonpositive<A>(x[j] - maxima[j]);
            group[j] += e[c * J + j];
          }
        }
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) sums[j] += group[j];
      }
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        const V p = y[j] / sums[j], weight = utility == kProbability ? du[j] * p : du[j];
        scale[j] = weight / sums[j];
        own_gradient[j] = weight - weight * p;
      }
    }
    for (int64_t c = 0; c < C; ++c) {
      if (utility == kMargin) {
        spread(z[c], partials + c, C, x);
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) {
          // The lowest class of the largest logit of the others.
          const Mask is_top = is_open[j] & (x[j] == maxima[j]);
          is_open[j] &= ~is_top;
          x[j] = is_top ? -du[j] : V{};
        }
      } else {
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) x[j] = -scale[j] * e[c * J + j];
      }
      fold(x, halves);
      dz[c] += x[0];
      MMFAST_UNROLL
      for (int i = 0; i < K; ++i) dpartials[i * C + c] += halves[i];
    }
    fold(own_gradient, halves);
    *dz_own += own_gradient[0];
    MMFAST_UNROLL
    for (int i = 0; i < K; ++i) down[i] += halves[i];
  }
};

// Utilities weighted and summed below a node of the walk: phi_m = halves[m] - shared at its root.
template <class A>
struct Sums {
  Vec<A> total, shared, halves[kMaxPlayers];
};

// One block of samples. K is the number of modalities decided in registers.
template <class A, int K>
struct Walk {
  using V = Vec<A>;
  static constexpr int J = 1 << K;

  int M, depth;
  int64_t C;
  A a[kMaxPlayers + 1], b[kMaxPlayers + 1];
  std::vector<V> base, partials, levels, dpartials, dlevels, root, e;
  V own_base, own[kMaxPlayers], down[kMaxPlayers], dphi[kMaxPlayers], dphi_sum, origin = {};
  Vec<Bits<A>> is_wild;  // backward: lanes whose dphi are infinite or may overflow in sums
  bool is_any_wild;
  Leaves<A, K> leaves;
  V* halves = nullptr;  // [M] what `weigh` adds up, if it is to

  Walk(int M, int64_t C, Utility utility, bool is_backward)
      : M(M), depth(M - K), C(C), base(C), partials(M * C), levels(depth * C) {
    // The weights of shapley_values.cpp, those of "cardinality" times the size of the coalition.
    double last = 0, next = 1.0 / M;
    for (int k = 0; k <= M; ++k) {
      const int factor = utility == kCardinality ? k : 1;
      a[k] = static_cast<A>((last + next) * factor), b[k] = static_cast<A>(next * factor);
      last = next;
      next = k + 1 < M ? next * (k + 1) / (M - 1 - k) : 0;
    }
    if (is_backward) {
      dpartials.resize(M * C), dlevels.resize(depth * C), root.resize(C);
      if (utility != kMargin) e.resize(C * J);
    }
    leaves = Leaves<A, K>{partials.data() + depth * C, own + depth, C, utility, {}, true};
  }

  void descend(int level, const V* z, V* next) const {
    const V* partial = partials.data() + level * C;
    for (int64_t c = 0; c < C; ++c) next[c] = z[c] + partial[c];
  }

  // `coalition`, of `size` modalities, is what is decided so far.
  void fwd(int level, const V* z, V z_own, unsigned coalition, int size, Sums<A>& out) {
    if (level == depth) {
      V u[J];
      leaves.utilities(z, z_own, u);
      if (__builtin_expect(halves != nullptr, 0)) {
        // A copy, for what a function is given the address of does not stay in registers.
        V given[J];
        std::copy_n(u, J, given);
        weigh(coalition, given);
      }
      if (leaves.utility >= kProbability) {
        // A number added to all utilities changes no value: less the mean of the first ones, sums stay small.
        if (size == 0) {
          V sum = u[0];
          for (int j = 1; j < J; ++j) sum += u[j];
          origin = sum - sum == 0 ? sum * (A(1) / J) : V{};
        }
        MMFAST_UNROLL
        for (int j = 0; j < J; ++j) u[j] -= origin;
      }
      out.shared = V{};
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        const int players = size + __builtin_popcount(j);
        out.shared += b[players] * u[j];
        u[j] *= a[players];
      }
      Leaves<A, K>::fold(u, out.halves + depth);
      out.total = u[0];
      return;
    }
    if (is_interrupted(2 * J * C)) return;
    fwd(level + 1, z, z_own, coalition, size, out);
    V* next = levels.data() + level * C;
    descend(level, z, next);
    Sums<A> with;
    fwd(level + 1, next, z_own + own[level], coalition | 1u << level, size + 1, with);
    out.total += with.total;
    out.shared += with.shared;
    out.halves[level] = with.total;
    for (int m = level + 1; m < M; ++m) out.halves[m] += with.halves[m];
  }

  // Adds to `halves` half of what a leaf's coalitions are worth to each modality, by the formula itself:
  // right for infinite utilities and for sums that overflow though values do not.
  __attribute__((noinline, cold)) void weigh(unsigned coalition, const V* u) const {
    for (unsigned j = 0; j < J; ++j) {
      const unsigned s = coalition | j << depth;
      const int players = __builtin_popcount(s);
      for (int m = 0; m < M; ++m)
        halves[m] += s >> m & 1 ? b[players - 1] * (A(0.5) * u[j]) : -b[players] * (A(0.5) * u[j]);
    }
  }

  // The values of a block, in sums.halves. Never inlined: one copy of the walk, which is in the two places
  // that call this, would be slower by a tenth.
  __attribute__((noinline)) void fwd(Sums<A>& sums) {
    fwd(0, base.data(), own_base, 0, 0, sums);
    for (int m = 0; m < M; ++m) sums.halves[m] -= sums.shared;
  }

  // The same once more, those that are infinite or NaN by the formula.
  void fwd_mended(Sums<A>& sums) {
    V weighed[kMaxPlayers] = {};
    halves = weighed;
    fwd(sums);
    halves = nullptr;
    for (int m = 0; m < M; ++m) {
      auto& value = sums.halves[m];
      value = value - value == 0 ? value : 2 * weighed[m];
    }
  }

  // The gradients du of a leaf's utilities by the formula itself, in wild lanes.
  __attribute__((noinline, cold)) void tame(unsigned coalition, V* du) const {
    for (unsigned j = 0; j < J; ++j) {
      const unsigned s = coalition | j << depth;
      const int players = __builtin_popcount(s);
      V sum = {};
      for (int m = 0; m < M; ++m) sum += s >> m & 1 ? b[players - 1] * dphi[m] : -b[players] * dphi[m];
      du[j] = is_wild ? sum : du[j];
    }
  }

  // Adds to dz the gradient with respect to z; `dphi_here` is the sum of dphi over the modalities present.
  void bwd(int level, const V* z, V z_own, unsigned coalition, int size, V dphi_here, V* dz, V& dz_own) {
    if (level == depth) {
      V du[J];
      Leaves<A, K>::spread(dphi_here, dphi + depth, 1, du);
      MMFAST_UNROLL
      for (int j = 0; j < J; ++j) {
        const int players = size + __builtin_popcount(j);
        du[j] = a[players] * du[j] - b[players] * dphi_sum;
      }
      if (__builtin_expect(is_any_wild, 0)) {
        V tamed[J];
        std::copy_n(du, J, tamed);
        tame(coalition, tamed);
        std::copy_n(tamed, J, du);
      }
      leaves.gradients(z, z_own, du, e.data(), dz, &dz_own, dpartials.data() + depth * C, down + depth);
      return;
    }
    if (is_interrupted(4 * J * C)) return;
    bwd(level + 1, z, z_own, coalition, size, dphi_here, dz, dz_own);
    V *next = levels.data() + level * C, *dnext = dlevels.data() + level * C;
    V dnext_own = {};
    descend(level, z, next);
    std::fill_n(dnext, C, V{});
    bwd(level + 1, next, z_own + own[level], coalition | 1u << level, size + 1, dphi_here + dphi[level],
        dnext, dnext_own);
    for (int64_t c = 0; c < C; ++c) {
      dpartials[level * C + c] += dnext[c];
      dz[c] += dnext[c];
    }
    down[level] += dnext_own;
    dz_own += dnext_own;
  }
};

template <class T>
struct Shapley {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const T* partial_logits;  // [M, N, C]
  const int64_t* labels;    // [N]
  const A* bias;            // [C] or null
  int64_t M, N, C, stride_m, stride_n, stride_c;
  Utility utility;

  int64_t label(int64_t n) const { return labels[std::min(n, N - 1)]; }
  int rows(int64_t first) const { return static_cast<int>(std::min<int64_t>(L, N - first)); }

  template <int K>
  void load_block(int64_t first, bool is_backward, Walk<A, K>& walk) const {
    const T* end = partial_logits + (M - 1) * stride_m + (N - 1) * stride_n + (C - 1) * stride_c + 1;
    auto is_tame = ~Vec<Bits<A>>{};
    for (int64_t c = 0; c < C; ++c) walk.base[c] = V{} + (bias == nullptr ? A{} : bias[c]);
    for (int64_t c = 0; c < C && bias != nullptr; ++c) is_tame &= walk.base[c] <= kMostOfTame<A>;
    for (int64_t m = 0; m < M; ++m) {
      V* tile = walk.partials.data() + m * C;
      const T* rows[L];
      for (int l = 0; l < L; ++l)
        rows[l] = partial_logits + m * stride_m + std::min(first + l, N - 1) * stride_n;
      load_lanes(rows, stride_c, C, end, L * stride_n, tile);
      for (int64_t c = 0; c < C; ++c) is_tame &= tile[c] <= kMostOfTame<A>;
      for (int l = 0; l < L; ++l) {
        A& own = reinterpret_cast<A*>(tile)[label(first + l) * L + l];
        walk.own[m][l] = own;
        own = 0;
      }
    }
    for (int l = 0; l < L; ++l) {
      const int64_t y = label(first + l);
      walk.leaves.labels[l] = static_cast<Bits<A>>(y);
      walk.own_base[l] = bias == nullptr ? A{} : bias[y];
      reinterpret_cast<A*>(walk.base.data())[y * L + l] = in_place_of_label<A>(utility, is_backward);
    }
    walk.leaves.is_tame = !any(~is_tame);
  }

  // Calls function(K) with the number of modalities whose coalitions fit into registers, as a type.
  template <class Function>
  void with_leaves(Function&& function) const {
    switch (M) {
      case 1:
        return function(std::integral_constant<int, 1>{});
      case 2:
        return function(std::integral_constant<int, 2>{});
      default:
        return function(std::integral_constant<int, 3>{});
    }
  }

  // What a block costs, as bytes read from memory in the same time.
  int64_t block_bytes() const {
    const int64_t per_class = utility == kProbability || utility == kLogProbability ? 64 : 8;
    return L * M * C * sizeof(T) + (per_class * C << M);
  }

  void fwd(T* phi, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for((N + L - 1) / L, block_bytes(), num_threads, [&](int64_t begin, int64_t end) {
        Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, false);
        Sums<A> sums;
        V doubt = {};
        const int64_t last = std::min(end * L, N);
        for (int64_t first = begin * L; first < last; first += L) {
          if (first % 1024 == 0 && is_interrupted(1024 / L * C * M)) return;
          load_block(first, false, walk);
          walk.fwd(sums);
          store_lanes(sums.halves, M, rows(first), phi + first * M);
          // Stays 0 unless a value is infinite or NaN, which counts never are.
          for (int m = 0; m < M && utility >= kProbability; ++m) doubt += sums.halves[m] - sums.halves[m];
        }
        if (!any(doubt != 0)) return;
        for (int64_t first = begin * L; first < last; first += L) {
          const T* values = phi + first * M;
          if (std::all_of(values, values + rows(first) * M, [](T x) { return std::isfinite(widen(x)); }))
            continue;
          load_block(first, false, walk);
          walk.fwd_mended(sums);
          store_lanes(sums.halves, M, rows(first), phi + first * M);
        }
      });
    });
  }

  void bwd(const T* dphi, T* dpartial_logits, A* dbias, int64_t num_threads) const {
    with_leaves([&](auto leaf_bits) {
      parallel_for((N + kChunk - 1) / kChunk, 3 * kChunk / L * block_bytes(), num_threads,
                   [&](int64_t begin, int64_t end) {
                     Walk<A, leaf_bits> walk(static_cast<int>(M), C, utility, true);
                     for (int64_t chunk = begin; chunk < end && !is_interrupted(kChunk / L * C * M);
                          ++chunk) {
                       std::fill(walk.root.begin(), walk.root.end(), V{});
                       const int64_t last = std::min(N, (chunk + 1) * kChunk);
                       for (int64_t first = chunk * kChunk; first < last; first += L)
                         bwd_block(first, dphi, dpartial_logits, walk);
                       for (int64_t c = 0; dbias != nullptr && c < C; ++c)
                         dbias[chunk * C + c] = sum_lanes(walk.root[c]);
                     }
                   });
    });
  }

  template <int K>
  void bwd_block(int64_t first, const T* dphi, T* dpartial_logits, Walk<A, K>& walk) const {
    load_block(first, true, walk);
    walk.dphi_sum = V{};
    V largest_sum = {};
    for (int m = 0; m < M; ++m) {
      // Lanes without a sample add nothing to the bias's gradient.
      for (int l = 0; l < L; ++l) walk.dphi[m][l] = first + l < N ? widen(dphi[(first + l) * M + m]) : A{};
      walk.dphi_sum += walk.dphi[m];
      largest_sum += walk.dphi[m] < 0 ? -walk.dphi[m] : walk.dphi[m];
      walk.down[m] = V{};
    }
    walk.is_wild = largest_sum - largest_sum != 0;
    walk.is_any_wild = any(walk.is_wild);
    std::fill(walk.dpartials.begin(), walk.dpartials.end(), V{});
    V root_own = {};
    walk.bwd(0, walk.base.data(), walk.own_base, 0, 0, V{}, walk.root.data(), root_own);
    for (int l = 0; l < L; ++l) {
      const int64_t own = label(first + l) * L + l;
      for (int64_t m = 0; m < M; ++m)
        reinterpret_cast<A*>(walk.dpartials.data() + m * C)[own] += walk.down[m][l];
      reinterpret_cast<A*>(walk.root.data())[own] += root_own[l];
    }
    for (int64_t m = 0; m < M; ++m)
      store_lanes(walk.dpartials.data() + m * C, C, rows(first), dpartial_logits + (m * N + first) * C);
  }

  static A sum_lanes(V x) {
    A sums[L];
    std::memcpy(sums, &x, sizeof x);
    for (int half = L / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    return sums[0];
  }
};

// The rows of a [N, S, C] table, each a coalition of its own.
template <class T>
struct Table {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;

  const T* logits;        // [N, S, C]
  const int64_t* labels;  // [N]
  int64_t N, S, C, stride_n, stride_s, stride_c;
  Utility utility;

  // Calls function(first row, number of rows, leaf, logits, the label's logits) for blocks of L rows.
  template <class Function>
  void for_blocks(bool is_backward, int64_t num_threads, Function&& function) const {
    const T* last = logits + (N - 1) * stride_n + (S - 1) * stride_s + (C - 1) * stride_c + 1;
    const int64_t num_rows = N * S;
    parallel_for((num_rows + L - 1) / L, 2 * L * C * sizeof(A), num_threads, [&](int64_t begin, int64_t end) {
      std::vector<V> z(C);
      Leaves<A, 0> leaf{z.data(), nullptr, C, utility, {}, true};
      for (int64_t first = begin * L; first < std::min(end * L, num_rows); first += L) {
        const T* rows[L];
        for (int l = 0; l < L; ++l) {
          const int64_t row = std::min(first + l, num_rows - 1);
          rows[l] = logits + row / S * stride_n + row % S * stride_s;
          leaf.labels[l] = static_cast<Bits<A>>(labels[row / S]);
        }
        load_lanes(rows, stride_c, C, last, L * stride_s, z.data());
        auto is_tame = ~Vec<Bits<A>>{};
        for (int64_t c = 0; c < C; ++c) is_tame &= z[c] <= kMostOfTame<A>;
        leaf.is_tame = !any(~is_tame);
        V own;
        for (int l = 0; l < L; ++l) {
          A& entry = reinterpret_cast<A*>(z.data())[static_cast<int64_t>(leaf.labels[l]) * L + l];
          own[l] = entry;
          entry = in_place_of_label<A>(utility, is_backward);
        }
        function(first, static_cast<int>(std::min<int64_t>(L, num_rows - first)), leaf, z.data(), own);
      }
    });
  }

  void fwd(T* values, int64_t num_threads) const {
    for_blocks(false, num_threads, [&](int64_t first, int count, const auto& leaf, const V* z, V own) {
      V u;
      leaf.utilities(z, own, &u);
      for (int l = 0; l < count; ++l) {
        const int size = utility == kCardinality ? __builtin_popcountll((first + l) % S) : 1;
        values[first + l] = narrow<T>(u[l] * size);
      }
    });
  }

  void bwd(const T* dvalues, T* dlogits, int64_t num_threads) const {
    for_blocks(true, num_threads, [&](int64_t first, int count, const auto& leaf, V* z, V own) {
      std::vector<V> dz(2 * C);
      V du, down = {};
      for (int l = 0; l < L; ++l) du[l] = widen(dvalues[first + std::min(l, count - 1)]);
      leaf.gradients(z, own, &du, dz.data() + C, dz.data(), &down, nullptr, nullptr);
      for (int l = 0; l < L; ++l)
        reinterpret_cast<A*>(dz.data())[static_cast<int64_t>(leaf.labels[l]) * L + l] += down[l];
      store_lanes(dz.data(), C, count, dlogits + first * C);
    });
  }
};

template <class T>
Table<T> make_table(const Strided<3>& logits, const int64_t* labels, Utility utility) {
  const auto& [N, S, C] = logits.sizes;
  const auto& [stride_n, stride_s, stride_c] = logits.strides;
  return {static_cast<const T*>(logits.data), labels, N, S, C, stride_n, stride_s, stride_c, utility};
}

template <class T>
Shapley<T> make_shapley(const Strided<3>& partial_logits, const int64_t* labels, const void* bias,
                        Utility utility) {
  const auto& [M, N, C] = partial_logits.sizes;
  const auto& [stride_m, stride_n, stride_c] = partial_logits.strides;
  return {static_cast<const T*>(partial_logits.data),
          labels,
          static_cast<const accumulate_t<T>*>(bias),
          M,
          N,
          C,
          stride_m,
          stride_n,
          stride_c,
          utility};
}

// All four refuse labels outside [0, C).
void coalition_utilities_fwd(const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous
                             void* values,              // [N, S] contiguous
                             Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, logits.sizes[0], logits.sizes[2], num_threads);
  dispatch_dtype("coalition_utilities_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    make_table<T>(logits, labels, utility).fwd(static_cast<T*>(values), num_threads);
  });
}

void coalition_utilities_bwd(const void* dvalues,       // [N, S] contiguous
                             const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous
                             void* dlogits,             // [N, S, C] contiguous
                             Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, logits.sizes[0], logits.sizes[2], num_threads);
  dispatch_dtype("coalition_utilities_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto table = make_table<T>(logits, labels, utility);
    table.bwd(static_cast<const T*>(dvalues), static_cast<T*>(dlogits), num_threads);
  });
}

// Sums over parts of the work, which Python adds up.
struct Parts {
  void* sums;     // [count, ...] in the type of accumulation, or null
  int64_t count;  // of those there is memory for
};

// The values of a sample are summed in one part.
int64_t additive_shapley_fwd_plan(int64_t, int64_t, int64_t, Dtype) { return 1; }

struct BackwardPlan {
  int64_t num_parts;  // of the bias's gradient
  int64_t is_wide;    // whether the gradient is written in the type of accumulation, whatever the dtype
};

BackwardPlan additive_shapley_bwd_plan(int64_t, int64_t N, int64_t, Dtype) {
  return {ceil_div(N, kChunk), false};
}

void additive_shapley_fwd(const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous
                          const void* bias,                  // [C] in the type of accumulation, or null
                          void* phi,                         // [N, M] contiguous
                          const Parts&,                      // one: there are no sums of parts
                          Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, partial_logits.sizes[1], partial_logits.sizes[2], num_threads);
  dispatch_dtype("additive_shapley_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    make_shapley<T>(partial_logits, labels, bias, utility).fwd(static_cast<T*>(phi), num_threads);
  });
}

void additive_shapley_bwd(const void* dphi,                  // [N, M] contiguous
                          const Strided<3>& partial_logits,  // [M, N, C]
                          const int64_t* labels,             // [N] contiguous
                          const void* bias,                  // [C] in the type of accumulation, or null
                          void* dpartial_logits,             // [M, N, C] contiguous
                          const Parts& dbias,                // [num_parts, C] of additive_shapley_bwd_plan
                          Utility utility, Dtype dtype, int64_t num_threads) {
  check_labels(labels, partial_logits.sizes[1], partial_logits.sizes[2], num_threads);
  dispatch_dtype("additive_shapley_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto shapley = make_shapley<T>(partial_logits, labels, bias, utility);
    shapley.bwd(static_cast<const T*>(dphi), static_cast<T*>(dpartial_logits),
                static_cast<accumulate_t<T>*>(dbias.sums), num_threads);
  });
}

MMFAST_REGISTER(additive_shapley_fwd_plan)
MMFAST_REGISTER(additive_shapley_bwd_plan)
MMFAST_REGISTER(coalition_utilities_fwd)
MMFAST_REGISTER(coalition_utilities_bwd)
MMFAST_REGISTER(additive_shapley_fwd)
MMFAST_REGISTER(additive_shapley_bwd)

}  // namespace
}  // namespace mmfast

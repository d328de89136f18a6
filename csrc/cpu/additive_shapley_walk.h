// The coalitions of a block of samples, one in each SIMD lane, walked depth first, modality 0 decided first.
//
// A level's logits are those of the level above, or those plus one partial, so that a coalition costs one
// addition a class as in Gray-code order; of exponentials they are products. Nothing is ever subtracted: no
// rounding accumulates, every z_s is the sum in order of m, to the last bit, and -inf survives. The last
// levels, the leaves, are up to eight coalitions in registers. Going up again, utilities fold into Shapley
// values, and gradients add up.
#pragma once

#include <vector>

#include "additive_shapley_products.h"
#include "shapley_weights.h"

namespace mmfast {
namespace {

// Utilities weighted and summed below a node of the walk: phi_m = halves[m] - shared at its dbase.
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
  ShapleyWeights<A> weights;
  std::vector<V> base, partials, levels, dpartials, dlevels, dbase, dbias, exponentials;
  std::vector<V> base_exponentials;  // [C], of the bias less its largest entry
  V label_base, label_partials[kMaxPlayers], dlabel_base, dlabel_partials[kMaxPlayers], dphi[kMaxPlayers],
      dphi_sum, origin = {};
  Vec<Int<A>> has_unbounded_dphi;  // backward: lanes whose dphi are infinite or may overflow in sums
  bool any_unbounded_dphi;
  const bool is_backward;
  Leaves<A, K> leaves;
  Products<A, K> products;
  bool by_products = false;     // bases, partials and the label's are exponentials, and the walk multiplies
  V* formula_values = nullptr;  // [M] where `add_by_formula` adds, if it is to

  Walk(int M, int64_t C, Utility utility, bool is_backward)
      : M(M), depth(M - K), C(C), weights(M, utility == kCardinality), is_backward(is_backward) {
    if (is_backward) dbias.resize(C);
    leaves.utility = utility;
  }

  // Takes the memory for a walk, which blocks that need none (additive_shapley_few.h) do without.
  void prepare() {
    if (!partials.empty()) return;
    const auto utility = leaves.utility;
    base.resize(C), partials.resize(M * C), levels.resize(depth * C);
    if (is_backward) {
      dpartials.resize(M * C), dlevels.resize(depth * C), dbase.resize(C);
      if (utility != kMargin) exponentials.resize(C * J);
    }
    leaves = {partials.data() + depth * C, label_partials + depth, C, utility, leaves.labels, true};
    products = {partials.data() + depth * C, label_partials + depth, C, utility};
  }

  Vec<Int<A>> is_label(int64_t c) const { return leaves.labels == static_cast<Int<A>>(c); }

  void set_base(const A* bias) {  // [C] or null
    if (!base_exponentials.empty()) return;
    const A max = bias == nullptr ? A{} : *std::max_element(bias, bias + C);
    base_exponentials.resize(C);
    for (int64_t c = 0; c < C; ++c)
      base_exponentials[c] = exp_nonpositive<A>(V{} + (bias == nullptr ? A{} : bias[c] - max));
  }

  void descend(int level, const V* z, V* next) const {
    const V* partial = partials.data() + level * C;
    if (by_products) {
      for (int64_t c = 0; c < C; ++c) next[c] = z[c] * partial[c];
    } else {
      for (int64_t c = 0; c < C; ++c) next[c] = z[c] + partial[c];
    }
  }

  V label_with(int level, V z_label) const {
    return by_products ? z_label * label_partials[level] : z_label + label_partials[level];
  }

  // Weighs and sums the utilities u of a leaf's coalitions, of `size` modalities decided before.
  __attribute__((always_inline)) void add_up(V* u, int size, Sums<A>& out) {
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
      out.shared += weights.b[players] * u[j];
      u[j] *= weights.a[players];
    }
    Leaves<A, K>::fold(u, out.halves + depth);
    out.total = u[0];
  }

  // `coalition`, of `size` modalities, is what is decided so far.
  void fwd(int level, const V* z, V z_label, unsigned coalition, int size, Sums<A>& out) {
    if (level == depth) {
      V u[J];
      if (by_products) {
        // Into memory, for what a function is given the address of does not stay in registers.
        V found[J];
        products.utilities(z, z_label, found);
        std::copy_n(found, J, u);
      } else {
        leaves.utilities(z, z_label, u);
      }
      if (__builtin_expect(formula_values != nullptr, 0)) {
        // A copy, for what a function is given the address of does not stay in registers.
        V given[J];
        std::copy_n(u, J, given);
        add_by_formula(coalition, given);
      }
      add_up(u, size, out);
      return;
    }
    if (is_interrupted(2 * J * C)) return;
    fwd(level + 1, z, z_label, coalition, size, out);
    V* next = levels.data() + level * C;
    descend(level, z, next);
    Sums<A> with;
    fwd(level + 1, next, label_with(level, z_label), coalition | 1u << level, size + 1, with);
    out.total += with.total;
    out.shared += with.shared;
    out.halves[level] = with.total;
    for (int m = level + 1; m < M; ++m) out.halves[m] += with.halves[m];
  }

  // Adds to `formula_values` half of what a leaf's coalitions are worth to each modality, by the formula
  // itself: right for infinite utilities and for sums that overflow though values do not.
  __attribute__((noinline, cold)) void add_by_formula(unsigned coalition, const V* u) const {
    for (unsigned j = 0; j < J; ++j) {
      const unsigned s = coalition | j << depth;
      const int players = __builtin_popcount(s);
      for (int m = 0; m < M; ++m)
        formula_values[m] +=
            s >> m & 1 ? weights.b[players - 1] * (A(0.5) * u[j]) : -weights.b[players] * (A(0.5) * u[j]);
    }
  }

  // The values of a block, in sums.halves. Never inlined: one copy of the walk, which is in the two places
  // that call this, would be slower by a tenth.
  __attribute__((noinline)) void fwd(Sums<A>& sums) {
    fwd(0, base.data(), label_base, 0, 0, sums);
    for (int m = 0; m < M; ++m) sums.halves[m] -= sums.shared;
  }

  // The same once more, those that are infinite or NaN by the formula.
  void fwd_by_formula(Sums<A>& sums) {
    V values[kMaxPlayers] = {};
    formula_values = values;
    fwd(sums);
    formula_values = nullptr;
    for (int m = 0; m < M; ++m) {
      auto& value = sums.halves[m];
      value = value - value == 0 ? value : 2 * values[m];
    }
  }

  // The gradients du of a leaf's utilities by the formula itself, in lanes of unbounded dphi.
  __attribute__((noinline, cold)) void utility_gradients_by_formula(unsigned coalition, V* du) const {
    for (unsigned j = 0; j < J; ++j) {
      const unsigned s = coalition | j << depth;
      const int players = __builtin_popcount(s);
      V sum = {};
      for (int m = 0; m < M; ++m)
        sum += s >> m & 1 ? weights.b[players - 1] * dphi[m] : -weights.b[players] * dphi[m];
      du[j] = has_unbounded_dphi ? sum : du[j];
    }
  }

  // The gradients of a block.
  void bwd() {
    std::fill(dpartials.begin(), dpartials.end(), V{});
    std::fill(dbase.begin(), dbase.end(), V{});
    std::fill_n(dlabel_partials, M, V{});
    dlabel_base = V{};
    bwd(0, base.data(), label_base, 0, 0, V{}, dbase.data(), dlabel_base);
  }

  // The gradients du of the utilities of a leaf's coalitions; `dphi_here` is the sum of dphi over the `size`
  // modalities present in all of them.
  __attribute__((always_inline)) void utility_gradients(int size, V dphi_here, V* du) const {
    Leaves<A, K>::subset_sums(dphi_here, dphi + depth, 1, du);
    MMFAST_UNROLL
    for (int j = 0; j < J; ++j) {
      const int players = size + __builtin_popcount(j);
      du[j] = weights.a[players] * du[j] - weights.b[players] * dphi_sum;
    }
  }

  // Adds to dz the gradient with respect to z; `dphi_here` is the sum of dphi over the modalities present.
  void bwd(int level, const V* z, V z_label, unsigned coalition, int size, V dphi_here, V* dz, V& dz_label) {
    if (level == depth) {
      V du[J];
      utility_gradients(size, dphi_here, du);
      if (__builtin_expect(any_unbounded_dphi, 0)) {
        V du_copy[J];
        std::copy_n(du, J, du_copy);
        utility_gradients_by_formula(coalition, du_copy);
        std::copy_n(du_copy, J, du);
      }
      if (by_products) {
        V given[J];
        std::copy_n(du, J, given);
        return products.gradients(z, z_label, given, dz, &dz_label, dpartials.data() + depth * C,
                                  dlabel_partials + depth);
      }
      leaves.gradients(z, z_label, du, exponentials.data(), dz, &dz_label, dpartials.data() + depth * C,
                       dlabel_partials + depth);
      return;
    }
    if (is_interrupted(4 * J * C)) return;
    bwd(level + 1, z, z_label, coalition, size, dphi_here, dz, dz_label);
    V *next = levels.data() + level * C, *dnext = dlevels.data() + level * C;
    V dnext_label = {};
    descend(level, z, next);
    std::fill_n(dnext, C, V{});
    bwd(level + 1, next, label_with(level, z_label), coalition | 1u << level, size + 1,
        dphi_here + dphi[level], dnext, dnext_label);
    for (int64_t c = 0; c < C; ++c) {
      dpartials[level * C + c] += dnext[c];
      dz[c] += dnext[c];
    }
    dlabel_partials[level] += dnext_label;
    dz_label += dnext_label;
  }
};

}  // namespace
}  // namespace mmfast

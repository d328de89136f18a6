// The dimension-decoupled unidirectional contrastive loss: loss and gradient of every ordered pair (m, n) in
// one sweep over the keys.
//
//   s_ij = q_i . k_j / temperature,  loss_i = log sum_j exp(s_ij) - s_ii
//   residual_i = sum_j p_ij k_j - k_i,  p = softmax(s)
//
// contrast_sweep.h shares the work out. In pairs of bfloat16 all weights are rounded but the largest so far,
// exp(0) = 1, so the residual of a sample that is all but learnt keeps its digits.
//
// Floor: 4 N K d operations a pair over the rate of FMA. Measured: bench/results/duc_loss.md.
#include <algorithm>
#include <cmath>
#include <limits>

#include "contrast_sweep.h"
#include "duc_loss_operands.h"
#include "vec_math.h"

namespace mmfast {
namespace {

struct NoOptions {};

// An online softmax, as in flash attention.
template <class A, int nv, bool pairs>
struct SoftmaxTile : QueryTile<A, nv, pairs, 3> {
  using Base = QueryTile<A, nv, pairs, 3>;
  using Base::kPack, Base::L, Base::product, Base::W;
  using typename Base::V;
  using Options = NoOptions;
  A* top;       // [W], the largest score so far
  A* sum;       // [W], sum_j exp(s_ij - top_i) so far; the products are with exp(s_ij - top_i), too
  A* positive;  // [W], s_ii, the score of the positive key

  SoftmaxTile(A* memory, int64_t padded_dims)
      : Base(memory, padded_dims), top(Base::states), sum(top + W), positive(sum + W) {}

  void start() const {
    // Not -infinity: as long as all scores are, their difference from it would be NaN.
    std::fill_n(top, W, std::numeric_limits<A>::lowest());
    std::fill_n(sum, 2 * W, A{0});
  }

  // From scores to weights, for keys of which the first is query 0's own less `shift`.
  void weigh(A* p, int64_t shift, int64_t num_keys, int64_t count, const Options&, V (&decay)[nv]) const {
    take_positives(p, shift, num_keys, count);
    update_softmax(p, num_keys, decay);
  }

  // Keeps the scores of the positive keys: query i of `count` has key i + shift of this tile's.
  void take_positives(const A* p, int64_t shift, int64_t num_keys, int64_t count) const {
    for (int64_t i = std::max<int64_t>(0, -shift); i < std::min(count, num_keys - shift); ++i)
      positive[i] = p[(shift + i) * W + i];
  }

  // From scores to exp(s_ij - top_i) in place, tops and sums brought up to date; `decay` is what all sums so
  // far are multiplied by.
  void update_softmax(A* p, int64_t num_keys, V (&decay)[nv]) const {
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) {
      A* column = p + v * L;
      const V last = load(top + v * L);
      V highest = last, total = {};
      for (int64_t j = 0; j < num_keys; ++j) {
        const V score = load(column + j * W);
        highest = score > highest ? score : highest;
      }
#pragma GCC unroll 2
      for (int64_t j = 0; j < num_keys; j += kPack) {
        const V weight = exp_nonpositive<A>(load(column + j * W) - highest);
        total += weight;
        if constexpr (pairs) {
          V second = {};
          if (j + 1 < num_keys) second = exp_nonpositive<A>(load(column + (j + 1) * W) - highest);
          total += second;
          store(column + j / 2 * W, pair_up(weight, second));
        } else {
          store(column + j * W, weight);
        }
      }
      decay[v] = exp_nonpositive<A>(last - highest);
      store(top + v * L, highest);
      store(sum + v * L, load(sum + v * L) * decay[v] + total);
    }
  }

  void store_sums(int64_t, const Options&, int64_t) const {}

  // The loss of query i. The difference first: where scores are large, a logarithm added to one of them would
  // be lost.
  A loss(int64_t i) const { return std::log(sum[i]) + (top[i] - positive[i]); }

  // Adds the residual of query i, whose positive key is given, to its row [D].
  template <class T>
  void add_residual(const std::vector<int64_t>& dims, int64_t i, const T* key, int64_t stride_dim,
                    A* row) const {
    const A inverse = 1 / sum[i];
    for (size_t c = 0; c < dims.size(); ++c)
      row[dims[c]] += product[c * W + i] * inverse - widen(key[dims[c] * stride_dim]);
  }
};

template <class T, bool pairs>
void run_op(const int64_t* views, const uint8_t* effective, void* loss, void* residual,
            int64_t num_modalities, int64_t num_samples, int64_t num_keys, int64_t num_dims,
            double temperature, int64_t offset, Reduction reduction, int64_t num_threads) {
  using A = accumulate_t<T>;
  ContrastSweep<T, pairs, SoftmaxTile> op;
  op.num_samples = num_samples, op.num_keys = num_keys, op.num_dims = num_dims, op.offset = offset;
  op.scale = static_cast<A>(1 / temperature);
  op.residual = static_cast<residual_t<T>*>(residual);
  for (int64_t m = 0; m < num_modalities; ++m) {
    const int64_t* view = views + 6 * m;
    op.queries.push_back({reinterpret_cast<const T*>(view[0]), view[1], view[2]});
    op.keys.push_back({reinterpret_cast<const T*>(view[3]), view[4], view[5]});
    for (int64_t n = 0; n < num_modalities; ++n) {
      ModalityPair<A> pair{m, n, {}, 0, nullptr};
      for (int64_t c = 0; c < num_dims; ++c) {
        if (effective == nullptr || (effective[m * num_dims + c] && !effective[n * num_dims + c]))
          pair.dims.push_back(c);
      }
      pair.padded_dims = round_up(pair.num_dims(), kPanelPart);
      if (pair.num_dims() > 0) op.modality_pairs.push_back(std::move(pair));
    }
  }
  reduce(op.run(num_threads), num_modalities, num_samples, reduction, static_cast<A*>(loss));
}

void duc_loss_fwd(const DucOperands& operands, const DucResults& out, double temperature, int64_t offset,
                  Reduction reduction, Dtype dtype, int64_t num_threads) {
  dispatch_sweep("duc_loss", dtype, [&](auto* type, auto pairs) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_op<T, decltype(pairs)::value>(operands.views, static_cast<const uint8_t*>(operands.effective),
                                      out.loss, out.residuals, operands.num_modalities, operands.num_samples,
                                      operands.num_keys, operands.num_dims, temperature, offset, reduction,
                                      num_threads);
  });
}

MMFAST_REGISTER(duc_loss_fwd)

}  // namespace
}  // namespace mmfast

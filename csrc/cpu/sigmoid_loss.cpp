// SigLIP's pairwise sigmoid loss with constant keys: loss and all gradients in one sweep over the keys.
//
//   s_ij = q_i . k_j / temperature + bias,  t_ij = s_ij, but -s_ii of the own key
//   loss_i = sum_j log(1 + exp(t_ij)),  g_ij = sigmoid(t_ij), but -sigmoid(t_ii)
//   residual_i = sum_j g_ij k_j,  sums_i = sum_j g_ij and sum_j g_ij q_i . k_j / temperature
//
// With e = exp(-|t|), log(1 + exp(t)) = max(t, 0) + log(1 + e): of a tile's keys the factors 1 + e are
// multiplied, as their product less 1, which keeps the digits of small e as a sum would, and one logarithm is
// taken of up to 96. contrast_sweep.h shares the work out.
//
// Floor: 4 N K d operations over the rate of FMA, N K exponentials. Measured: bench/results/sigmoid_loss.md.
#include <algorithm>
#include <cmath>
#include <limits>

#include "contrast_sweep.h"
#include "vec_math.h"

namespace mmfast {
namespace {

// ln(1 + x) for x >= 0 whose sum with 1 is finite: what rounding 1 + x lost is put back. NaN for NaN.
template <class A>
inline Vec<A> log_of_one_and(Vec<A> x) {
  const Vec<A> sum = 1 + x;
  return log_positive<A>(sum) + (x - (sum - 1)) / sum;
}

template <class A>
struct SigmoidOptions {
  A bias;
  A* sums;  // [2, num_samples]
  int64_t num_samples;
};

template <class A, int nv, bool pairs>
struct SigmoidTile : QueryTile<A, nv, pairs, 4> {
  using Base = QueryTile<A, nv, pairs, 4>;
  using Base::kPack, Base::L, Base::product, Base::W;
  using typename Base::V;
  // The product of so many factors of up to 2 is finite in float.
  static_assert(kKeys <= 120);
  using Options = SigmoidOptions<A>;
  A* losses;   // [W], of the keys so far, as all that follows
  A* weights;  // [W], sum_j g_ij
  A* heated;   // [W], sum_j g_ij (s_ij - bias)
  A* lost;     // [W], what rounding the own key's weight lost

  SigmoidTile(A* memory, int64_t padded_dims)
      : Base(memory, padded_dims),
        losses(Base::states),
        weights(losses + W),
        heated(weights + W),
        lost(heated + W) {}

  void start() const { std::fill_n(losses, 4 * W, A{0}); }

  // From scores without the bias to weights, for keys of which the first is query 0's own less `shift`.
  void weigh(A* p, int64_t shift, int64_t num_keys, int64_t count, const Options& options,
             V (&decay)[nv]) const {
    // Own keys are taken out of the vectors, where so low a score weighs nothing, and then one by one.
    const int64_t from = std::max<int64_t>(0, -shift), end = std::min(count, num_keys - shift);
    A own[W];
    for (int64_t i = from; i < end; ++i) {
      A& score = p[(shift + i) * W + i];
      own[i] = score, score = std::numeric_limits<A>::lowest();
    }
#pragma GCC unroll 2
    for (int v = 0; v < nv; ++v) {
      decay[v] = V{} + 1;
      weigh_column(p + v * L, num_keys, options.bias, v * L);
    }
    for (int64_t i = from; i < end; ++i) p[place(shift + i, i)] = weigh_own(own[i], shift + i, i, p, options);
  }

  A loss(int64_t i) const { return losses[i]; }

  void store_sums(int64_t i, const Options& options, int64_t sample) const {
    options.sums[sample] = weights[i], options.sums[options.num_samples + sample] = heated[i];
  }

  // Adds the residual of query i, whose own key is given, to its row [D].
  template <class T>
  void add_residual(const std::vector<int64_t>& dims, int64_t i, const T* key, int64_t stride_dim,
                    A* row) const {
    for (size_t c = 0; c < dims.size(); ++c) {
      A total = product[c * W + i];
      if constexpr (pairs) {
        // A NaN's bits may have become a number's where they were rounded; the sum of weights is NaN then.
        total += weights[i] - weights[i];
        const A k = widen(key[dims[c] * stride_dim]);
        if (std::isfinite(k)) total += lost[i] * k;
      }
      row[dims[c]] += total;
    }
  }

 private:
  static int64_t place(int64_t key, int64_t i) { return key / kPack * W + i; }

  // One vector of queries.
  void weigh_column(A* column, int64_t num_keys, A bias, int first) const {
    V linear = {}, factors = {}, weight_sum = {}, heated_sum = {};
    const auto weigh_one = [&](V score) __attribute__((always_inline)) {
      const V t = score + bias;
      const V e = exp_nonpositive<A>(from_bits<A>(bits_of<A>(t) | std::numeric_limits<Int<A>>::min()));
      const V inverse = 1 / (1 + e), weight = t > 0 ? inverse : e * inverse;
      linear += t > 0 ? t : V{};
      // (1 + factors) (1 + e) - 1
      factors = factors * e + (factors + e);
      weight_sum += weight;
      heated_sum += weight * score;
      return weight;
    };
    for (int64_t j = 0; j < num_keys; j += kPack) {
      const V weight = weigh_one(load(column + j * W));
      if constexpr (pairs) {
        V second = {};
        if (j + 1 < num_keys) second = weigh_one(load(column + (j + 1) * W));
        store(column + j / 2 * W, pair_up(weight, second));
      } else {
        store(column + j * W, weight);
      }
    }
    const auto add = [&](A* sums, V x) { store(sums + first, load(sums + first) + x); };
    add(losses, linear + log_of_one_and<A>(factors));
    add(weights, weight_sum);
    add(heated, heated_sum);
  }

  // The own key of query i, key `key` of the tile: returns what is to stand in its place among the weights.
  A weigh_own(A score, int64_t key, int64_t i, const A* p, const Options& options) const {
    const A t = -(score + options.bias), e = std::exp(-std::abs(t));
    const A weight = -(t > 0 ? 1 : e) / (1 + e);
    losses[i] += (t > 0 ? t : 0) + std::log1p(e);
    weights[i] += weight;
    heated[i] += weight * score;
    if constexpr (pairs) {
      const bfloat16 rounded = narrow<bfloat16>(weight);
      lost[i] = weight - widen(rounded);
      // The other half is another key's.
      uint32_t bits;
      std::memcpy(&bits, p + place(key, i), sizeof bits);
      return float_of(key % 2 == 0 ? (bits & 0xffff0000) | rounded.bits
                                   : (bits & 0xffff) | uint32_t{rounded.bits} << 16);
    } else {
      return weight;
    }
  }
};

template <class T, bool pairs>
void run_op(const Strided<2>& query, const Strided<2>& key, void* loss, void* residual, void* sums,
            double temperature, double bias, int64_t offset, Reduction reduction, int64_t num_threads) {
  using A = accumulate_t<T>;
  ContrastSweep<T, pairs, SigmoidTile> op;
  op.num_samples = query.sizes[0], op.num_keys = key.sizes[0], op.num_dims = query.sizes[1];
  op.offset = offset, op.scale = static_cast<A>(1 / temperature);
  op.residual = static_cast<residual_t<T>*>(residual);
  op.options = {static_cast<A>(bias), static_cast<A*>(sums), op.num_samples};
  op.queries.push_back({static_cast<const T*>(query.data), query.strides[0], query.strides[1]});
  op.keys.push_back({static_cast<const T*>(key.data), key.strides[0], key.strides[1]});
  ModalityPair<A> pair{0, 0, std::vector<int64_t>(op.num_dims), round_up(op.num_dims, kPanelPart), nullptr};
  for (int64_t c = 0; c < op.num_dims; ++c) pair.dims[c] = c;
  op.modality_pairs.push_back(std::move(pair));
  reduce(op.run(num_threads), 1, op.num_samples, reduction, static_cast<A*>(loss));
}

void sigmoid_loss_fwd(const Strided<2>& query,  // [N, D], D at least 1
                      const Strided<2>& key,    // [K, D]
                      void* loss,               // [] or [N]
                      void* residual,           // [N, D], of float16 in float32; nullptr: not wanted
                      void* sums,               // [2, N]
                      double temperature, double bias, int64_t offset, Reduction reduction, Dtype dtype,
                      int64_t num_threads) {
  dispatch_sweep("sigmoid_loss", dtype, [&](auto* type, auto pairs) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_op<T, decltype(pairs)::value>(query, key, loss, residual, sums, temperature, bias, offset, reduction,
                                      num_threads);
  });
}

MMFAST_REGISTER(sigmoid_loss_fwd)

}  // namespace
}  // namespace mmfast

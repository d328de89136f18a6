// Sums of unimodal logits weighted by the softmax, over modalities, of how sure each is of a sample.
//
//   entropy    score_m = sum_c p_c ln p_c    = t / s - ln s     e_c = exp(z_c - max z), s = sum_c e_c
//   certainty  score_m = max_c p_c / T       = 1 / (s T)        t = sum_c e_c (z_c - max z)
//   w = softmax_m(score),  fused = sum_m w_m z^m
//
// Blocks of kLanes samples, as rows (logit_fusion_rows.h) or, where those are short, as columns
// (logit_fusion_lanes.h); a few blocks at a time, so that the long chain from sums to weights is not waited
// for.
//
// Floors: (M + 1) C + M elements a sample over the bandwidth of memory; M C exponentials, those of backward
// once more. Measured: bench/results/logit_fusion.md.
#include "integers.h"
#include "logit_fusion_lanes.h"
#include "logit_fusion_rows.h"

namespace mmfast {
namespace {

template <class T>
Fusion<T> make_fusion(const Strided<3>& logits, const uint8_t* present, Score score, double temperature) {
  const auto& [M, N, C] = logits.sizes;
  const auto& [stride_m, stride_n, stride_c] = logits.strides;
  return {static_cast<const T*>(logits.data),       present, M, N, C, stride_m, stride_n, stride_c, score,
          static_cast<accumulate_t<T>>(temperature)};
}

// A few blocks at a time, so that nobody waits for the long chain from sums to weights.
template <class T, class Blocks>
struct Batch {
  using V = Vec<accumulate_t<T>>;
  static constexpr int64_t L = kLanes<accumulate_t<T>>;

  const Fusion<T>& f;
  const int64_t M = f.M;
  Blocks blocks;
  std::vector<V> weights, sums, means, products;  // [blocks, M]; means are t / s

  Batch(const Fusion<T>& fusion, int64_t size, bool is_backward)
      : f(fusion), blocks(fusion, size, is_backward), weights(size * M), sums(size * M), means(size * M) {
    if (is_backward) products.resize(size * M);
  }

  // Calls function(batch, first block, number of blocks) until all samples are done.
  template <class Function>
  static void for_all(const Fusion<T>& f, bool is_backward, int64_t num_threads, Function&& function) {
    constexpr int64_t kMost = 8, kCacheBytes = 24 << 10;
    const int64_t bytes = (f.M + 1) * f.C * sizeof(V),
                  size = std::clamp<int64_t>(kCacheBytes / bytes, 1, kMost);
    parallel_for(ceil_div(f.N, L), bytes, num_threads, [&](int64_t begin, int64_t end) {
      Batch batch(f, size, is_backward);
      for (int64_t block = begin; block < end; block += size)
        function(batch, block, std::min(size, end - block));
    });
  }

  void weigh(int64_t block, int64_t count) {
    for (int64_t g = 0; g < count; ++g) f.weigh(weights.data() + g * M, (block + g) * L);
  }

  void fwd(int64_t block, int64_t count, T* fused, T* stored_weights) {
    blocks.write_to(fused);
    for (int64_t g = 0; g < count; ++g) {
      for (int64_t m = 0; m < M; ++m) {
        V s, t;
        blocks.sums(g, m, (block + g) * L, s, t);
        sums[g * M + m] = s, means[g * M + m] = t / s;
      }
    }
    for (int64_t i = 0; i < count * M; ++i) weights[i] = f.score_of(sums[i], means[i]);
    weigh(block, count);
    for (int64_t g = 0; g < count; ++g) {
      f.store_weights(weights.data() + g * M, (block + g) * L, stored_weights);
      blocks.fuse(g, (block + g) * L, weights.data() + g * M);
    }
  }

  void bwd(int64_t block, int64_t count, const T* dfused, const T* dweights, T* dlogits) {
    blocks.write_to(dlogits);
    for (int64_t g = 0; g < count; ++g) {
      blocks.load_gradient(g, (block + g) * L, dfused);
      for (int64_t m = 0; m < M; ++m) {
        V s, t, product;
        blocks.sums_and_product(g, m, (block + g) * L, s, t, product);
        sums[g * M + m] = s, means[g * M + m] = t / s, products[g * M + m] = product;
      }
    }
    for (int64_t i = 0; i < count * M; ++i) weights[i] = f.score_of(sums[i], means[i]);
    weigh(block, count);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t first = (block + g) * L;
      const V *w = weights.data() + g * M, *s = sums.data() + g * M;
      V *dweight = products.data() + g * M, mean = {};
      for (int64_t m = 0; m < M; ++m) {
        dweight[m] += f.load_samples(dweights + m * f.N, first);
        mean += w[m] * dweight[m];
      }
      for (int64_t m = 0; m < M; ++m) {
        // Weighted before they are subtracted: the difference itself may lie beyond the dtype.
        const V dscore = (w[m] * dweight[m] - w[m] * mean) / f.temperature / s[m];
        blocks.gradients(g, m, first, w[m], dscore, s[m], means[g * M + m]);
      }
    }
  }
};

// Calls function(Batch) with the layout that is the quicker for the logits, as a type.
template <class T, class Function>
void with_layout(const Fusion<T>& f, Function&& function) {
  if (f.stride_c == 1 && f.C >= 4 * kLanes<accumulate_t<T>>) {
    function(static_cast<Batch<T, RowBlocks<T>>*>(nullptr));
  } else {
    function(static_cast<Batch<T, LaneBlocks<T>>*>(nullptr));
  }
}

void logit_fusion_fwd(const Strided<3>& logits,  // [M, N, C]
                      const uint8_t* present,    // [M, N] contiguous, or null
                      void* fused,               // [N, C] contiguous
                      void* weights,             // [M, N] contiguous
                      Score score, double temperature, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("logit_fusion_fwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto fusion = make_fusion<T>(logits, present, score, temperature);
    with_layout(fusion, [&](auto* layout) {
      using Blocks = std::remove_pointer_t<decltype(layout)>;
      Blocks::for_all(fusion, false, num_threads, [&](auto& batch, int64_t block, int64_t count) {
        batch.fwd(block, count, static_cast<T*>(fused), static_cast<T*>(weights));
      });
    });
  });
}

void logit_fusion_bwd(const void* dfused,        // [N, C] contiguous
                      const void* dweights,      // [M, N] contiguous
                      const Strided<3>& logits,  // [M, N, C]
                      const uint8_t* present,    // [M, N] contiguous, or null
                      void* dlogits,             // [M, N, C] contiguous
                      Score score, double temperature, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("logit_fusion_bwd", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto fusion = make_fusion<T>(logits, present, score, temperature);
    with_layout(fusion, [&](auto* layout) {
      using Blocks = std::remove_pointer_t<decltype(layout)>;
      Blocks::for_all(fusion, true, num_threads, [&](auto& batch, int64_t block, int64_t count) {
        batch.bwd(block, count, static_cast<const T*>(dfused), static_cast<const T*>(dweights),
                  static_cast<T*>(dlogits));
      });
    });
  });
}

MMFAST_REGISTER(logit_fusion_fwd)
MMFAST_REGISTER(logit_fusion_bwd)

}  // namespace
}  // namespace mmfast

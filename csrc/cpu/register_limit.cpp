// What this processor reaches while nothing comes from memory: the bounds that benchmarks hold kernels
// against.
//
// Each function does so many rounds on each thread and returns how many numbers, or operations, those were:
// who calls it takes the time. The exponential and the logarithm are the kernels' own (vec_math.h), of
// float16 and bfloat16 with the conversion from that and back.
#include "gemm_tile.h"
#include "vec_math.h"

namespace mmfast {
namespace {

// A value the compiler knows nothing of, in a register.
template <class V>
__attribute__((always_inline)) inline void hide(V& x) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 8) {
    // As a number: clang has no register for a vector of eight bytes.
    double held;
    __builtin_memcpy(&held, &x, 8);
    asm volatile("" : "+v"(held));
    __builtin_memcpy(&x, &held, 8);
  } else {
    asm volatile("" : "+v"(x));
  }
#elif defined(__aarch64__)
  asm volatile("" : "+w"(x));
#else
  asm volatile("" : "+m"(x));
#endif
}

// Independent values, enough to fill the pipes while each waits for its own instructions.
constexpr int kChains = MMFAST_ISA == 2 ? 24 : 12, kValues = 4;

template <class Function>
void on_threads(int64_t num_threads, Function&& function) {
  parallel_for(num_threads, int64_t{1} << 40, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function();
  });
}

// In the range of a softmax's logits: all of [-16, -1].
template <class T, class Function>
int64_t count_values(int64_t rounds, int64_t num_threads, Function&& function) {
  using A = accumulate_t<T>;
  on_threads(num_threads, [&] {
    for (int64_t round = 0; round < rounds; ++round) {
      if (is_interrupted(64 * kValues)) return;
#pragma GCC unroll 4
      for (int i = 0; i < kValues; ++i) {
        auto packed = narrow<T>(Vec<A>{} + A(1 + i));
        hide(packed.bits);
        packed = narrow<T>(function(widen(packed)));
        hide(packed.bits);
      }
    }
  });
  return rounds * num_threads * kValues * kLanes<A>;
}

int64_t register_limit_exponential(Dtype dtype, int64_t rounds, int64_t num_threads) {
  int64_t count = 0;
  dispatch_dtype("register_limit_exponential", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    count = count_values<T>(rounds, num_threads, [](Vec<A> x) { return exp_nonpositive<A>(-x); });
  });
  return count;
}

int64_t register_limit_logarithm(Dtype dtype, int64_t rounds, int64_t num_threads) {
  int64_t count = 0;
  dispatch_dtype("register_limit_logarithm", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    count = count_values<T>(rounds, num_threads, [](Vec<A> x) { return log_positive<A>(x); });
  });
  return count;
}

// sum = sum * factor + factor in every lane, a product of each sum's own, or the compiler makes one for all;
// where `pairs` is true sum += factor * factor of pairs of bfloat16.
template <bool pairs, class V>
__attribute__((always_inline)) inline void multiply_add(V& sum, V factor) {
  if constexpr (!pairs) {
    sum = sum * factor + factor;
  } else {
#if MMFAST_ISA == 2
    asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(factor));
#endif
  }
}

template <class A, bool pairs>
void multiply_add_rounds(int64_t rounds, int64_t num_threads) {
  on_threads(num_threads, [&] {
    Vec<A> sums[kChains] = {}, factor = Vec<A>{} + A(0.5);
#pragma GCC unroll 24
    for (Vec<A>& sum : sums) hide(sum);
    for (int64_t round = 0; round < rounds; ++round) {
      if (is_interrupted(kChains)) return;
      hide(factor);
#pragma GCC unroll 24
      for (Vec<A>& sum : sums) multiply_add<pairs>(sum, factor);
    }
#pragma GCC unroll 24
    for (Vec<A>& sum : sums) hide(sum);
  });
}

// Two operations a multiply-add. Of half precision they are made in float32, but for bfloat16 where the
// processor has its dot products.
int64_t register_limit_multiply_add(Dtype dtype, int64_t rounds, int64_t num_threads) {
  int64_t count = 0;
  dispatch_dtype("register_limit_multiply_add", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    count = rounds * num_threads * kChains * kLanes<A> * 2;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (has_bfloat16_pairs()) {
        multiply_add_rounds<A, true>(rounds, num_threads);
        count *= 2;
        return;
      }
    }
    multiply_add_rounds<A, false>(rounds, num_threads);
  });
  return count;
}

MMFAST_REGISTER(register_limit_exponential)
MMFAST_REGISTER(register_limit_logarithm)
MMFAST_REGISTER(register_limit_multiply_add)

}  // namespace
}  // namespace mmfast

// Functions of whole vectors that compilers do not vectorise: maximum, exponential, logarithm.
#pragma once

#include <limits>

#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

template <class A>
inline Vec<Int<A>> bits_of(Vec<A> x) {
  return reinterpret_cast<Vec<Int<A>>>(x);
}
template <class A>
inline Vec<A> from_bits(Vec<Int<A>> bits) {
  return reinterpret_cast<Vec<A>>(bits);
}

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// a > b ? a : b, so b where either is NaN; GCC 12 makes two instructions of that for AVX-512.
template <class A>
inline Vec<A> larger(Vec<A> a, Vec<A> b) {
#if MMFAST_ISA == 2
  if constexpr (std::is_same_v<A, double>) {
    return reinterpret_cast<Vec<A>>(
        _mm512_max_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
  } else {
    return reinterpret_cast<Vec<A>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  }
#else
  return a > b ? a : b;
#endif
}

// a < b ? a : b, so b where either is NaN.
template <class A>
inline Vec<A> smaller(Vec<A> a, Vec<A> b) {
#if MMFAST_ISA == 2
  if constexpr (std::is_same_v<A, double>) {
    return reinterpret_cast<Vec<A>>(
        _mm512_min_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
  } else {
    return reinterpret_cast<Vec<A>>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
  }
#else
  return a < b ? a : b;
#endif
}

// Whether a lane of a comparison's result is set.
template <class V>
inline bool any(V is_set) {
#if MMFAST_ISA == 2
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(is_set), reinterpret_cast<__m512i>(is_set)) != 0;
#elif MMFAST_ISA == 1
  return _mm256_testz_si256(reinterpret_cast<__m256i>(is_set), reinterpret_cast<__m256i>(is_set)) == 0;
#else
  typename VecOf<int64_t, sizeof(V) / 8>::type words;
  std::memcpy(&words, &is_set, sizeof words);
  return (words[0] | words[1]) != 0;
#endif
}

template <class A>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr int kMantissaBits = 23, kBias = 127;
  // Adding 1.5 * 2^23 rounds to an integer, whose bits are then the lowest of the sum.
  static constexpr float kRound = 0x1.8p23f, kLog2E = 1.44269504f;
  // ln 2 in two parts, the first short enough for exact products with any exponent.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLogSmallest = -87.336544f;
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;
  // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2 by Cephes, highest power first.
  static constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                   4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  static constexpr int kLogTerms = 5;
};

template <>
struct MathConstants<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52, kLog2E = 1.4426950408889634;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLogSmallest = -708.3964185322641;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  // The same by Taylor: the first power left out is below 2^-57.
  static constexpr double kExp[] = {1. / 6227020800, 1. / 479001600, 1. / 39916800, 1. / 3628800,
                                    1. / 362880,     1. / 40320,     1. / 5040,     1. / 720,
                                    1. / 120,        1. / 24,        1. / 6,        1. / 2};
  static constexpr int kLogTerms = 11;
};

// e^x, x at most 80, to about one unit in the last place; 0 where it is below the smallest normal number, NaN
// for NaN. A call would save all SIMD registers around it, so it is never one.
template <class A>
__attribute__((always_inline)) inline Vec<A> exp_nonpositive(Vec<A> x) {
  using K = MathConstants<A>;
  const Vec<A> rounded = x * K::kLog2E + K::kRound, n = rounded - K::kRound;
  const Vec<A> r = x - n * K::kLn2High - n * K::kLn2Low;
  Vec<A> p = r * K::kExp[0] + K::kExp[1];
  for (int i = 2; i < static_cast<int>(std::size(K::kExp)); ++i) p = p * r + K::kExp[i];
  p = p * (r * r) + r + 1;
  // Unsigned, for the bits of what is out of range overflow.
  using Unsigned = std::make_unsigned_t<Int<A>>;
  const auto scale = (reinterpret_cast<Vec<Unsigned>>(rounded) + Unsigned{K::kBias}) << K::kMantissaBits;
  // A product, not a sum of exponents: a NaN stays one.
  return x < K::kLogSmallest ? Vec<A>{} : p * reinterpret_cast<Vec<A>>(scale);
}

#if MMFAST_ISA >= 1
// The powers 2^(i / n) that a register holds, each less i / n in the exponent: the bits of i, shifted so that
// their lowest ones are the highest of the mantissa, are added to those of entry i mod n.
struct PowersOfTwo {
  static constexpr int kBits = MMFAST_ISA == 2 ? 4 : 3, kShift = MathConstants<float>::kMantissaBits - kBits;
  static constexpr float kSteps = 1 << kBits;
  // e^r = 1 + r + kSquare r^2 + kCube r^3 to 0.03 and 0.43 units of 2^-24 for |r| <= ln 2 / 2 / n.
  static constexpr float kSquare = kBits == 4 ? 0.5000161950783564f : 0.5000645364907836f;
  static constexpr float kCube = kBits == 4 ? 0.16666720661866558f : 0.1666685859963277f;
#if MMFAST_ISA == 2
  alignas(64) static constexpr int32_t kTable[] = {
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
      0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  static Vec<uint32_t> look_up(Vec<uint32_t> i) {
    return reinterpret_cast<Vec<uint32_t>>(
        _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(i), _mm512_load_si512(kTable)));
  }
#else
  alignas(32) static constexpr int32_t kTable[] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                                   0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  static Vec<uint32_t> look_up(Vec<uint32_t> i) {
    return reinterpret_cast<Vec<uint32_t>>(_mm256_permutevar8x32_epi32(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(kTable)), reinterpret_cast<__m256i>(i)));
  }
#endif
};

// By a table in a register instead of the higher powers: 8 operations of the multipliers instead of 12, and a
// chain two thirds as long.
template <>
__attribute__((always_inline)) inline Vec<float> exp_nonpositive<float>(Vec<float> x) {
  using K = MathConstants<float>;
  using P = PowersOfTwo;
  const Vec<float> rounded = x * (K::kLog2E * P::kSteps) + K::kRound, n = rounded - K::kRound;
  const Vec<float> r = x - n * (K::kLn2High / P::kSteps) - n * (K::kLn2Low / P::kSteps);
  // Unsigned, for the bits of what is out of range overflow.
  const auto i = reinterpret_cast<Vec<uint32_t>>(rounded);
  const auto power = reinterpret_cast<Vec<float>>(P::look_up(i) + (i << P::kShift));
  const Vec<float> p = (P::kCube * r + P::kSquare) * r + 1;
  return x < K::kLogSmallest ? Vec<float>{} : (power * r) * p + power;
}
#endif

// ln x for normal positive x to about one unit in the last place. Of other x, NaN and infinity among them, it
// makes any number: callers keep those apart, for to look here costs 7% of a kernel with few classes.
template <class A>
inline Vec<A> log_positive(Vec<A> x) {
  using K = MathConstants<A>;
  const auto exponent = (bits_of<A>(x) - K::kSqrtHalf) >> K::kMantissaBits;
  const Vec<A> f = from_bits<A>(bits_of<A>(x) - (exponent << K::kMantissaBits)) - 1;
  const Vec<A> n = from_bits<A>(bits_of<A>(Vec<A>{} + K::kRound) + exponent) - K::kRound;
  // ln (1 + f) = 2 atanh s, s = f / (2 + f), |s| < 0.172.
  const Vec<A> s = f / (2 + f), z = s * s;
  Vec<A> p = {};
#pragma GCC unroll 16
  for (int i = K::kLogTerms; i >= 1; --i) p = (p + A(2) / (2 * i + 1)) * z;
  return n * K::kLn2High + (n * K::kLn2Low + (p * s + 2 * s));
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

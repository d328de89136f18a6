// What the CPU ops share: SIMD vectors as wide as the instruction set, half-precision types, dispatch on
// dtype. Everything lies in a namespace of the instruction set, so builds for several of them can be linked
// together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "codes.h"
#include "registry.h"
#include "threads.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

#if MMFAST_ISA == 2
constexpr int kVectorBytes = 64;
#elif MMFAST_ISA == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type sums are kept in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int lanes = kLanes<T>>
struct VecOf {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
// A vector of the instruction set's full width: arithmetic by operators, lanes by [].
template <class T>
using Vec = typename VecOf<T>::type;

// The signed integer as wide as T: what comparisons of vectors of T yield, and lanes count in.
template <class T>
using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Neither NaN nor infinite, of a number or lane by lane. (std::isfinite is not for vectors.)
template <class V>
inline auto is_finite(V x) {
  return x - x == V{};
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float widen(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
#else
  // Exponent and mantissa are shifted into place and the exponent rebiased by a multiplication, which is
  // exact and handles subnormal numbers; infinity and NaN are patched.
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  const uint32_t magnitude =
      rest >= 0x7c00 ? 0x7f800000u | (rest & 0x3ff) << 13 : bits_of(float_of(rest << 13) * 0x1p112f);
  return float_of(sign | magnitude);
#endif
}

template <class T>
inline T narrow(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    // To nearest, ties to even; a NaN keeps its sign and becomes quiet.
    const uint32_t bits = bits_of(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, float16>) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
    const __fp16 half = x;
    float16 result;
    std::memcpy(&result, &half, sizeof half);
    return result;
#else
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    const uint16_t sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
    // Below the smallest normal number the addition of 0.5 rounds the mantissa at the right bit.
    if (magnitude < 0x38800000)
      return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
    return {static_cast<uint16_t>(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13))};
#endif
  } else {
    return x;
  }
}

// As many elements of T as there are lanes of its type of accumulation, in a register.
template <class T>
struct Packed {
  typename VecOf<uint16_t, kLanes<float>>::type bits;
};
template <>
struct Packed<float> {
  Vec<float> bits;
};
template <>
struct Packed<double> {
  Vec<double> bits;
};

// Those elements in the type of accumulation.
template <class T>
inline Vec<accumulate_t<T>> widen(Packed<T> x) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return x.bits;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(x.bits, Vec<uint32_t>) << 16);
  } else {
#if MMFAST_ISA == 2
    return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(x.bits)));
#elif MMFAST_ISA == 1
    return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x.bits)));
#elif defined(__aarch64__)
    return reinterpret_cast<Vec<float>>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(x.bits)));
#else
    Vec<float> result;
    for (int i = 0; i < kLanes<float>; ++i) result[i] = widen(float16{x.bits[i]});
    return result;
#endif
  }
}

// The next kLanes<accumulate_t<T>> elements, in the type of accumulation.
template <class T>
inline Vec<accumulate_t<T>> load(const T* source) {
  Packed<T> packed;
  std::memcpy(&packed, source, sizeof packed);
  return widen(packed);
}

// The next kLanes<accumulate_t<T>> / 2 elements of each of two arrays, one behind the other.
template <class T>
inline Vec<accumulate_t<T>> load_halves(const T* lower, const T* upper) {
  Packed<T> packed;
#if MMFAST_ISA == 2
  if constexpr (sizeof packed == 64) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower)),
                  high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(upper));
    packed.bits =
        reinterpret_cast<decltype(packed.bits)>(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    return widen(packed);
  }
#endif
#if MMFAST_ISA >= 1
  if constexpr (sizeof packed == 32) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower)),
                  high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(upper));
    packed.bits = reinterpret_cast<decltype(packed.bits)>(
        _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
    return widen(packed);
  }
#endif
  std::memcpy(&packed, lower, sizeof packed / 2);
  std::memcpy(reinterpret_cast<char*>(&packed) + sizeof packed / 2, upper, sizeof packed / 2);
  return widen(packed);
}

// The other way round, to nearest, ties to even.
template <class T>
inline Packed<T> narrow(Vec<accumulate_t<T>> value) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return {value};
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const auto bits = reinterpret_cast<Vec<uint32_t>>(value);
    const Vec<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    const auto is_nan = reinterpret_cast<Vec<uint32_t>>(value != value);
    return {__builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), decltype(Packed<T>::bits))};
  } else {
    using Bits = decltype(Packed<T>::bits);
#if MMFAST_ISA == 2
    return {
        reinterpret_cast<Bits>(_mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT))};
#elif MMFAST_ISA == 1
    return {
        reinterpret_cast<Bits>(_mm256_cvtps_ph(reinterpret_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
    return {reinterpret_cast<Bits>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(value)))};
#else
    Bits bits;
    for (int i = 0; i < kLanes<float>; ++i) bits[i] = narrow<T>(value[i]).bits;
    return {bits};
#endif
  }
}

template <class T>
inline void store(T* target, Vec<accumulate_t<T>> value) {
  const Packed<T> packed = narrow<T>(value);
  std::memcpy(target, &packed, sizeof packed);
}

// The lower or the upper half of a vector.
template <bool upper, class T>
inline void store_half(T* target, Vec<accumulate_t<T>> value) {
  const Packed<T> packed = narrow<T>(value);
#if MMFAST_ISA == 2
  if constexpr (sizeof packed == 64) {
    const __m512i bits = reinterpret_cast<__m512i>(packed.bits);
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_extracti64x4_epi64(bits, upper));
  }
#endif
  std::memcpy(target, reinterpret_cast<const char*>(&packed) + upper * sizeof packed / 2, sizeof packed / 2);
}

// The lower half to one array, the upper half to another.
template <class T>
inline void store_halves(T* lower, T* upper, Vec<accumulate_t<T>> value) {
  store_half<false>(lower, value);
  store_half<true>(upper, value);
}

// The first `count` elements of a vector, at most its lanes; 0 in the lanes behind them.
template <class T>
inline Vec<accumulate_t<T>> load_part(const T* source, int64_t count) {
#if MMFAST_ISA == 2
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_ps((1u << count) - 1, source));
  } else if constexpr (std::is_same_v<T, double>) {
    return reinterpret_cast<Vec<A>>(_mm512_maskz_loadu_pd((1u << count) - 1, source));
  }
#endif
  T padded[kLanes<accumulate_t<T>>] = {};
  std::memcpy(padded, source, count * sizeof(T));
  return load(padded);
}

// Writes the first `count` lanes.
template <class T>
inline void store_part(T* target, Vec<accumulate_t<T>> value, int64_t count) {
#if MMFAST_ISA == 2
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(target, (1u << count) - 1, reinterpret_cast<__m512>(value));
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm512_mask_storeu_pd(target, (1u << count) - 1, reinterpret_cast<__m512d>(value));
  }
#endif
  T padded[kLanes<accumulate_t<T>>];
  store(padded, value);
  std::memcpy(target, padded, count * sizeof(T));
}

// Lane i of the result is lane index[i] of a followed by b.
template <int... index, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  return __builtin_shuffle(
      a, b, typename VecOf<Int<std::decay_t<decltype(a[0])>>, sizeof...(index)>::type{index...});
#endif
}

template <class V>
using lanes_of = std::make_integer_sequence<int, sizeof(V) / sizeof(std::declval<V>()[0])>;

// The even or the odd lanes of a followed by those of b.
template <bool odd, class V, int... lane>
inline V unzip(V a, V b, std::integer_sequence<int, lane...>) {
  return shuffle<(2 * lane + odd)...>(a, b);
}
template <bool odd, class V>
inline V unzip(V a, V b) {
  return unzip<odd>(a, b, lanes_of<V>{});
}

// The lower or the upper halves of a and b, their lanes taken in turn: the inverse of unzip.
template <bool upper, class V, int... lane>
inline V zip(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  return shuffle<(lane / 2 + upper * lanes / 2 + lane % 2 * lanes)...>(a, b);
}
template <bool upper, class V>
inline V zip(V a, V b) {
  return zip<upper>(a, b, lanes_of<V>{});
}

// Calls function(pointer to T) for the type behind a dtype.
template <class Function>
void dispatch_dtype(const char* op, Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(static_cast<float*>(nullptr));
    case Dtype::kFloat64:
      return function(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return function(static_cast<bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return function(static_cast<float16*>(nullptr));
    default:
      throw std::invalid_argument(std::string(op) + ": unknown dtype code " +
                                  std::to_string(static_cast<int64_t>(dtype)));
  }
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

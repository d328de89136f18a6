// exp of a vector of numbers that are not positive, as a softmax needs it.
#pragma once

#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = uint32_t;
  static constexpr int degree = 7, mantissa_bits = 23, bias = 127;
  // ln 2 in two parts, the first of so few bits that its product with an exponent is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, lowest = -86.5f;
};
template <>
struct ExpConstants<double> {
  using Bits = uint64_t;
  static constexpr int degree = 13, mantissa_bits = 52, bias = 1023;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest = -706;
};

constexpr double inverse_factorial(int n) { return n == 0 ? 1.0 : inverse_factorial(n - 1) / n; }

// exp(x) for x <= 0 to 2 units in the last place; 0 below about -86 (float) or -706 (double), NaN for NaN.
// x = n ln 2 + r, |r| <= ln(2) / 2; a Taylor polynomial for exp(r), times 2^n. A product, not a sum of
// exponents: whatever bits a NaN has, it stays one.
// A call would save all vectors around it, so it is never one.
template <class A>
__attribute__((always_inline)) inline Vec<A> exp_nonpositive(Vec<A> x) {
  using Constants = ExpConstants<A>;
  using Bits = Vec<typename Constants::Bits>;
  constexpr int degree = Constants::degree;
  // Adding 1.5 * 2^mantissa_bits rounds to an integer and leaves it in the low bits of the sum, here with the
  // bias of exponents.
  constexpr A round =
      static_cast<A>((typename Constants::Bits{3} << (Constants::mantissa_bits - 1)) + Constants::bias);
  const Vec<A> shifted = x * static_cast<A>(1.4426950408889634) + round;
  const Vec<A> n = shifted - round;
  const Vec<A> r = (x - n * Constants::ln2_high) - n * Constants::ln2_low;
  Vec<A> p = r * static_cast<A>(inverse_factorial(degree)) + static_cast<A>(inverse_factorial(degree - 1));
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; --k) p = p * r + static_cast<A>(inverse_factorial(k));
  const Vec<A> power = reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(shifted) << Constants::mantissa_bits);
  const Bits is_zero = reinterpret_cast<Bits>(x < Constants::lowest);
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(p * power) & ~is_zero);
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

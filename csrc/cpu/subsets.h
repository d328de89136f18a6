// Coalitions as bits of an index, and sums over them in registers.
#pragma once

#include <cstdint>

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

// GCC leaves loops of more than 16 turns rolled, and arrays of vectors in memory with them.
#define MMFAST_UNROLL _Pragma("GCC unroll 32")

constexpr int log2_of(int64_t n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }
constexpr int count_bits(unsigned n) { return n == 0 ? 0 : static_cast<int>(n & 1) + count_bits(n >> 1); }

// x[j] = first + the sum of the terms, `stride` apart, of the bits set in j < 2^bits.
template <int bits, class V>
__attribute__((always_inline)) inline void subset_sums(V first, const V* terms, int64_t stride, V* x) {
  x[0] = first;
  MMFAST_UNROLL
  for (int i = 0; i < bits; ++i) {
    const V term = terms[i * stride];
    MMFAST_UNROLL
    for (int j = 0; j < 1 << i; ++j) x[(1 << i) + j] = x[j] + term;
  }
}

// half_sums[i] = the sum of x[j] over the j < 2^bits with bit i set; leaves the sum of all in x[0]. The top
// bit is folded first: with 2 * 2^bits additions in all.
template <int bits, class V>
__attribute__((always_inline)) inline void fold_subsets(V* x, V* half_sums) {
  MMFAST_UNROLL
  for (int i = bits - 1; i >= 0; --i) {
    V sum = x[1 << i];
    MMFAST_UNROLL
    for (int j = 1; j < 1 << i; ++j) sum += x[(1 << i) + j];
    MMFAST_UNROLL
    for (int j = 0; j < 1 << i; ++j) x[j] += x[(1 << i) + j];
    half_sums[i] = sum;
  }
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

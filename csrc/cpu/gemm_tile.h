// The inner loops of a matrix product whose small operand is packed in panels.
//
// A panel holds kPanel rows of a matrix, column by column: element (row, column) of panel p lies at
// (p * columns + column) * kPanel + row. Both products with the matrix, x K^T and y K, then read it by
// broadcasts at constant distances, so one packed copy serves both; the other operand lies as vectors.
// kPanel x 2 sums fill the registers: 24 of 32 with AVX-512, 12 of 16 below.
#pragma once

#include "integers.h"
#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

#if MMFAST_ISA == 2 || defined(__aarch64__)
constexpr int kPanel = 12;
#else
constexpr int kPanel = 6;
#endif
// Fewer rows than a panel are done in steps of this many.
constexpr int kPanelPart = kPanel / 3;

// sums[r][v] += sum over s < steps of a[r * row_stride + s * step_stride] * (vector v at b + s * b_stride).
// With `pairs` the elements of a and b are two bfloat16 each, whose products are both added, at twice the
// rate.
template <int row_stride, int step_stride, bool pairs, class A, int rows, int nv>
inline void multiply_tile(Vec<A> (&sums)[rows][nv], const A* a, const A* b, int64_t steps,
                          int64_t b_stride = nv * kLanes<A>) {
  for (int64_t s = 0; s < steps; ++s) {
    Vec<A> x[nv];
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) x[v] = load(b + s * b_stride + v * kLanes<A>);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const A* factor = a + r * row_stride + s * step_stride;
      if constexpr (pairs) {
#if MMFAST_ISA == 2
        const __m512 factors = _mm512_set1_ps(*factor);
        // As text, since no build is for CPUs with AVX512-BF16 alone.
#pragma GCC unroll 2
        for (int v = 0; v < nv; ++v) {
          // Through a variable of its own: an array's element would stay in memory.
          Vec<A> sum = sums[r][v];
          const Vec<A> vector = x[v];
          asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(factors), "v"(vector));
          sums[r][v] = sum;
        }
#endif
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) sums[r][v] += *factor * x[v];
      }
    }
  }
}

// Whether multiply_tile can be called with pairs of bfloat16.
inline bool has_bfloat16_pairs() {
#if MMFAST_ISA == 2
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Calls function(first row, number of rows as a constant) for rows [0, count) in panels, the last one cut to
// the parts it needs; up to kPanelPart - 1 rows past the end are visited.
template <class Function>
inline void for_panels(int64_t count, Function&& function) {
  int64_t row = 0;
  for (; row + kPanel <= count; row += kPanel) function(row, std::integral_constant<int, kPanel>{});
  const int64_t rest = count - row;
  if (rest > 2 * kPanelPart) {
    function(row, std::integral_constant<int, kPanel>{});
  } else if (rest > kPanelPart) {
    function(row, std::integral_constant<int, 2 * kPanelPart>{});
  } else if (rest > 0) {
    function(row, std::integral_constant<int, kPanelPart>{});
  }
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

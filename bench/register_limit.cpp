// How many multiply-adds a second this processor makes when nothing comes from memory: the bound that stands
// in bench/results beside a kernel's rate. AVX-512 only.
//
//   g++ -O2 -march=native -fopenmp bench/register_limit.cpp -o /tmp/register_limit && /tmp/register_limit
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdio>

namespace {

constexpr int kChains = 24;  // independent sums, more than the instruction's latency takes
constexpr long kRounds = 20'000'000;

// Two operations a multiply-add, summed over the lanes of a vector.
template <class Vector, class Step>
double gigaflops(int threads, int operations, Vector start, Step step) {
  double best = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const double begin = omp_get_wtime();
#pragma omp parallel num_threads(threads)
    {
      Vector sums[kChains];
      std::fill(sums, sums + kChains, start);
      for (long round = 0; round < kRounds; ++round) {
#pragma GCC unroll 24
        for (Vector& sum : sums) sum = step(sum);
      }
      // Sums that nobody reads would not be taken.
      for (Vector& sum : sums) asm volatile("" : : "v"(sum));
    }
    best = std::max(best, 1e-9 * threads * kRounds * kChains * operations / (omp_get_wtime() - begin));
  }
  return best;
}

}  // namespace

int main() {
  const __m512 one = _mm512_set1_ps(1);
  for (int threads = 1; threads <= omp_get_max_threads(); ++threads) {
    std::printf("%d threads: float32 %.0f GFLOP/s", threads,
                gigaflops(threads, 32, one, [=](__m512 sum) { return _mm512_fmadd_ps(one, one, sum); }));
#ifdef __AVX512BF16__
    const __m512bh pair = _mm512_cvtne2ps_pbh(one, one);
    std::printf(", bfloat16 pairs %.0f GFLOP/s",
                gigaflops(threads, 64, one, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, pair, pair); }));
#endif
    std::printf("\n");
  }
}

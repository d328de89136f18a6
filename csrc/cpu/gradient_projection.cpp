// The projector without the direction u, P <- P - u u^T with u = P h / sqrt(a + h^T P h), and G P. The
// divisor and the sign as mmfast/reference/gradient_projection.py explains them.
//
// The update reads P for P h, then reads and writes it. One parallel region does both, a barrier between, so
// that a thread's rows stay in its core's L2 cache, and the difference begins with the rows read last. P is
// symmetric, but neither half is left out: mirroring one takes a transposition of registers in place of a
// read. The product takes rows of G packed in panels (gemm_tile.h).
//
// Floors: 3 D^2 elements over the bandwidth of the cache P fits into; 2 C D^2 operations over the rate of
// FMA. Measured: bench/results/gradient_projection.md.
#include <omp.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "codes.h"
#include "gemm_tile.h"

namespace mmfast {
namespace {

// Waking a thread takes longer than so many bytes of P from the L2 cache.
constexpr int64_t kMinBytes = 1 << 17;
// Operations of a product that take as long as to read a byte, by which parallel_for counts.
constexpr int64_t kOperationsPerByte = 8;
// Panels of a gradient from which on a copy of the columns they meet pays.
constexpr int64_t kMinPanels = 8;
// Steps summed in one go; a second sum adds them up.
constexpr int64_t kSlice = 256;

template <class A>
struct Projector {
  using V = Vec<A>;
  static constexpr int L = kLanes<A>, kRows = std::min(4, L);
  A* data;  // [D, D]
  int64_t stride, D;

  // Calls function(first row, number of rows as a constant) for rows [begin, end), the last ones first.
  template <class Function>
  static void for_rows_backwards(int64_t begin, int64_t end, Function&& function) {
    int64_t i = end;
    for (; i - kRows >= begin; i -= kRows) function(i - kRows, std::integral_constant<int, kRows>{});
    for (; i > begin; --i) function(i - 1, std::integral_constant<int, 1>{});
  }

  // Writes the sums over the lanes of the first `count` of kRows vectors.
  static void store_row_sums(V (&sums)[kRows], int64_t count, A* target) {
    // Pairs of vectors become one that holds sums of both, until lane l belongs to row l % kRows.
#pragma GCC unroll 2
    for (int n = kRows / 2; n > 0; n /= 2) {
#pragma GCC unroll 2
      for (int r = 0; r < n; ++r)
        sums[r] = zip<false>(sums[r], sums[r + n]) + zip<true>(sums[r], sums[r + n]);
    }
    A parts[L];
    store(parts, sums[0]);
    for (int l = kRows; l < L; ++l) parts[l % kRows] += parts[l];
    for (int r = 0; r < count; ++r) target[r] = parts[r];
  }

  // ph[i] = (row i of P) . h for begin <= i < end, h followed by zeros up to a whole vector.
  void multiply(int64_t begin, int64_t end, const A* h, A* ph) const {
    for (int64_t i = begin; i < end; i += kRows) {
      // The last row stands in for those past the end.
      const A* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = data + std::min(i + r, end - 1) * stride;
      V sums[kRows] = {};
      int64_t j = 0;
      for (; j + L <= D; j += L) {
        const V x = load(h + j);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sums[r] += load(rows[r] + j) * x;
      }
      if (j < D) {
        const V x = load(h + j);
        for (int r = 0; r < kRows; ++r) sums[r] += load_part(rows[r] + j, D - j) * x;
      }
      store_row_sums(sums, std::min<int64_t>(kRows, end - i), ph + i);
    }
  }

  // P -= s u u^T in rows [begin, end), s = 1 or -1. Each element is one product and one difference, in
  // whatever vector it falls, so mirrored elements that were equal stay equal to the last bit.
  void subtract(int64_t begin, int64_t end, A sign, const A* u) const {
    // What was read last is still in the L1 cache.
    for_rows_backwards(begin, end, [&](int64_t i, auto rows) {
      constexpr int num_rows = decltype(rows)::value;
      V factors[num_rows];
#pragma GCC unroll 4
      for (int r = 0; r < num_rows; ++r) factors[r] = V{} + u[i + r] * sign;
      int64_t j = 0;
      for (; j + L <= D; j += L) {
        const V x = load(u + j);
#pragma GCC unroll 4
        for (int r = 0; r < num_rows; ++r) {
          A* target = data + (i + r) * stride + j;
          store(target, load(target) - factors[r] * x);
        }
      }
      if (j < D) {
        const V x = load(u + j);
        for (int r = 0; r < num_rows; ++r) {
          A* target = data + (i + r) * stride + j;
          store_part(target, load_part(target, D - j) - factors[r] * x, D - j);
        }
      }
    });
  }

  // Leaves P h / sqrt(divisor) in u; returns the sign of the term. Squares are taken in float64.
  A direction(const A* h, const A* ph, double alpha, A* u) const {
    constexpr int kSums = 16;
    double lengths[kSums] = {}, squares[kSums] = {};
    for (int64_t j = 0; j < round_up(D, L); j += std::min(L, kSums)) {
      for (int i = 0; i < std::min(L, kSums); ++i) {
        lengths[i] += static_cast<double>(h[j + i]) * ph[j + i];
        squares[i] += static_cast<double>(h[j + i]) * h[j + i];
      }
    }
    double kept = 0, square = 0;
    for (int i = 0; i < kSums; ++i) kept += lengths[i], square += squares[i];
    const double least = 16 * static_cast<double>(std::numeric_limits<A>::epsilon()) * square;
    const double factor = 1 / std::sqrt(std::max(alpha, least) + std::abs(kept));
    for (int64_t j = 0; j < D; ++j) u[j] = static_cast<A>(ph[j] * factor);
    return kept < 0 ? -1 : 1;
  }

  // Multiplies features [padded] whose products might not be in range by a power of two; returns it. With
  // alpha times its square the update is the same.
  double scale(A* h, int64_t padded) const {
    constexpr bool is_float = std::is_same_v<A, float>;
    constexpr A kMost = is_float ? A(0x1p60) : A(0x1p400), kLeast = 1 / kMost;
    V sizes = {};
    for (int64_t j = 0; j < padded; j += L) {
      const V x = load(h + j), size = x < 0 ? -x : x;
      sizes = size > sizes ? size : sizes;
    }
    A largest = 0;
    for (int l = 0; l < L; ++l) largest = std::max(largest, sizes[l]);
    if ((largest > kLeast && largest < kMost) || largest == 0) return 1;
    int exponent = 0;
    std::frexp(largest, &exponent);
    const double unit =
        std::ldexp(1.0, -std::clamp(exponent, is_float ? -120 : -1000, is_float ? 120 : 1000));
    for (int64_t j = 0; j < D; ++j) h[j] *= static_cast<A>(unit);
    return unit;
  }

  void update(const A* mean_feature, double alpha, int64_t num_threads) const {
    const int64_t padded = round_up(D, L);
    const int64_t useful = D * D * static_cast<int64_t>(sizeof(A)) / kMinBytes;
    const int64_t threads = std::max<int64_t>(1, std::min(num_threads, useful));
    // A cache line apart: vectors of 4 KB in one piece would lie at the same place of a page, where a load
    // waits for the store to another.
    constexpr int64_t line = 64 / sizeof(A);
    const int64_t pitch = round_up(D, line) + line;
    std::vector<A> memory((2 + threads) * pitch + line);
    void* start = memory.data();
    size_t space = memory.size() * sizeof(A);
    A* const h = static_cast<A*>(std::align(64, pitch * sizeof(A), start, space));
    A* const ph = h + pitch;
    std::copy_n(mean_feature, D, h);
    const double unit = scale(h, padded);
    alpha *= unit * unit;
    // A thread's rows stay in its core's L2 cache from the product to the difference.
    const auto part = [&](int64_t t, int64_t n, auto&& wait) __attribute__((noinline)) {
      const int64_t begin = D * t / n, end = D * (t + 1) / n;
      A* const u = ph + (1 + t) * pitch;
      multiply(begin, end, h, ph);
      wait();
      const A sign = direction(h, ph, alpha, u);
      subtract(begin, end, sign, u);
    };
    if (threads == 1) return part(0, 1, [] {});
#pragma omp parallel num_threads(static_cast<int>(threads))
    part(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  }
};

// Rows of a gradient, widened and packed in panels, times columns of a projector.
template <class T>
struct Product {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  const A* projector;  // [D, D]
  int64_t stride, D;
  T* out;  // [C, D] contiguous
  int64_t C;

  // Up to `rows` rows from `row`, nv vectors of columns from `column`; the columns lie at b, rows `b_stride`
  // apart.
  template <int rows, int nv>
  void tile(const A* panel, const A* b, int64_t b_stride, int64_t row, int64_t column) const {
    constexpr int W = nv * L;
    V total[rows][nv] = {};
    for (int64_t first = 0; first < D; first += kSlice) {
      V sums[rows][nv] = {};
      multiply_tile<1, kPanel, false>(sums, panel + first * kPanel, b + first * b_stride,
                                      std::min(kSlice, D - first), b_stride);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) total[r][v] = first == 0 ? sums[r][v] : total[r][v] + sums[r][v];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      if (row + r >= C) break;
      T* target = out + (row + r) * D + column;
      const int64_t count = std::min<int64_t>(W, D - column);
      if (count == W) {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) store(target + v * L, total[r][v]);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) {
          const int64_t rest = count - v * L;
          if (rest > 0) store_part(target + v * L, total[r][v], std::min<int64_t>(L, rest));
        }
      }
    }
  }

  // Few rows leave registers for twice as many columns.
  template <int nv>
  void run(const A* panels, int64_t num_threads) const {
    constexpr int W = nv * L;
    const int64_t num_panels = ceil_div(C, kPanel), num_tiles = ceil_div(D, W);
    const int64_t operations = 2 * C * D * W / num_panels;
    parallel_for(num_panels * num_tiles, operations / kOperationsPerByte, num_threads,
                 [&](int64_t begin, int64_t end) {
                   std::vector<A> copy;
                   int64_t copied = -1;
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t row = i % num_panels * kPanel, column = i / num_panels * W;
                     const int64_t count = std::min<int64_t>(W, D - column);
                     // Columns that several panels meet would fall out of the cache, whose places they
                     // share where rows are a power of two apart.
                     const bool with_copy = num_panels >= kMinPanels || count < W;
                     if (with_copy && copied != column) {
                       copy.resize(D * W);
                       for (int64_t k = 0; k < D; ++k)
                         std::memcpy(&copy[k * W], projector + k * stride + column, count * sizeof(A));
                       copied = column;
                     }
                     const A* b = with_copy ? copy.data() : projector + column;
                     choose_rows<nv>(panels + row * D, b, with_copy ? W : stride, row, column);
                   }
                 });
  }

  template <int nv>
  void choose_rows(const A* panel, const A* b, int64_t b_stride, int64_t row, int64_t column) const {
    constexpr int kMost = nv == 4 ? kPanel / 2 : kPanel;
    const int64_t count = C - row;
    if (count <= kMost / 3) {
      tile<kMost / 3, nv>(panel, b, b_stride, row, column);
    } else if (count <= kMost / 3 * 2) {
      tile<kMost / 3 * 2, nv>(panel, b, b_stride, row, column);
    } else {
      tile<kMost, nv>(panel, b, b_stride, row, column);
    }
  }

  void multiply(const T* grad, int64_t stride_row, int64_t stride_column, int64_t num_threads) const {
    const int64_t num_panels = ceil_div(C, kPanel);
    std::vector<A> panels(num_panels * kPanel * D);
    for (int64_t i = 0; i < C; ++i) {
      A* target = panels.data() + i / kPanel * kPanel * D + i % kPanel;
      for (int64_t k = 0; k < D; ++k) target[k * kPanel] = widen(grad[i * stride_row + k * stride_column]);
    }
    if (C <= kPanel / 2) {
      run<4>(panels.data(), num_threads);
    } else {
      run<2>(panels.data(), num_threads);
    }
  }
};

void gradient_projection_update(const Strided<2>& projector,  // [D, D], rows contiguous, written
                                const void* mean_feature,     // [D] contiguous
                                double alpha, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("gradient_projection_update", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<T, accumulate_t<T>>) {
      const Projector<T> p{static_cast<T*>(projector.data), projector.strides[0], projector.sizes[0]};
      p.update(static_cast<const T*>(mean_feature), alpha, num_threads);
    } else {
      throw std::invalid_argument("gradient_projection_update: P must be float32 or float64");
    }
  });
}

void gradient_projection_product(const Strided<2>& grad,       // [C, D]
                                 const Strided<2>& projector,  // [D, D], rows contiguous, as sums are kept
                                 void* out,                    // [C, D] contiguous
                                 Dtype dtype, int64_t num_threads) {
  dispatch_dtype("gradient_projection_product", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Product<T> product{static_cast<const accumulate_t<T>*>(projector.data), projector.strides[0],
                             projector.sizes[0], static_cast<T*>(out), grad.sizes[0]};
    product.multiply(static_cast<const T*>(grad.data), grad.strides[0], grad.strides[1], num_threads);
  });
}

MMFAST_REGISTER(gradient_projection_update)
MMFAST_REGISTER(gradient_projection_product)

}  // namespace
}  // namespace mmfast

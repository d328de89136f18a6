// The projector without the direction u, P <- P - u u^T with u = P h / sqrt(a + h^T P h), and G P. The
// divisor and the sign as mmfast/reference/gradient_projection.py explains them.
//
// The update reads P for P h, then reads and writes it. One parallel region does both, a barrier between, so
// that a thread's rows stay in its core's L2 cache, and the difference begins with the rows read last. P is
// symmetric, but neither half is left out: mirroring one takes a transposition of registers in place of a
// read. The product takes rows of G packed in panels (gemm_tile.h).
// A step of both with few rows of G updates P within the product, each element once in registers.
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

  // Vectors of a call, each a cache line more than whole ones apart: at 4 KB in one piece they would lie at
  // the same place of a page, where a load waits for the store to another.
  class Memory {
   public:
    Memory(int64_t D, int64_t count) {
      constexpr int64_t line = 64 / sizeof(A);
      pitch_ = round_up(D, line) + line;
      memory_.resize(count * pitch_ + line);
      void* start = memory_.data();
      size_t space = memory_.size() * sizeof(A);
      first_ = static_cast<A*>(std::align(64, pitch_ * sizeof(A), start, space));
    }
    A* operator[](int64_t index) const { return first_ + index * pitch_; }
    int64_t pitch() const { return pitch_; }

   private:
    std::vector<A> memory_;
    int64_t pitch_;
    A* first_;
  };

  // Calls subtract(thread, number of threads, sign, u), each with its own u.
  template <class Subtract>
  void update_by(const Memory& memory, const A* mean_feature, double alpha, int64_t threads,
                 Subtract&& subtract) const {
    A* const h = memory[0];
    A* const ph = memory[1];
    std::copy_n(mean_feature, D, h);
    const double unit = scale(h, round_up(D, L));
    alpha *= unit * unit;
    // A thread's rows stay in its core's L2 cache from the product to the difference.
    const auto part = [&](int64_t t, int64_t n, auto&& wait) __attribute__((noinline)) {
      const int64_t begin = D * t / n, end = D * (t + 1) / n;
      A* const u = memory[2 + t];
      multiply(begin, end, h, ph);
      wait();
      const A sign = direction(h, ph, alpha, u);
      subtract(t, n, sign, u);
    };
    if (threads == 1) return part(0, 1, [] {});
#pragma omp parallel num_threads(static_cast<int>(threads))
    part(omp_get_thread_num(), omp_get_num_threads(), [] {
#pragma omp barrier
    });
  }

  int64_t useful_threads(int64_t num_threads) const {
    const int64_t useful = D * D * static_cast<int64_t>(sizeof(A)) / kMinBytes;
    return std::max<int64_t>(1, std::min(num_threads, useful));
  }

  void update(const A* mean_feature, double alpha, int64_t num_threads) const {
    const int64_t threads = useful_threads(num_threads);
    const Memory memory(D, 2 + threads);
    update_by(memory, mean_feature, alpha, threads, [&](int64_t t, int64_t n, A sign, const A* u) {
      subtract(D * t / n, D * (t + 1) / n, sign, u);
    });
  }
};

// The product of a gradient with a projector that is updated on the way: each element of P is read, less its
// part of s u u^T written and multiplied, in a tile of `rows` rows of G by nv vectors of columns.
template <class T>
struct Step {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<A>;
  // Vectors of columns that leave registers for their part of u.
  static constexpr int kVectors = 3;
  static constexpr int64_t kRows = kPanel / 2;  // of G at most
  const Projector<A>& p;
  T* out;  // [C, D] contiguous
  int64_t C;

  template <int rows, int nv, bool is_part>
  void tile(const A* panel, A sign, const A* u, int64_t column) const {
    const int64_t width = is_part ? p.D - column : L;
    const auto read = [&](const A* from) { return is_part ? load_part(from, width) : load(from); };
    V total[rows][nv] = {}, of_columns[nv];
#pragma GCC unroll 4
    for (int v = 0; v < nv; ++v) of_columns[v] = read(u + column + v * L);
    for (int64_t first = 0; first < p.D; first += kSlice) {
      V sums[rows][nv] = {};
      for (int64_t k = first; k < std::min(p.D, first + kSlice); ++k) {
        A* const target = p.data + k * p.stride + column;
        const V factor = V{} + u[k] * sign;
        V x[nv];
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) {
          x[v] = read(target + v * L) - factor * of_columns[v];
          if constexpr (is_part)
            store_part(target, x[v], width);
          else
            store(target + v * L, x[v]);
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < nv; ++v) sums[r][v] += panel[k * kPanel + r] * x[v];
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) total[r][v] = first == 0 ? sums[r][v] : total[r][v] + sums[r][v];
      }
    }
    for (int r = 0; r < std::min<int64_t>(rows, C); ++r) {
      T* const target = out + r * p.D + column;
      if constexpr (is_part) {
        store_part(target, total[r][0], width);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < nv; ++v) store(target + v * L, total[r][v]);
      }
    }
  }

  // Columns [begin, end), which only at the end of all are no whole vectors.
  template <int rows>
  void columns(int64_t begin, int64_t end, const A* panel, A sign, const A* u) const {
    int64_t j = begin;
    // No single vector where it can be helped: its few sums would wait for each other.
    while (j + 2 * L <= end) {
      const int64_t left = (end - j) / L;
      if (left == 3 || left > 4) {
        tile<rows, 3, false>(panel, sign, u, j), j += 3 * L;
      } else {
        tile<rows, 2, false>(panel, sign, u, j), j += 2 * L;
      }
    }
    if (j + L <= end) tile<rows, 1, false>(panel, sign, u, j), j += L;
    if (j < end) tile<rows, 1, true>(panel, sign, u, j);
  }

  void run(const A* mean_feature, double alpha, const A* panel, int64_t num_threads) const {
    const int64_t threads = p.useful_threads(num_threads);
    const typename Projector<A>::Memory memory(p.D, 2 + threads);
    const int64_t num_tiles = ceil_div(p.D, int64_t{kVectors * L});
    p.update_by(memory, mean_feature, alpha, threads, [&](int64_t t, int64_t n, A sign, const A* u) {
      const int64_t begin = num_tiles * t / n * kVectors * L;
      const int64_t end = std::min(num_tiles * (t + 1) / n * kVectors * L, p.D);
      if (C <= kRows / 3) {
        columns<kRows / 3>(begin, end, panel, sign, u);
      } else if (C <= kRows / 3 * 2) {
        columns<kRows / 3 * 2>(begin, end, panel, sign, u);
      } else {
        columns<kRows>(begin, end, panel, sign, u);
      }
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

  std::vector<A> packed(const T* grad, int64_t stride_row, int64_t stride_column) const {
    std::vector<A> panels(ceil_div(C, kPanel) * kPanel * D);
    for (int64_t i = 0; i < C; ++i) {
      A* target = panels.data() + i / kPanel * kPanel * D + i % kPanel;
      for (int64_t k = 0; k < D; ++k) target[k * kPanel] = widen(grad[i * stride_row + k * stride_column]);
    }
    return panels;
  }

  void multiply(const std::vector<A>& panels, int64_t num_threads) const {
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
    product.multiply(product.packed(static_cast<const T*>(grad.data), grad.strides[0], grad.strides[1]),
                     num_threads);
  });
}

// Both, the update first: grad may lie in the projector, its values before the call count.
void gradient_projection_step(const Strided<2>& projector,  // [D, D] symmetric, rows contiguous, written
                              const void* mean_feature,     // [D] contiguous, of the projector's dtype
                              const Strided<2>& grad,       // [C, D] of a dtype that sums in the projector's
                              void* out,                    // [C, D] contiguous
                              double alpha, Dtype dtype, int64_t num_threads) {
  dispatch_dtype("gradient_projection_step", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    const int64_t C = grad.sizes[0], D = projector.sizes[0];
    const Projector<A> p{static_cast<A*>(projector.data), projector.strides[0], D};
    const T* const g = static_cast<const T*>(grad.data);
    T* const target = static_cast<T*>(out);
    const A* const h = static_cast<const A*>(mean_feature);
    const Product<T> product{p.data, p.stride, D, target, C};
    const std::vector<A> panels = product.packed(g, grad.strides[0], grad.strides[1]);
    if (C > 0 && C <= Step<T>::kRows) return Step<T>{p, target, C}.run(h, alpha, panels.data(), num_threads);
    p.update(h, alpha, num_threads);
    if (C > 0) product.multiply(panels, num_threads);
  });
}

MMFAST_REGISTER(gradient_projection_update)
MMFAST_REGISTER(gradient_projection_product)
MMFAST_REGISTER(gradient_projection_step)

}  // namespace
}  // namespace mmfast

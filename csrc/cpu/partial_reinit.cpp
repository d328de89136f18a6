// theta <- (1 - alpha) theta + alpha theta_0 over a list of tensors of any sizes, in place.
//
// The list is one long line of elements, cut into equal parts for the threads wherever that falls in a
// tensor. On many small tensors the cost is the cache misses on each, so the tensors a few places ahead are
// prefetched.
//
// Floor: 3 elements moved for each of theta, over the bandwidth of memory. Measured:
// bench/results/partial_reinit.md.
#include "codes.h"
#include "vec.h"

namespace mmfast {
namespace {

constexpr int64_t kPrefetchDistance = 6;

template <class T>
void interpolate(T* theta, const T* theta_0, int64_t count, double alpha) {
  using A = accumulate_t<T>;
  constexpr int L = kLanes<A>;
  const A keep = static_cast<A>(1 - alpha), pull = static_cast<A>(alpha);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + L <= count; i += L) store(theta + i, keep * load(theta + i) + pull * load(theta_0 + i));
  for (; i < count; ++i) theta[i] = narrow<T>(keep * widen(theta[i]) + pull * widen(theta_0[i]));
}

void reinit_part(void* theta, const void* theta_0, int64_t begin, int64_t end, double alpha, Dtype dtype) {
  // Neither of the two ends does arithmetic: NaN and the sign of zero stay as they are.
  if (alpha == 0) return;
  dispatch_dtype("partial_reinit", dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* target = static_cast<T*>(theta) + begin;
    const T* source = static_cast<const T*>(theta_0) + begin;
    if (alpha == 1) {
      std::memmove(target, source, (end - begin) * sizeof(T));
    } else {
      interpolate(target, source, end - begin, alpha);
    }
  });
}

void partial_reinit(void* const* params,       // [P] addresses of contiguous tensors
                    const void* const* inits,  // [P]
                    const int64_t* sizes,      // [P] in elements
                    const double* alphas,      // [P] in [0, 1]
                    const Dtype* dtypes,       // [P]
                    int64_t num_tensors, int64_t num_threads) {
  int64_t total = 0;
  for (int64_t p = 0; p < num_tensors; ++p) {
    total += sizes[p];
    // Here, because an exception must not leave a parallel region.
    dispatch_dtype("partial_reinit", dtypes[p], [](auto*) {});
  }
  parallel_for(total, 3 * sizeof(float), num_threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t p = 0; p < num_tensors && first < end; first += sizes[p++]) {
      if (first + sizes[p] <= begin) continue;
      if (const int64_t ahead = p + kPrefetchDistance; ahead < num_tensors) {
        for (int64_t line = 0; line < std::min<int64_t>(256, sizes[ahead] * 4); line += 64) {
          __builtin_prefetch(static_cast<const char*>(params[ahead]) + line, 1);
          __builtin_prefetch(static_cast<const char*>(inits[ahead]) + line, 0);
        }
      }
      reinit_part(params[p], inits[p], std::max(begin - first, int64_t{0}), std::min(end - first, sizes[p]),
                  alphas[p], dtypes[p]);
    }
  });
}

MMFAST_REGISTER(partial_reinit)

}  // namespace
}  // namespace mmfast

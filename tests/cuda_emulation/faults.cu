// A small kernel, right or with a planted fault, that shows what the emulation notices.
#include "common.cuh"

namespace mmfast {
namespace {

constexpr int kSize = 64;

enum Fault {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kTail,
  kNotInitialised,
  kSharedTail,
  kLaneMissing,
  kMaskWithoutLane,
  kTooMuchShared,
  kTooMuchTogether,
  kNotAligned,
};

// Reverses each of `turns` pieces of kSize elements within itself and writes every piece's sum behind them.
__global__ void reverse_kernel(const float* x,  // [N]
                               float* out,      // [N]
                               float* sum,      // [1]
                               int64_t n, int fault) {
  MMFAST_SHARED(float, piece, [kSize]);
  MMFAST_SHARED(float, total, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0 && fault != kNotInitialised) total[0] = 0;
  for (int64_t begin = 0; begin < n; begin += kSize) {
    const int64_t size = n - begin < kSize ? n - begin : kSize;
    if (thread < size + (fault == kTail)) piece[thread] = x[begin + thread];
    if (fault == kSharedTail && thread == 0) piece[kSize] = 0;
    if (fault != kNoBarrier) __syncthreads();
    if (thread < size) out[begin + thread] = piece[size - 1 - thread];
    if (thread == 0) {
      for (int i = 0; i < size; ++i) total[0] += piece[i];
    }
    if (fault != kNoSecondBarrier) __syncthreads();
  }
  if (fault == kNotAligned) total[0] += reinterpret_cast<const Pack<float, 4>*>(x + 1)->values[0];
  if (fault == kLaneMissing && thread == 5) return;
  const unsigned mask = fault == kMaskWithoutLane ? 0xffff0000u : 0xffffffffu;
  const float first = __shfl_sync(mask, total[0], 0);
  if (thread == 0) sum[0] = first;
}

void reverse(const void* x, void* out, void* sum, int64_t n, int64_t fault) {
  // The kernel has arrays of its own besides.
  const int shared_bytes = fault == kTooMuchShared ? 100000 : fault == kTooMuchTogether ? 48 << 10 : 0;
  MMFAST_LAUNCH(reverse_kernel, 1, kSize, shared_bytes, nullptr, static_cast<const float*>(x),
                static_cast<float*>(out), static_cast<float*>(sum), n, static_cast<int>(fault));
  check_cuda("reverse", cudaGetLastError());
}

MMFAST_REGISTER(reverse)

}  // namespace
}  // namespace mmfast

// csrc/cuda/tensor_core.cuh in plain C++ (tensor_core.cpp): fragments by the layouts that the PTX manual
// documents, copies that land as late as they may, or at once, so that a missing wait and a stage refilled
// too early both show.
#pragma once

#include "common.cuh"

namespace mmfast {

uint32_t shared_address(const void* pointer);

void cp_async_16(uint32_t target, const void* source);
void cp_async_commit();
namespace emulation {
void cp_async_wait(int pending);
// d += a b of one m16n8k16, in float16 or bfloat16.
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half);
}  // namespace emulation
template <int pending>
void cp_async_wait() {
  emulation::cp_async_wait(pending);
}

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row);

template <class T>
void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
                  uint32_t b1) {
  float d[4] = {d0, d1, d2, d3};
  emulation::mma(d, a, b0, b1, std::is_same_v<T, __half>);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

inline float reciprocal_approx(float x) { return 1 / x; }

template <class T>
uint32_t pack_pair(float low, float high) {
  const T values[2] = {T(low), T(high)};
  return __bit_cast<uint32_t>(Pack<T, 2>{values[0], values[1]});
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float max_or_nan(float x, float y) { return x != x || x > y ? x : y; }

}  // namespace mmfast

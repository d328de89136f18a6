// csrc/cuda/hopper.cuh in plain C++ (hopper.cpp). Bulk copies and products are complete at once or as late as
// they may be, by chance, so that a missing wait and a stage given back too early both show. Products
// find their operands by the descriptors, as the PTX manual's canonical layouts say.
#pragma once

#include "tensor_core.h"

namespace mmfast {

void mbarrier_init(uint32_t barrier, int arrivals);
inline void mbarrier_fence() {}
void mbarrier_arrive(uint32_t barrier);
void mbarrier_expect(uint32_t barrier, int bytes);
void mbarrier_wait(uint32_t barrier, int parity);
void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier);

inline void named_barrier_sync(int id, int threads) { emulation::barrier(id, threads); }
inline void named_barrier_arrive(int id, int threads) { emulation::barrier_arrive(id, threads); }

template <int registers>
void warpgroup_reg_dealloc() {}
template <int registers>
void warpgroup_reg_alloc() {}

void wgmma_fence();
void wgmma_commit();
namespace emulation {
void wgmma_wait(int pending);
struct Product {
  float* d;
  int columns;
  uint64_t a, b;  // descriptors
  bool is_weighted, accumulates, is_half;
  float rows[2][16];  // of a, if from registers
};
void begin_product(Product product, const uint32_t* p);
}  // namespace emulation
template <int pending>
void wgmma_wait() {
  emulation::wgmma_wait(pending);
}
template <int n>
void warpgroup_fence_operand(float (&)[n]) {}
inline uint32_t kept(uint32_t value) { return value; }
inline void schedule_barrier(float) {}

template <class T, int n>
struct Wgmma {
  static constexpr bool is_half = std::is_same_v<T, __half>;
  static void scores(float (&d)[n / 2], uint64_t queries, uint64_t keys, int accumulate) {
    emulation::begin_product({d, n, queries, keys, false, accumulate != 0, is_half, {}}, nullptr);
  }
  static void weighted(float (&d)[n / 2], const uint32_t (&p)[4], uint64_t keys) {
    emulation::begin_product({d, n, 0, keys, true, true, is_half, {}}, p);
  }
};

}  // namespace mmfast

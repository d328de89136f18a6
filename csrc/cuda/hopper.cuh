// PTX of sm_90a: barriers in shared memory, bulk copies that complete on them, products of a warpgroup.
// Each function is one instruction; the tests run the same names as plain C++.
#pragma once

#include "tensor_core.cuh"

#ifdef MMFAST_EMULATED
#include "hopper.h"
#else

namespace mmfast {

// A barrier of 64 bits. Its phase ends when so many arrivals and all announced bytes have come.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Shows what was initialised to the copy engine; threads still need a barrier.
__device__ __forceinline__ void mbarrier_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and announces bytes.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of a phase of this parity: the first phase is 0, and before it 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Copies a multiple of 16 bytes into shared memory, which then count on the barrier.
__device__ __forceinline__ void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// Barriers 1 to 15 of a block, among so many threads; the second only arrives.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers of each of a warpgroup's threads from here on.
template <int registers>
__device__ __forceinline__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

// Before the first product of a group: orders it after what was done to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// No code: keeps reads and writes of accumulators on their side of a wait, which the compiler does not know
// to concern them.
template <int n>
__device__ __forceinline__ void warpgroup_fence_operand(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// No code: a value in a register, which the compiler would otherwise compute anew where it is used.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
// A loop that is never entered, on a value that is never negative: the assembler, which would put the wait
// that follows at the front of its block, has to leave it behind what computes the value.
__device__ __forceinline__ void schedule_barrier(float x) {
  asm volatile(
      "{\n"
      ".reg .pred again;\n"
      "again_%=: setp.lt.f32 again, %0, 0f00000000;\n"
      "@again nanosleep.u32 1;\n"
      "@again bra again_%=;\n"
      "}" ::"f"(x)
      : "memory");
}

// Products of a warpgroup, d [64, n] in float32, begun here and complete after a wait. Each warp has 16 rows,
// laid out as those of mma_m16n8k16, eight columns after eight.
//   scores: d (+)= q k^T, 16 columns of q [64, ..] and k [n, ..], both in shared memory.
//   weighted: d += p k, p [64, 16] in registers as mma_m16n8k16 has it, k [16, n] in shared memory.
template <class T, int n>
struct Wgmma;

#define MMFAST_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MMFAST_REGISTERS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MMFAST_REGISTERS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MMFAST_REGISTERS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMFAST_REGISTERS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MMFAST_REGISTERS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MMFAST_REGISTERS_6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MMFAST_REGISTERS_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MMFAST_REGISTERS_64 MMFAST_REGISTERS_0 ", " MMFAST_REGISTERS_1
#define MMFAST_REGISTERS_96 MMFAST_REGISTERS_64 ", " MMFAST_REGISTERS_2
#define MMFAST_REGISTERS_128 MMFAST_REGISTERS_96 ", " MMFAST_REGISTERS_3
#define MMFAST_REGISTERS_256                                                                   \
  MMFAST_REGISTERS_128 ", " MMFAST_REGISTERS_4 ", " MMFAST_REGISTERS_5 ", " MMFAST_REGISTERS_6 \
                       ", " MMFAST_REGISTERS_7
#define MMFAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MMFAST_D16(i) MMFAST_D4(i), MMFAST_D4(i + 4), MMFAST_D4(i + 8), MMFAST_D4(i + 12)
#define MMFAST_D_64 MMFAST_D16(0), MMFAST_D16(16)
#define MMFAST_D_96 MMFAST_D_64, MMFAST_D16(32)
#define MMFAST_D_128 MMFAST_D_96, MMFAST_D16(48)
#define MMFAST_D_256 MMFAST_D_128, MMFAST_D16(64), MMFAST_D16(80), MMFAST_D16(96), MMFAST_D16(112)

// Operands are numbered after the accumulators: the descriptors and the predicate of accumulating, or the
// registers p and the descriptor. The last immediates of an instruction say of its operands in shared memory
// whether they are transposed.
#define MMFAST_WGMMA_SCORES(n, type, a, b, more)                                                            \
  asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %" more ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." type "." type " {" MMFAST_REGISTERS_##n "}, %" a ", %" b ", more, 1, 1, 0, 0;\n}" \
               : MMFAST_D_##n                                                                               \
               : "l"(queries), "l"(keys), "r"(accumulate))
#define MMFAST_WGMMA_WEIGHTED(n, type, p0, p1, p2, p3, b)                                       \
  asm volatile(                                                                                 \
      "{\n.reg .pred more;\nsetp.ne.b32 more, 1, 0;\n"                                          \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MMFAST_REGISTERS_##n \
      "}, {%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" b ", more, 1, 1, 1;\n}"                      \
      : MMFAST_D_##n                                                                            \
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(keys))
#define MMFAST_WGMMA(n, i0, i1, i2, i3, i4)                                                           \
  template <class T>                                                                                  \
  struct Wgmma<T, n> {                                                                                \
    static __device__ __forceinline__ void scores(float (&d)[n / 2], uint64_t queries, uint64_t keys, \
                                                  int accumulate) {                                   \
      if constexpr (std::is_same_v<T, __half>) {                                                      \
        MMFAST_WGMMA_SCORES(n, "f16", i0, i1, i2);                                                    \
      } else {                                                                                        \
        MMFAST_WGMMA_SCORES(n, "bf16", i0, i1, i2);                                                   \
      }                                                                                               \
    }                                                                                                 \
    static __device__ __forceinline__ void weighted(float (&d)[n / 2], const uint32_t (&p)[4],        \
                                                    uint64_t keys) {                                  \
      if constexpr (std::is_same_v<T, __half>) {                                                      \
        MMFAST_WGMMA_WEIGHTED(n, "f16", i0, i1, i2, i3, i4);                                          \
      } else {                                                                                        \
        MMFAST_WGMMA_WEIGHTED(n, "bf16", i0, i1, i2, i3, i4);                                         \
      }                                                                                               \
    }                                                                                                 \
  }
MMFAST_WGMMA(64, "32", "33", "34", "35", "36");
MMFAST_WGMMA(96, "48", "49", "50", "51", "52");
MMFAST_WGMMA(128, "64", "65", "66", "67", "68");
MMFAST_WGMMA(256, "128", "129", "130", "131", "132");
#undef MMFAST_WGMMA
#undef MMFAST_WGMMA_SCORES
#undef MMFAST_WGMMA_WEIGHTED

}  // namespace mmfast

#endif

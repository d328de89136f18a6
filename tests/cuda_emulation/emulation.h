// Runs CUDA C++ kernels on a CPU, for tests only: csrc/cuda/*.cu compiled as C++ with MMFAST_EMULATED
// defined.
//
// The threads of a block are fibers that run, in shuffled order, up to their next barrier or warp operation;
// in most blocks one thread or one warp moves only when no other can. Blocks run one after the other, in
// shuffled order. What a missing barrier leaves unwritten is then read as poison, what it lets be written
// too early is overwritten: shared memory begins every block filled with 0xff, a NaN in every floating dtype.
// Every access to memory is checked (emulation.cpp): inside a tensor the caller showed, inside shared memory,
// or on the fiber's own stack, and aligned as its type is. Shared memory is limited to what the smallest GPU
// of the compute capability in force gives a block. What a kernel needs of CUDA is declared here, and nothing
// else; a name that is missing does not compile.
//
// Not emulated: threads of a warp do not run in lockstep (no kernel may count on it), memory is sequentially
// consistent (a missing fence does not show), and nothing here says how fast a kernel is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static_assert(false, "shared memory is declared by MMFAST_SHARED");

// No macro of CUDA's name: GCC's own headers, from 13 on, name the attribute so.
#define MMFAST_NOINLINE __attribute__((noinline))
#define MMFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::mmfast::emulation::launch(#kernel, grid, block, shared_bytes, kernel, __VA_ARGS__)
// A lambda's static is one per instantiation of the template around it, and so names the array.
#define MMFAST_SHARED(type, name, ...)                                                 \
  typedef type name##_array __VA_ARGS__;                                               \
  name##_array& name = *static_cast<name##_array*>(::mmfast::emulation::shared_memory( \
      []() -> const void* {                                                            \
        static char key;                                                               \
        return &key;                                                                   \
      }(),                                                                             \
      sizeof(name##_array), alignof(name##_array)))
#define MMFAST_DYNAMIC_SHARED(name) unsigned char* const name = ::mmfast::emulation::dynamic_shared_memory()

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace mmfast::emulation {

// Puts the calling fiber to sleep until is_ready(argument).
void block_until(bool (*is_ready)(void*), void* argument);

template <class Ready>
void wait_until(Ready&& is_ready) {
  using Function = std::remove_reference_t<Ready>;
  block_until([](void* function) { return static_cast<bool>((*static_cast<Function*>(function))()); },
              &is_ready);
}

// Stops the kernel: the launch throws std::runtime_error with the kernel's name, block, thread and this text.
[[noreturn]] void fail(const char* text);

void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment);
unsigned char* dynamic_shared_memory();

// Waits for `num_threads` threads of the block at barrier `id`; for all that have not returned if it is 0.
void barrier(int id, int num_threads);
// Counts this thread at barrier `id` and goes on.
void barrier_arrive(int id, int num_threads);

// Gathers `bytes` of every lane of `mask`: [32] values of kLaneBytes each, poison from lanes outside.
constexpr int kLaneBytes = 64;
const unsigned char* gather_bytes(unsigned mask, const void* mine, std::size_t bytes);

template <class T>
struct Lanes {
  const unsigned char* bytes;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, bytes + lane * kLaneBytes, sizeof value);
    return value;
  }
};

template <class T>
Lanes<T> gather(unsigned mask, const T& mine) {
  static_assert(sizeof(T) <= kLaneBytes, "too much for a lane");
  return {gather_bytes(mask, &mine, sizeof mine)};
}

int lane();
// Goes up with every block of every launch.
int64_t block_number();

using Body = void (*)(void* arguments);
void run(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, Body body, void* arguments,
         std::size_t arguments_bytes);

template <class... P, class... A>
void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, void (*kernel)(P...),
            A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> values;
  } call{kernel, std::tuple<P...>(static_cast<P>(arguments)...)};
  run(
      name, grid, block, shared_bytes,
      [](void* self) { std::apply(static_cast<Call*>(self)->kernel, static_cast<Call*>(self)->values); },
      &call, sizeof call);
}

}  // namespace mmfast::emulation

// Barriers, votes and exchanges.
inline void __syncthreads() { mmfast::emulation::barrier(0, 0); }
inline void __syncwarp(unsigned mask = ~0u) { mmfast::emulation::gather(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = mmfast::emulation::lane() / width * width;
  return mmfast::emulation::gather(mask, value)[base + source % width];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = mmfast::emulation::lane(), source = lane ^ distance;
  return mmfast::emulation::gather(mask, value)[source / width <= lane / width ? source : lane];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = mmfast::emulation::lane(), source = lane - static_cast<int>(distance);
  return mmfast::emulation::gather(mask, value)[source >= lane / width * width ? source : lane];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto votes = mmfast::emulation::gather(mask, predicate != 0);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= (mask >> lane & 1 && votes[lane]) ? 1u << lane : 0u;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto values = mmfast::emulation::gather(mask, value);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane)
    result |= (mask >> lane & 1 && values[lane] == value) ? 1u << lane : 0u;
  return result;
}
// Fibers are not interrupted, so a plain operation is atomic.
template <class T, class V>
T atomicAdd(T* address, V value) {
  const T old = *address;
  *address = old + static_cast<T>(value);
  return old;
}
// Arithmetic.
template <class A, class B>
auto min(A a, B b) -> std::common_type_t<A, B> {
  return b < a ? b : a;
}
template <class A, class B>
auto max(A a, B b) -> std::common_type_t<A, B> {
  return a < b ? b : a;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class To, class From>
To __bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline int __float_as_int(float x) { return __bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return __bit_cast<float>(x); }
inline float __int_as_float(int x) { return __bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return __bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return __bit_cast<double>(x); }

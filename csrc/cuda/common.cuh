// What the CUDA ops share: dtypes, the device guard and checked calls.
#pragma once

#ifdef MMFAST_EMULATED
// Run on a CPU by the tests: tests/cuda_emulation.
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A launch and the memory a block shares, in a form that a C++ compiler can be given, too.
#define MMFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define MMFAST_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define MMFAST_NOINLINE __noinline__
#define MMFAST_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "codes.h"
#include "integers.h"
#include "registry.h"

namespace mmfast {

constexpr int kWarp = 32;

// The type sums are kept in.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements that are loaded or stored by one instruction, or by several of 16 bytes.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T values[n];
};

template <int n, class T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, n>*>(source);
}
template <class T, int n>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(target) = pack;
}
template <class T, int n>
bool is_aligned_for_packs(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(Pack<T, n>) == 0;
}

inline void check_cuda(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  // What is raised here is not left for the next call to find.
  cudaGetLastError();
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Where a call runs, as mmfast.backend.stream_of gives it.
struct Stream {
  int64_t device;
  void* handle;  // cudaStream_t
};

inline int device_attribute(const char* op, cudaDeviceAttr attribute, int64_t device) {
  int value = 0;
  check_cuda(op, cudaDeviceGetAttribute(&value, attribute, static_cast<int>(device)));
  return value;
}

// Lets blocks of `kernel` have so much dynamic shared memory; 48 KiB are granted without asking.
template <class Kernel>
void allow_shared_memory(const char* op, Kernel* kernel, int64_t bytes) {
  check_cuda(
      op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Blocks of a grid that take `per_block` of n items each.
inline unsigned grid_blocks(int64_t n, int64_t per_block) {
  return static_cast<unsigned>(ceil_div(n, per_block));
}

// Makes `device` current for a scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int64_t wanted) {
    const int device = static_cast<int>(wanted);
    check_cuda(op, cudaGetDevice(&previous_));
    if (previous_ == device) previous_ = -1;
    if (previous_ >= 0) check_cuda(op, cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

// Calls function(pointer to T) for the type behind a dtype.
template <class Function>
void dispatch_dtype(const char* op, Dtype dtype, Function&& function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(static_cast<float*>(nullptr));
    case Dtype::kFloat64:
      return function(static_cast<double*>(nullptr));
    case Dtype::kBFloat16:
      return function(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::kFloat16:
      return function(static_cast<__half*>(nullptr));
    default:
      throw std::invalid_argument(std::string(op) + ": unknown dtype code " +
                                  std::to_string(static_cast<int64_t>(dtype)));
  }
}

}  // namespace mmfast

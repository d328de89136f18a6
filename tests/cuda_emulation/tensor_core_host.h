// What tensor_core.cpp and hopper.cpp share.
#pragma once

#include "tensor_core.h"

extern "C" void __tsan_read_range(void* address, std::size_t bytes);
extern "C" void __tsan_write_range(void* address, std::size_t bytes);

namespace mmfast::emulation {

inline unsigned char* shared_pointer(uint32_t address) { return dynamic_shared_memory() + address; }

// Whether what may be complete at once or later is so at once.
inline bool coin() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 31;
}

inline float half_of(uint32_t pair, int index, bool is_half) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * index);
  return is_half ? static_cast<float>(__bit_cast<__half>(bits))
                 : static_cast<float>(__bit_cast<__nv_bfloat16>(bits));
}

}  // namespace mmfast::emulation

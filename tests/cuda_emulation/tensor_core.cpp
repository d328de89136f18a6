// What tensor_core.h declares. Not compiled with the check of every access: each operand is announced whole.
#include "tensor_core.h"

#include <deque>
#include <utility>
#include <vector>

#include "tensor_core_host.h"

namespace mmfast {
namespace {

using namespace emulation;

void copy(uint32_t target, const void* source, std::size_t bytes) {
  __tsan_read_range(const_cast<void*>(source), bytes);
  __tsan_write_range(shared_pointer(target), bytes);
  std::memcpy(shared_pointer(target), source, bytes);
}

// What a thread has begun to copy and not waited for; the last group is open.
struct Copies {
  int64_t block = -1;
  std::deque<std::vector<std::pair<uint32_t, const void*>>> groups;
};

Copies& copies() {
  static Copies all[1024];
  Copies& mine = all[threadIdx.x];
  if (mine.block != block_number()) mine = {block_number(), {{}}};
  return mine;
}

void ldmatrix(uint32_t (&r)[4], uint32_t row, bool is_transposed) {
  const auto rows = gather(~0u, row);
  const int g = lane() / 4, t = lane() % 4;
  if (row % 16 != 0) fail("ldmatrix of a row at an address that is no multiple of 16");
  __tsan_read_range(shared_pointer(row), 16);
  for (int matrix = 0; matrix < 4; ++matrix) {
    r[matrix] = 0;
    for (int i = 0; i < 2; ++i) {
      const int from = is_transposed ? 2 * t + i : g, place = is_transposed ? g : 2 * t + i;
      uint16_t bits;
      std::memcpy(&bits, shared_pointer(rows[8 * matrix + from]) + 2 * place, 2);
      r[matrix] |= static_cast<uint32_t>(bits) << 16 * i;
    }
  }
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared_memory());
}

void cp_async_16(uint32_t target, const void* source) {
  if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0)
    fail("cp.async of 16 bytes at an address that is no multiple of 16");
  if (coin()) {
    copy(target, source, 16);
  } else {
    copies().groups.back().emplace_back(target, source);
  }
}

void cp_async_commit() { copies().groups.emplace_back(); }

void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { ldmatrix(r, row, false); }
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { ldmatrix(r, row, true); }

namespace emulation {

void cp_async_wait(int pending) {
  auto& groups = copies().groups;
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const auto& [target, source] : groups.front()) copy(target, source, 16);
    groups.pop_front();
  }
}

void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_half) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const auto lanes = gather(~0u, Registers{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = lane() / 4, t = lane() % 4;
  for (int k = 0; k < 16; k += 2) {
    const Registers row = lanes[4 * g + k % 8 / 2];
    const Registers columns[2] = {lanes[8 * t + k % 8 / 2], lanes[8 * t + 4 + k % 8 / 2]};
    for (int e = 0; e < 2; ++e) {
      for (int c = 0; c < 2; ++c) {
        const float b = half_of(columns[c].b[k / 8], e, is_half);
        for (int h = 0; h < 2; ++h) d[2 * h + c] += half_of(row.a[2 * (k / 8) + h], e, is_half) * b;
      }
    }
  }
}

}  // namespace emulation
}  // namespace mmfast

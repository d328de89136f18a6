// What hopper.h declares. Not compiled with the check of every access: each operand is announced whole.
#include "hopper.h"

#include <deque>
#include <map>
#include <vector>

#include "tensor_core_host.h"

namespace mmfast {
namespace {

using namespace emulation;

constexpr int kSteps = 16;

// The barriers of the running block, by their addresses.
struct Phase {
  int arrivals, pending, bytes;
  int64_t number;

  void advance() {
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    ++number;
  }
};
struct BulkCopy {
  uint32_t target;
  const void* source;
  std::size_t bytes;
  uint32_t barrier;
};
struct Block {
  int64_t number = -1;
  std::map<uint32_t, Phase> phases;
  std::deque<BulkCopy> copies;
};

Block& block() {
  static Block current;
  if (current.number != block_number()) current = {block_number(), {}, {}};
  return current;
}

Phase& phase(uint32_t barrier) {
  const auto found = block().phases.find(barrier);
  if (found == block().phases.end()) fail("an mbarrier that was not initialised");
  return found->second;
}

void land(const BulkCopy& copy) {
  std::memcpy(shared_pointer(copy.target), copy.source, copy.bytes);
  Phase& landed = block().phases.at(copy.barrier);
  landed.bytes -= static_cast<int>(copy.bytes);
  landed.advance();
}

void land_all(uint32_t barrier) {
  auto& copies = block().copies;
  for (auto copy = copies.begin(); copy != copies.end();) {
    if (copy->barrier == barrier) {
      land(*copy);
      copy = copies.erase(copy);
    } else {
      ++copy;
    }
  }
}

// Products a thread has begun and not waited for; the last group is open.
struct Products {
  int64_t block = -1;
  bool is_fenced = false;
  std::deque<std::vector<Product>> groups;
};

Products& products() {
  static Products all[1024];
  Products& mine = all[threadIdx.x];
  if (mine.block != block_number()) mine = {block_number(), false, {{}}};
  return mine;
}

// Element (row, k) of a K-major operand: ((8, m), (8, 2)) : ((64, stride), (1, 8)) in elements of 16 bits,
// or (column, k) of an MN-major one: ((8, 8, m), (8, k)) : ((1, 8, leading), (64, stride)); then bits 4-6 of
// the address are changed by bits 7-9.
float element(uint64_t descriptor, int row, int k, bool is_mn_major, bool is_half) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) fail("not a descriptor of 128-byte swizzle");
  uint32_t address = field(0);
  if (is_mn_major) {
    address += row % 64 * 2 + row / 64 * field(16) + k % 8 * 128 + k / 8 * field(32);
  } else {
    address += row % 8 * 128 + row / 8 * field(32) + k * 2;
  }
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  __tsan_read_range(shared_pointer(address), 2);
  std::memcpy(&bits, shared_pointer(address), 2);
  return half_of(bits, 0, is_half);
}

void compute(const Product& product) {
  const int thread = threadIdx.x % 128, g = thread % 32 / 4, t = thread % 4, first_row = thread / 32 * 16 + g;
  float rows[2][kSteps];
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < kSteps; ++k) {
      rows[h][k] = product.is_weighted ? product.rows[h][k]
                                       : element(product.a, first_row + 8 * h, k, false, product.is_half);
    }
  }
  for (int i = 0; i < product.columns / 4; ++i) {
    const int column = i / 2 * 8 + 2 * t + i % 2;
    float sums[2] = {};
    for (int k = 0; k < kSteps; ++k) {
      const float b = element(product.b, column, k, product.is_weighted, product.is_half);
      for (int h = 0; h < 2; ++h) sums[h] += rows[h][k] * b;
    }
    for (int h = 0; h < 2; ++h) {
      float& d = product.d[i / 2 * 4 + 2 * h + i % 2];
      d = product.accumulates ? d + sums[h] : sums[h];
    }
  }
}

}  // namespace

void mbarrier_init(uint32_t barrier, int arrivals) {
  if (barrier % 8 != 0) fail("an mbarrier at an address that is no multiple of 8");
  block().phases[barrier] = {arrivals, arrivals, 0, 0};
}

void mbarrier_arrive(uint32_t barrier) {
  Phase& arrived = phase(barrier);
  if (--arrived.pending < 0) fail("more arrivals at an mbarrier than its phase takes");
  arrived.advance();
}

void mbarrier_expect(uint32_t barrier, int bytes) {
  phase(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}

void mbarrier_wait(uint32_t barrier, int parity) {
  const Phase& awaited = phase(barrier);
  wait_until([&] {
    if (coin()) land_all(barrier);
    return (awaited.number & 1) != parity;
  });
}

void bulk_copy(uint32_t target, const void* source, int bytes, uint32_t barrier) {
  if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || bytes % 16 != 0)
    fail("a bulk copy of addresses or bytes that are no multiple of 16");
  __tsan_read_range(const_cast<void*>(source), bytes);
  __tsan_write_range(shared_pointer(target), bytes);
  phase(barrier);
  const BulkCopy copy{target, source, static_cast<std::size_t>(bytes), barrier};
  if (coin()) {
    land(copy);
  } else {
    block().copies.push_back(copy);
  }
}

void wgmma_fence() { products().is_fenced = true; }
void wgmma_commit() { products().groups.emplace_back(); }

namespace emulation {

void wgmma_wait(int pending) {
  Products& mine = products();
  mine.is_fenced = false;
  while (static_cast<int>(mine.groups.size()) > pending + 1) {
    for (const Product& product : mine.groups.front()) compute(product);
    mine.groups.pop_front();
  }
  // A warp waits as one: a lane may then speak for all.
  gather(~0u, 0);
}

void begin_product(Product product, const uint32_t* p) {
  if (p != nullptr) {
    struct Registers {
      uint32_t p[4];
    };
    const auto lanes = gather(~0u, Registers{{p[0], p[1], p[2], p[3]}});
    for (int k = 0; k < kSteps; ++k) {
      const Registers from = lanes[lane() / 4 * 4 + k % 8 / 2];
      for (int h = 0; h < 2; ++h) product.rows[h][k] = half_of(from.p[k / 8 * 2 + h], k % 2, product.is_half);
    }
  }
  Products& mine = products();
  if (!mine.is_fenced) fail("wgmma without a fence since the last wait");
  // In order: at once only if nothing that was begun is still to be computed.
  bool is_first = true;
  for (const auto& group : mine.groups) is_first = is_first && group.empty();
  if (is_first && coin()) {
    compute(product);
  } else {
    mine.groups.back().push_back(product);
  }
}

}  // namespace emulation
}  // namespace mmfast

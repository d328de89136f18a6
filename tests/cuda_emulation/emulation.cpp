// The part of the emulation that kernels are compiled against but not with: fibers, barriers, the check of
// every access, and the calls from Python (tests/support/emulation.py).
//
// Kernels are compiled with -fsanitize=thread but linked without its library: the compiler then calls
// __tsan_read4 and its like before every access to memory that is not a plain local variable, and those are
// here.
#include "emulation.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "integers.h"
#include "registry.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The ends of this library in memory, and of the records of its ops: set by the linker.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __start_mmfast_ops[];
extern "C" __attribute__((weak, visibility("hidden"))) const mmfast::Entry* const __stop_mmfast_ops[];

namespace mmfast::emulation {
namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kMasks = 8, kBarriers = 16;
constexpr std::size_t kStack = 256 << 10, kGuard = 4096, kShared = 227 << 10, kSharedByDefault = 48 << 10;
// What a block may ask for on the smallest GPU of compute capability 8, and so on that of 12.
constexpr std::size_t kSharedBefore90 = 99 << 10;
constexpr unsigned char kPoison = 0xff;
constexpr std::size_t kPoisonedStack = 8 << 10;

struct Fiber {
  unsigned char* stack = nullptr;
  jmp_buf here;
  bool is_started = false, is_done = false;
  bool (*is_ready)(void*) = nullptr;
  void* argument = nullptr;
  uint3 index{};
};

struct Range {
  const unsigned char* begin;
  std::size_t bytes;
  bool contains(const void* address, std::size_t n) const {
    const auto offset = static_cast<std::size_t>(static_cast<const unsigned char*>(address) - begin);
    return offset < bytes && n <= bytes - offset;
  }
};

struct Barrier {
  int64_t generation;
  int arrived;
};

// The lanes that meet under one mask. Two turns of values: the next turn begins while lanes still read this
// one.
struct Meeting {
  unsigned mask, arrived;
  int64_t turn;
  unsigned char values[2][kWarp * kLaneBytes];
};

std::vector<Fiber> fibers;
std::vector<Range> tensors;
std::map<const void*, Range> shared_arrays;
std::map<const void*, std::size_t> allowed_shared;
Barrier barriers[kBarriers];
Meeting meetings[kMaxThreads / kWarp][kMasks];
alignas(1024) unsigned char shared_bytes[kShared];
// static_bytes: of the arrays alone, without the gaps between them.
std::size_t dynamic_bytes, static_bytes, shared_used, shared_limit;
Range arguments_range;
Body body;
void* body_arguments;
const char* kernel_name = "";
int num_threads, num_running, current = -1, capability = 8, multiprocessors = 2;
int64_t num_blocks;
jmp_buf scheduler;
ucontext_t scheduler_context;
std::string failure;
cudaError_t last_error = cudaSuccess;
std::mt19937 order_source;
std::mutex one_launch;

std::size_t shared_of_device() { return capability == 9 ? kShared : kSharedBefore90; }

void complete(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

[[noreturn]] void leave(Fiber& fiber) {
  if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
  __builtin_unreachable();
}

// What a kernel leaves uninitialised among its local variables is read as poison, too.
__attribute__((noinline)) void poison_stack() {
  unsigned char below[kPoisonedStack];
  std::memset(below, kPoison, sizeof below);
  // Not to be left out as without effect.
  asm volatile("" ::"r"(below) : "memory");
}

void fiber_main() {
  for (;;) {
    poison_stack();
    body(body_arguments);
    Fiber& fiber = fibers[current];
    fiber.is_done = true;
    --num_running;
    // Threads that have returned are not waited for.
    if (barriers[0].arrived > 0 && barriers[0].arrived == num_running) complete(barriers[0]);
    if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
  }
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.is_started) _longjmp(fiber.here, 1);
    fiber.is_started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    swapcontext(&scheduler_context, &context);
  }
  current = -1;
  if (failure.empty()) return;
  // What stands on the fibers' stacks is given up.
  for (Fiber& each : fibers) each.is_started = false;
  throw std::runtime_error(std::exchange(failure, {}));
}

void make_fibers() {
  while (static_cast<int>(fibers.size()) < num_threads) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    fibers.emplace_back().stack = static_cast<unsigned char*>(memory) + kGuard;
  }
}

// The threads of a block that move only when no other can: none, one, or a warp. The others overtake them as
// far as barriers let them, so what is written too early shows, too.
struct Last {
  int first = 0, count = 0;

  Last() {
    const unsigned kind = order_source() % 3, pick = order_source();
    if (kind == 1) first = static_cast<int>(pick % num_threads), count = 1;
    if (kind == 2) first = static_cast<int>(pick % num_threads / kWarp * kWarp), count = kWarp;
  }
  bool contains(int thread) const { return thread >= first && thread < first + count; }
};

// Resumes every fiber that can go on among the last or among the others; returns whether there was one.
bool run_ready(const std::vector<int>& order, const Last& last, bool are_last) {
  bool has_moved = false;
  for (const int t : order) {
    Fiber& fiber = fibers[t];
    if (last.contains(t) != are_last || fiber.is_done) continue;
    if (fiber.is_ready != nullptr && !fiber.is_ready(fiber.argument)) continue;
    fiber.is_ready = nullptr;
    resume(t);
    has_moved = true;
  }
  return has_moved;
}

void run_block() {
  std::memset(shared_bytes, kPoison, std::max(dynamic_bytes, shared_used));
  shared_used = round_up(dynamic_bytes, 1024);
  static_bytes = 0;
  shared_arrays.clear();
  std::memset(barriers, 0, sizeof barriers);
  for (auto& warp : meetings)
    for (Meeting& meeting : warp) meeting.mask = meeting.arrived = 0;
  num_running = num_threads;
  ++num_blocks;
  for (int t = 0; t < num_threads; ++t) {
    const auto i = static_cast<unsigned>(t);
    fibers[t].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fibers[t].is_done = false;
    fibers[t].is_ready = nullptr;
  }
  std::vector<int> order(num_threads);
  std::iota(order.begin(), order.end(), 0);
  const Last last;
  while (num_running > 0) {
    std::shuffle(order.begin(), order.end(), order_source);
    if (!run_ready(order, last, false) && !run_ready(order, last, true)) {
      for (Fiber& fiber : fibers) fiber.is_started = false;
      throw std::runtime_error(std::string(kernel_name) + ": " + std::to_string(num_running) + " of " +
                               std::to_string(num_threads) + " threads wait for ever");
    }
  }
}

void check(const void* address, std::size_t bytes, const char* verb) {
  if (current < 0) return;
  if (Range{fibers[current].stack, kStack}.contains(address, bytes) ||
      arguments_range.contains(address, bytes))
    return;
  const Range shared{shared_bytes, kShared};
  if (shared.contains(address, bytes)) {
    if (Range{shared_bytes, dynamic_bytes}.contains(address, bytes)) return;
    for (const auto& [key, array] : shared_arrays)
      if (array.contains(address, bytes)) return;
  } else if (Range{reinterpret_cast<const unsigned char*>(&__ehdr_start),
                   static_cast<std::size_t>(&_end - &__ehdr_start)}
                 .contains(address, bytes)) {
    return;
  }
  for (Range& tensor : tensors) {
    if (!tensor.contains(address, bytes)) continue;
    // The next access is likely to fall into the same one.
    std::swap(tensor, tensors.front());
    return;
  }
  char text[160];
  std::snprintf(text, sizeof text, "%s %zu bytes at %p, outside every tensor and array", verb, bytes,
                address);
  fail(text);
}

}  // namespace

void block_until(bool (*is_ready)(void*), void* argument) {
  if (is_ready(argument)) return;
  Fiber& fiber = fibers[current];
  fiber.is_ready = is_ready;
  fiber.argument = argument;
  if (_setjmp(fiber.here) == 0) _longjmp(scheduler, 1);
}

void fail(const char* text) {
  const auto at = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  failure = std::string(kernel_name) + ": block " + at(blockIdx) + ", thread " + at(threadIdx) + ": " + text;
  leave(fibers[current]);
}

void* shared_memory(const void* key, std::size_t bytes, std::size_t alignment) {
  const auto found = shared_arrays.find(key);
  if (found != shared_arrays.end()) return const_cast<unsigned char*>(found->second.begin);
  // A gap of poison between arrays.
  const std::size_t begin = round_up(shared_used, alignment);
  static_bytes = round_up(static_bytes, alignment) + bytes;
  // Dynamic memory lies behind the arrays, at a multiple of 1,024.
  const std::size_t behind = dynamic_bytes == 0 ? static_bytes : round_up(static_bytes, 1024);
  if (behind + dynamic_bytes > shared_limit || begin + bytes > kShared)
    fail("more shared memory than the block may have");
  shared_used = begin + bytes + 1;
  shared_arrays[key] = {shared_bytes + begin, bytes};
  return shared_bytes + begin;
}

unsigned char* dynamic_shared_memory() { return shared_bytes; }

int lane() { return current % kWarp; }

int64_t block_number() { return num_blocks; }

void barrier(int id, int count) {
  Barrier& barrier = barriers[id];
  const int64_t generation = barrier.generation;
  const int expected = count == 0 ? num_running : count;
  if (++barrier.arrived == expected) {
    complete(barrier);
  } else {
    wait_until([&] { return barrier.generation != generation; });
  }
}

void barrier_arrive(int id, int count) {
  if (++barriers[id].arrived == count) complete(barriers[id]);
}

const unsigned char* gather_bytes(unsigned mask, const void* mine, std::size_t bytes) {
  const int warp = current / kWarp, lanes = std::min(kWarp, num_threads - warp * kWarp);
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if (!(mask >> lane() & 1)) fail("a lane takes part in a warp's operation whose mask does not name it");
  Meeting* meeting = meetings[warp];
  while (meeting->mask != mask && meeting->mask != 0) {
    if (++meeting == meetings[warp] + kMasks) fail("more masks in one warp than the emulation keeps");
  }
  if (meeting->mask == 0) *meeting = {mask, 0, 0, {}};
  if (meeting->arrived == 0)
    std::memset(meeting->values[meeting->turn & 1], kPoison, sizeof meeting->values[0]);
  const int64_t turn = meeting->turn;
  unsigned char* values = meeting->values[turn & 1];
  std::memcpy(values + lane() * kLaneBytes, mine, bytes);
  meeting->arrived |= 1u << lane();
  if (meeting->arrived == mask) {
    meeting->arrived = 0;
    ++meeting->turn;
  } else {
    wait_until([&] { return meeting->turn != turn; });
  }
  return values;
}

void run(const char* name, dim3 grid, dim3 block, std::size_t bytes, Body kernel, void* arguments,
         std::size_t arguments_bytes) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const int64_t threads = int64_t{1} * block.x * block.y * block.z,
                blocks = int64_t{1} * grid.x * grid.y * grid.z;
  const void* function = *static_cast<const void* const*>(arguments);
  const auto allowed = allowed_shared.find(function);
  shared_limit = allowed == allowed_shared.end() ? kSharedByDefault : shared_of_device();
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.y > 65535 || grid.z > 65535 ||
      bytes > (allowed == allowed_shared.end() ? kSharedByDefault : allowed->second)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  kernel_name = name, body = kernel, body_arguments = arguments;
  arguments_range = {static_cast<const unsigned char*>(arguments), arguments_bytes};
  blockDim = block, gridDim = grid, num_threads = static_cast<int>(threads), dynamic_bytes = bytes;
  make_fibers();
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), order_source);
  for (const int64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
  }
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > shared_of_device()) return cudaErrorInvalidValue;
  allowed_shared[kernel] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

}  // namespace mmfast::emulation

using namespace mmfast::emulation;

const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess             ? "no error"
         : status == cudaErrorInvalidValue ? "invalid argument"
                                           : "invalid configuration argument";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? multiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? capability
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* target, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(target, value, bytes), cudaSuccess;
}

extern "C" {

#define MMFAST_ACCESS(n)                                                        \
  void __tsan_read##n(void* address) { check(address, n, "reads"); }            \
  void __tsan_write##n(void* address) { check(address, n, "writes"); }          \
  void __tsan_volatile_read##n(void* address) { check(address, n, "reads"); }   \
  void __tsan_volatile_write##n(void* address) { check(address, n, "writes"); } \
  void __tsan_unaligned_read##n(void* address) { check(address, n, "reads"); }  \
  void __tsan_unaligned_write##n(void* address) { check(address, n, "writes"); }
MMFAST_ACCESS(1)
MMFAST_ACCESS(2)
MMFAST_ACCESS(4)
MMFAST_ACCESS(8)
MMFAST_ACCESS(16)
void __tsan_read_range(void* address, std::size_t bytes) { check(address, bytes, "reads"); }
void __tsan_write_range(void* address, std::size_t bytes) { check(address, bytes, "writes"); }
void __tsan_init() {}
// What -fsanitize=alignment calls.
void __ubsan_handle_type_mismatch_v1(void*, void*) {
  if (current >= 0) fail("a pointer that is not aligned as its type is");
}

// What Python calls. The names and arguments of op `index`; nullptr behind the last.
__attribute__((visibility("default"))) const mmfast::Entry* mmfast_emulated_entry(int index) {
  return index < __stop_mmfast_ops - __start_mmfast_ops ? __start_mmfast_ops[index] : nullptr;
}

// Calls an op whose kernels may touch the `num_tensors` ranges [address, bytes]. Returns 0, or 1 for an
// invalid argument and 2 for another error, with its text.
__attribute__((visibility("default"))) int mmfast_emulated_call(
    const mmfast::Entry* entry, const mmfast::Argument* arguments, int64_t* results, const int64_t* ranges,
    int64_t num_tensors, int compute_capability, int num_sms, unsigned seed, char* text, int64_t text_size) {
  tensors.clear();
  for (int64_t i = 0; i < num_tensors; ++i) {
    tensors.push_back(
        {reinterpret_cast<const unsigned char*>(ranges[2 * i]), static_cast<std::size_t>(ranges[2 * i + 1])});
  }
  capability = compute_capability, multiprocessors = num_sms;
  order_source.seed(seed);
  try {
    entry->call(arguments, results);
    return 0;
  } catch (const std::invalid_argument& error) {
    return std::snprintf(text, text_size, "%s", error.what()), 1;
  } catch (const std::exception& error) {
    return std::snprintf(text, text_size, "%s", error.what()), 2;
  }
}

}  // extern "C"

// theta <- (1 - alpha) theta + alpha theta_0 over a list of tensors of any sizes and dtypes, in place.
//
// One launch for any list. A plan on the device holds a record for every 4 KiB of a tensor: both addresses,
// alpha (unless one for all comes with the launch), the number of elements and the dtype. A warp serves one
// record, so tensors of a few elements still fill the GPU. What alpha = 0 leaves alone has no record; alpha =
// 1 copies, and no bit passes through arithmetic. Vectors of 16 bytes where both tensors lie alike against 16
// bytes, the elements before the first and behind the last one by one. Floor: both tensors read and one
// written; the records add 0.3%.
#include <algorithm>

#include "codes.h"
#include "common.cuh"

namespace mmfast {
namespace {

constexpr int kBlock = 128, kWarps = kBlock / kWarp;
// Vectors of each of the two tensors that a lane has in flight.
constexpr int kBatch = 4;

// Part of a tensor; mmfast/ops/_partial_reinit_table.py writes these.
struct alignas(16) Piece {
  void* theta;
  const void* theta_0;
  double alpha;
  int32_t count, dtype;  // elements; code
};
static_assert(sizeof(Piece) == 32, "as mmfast/ops/_partial_reinit_table.py lays it out");
// Bytes of a tensor that a record stands for: whole turns of a warp.
constexpr int64_t kPieceBytes = 4096;
static_assert(kPieceBytes % (kBatch * kWarp * 16) == 0);

template <class T>
struct Blend {
  using A = accumulate_t<T>;
  A keep, pull;
  bool is_copy;

  __device__ explicit Blend(double alpha)
      : keep(static_cast<A>(1 - alpha)), pull(static_cast<A>(alpha)), is_copy(alpha == 1) {}

  __device__ T operator()(T value, T value_0) const {
    const T mixed = static_cast<T>(keep * static_cast<A>(value) + pull * static_cast<A>(value_0));
    // Chosen in the tensors' own type: no conversion touches the bits that alpha = 1 restores.
    return is_copy ? value_0 : mixed;
  }
};

// Says that an address which came out of memory leads to global memory.
template <class T>
__device__ T* in_global_memory(T* address) {
#ifndef MMFAST_EMULATED
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

template <class T>
__device__ void blend_piece(const Piece& piece, int lane) {
  constexpr int n = 16 / sizeof(T);
  using Vector = Pack<T, n>;
  T* const theta = in_global_memory(static_cast<T*>(piece.theta));
  const T* const theta_0 = in_global_memory(static_cast<const T*>(piece.theta_0));
  const Blend<T> blend(piece.alpha);

  // Elements before the first vector: all, where the tensors never lie on 16 bytes together.
  const auto offset = static_cast<int>(reinterpret_cast<uintptr_t>(theta) % 16);
  const auto offset_0 = static_cast<int>(reinterpret_cast<uintptr_t>(theta_0) % 16);
  const int to_vector = (16 - offset) % 16 / static_cast<int>(sizeof(T));
  const int head = offset == offset_0 ? min(to_vector, piece.count) : piece.count;
  const int num_vectors = (piece.count - head) / n;

  auto* const vectors = reinterpret_cast<Vector*>(theta + head);
  const auto* const vectors_0 = reinterpret_cast<const Vector*>(theta_0 + head);
  for (int start = lane; start < num_vectors; start += kBatch * kWarp) {
    Vector value[kBatch], value_0[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (start + b * kWarp >= num_vectors) continue;
      value[b] = vectors[start + b * kWarp];
      value_0[b] = vectors_0[start + b * kWarp];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (start + b * kWarp >= num_vectors) continue;
#pragma unroll
      for (int i = 0; i < n; ++i) value[b].values[i] = blend(value[b].values[i], value_0[b].values[i]);
      vectors[start + b * kWarp] = value[b];
    }
  }
  const int tail = head + num_vectors * n;
#pragma unroll 4
  for (int i = lane; i < piece.count - num_vectors * n; i += kWarp) {
    const int at = i < head ? i : tail + i - head;
    theta[at] = blend(theta[at], theta_0[at]);
  }
}

__global__ void __launch_bounds__(kBlock)
    partial_reinit_kernel(const Piece* __restrict__ pieces,  // [num_pieces]
                          int64_t num_pieces, double alpha) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= num_pieces) return;
  Piece piece = pieces[index];
  if (alpha >= 0) piece.alpha = alpha;
  const int lane = threadIdx.x % kWarp;
  switch (piece.dtype) {
    case static_cast<int32_t>(Dtype::kFloat32):
      return blend_piece<float>(piece, lane);
    case static_cast<int32_t>(Dtype::kFloat64):
      return blend_piece<double>(piece, lane);
    case static_cast<int32_t>(Dtype::kBFloat16):
      return blend_piece<__nv_bfloat16>(piece, lane);
    case static_cast<int32_t>(Dtype::kFloat16):
      return blend_piece<__half>(piece, lane);
  }
}

// How many bytes of a tensor Python's plan has a record for.
int64_t partial_reinit_piece_bytes() { return kPieceBytes; }

void partial_reinit(const Piece* pieces,  // [num_pieces] on the device
                    int64_t num_pieces,
                    double alpha,  // of all, above 0; below it: each record's own
                    Stream stream) {
  constexpr const char* op = "partial_reinit";
  if (num_pieces == 0) return;
  const DeviceGuard guard(op, stream.device);
  MMFAST_LAUNCH(partial_reinit_kernel, grid_blocks(num_pieces, kWarps), kBlock, 0, stream.handle, pieces,
                num_pieces, alpha);
  check_cuda(op, cudaGetLastError());
}

// Records among a kernel's arguments, which a captured graph keeps: 4 KiB is the limit of all arguments.
constexpr int kGiven = 120;
struct Given {
  Piece pieces[kGiven];
};

__global__ void __launch_bounds__(kBlock) partial_reinit_plan_kernel(const __grid_constant__ Given given,
                                                                     Piece* __restrict__ pieces,  // [count]
                                                                     int count) {
  const int i = threadIdx.x;
  if (i < count) pieces[i] = given.pieces[i];
}

// Writes a plan in a form that a graph can capture: nothing is read from the host when it is replayed.
void partial_reinit_write_plan(const Piece* records,  // [num_pieces] on the host
                               Piece* pieces,         // [num_pieces] on the device, written
                               int64_t num_pieces, Stream stream) {
  constexpr const char* op = "partial_reinit_write_plan";
  if (num_pieces == 0) return;
  const DeviceGuard guard(op, stream.device);
  for (int64_t first = 0; first < num_pieces; first += kGiven) {
    const auto count = static_cast<int>(std::min<int64_t>(num_pieces - first, kGiven));
    Given given{};
    std::copy(records + first, records + first + count, given.pieces);
    MMFAST_LAUNCH(partial_reinit_plan_kernel, 1, kBlock, 0, stream.handle, given, pieces + first, count);
    check_cuda(op, cudaGetLastError());
  }
}

MMFAST_REGISTER(partial_reinit_piece_bytes)
MMFAST_REGISTER(partial_reinit)
MMFAST_REGISTER(partial_reinit_write_plan)

}  // namespace
}  // namespace mmfast

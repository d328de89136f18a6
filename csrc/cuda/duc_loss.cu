// The dimension-decoupled unidirectional contrastive loss: loss and gradient of every ordered pair (m, n) in
// one sweep over the keys, as attention with values = keys.
#include <algorithm>

#include "duc_loss_mma.cuh"
#include "duc_loss_pack.cuh"
#include "duc_loss_plain.cuh"

namespace mmfast {
namespace {

using namespace duc;

constexpr const char* kOp = "duc_loss_fwd";
constexpr int64_t kRowMultiple = 128;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The whole call; the sizes of all that Python has taken memory for.
struct Call {
  Columns columns;
  Sweep sweep;
  const View* views;     // [M, 2] on the host
  const int64_t* sizes;  // [M, M] on the host, columns of each pair; nullptr: not known here
  int num_processors, capability;
  void* stream;

  // Whether a pair may fall into the slot.
  bool has_slot(const Tiling& tiling, int slot) const {
    if (columns.effective == nullptr) return tiling.slot(columns.num_dims) == slot;
    if (sizes == nullptr) return slot <= tiling.slot(columns.num_dims);
    return std::any_of(sizes, sizes + columns.num_modalities * columns.num_modalities,
                       [&](int64_t size) { return size > 0 && tiling.slot(static_cast<int>(size)) == slot; });
  }

  // Launches kernel(columns, views, first_modality, more...) for all modalities; a block for so many rows.
  template <class Kernel, class... More>
  void pack(Kernel* kernel, int rows, const More&... more) const {
    const int num_modalities = columns.num_modalities, kinds = 2 * std::max(1, num_modalities - 1);
    const int64_t num_rows = round_up(std::max(sweep.num_queries, sweep.num_keys), kRowMultiple);
    for (int first = 0; first < num_modalities; first += kMaxViews) {
      const int number = std::min(kMaxViews, num_modalities - first);
      Views some{};
      for (int i = 0; i < number; ++i) {
        some.features[i] = views[2 * (first + i)];
        some.keys[i] = views[2 * (first + i) + 1];
      }
      const dim3 grid(static_cast<unsigned>(num_rows / rows), kinds * number);
      MMFAST_LAUNCH((kernel), grid, kBlock, 0, stream, columns, some, first, more...);
    }
  }
};

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  check_cuda(kOp, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <class Tile>
void sweep_plain(const Call& call, void* queries, void* keys, void* keys_by_row) {
  using T = typename Tile::T;
  const Sweep& sweep = call.sweep;
  call.pack(&duc_pack_plain_kernel<T>, kWarp, Tile::rows, Tile::keys, Tile::step, static_cast<T*>(queries),
            static_cast<T*>(keys), static_cast<T*>(keys_by_row), sweep.query_stride, sweep.key_stride,
            sweep.width, sweep.num_queries, sweep.num_keys);
  const auto kernel = &duc_plain_kernel<Tile>;
  allow_shared_memory(kernel, Tile::shared_bytes);
  const int64_t num_slices =
      sweep.residual == nullptr ? 1 : round_up(sweep.width, Tile::columns) / Tile::columns;
  const dim3 grid(static_cast<unsigned>(round_up(sweep.num_queries, Tile::rows) / Tile::rows),
                  static_cast<unsigned>(num_slices), sweep.num_pairs);
  MMFAST_LAUNCH((kernel), grid, 256, Tile::shared_bytes, call.stream, sweep,
                static_cast<const T*>(keys_by_row));
}

template <class T, int slot, int stages>
void sweep_mma(const Call& call) {
  const auto kernel = &duc_mma_kernel<T, slot, stages>;
  constexpr int bytes = MmaTile<1 << slot, kMmaTiling.keys[slot], stages>::shared_bytes;
  allow_shared_memory(kernel, bytes);
  const dim3 grid(static_cast<unsigned>(round_up(call.sweep.num_queries, kMmaRows) / kMmaRows), 1,
                  call.sweep.num_pairs);
  MMFAST_LAUNCH((kernel), grid, kMmaBlock, bytes, call.stream, call.sweep, kMmaTiling);
}

// Every slot that may hold a pair gets a launch, in which the blocks of other pairs return at once.
template <class T>
void sweep_half(const Call& call, T* queries, T* keys) {
  const Sweep& sweep = call.sweep;
  const bool is_hopper = call.capability == 9;
  const Tiling tiling = is_hopper ? kHopperTiling : kMmaTiling;
  call.pack(&duc_pack_panels_kernel<T>, kQueryRows, tiling, queries, keys, sweep.query_stride,
            sweep.key_stride, sweep.num_queries, sweep.num_keys);
  for (int slot = 0; slot <= tiling.wide; ++slot) {
    if (!call.has_slot(tiling, slot)) continue;
    if (slot == tiling.wide) {
      const auto kernel = &duc_mma_wide_kernel<T>;
      allow_shared_memory(kernel, kWideShared);
      const int64_t columns = kWidePanels * kPanel,
                    num_slices = sweep.residual == nullptr ? 1 : round_up(sweep.width, columns) / columns;
      const dim3 grid(static_cast<unsigned>(round_up(sweep.num_queries, kMmaRows) / kMmaRows),
                      static_cast<unsigned>(num_slices), sweep.num_pairs);
      MMFAST_LAUNCH((kernel), grid, kMmaBlock, kWideShared, call.stream, sweep, tiling);
    } else if (is_hopper) {
      launch_hopper(kOp, std::is_same_v<T, __half>, slot, sweep, call.stream);
    } else if (slot == 0) {
      sweep_mma<T, 0, 3>(call);
    } else if (slot == 1) {
      sweep_mma<T, 1, 3>(call);
    } else {
      sweep_mma<T, 2, 2>(call);
    }
  }
}

template <class T>
void sweep(const Call& call, void* packed) {
  const Sweep& sweep = call.sweep;
  T* const queries = static_cast<T*>(packed);
  T* const keys = queries + sweep.num_pairs * sweep.query_stride;
  T* const keys_by_row = keys + sweep.num_pairs * sweep.key_stride;
  if constexpr (std::is_same_v<T, double>) {
    sweep_plain<PlainTile<double, 4, 2, 4>>(call, queries, keys, keys_by_row);
  } else if constexpr (std::is_same_v<T, float>) {
    using Large = PlainTile<float, 8, 4, 8>;
    const int64_t slices = round_up(sweep.width, Large::columns) / Large::columns;
    const int64_t blocks = round_up(sweep.num_queries, Large::rows) / Large::rows * slices * sweep.num_pairs;
    if (blocks >= call.num_processors) return sweep_plain<Large>(call, queries, keys, keys_by_row);
    sweep_plain<PlainTile<float, 4, 4, 8>>(call, queries, keys, keys_by_row);
  } else {
    sweep_half<T>(call, queries, keys);
  }
}

template <class T>
void run(Call& call, void* packed, void* loss, void* residuals, int reduction) {
  Sweep& sweep = call.sweep;
  sweep.queries = packed;
  sweep.keys = static_cast<T*>(packed) + sweep.num_pairs * sweep.query_stride;
  if (call.columns.effective != nullptr)
    MMFAST_LAUNCH((&duc_columns_kernel), sweep.num_pairs, kBlock, 0, call.stream, call.columns);
  mmfast::sweep<T>(call, packed);
  const int64_t rows = sweep.residual == nullptr ? 0 : call.columns.num_modalities * sweep.num_queries;
  constexpr int rows_per_block = kFinishBlock / kWarp;
  MMFAST_LAUNCH((&duc_finish_kernel<T>),
                static_cast<unsigned>(1 + round_up(rows, rows_per_block) / rows_per_block), kFinishBlock, 0,
                call.stream, call.columns, static_cast<const accumulate_t<T>*>(sweep.losses), sweep.residual,
                static_cast<accumulate_t<T>*>(loss), static_cast<T*>(residuals), sweep.num_pairs,
                sweep.num_queries, sweep.width, sweep.is_rounded, reduction);
}

void duc_loss_fwd(const int64_t* views,   // [M, 6] on the host: address, strides of a feature, of its keys
                  const void* effective,  // bool [M, D], contiguous; nullptr: keys[0] teaches features[0] all
                  void* columns,          // int32 [P (2 D + 1)], P = M (M - 1) or 1
                  void* packed,           // [P, N + K (+ K in wide floats), W], N and K as multiples of 128
                  void* packed_residual,  // [P, N, W]; nullptr: no residuals
                  void* losses,           // [P, N]
                  void* loss,             // [] or [N]
                  void* residuals,        // [M, N, D]
                  int64_t num_modalities, int64_t num_queries, int64_t num_keys, int64_t num_dims,
                  int64_t width, const int64_t* sizes,  // [M, M] on the host; nullptr: not known
                  bool is_rounded, double temperature, int64_t offset, int64_t reduction, int64_t dtype,
                  int64_t device, void* stream) {
  if (num_queries == 0 || num_dims == 0) return;
  const DeviceGuard guard(kOp, static_cast<int>(device));
  const int64_t num_pairs = effective == nullptr ? 1 : num_modalities * (num_modalities - 1);
  if (num_pairs < 1 || num_pairs > 65535)
    throw std::invalid_argument(std::string(kOp) + ": num_modalities must lie in [2, 256]");
  Call call{};
  View list[2 * 256];
  for (int i = 0; i < 2 * num_modalities; ++i)
    list[i] = {reinterpret_cast<const void*>(views[3 * i]), views[3 * i + 1], views[3 * i + 2]};
  int* const indices = static_cast<int*>(columns);
  call.columns = {static_cast<const bool*>(effective), indices,
                  indices + num_pairs * num_dims,      indices + 2 * num_pairs * num_dims,
                  static_cast<int>(num_modalities),    static_cast<int>(num_dims)};
  call.sweep.residual = packed_residual;
  call.sweep.losses = losses;
  call.sweep.counts = effective == nullptr ? nullptr : call.columns.counts;
  call.sweep.query_stride = round_up(num_queries, kRowMultiple) * width;
  call.sweep.key_stride = round_up(num_keys, kRowMultiple) * width;
  call.sweep.num_queries = num_queries, call.sweep.num_keys = num_keys;
  call.sweep.width = width, call.sweep.offset = offset;
  call.sweep.num_pairs = static_cast<int>(num_pairs), call.sweep.num_columns = static_cast<int>(num_dims);
  call.sweep.is_rounded = is_rounded;
  call.sweep.scale = kLog2E / temperature;
  call.views = list, call.sizes = sizes, call.stream = stream;
  check_cuda(kOp, cudaDeviceGetAttribute(&call.num_processors, cudaDevAttrMultiProcessorCount,
                                         static_cast<int>(device)));
  check_cuda(kOp, cudaDeviceGetAttribute(&call.capability, cudaDevAttrComputeCapabilityMajor,
                                         static_cast<int>(device)));
  dispatch_dtype(kOp, dtype, [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(call, packed, loss, residuals, static_cast<int>(reduction));
  });
  check_cuda(kOp, cudaGetLastError());
}

MMFAST_REGISTER(duc_loss_fwd)

}  // namespace
}  // namespace mmfast

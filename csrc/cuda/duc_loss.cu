// The dimension-decoupled unidirectional contrastive loss: loss and gradient of every ordered pair (m, n) in
// one sweep over the keys, as attention with values = keys.
//
//   s_ij = q_i . k_j,  loss_i = log sum_j exp(s_ij / temperature) - s_ii / temperature
//   residual_i = sum_j p_ij k_j - k_i,  p = softmax(s / temperature)
//
// duc_loss_pack.cuh lists each pair's columns and lays queries and keys out as a block's shared memory has
// them; an engine (duc_loss_engines.cuh) sweeps the key tiles: scores, online softmax in registers, residual;
// the residuals then go back to their columns and are summed over teachers in order. The numbers of columns
// stay on the device: every bucket that may hold a pair is launched. Few queries: keys split over blocks.
// Floors for N queries and keys of d columns: 4 N^2 d operations on tensor cores, N^2 exponentials.
#include <algorithm>

#include "duc_loss_mma.cuh"
#include "duc_loss_pack.cuh"
#include "duc_loss_plain.cuh"

namespace mmfast {
namespace {

using namespace duc;

constexpr int64_t kMaxModalities = 256, kMaxPairs = 65535;

// Every tiling's last bucket is swept by duc_mma_wide_kernel.
constexpr bool all_end_wide() {
  for (const Engine& engine : kEngines) {
    if (engine.tiling.wide > 0 && engine.tiling.keys[engine.tiling.wide] != kWideKeys) return false;
  }
  return true;
}
static_assert(all_end_wide(), "tiles of the last bucket have as many keys as duc_mma_wide_kernel's");

const Engine& engine_for(int major, int64_t dtype) {
  for (const Engine& engine : kEngines) {
    if (engine.first_major <= major && major <= engine.last_major && engine.dtypes >> dtype & 1)
      return engine;
  }
  throw std::invalid_argument(std::string(kOp) + ": no kernels for compute capability " +
                              std::to_string(major) + " and dtype code " + std::to_string(dtype));
}

// Whether a pair may fall into the bucket.
bool has_bucket(const Call& call, const Tiling& tiling, int bucket) {
  const Columns& columns = call.columns;
  if (columns.effective == nullptr) return tiling.bucket(columns.num_dims) == bucket;
  if (call.sizes == nullptr) return bucket <= tiling.bucket(columns.num_dims);
  return std::any_of(
      call.sizes, call.sizes + columns.num_modalities * columns.num_modalities,
      [&](int64_t size) { return size > 0 && tiling.bucket(static_cast<int>(size)) == bucket; });
}

// Every bucket that may hold a pair gets a launch, in which the blocks of other pairs return at once.
template <class T>
void sweep_panels(const Call& call, const Engine& engine) {
  const Sweep& sweep = call.sweep;
  const Tiling& tiling = engine.tiling;
  launch_pack(call, &duc_pack_panels_kernel<T>, kQueryRows, tiling, static_cast<T*>(call.queries),
              static_cast<T*>(call.keys), sweep.query_stride, sweep.key_stride, sweep.num_queries,
              sweep.num_keys);
  for (int bucket = 0; bucket <= tiling.wide; ++bucket) {
    if (!has_bucket(call, tiling, bucket)) continue;
    if (bucket == tiling.wide) {
      launch_mma_wide<T>(call, tiling);
    } else {
      engine.launch(call, bucket);
    }
  }
}

template <class T>
void run(Call call, const Engine& engine, bool reads_keys, void* packed, void* partial, void* loss,
         void* residuals, int reduction) {
  using A = accumulate_t<T>;
  if (call.columns.effective != nullptr)
    MMFAST_LAUNCH((&duc_columns_kernel), call.sweep.num_pairs, kBlock, 0, call.stream, call.columns);
  Sweep& sweep = call.sweep;
  T* const queries = static_cast<T*>(packed);
  T* const keys = queries + sweep.num_pairs * sweep.query_stride;
  // Rows of keys that can be read as they lie are not packed once more.
  T* const keys_by_row = reads_keys ? nullptr : keys + sweep.num_pairs * sweep.key_stride;
  call.queries = queries, call.keys = keys, call.keys_by_row = keys_by_row;
  call.rows_of_keys = {keys_by_row, sweep.key_stride, sweep.width, sweep.width};
  if (reads_keys) {
    const View& view = call.views[1];
    call.rows_of_keys = {view.data, 0, view.stride_row, call.columns.num_dims};
  }
  sweep.queries = queries, sweep.keys = keys;
  const Sweep whole = sweep;
  const bool is_split = sweep.num_splits > 1;
  if (is_split) {
    const bool has_residual = sweep.residual != nullptr;
    const int64_t rows = sweep.num_pairs * sweep.num_queries;
    sweep.losses = static_cast<A*>(partial) + (has_residual ? sweep.num_splits * rows * sweep.width : 0);
    sweep.residual = has_residual ? partial : nullptr;
    sweep.is_rounded = false;
    sweep.residual_width = sweep.width;
  }
  if constexpr (sizeof(T) == 2) {
    sweep_panels<T>(call, engine);
  } else {
    engine.launch(call, 0);
  }
  if (is_split) {
    const dim3 grid(grid_blocks(sweep.num_queries, kBlock / kWarp), sweep.num_pairs);
    MMFAST_LAUNCH((&duc_merge_kernel<T>), grid, kBlock, 0, call.stream, whole, engine.tiling,
                  call.rows_of_keys, static_cast<const A*>(sweep.losses),
                  static_cast<const A*>(sweep.residual), static_cast<A*>(whole.losses));
  }
  const unsigned blocks =
      whole.residual == residuals
          ? 0
          : grid_blocks(call.columns.num_modalities * whole.num_queries, kFinishBlock / kWarp);
  MMFAST_LAUNCH((&duc_finish_kernel<T>), 1 + blocks, kFinishBlock, 0, call.stream, call.columns,
                static_cast<const A*>(whole.losses), whole.residual, static_cast<A*>(loss),
                static_cast<residual_t<T>*>(residuals), whole.num_pairs, whole.num_queries,
                whole.residual_width, whole.is_rounded, reduction);
}

void duc_loss_fwd(
    const int64_t* views,   // [M, 6] on the host: address, strides of a feature, of its keys
    const void* effective,  // bool [M, D], contiguous; nullptr: keys[0] teaches features[0] all
    void* columns,          // int32 [P (2 D + 1)], P = M (M - 1) or 1
    void* packed,  // [P, N + K, W], in wide floats [P, N + 2 K, W] unless reads_keys; N, K rounded up
    void* packed_residual,  // [P, N, W]; `residuals` itself if all columns are taken; nullptr: not wanted
    void* partial,          // [splits, P, N, W (if residuals) + 3] in the dtype of sums; unused for 1 split
    void* losses,           // [P, N]
    void* loss,             // [] or [N]
    void* residuals,        // [M, N, D], of float16 in float32
    int64_t num_modalities, int64_t num_queries, int64_t num_keys, int64_t num_dims, int64_t width,
    const int64_t* sizes,  // [M, M] on the host; nullptr: not known
    int64_t num_splits, bool reads_keys, bool is_rounded, double temperature, int64_t offset,
    int64_t reduction, int64_t dtype, int64_t device, void* stream) {
  const int64_t num_pairs = effective == nullptr ? 1 : num_modalities * (num_modalities - 1);
  if (num_queries == 0 || num_dims == 0 || num_pairs == 0) return;
  const int64_t num_blocks = num_pairs * num_splits;
  if (num_modalities > kMaxModalities || num_blocks > kMaxPairs || num_splits > kWarp) {
    throw std::invalid_argument(std::string(kOp) + ": more than " + std::to_string(kMaxModalities) +
                                " modalities, or more than " + std::to_string(kWarp) + " parts of keys");
  }
  const DeviceGuard guard(kOp, static_cast<int>(device));
  Call call{};
  View list[2 * kMaxModalities];
  for (int i = 0; i < 2 * num_modalities; ++i)
    list[i] = {reinterpret_cast<const void*>(views[3 * i]), views[3 * i + 1], views[3 * i + 2]};
  int* const indices = static_cast<int*>(columns);
  call.columns = {static_cast<const bool*>(effective), indices,
                  indices + num_pairs * num_dims,      indices + 2 * num_pairs * num_dims,
                  static_cast<int>(num_modalities),    static_cast<int>(num_dims)};
  Sweep& sweep = call.sweep;
  sweep.residual = packed_residual, sweep.losses = losses;
  sweep.counts = effective == nullptr ? nullptr : call.columns.counts;
  sweep.query_stride = round_up(num_queries, kQueryMultiple) * width;
  sweep.key_stride = round_up(num_keys, kKeyMultiple) * width;
  sweep.num_queries = num_queries, sweep.num_keys = num_keys;
  sweep.width = width, sweep.offset = offset;
  sweep.residual_width = packed_residual == residuals ? num_dims : width;
  sweep.num_pairs = static_cast<int>(num_pairs), sweep.num_columns = static_cast<int>(num_dims);
  sweep.num_splits = static_cast<int>(num_splits);
  sweep.is_rounded = is_rounded;
  sweep.scale = kLog2E / temperature;
  call.views = list, call.sizes = sizes, call.stream = stream;
  call.num_sms = device_attribute(kOp, cudaDevAttrMultiProcessorCount, device);
  const int major = device_attribute(kOp, cudaDevAttrComputeCapabilityMajor, device);
  dispatch_dtype(kOp, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    call.is_float16 = std::is_same_v<T, __half>, call.is_float64 = std::is_same_v<T, double>;
    run<T>(call, engine_for(major, dtype), reads_keys, packed, partial, loss, residuals,
           static_cast<int>(reduction));
  });
  check_cuda(kOp, cudaGetLastError());
}

MMFAST_REGISTER(duc_loss_fwd)

}  // namespace
}  // namespace mmfast

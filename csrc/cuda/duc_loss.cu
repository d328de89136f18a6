// The dimension-decoupled unidirectional contrastive loss: loss and gradient of every ordered pair (m, n) in
// one sweep over the keys, as attention with values = keys.
//
//   s_ij = q_i . k_j,  loss_i = log sum_j exp(s_ij / temperature) - s_ii / temperature
//   residual_i = sum_j p_ij k_j - k_i,  p = softmax(s / temperature)
//
// contrast_pack.cuh lists each pair's columns and lays queries and keys out as a block's shared memory has
// them; an engine (contrast_engines.cuh) sweeps the key tiles: scores, online softmax in registers, residual;
// the residuals then go back to their columns and are summed over teachers in order. The numbers of columns
// stay on the device: every bucket that may hold a pair is launched. Few queries: keys split over blocks.
// Floors for N queries and keys of d columns: 4 N^2 d operations on tensor cores, N^2 exponentials.
#include "contrast_call.cuh"

namespace mmfast {

void duc::launch_mma(const Call& call, int bucket) { sweep_mma(call, bucket); }
void duc::launch_plain(const Call& call, int bucket) { sweep_plain(call, bucket); }

namespace {

using namespace duc;

// Packed rows of a pair end with a whole tile of whatever engine; a tiling's last bucket is swept by
// duc_mma_wide_kernel.
constexpr bool all_tiles_fit() {
  for (const Engine& engine : kEngines) {
    const Tiling& tiling = engine.tiling;
    if (tiling.wide > 0 && tiling.keys[tiling.wide] != kWideKeys) return false;
    for (const int keys : tiling.keys) {
      if (keys > 0 && kKeyMultiple % keys != 0) return false;
    }
  }
  return true;
}
static_assert(all_tiles_fit(), "see above");

const Engine& engine_for(int major, Dtype dtype) {
  for (const Engine& engine : kEngines) {
    if (engine.first_major <= major && major <= engine.last_major && (engine.dtypes & bit(dtype)))
      return engine;
  }
  throw std::invalid_argument(std::string(kOp) + ": no kernels for compute capability " +
                              std::to_string(major) + " and " + kDtypeNames[static_cast<int>(dtype)]);
}

// Whether an engine may split the rest of this call: memory is taken before one is chosen.
bool may_split_rest(const DucOperands& operands, Dtype dtype) {
  return std::any_of(std::begin(kEngines), std::end(kEngines), [&](const Engine& engine) {
    const bool is_wide = engine.tiling.bucket(static_cast<int>(operands.num_dims)) == engine.tiling.wide;
    return engine.splits_rest && (engine.dtypes & bit(dtype)) && (operands.effective != nullptr || !is_wide);
  });
}

template <class T>
void run(Call call, const Engine& engine, const Layout& layout, const Workspace& workspace,
         const DucResults& out, Reduction reduction) {
  using A = accumulate_t<T>;
  if (call.columns.effective != nullptr)
    MMFAST_LAUNCH((&duc_columns_kernel), call.sweep.num_pairs, kBlock, 0, call.stream, call.columns);
  const Sweep whole = place_sweep<T>(call, layout, workspace);
  if constexpr (sizeof(T) == 2) {
    sweep_panels<T>(call, engine.tiling, engine.launch);
  } else {
    engine.launch(call, 0);
  }
  if (call.parts.num_splits > 1) {
    Sweep merged = whole;
    merged.num_splits = call.parts.num_splits, merged.first_result = call.parts.first_result;
    MMFAST_LAUNCH((&duc_merge_kernel<T>), grid_blocks(merged.num_results(), kBlock / kWarp), kBlock, 0,
                  call.stream, merged, engine.tiling, call.rows_of_keys,
                  static_cast<const A*>(call.parts.losses), static_cast<const A*>(call.parts.residual),
                  static_cast<A*>(whole.losses));
  }
  const unsigned blocks =
      whole.residual == out.residuals
          ? 0
          : grid_blocks(call.columns.num_modalities * whole.num_queries, kFinishBlock / kWarp);
  MMFAST_LAUNCH((&duc_finish_kernel<T>), 1 + blocks, kFinishBlock, 0, call.stream, call.columns,
                static_cast<const A*>(whole.losses), whole.residual, static_cast<A*>(out.loss),
                static_cast<residual_t<T>*>(out.residuals), whole.num_pairs, whole.num_queries,
                whole.residual_width, whole.is_rounded, reduction);
}

Plan duc_loss_plan(const DucOperands& operands,
                   const int64_t* sizes,  // [M, M] on the host: columns of a pair; nullptr: not known
                   bool has_residual, Dtype dtype) {
  return plan_of(operands, sizes, has_residual, dtype, may_split_rest(operands, dtype));
}

void duc_loss_fwd(const DucOperands& operands,
                  const int64_t* sizes,  // [M, M] on the host: columns of a pair; nullptr: not known
                  const Workspace& workspace, const DucResults& out, double temperature, int64_t offset,
                  Reduction reduction, Dtype dtype, Stream stream) {
  const Layout layout = layout_of(operands, sizes, dtype, may_split_rest(operands, dtype));
  if (layout.num_pairs == 0) return;
  const DeviceGuard guard(kOp, stream.device);
  Call call{};
  View list[2 * kMaxModalities];
  fill_call(call, kOp, operands, sizes, layout, workspace, out.residuals, list, offset, dtype, stream);
  call.sweep.scale = kLog2E / temperature;
  const int major = device_attribute(kOp, cudaDevAttrComputeCapabilityMajor, stream.device);
  dispatch_dtype(kOp, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Engine& engine = engine_for(major, dtype);
    Layout taken = layout;
    if (!engine.splits_rest) taken.rest_splits = 1;
    run<T>(call, engine, taken, workspace, out, reduction);
  });
  check_cuda(kOp, cudaGetLastError());
}

MMFAST_REGISTER(duc_loss_plan)
MMFAST_REGISTER(duc_loss_fwd)

}  // namespace
}  // namespace mmfast

// SigLIP's pairwise sigmoid loss with constant keys: loss and all gradients in one sweep over the keys.
//
//   s_ij = q_i . k_j / temperature + bias,  t_ij = s_ij, but -s_ii of the own key
//   loss_i = sum_j log(1 + exp(t_ij)),  g_ij = sigmoid(t_ij), but -sigmoid(t_ii)
//   residual_i = sum_j g_ij k_j,  sums_i = sum_j g_ij and sum_j g_ij q_i . k_j / temperature
//
// The sweeps are those of duc_loss, with one pair of all columns and other rows (sigmoid_loss_rows.cuh).
// Floors for N queries and keys of d columns: 4 N^2 d operations, N^2 exponentials and reciprocals.
//
// Machine code: duc_mma_kernel, 80 90 100 120: HMMA LDGSTS
// Machine code: duc_mma_wide_kernel, 80 90 100 120: HMMA LDGSTS
#include "sigmoid_loss_rows.cuh"

namespace mmfast {
namespace {

using namespace duc;

// Adds up the splits of the keys, in their order; a warp takes a row.
template <class T>
__global__ void __launch_bounds__(kBlock)
    sigmoid_merge_kernel(SigmoidSweep sweep,
                         const accumulate_t<T>* __restrict__ statistics,  // [3, splits, N]
                         const accumulate_t<T>* __restrict__ partial) {   // [splits, N, W]
  using A = accumulate_t<T>;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kBlock / kWarp) + threadIdx.x / kWarp;
  if (row >= sweep.num_queries) return;
  const auto sum_of = [&](const A* parts, int64_t stride) {
    A sum = 0;
    for (int split = 0; split < sweep.num_splits; ++split) sum += parts[split * stride];
    return sum;
  };
  if (lane < 3) {
    A* const target = lane == 0 ? static_cast<A*>(sweep.losses)
                                : static_cast<A*>(sweep.sums) + (lane - 1) * sweep.num_queries;
    const A* const plane = statistics + lane * sweep.num_splits * sweep.num_queries;
    target[row] = sum_of(plane + row, sweep.num_queries);
  }
  if (sweep.residual == nullptr) return;
  for (int column = lane; column < sweep.num_columns; column += kWarp) {
    const A residual = sum_of(partial + row * sweep.width + column, sweep.num_queries * sweep.width);
    const int64_t target = row * sweep.residual_width + column;
    if (sweep.is_rounded) {
      static_cast<T*>(sweep.residual)[target] = static_cast<T>(residual);
    } else {
      static_cast<A*>(sweep.residual)[target] = residual;
    }
  }
}

template <class T>
void run(CallOf<SigmoidSweep> call, const Layout& layout, const Workspace& workspace, const DucResults& out,
         Reduction reduction) {
  using A = accumulate_t<T>;
  const SigmoidSweep whole = place_sweep<T>(call, layout, workspace);
  const SigmoidSweep& sweep = call.sweep;
  if constexpr (sizeof(T) == 2) {
    sweep_panels<T>(call, kMmaTiling, &sweep_mma<SigmoidSweep>);
  } else {
    sweep_plain(call, 0);
  }
  if (sweep.num_splits > 1) {
    MMFAST_LAUNCH((&sigmoid_merge_kernel<T>), grid_blocks(sweep.num_queries, kBlock / kWarp), kBlock, 0,
                  call.stream, whole, static_cast<const A*>(sweep.losses),
                  static_cast<const A*>(sweep.residual));
  }
  const unsigned blocks =
      whole.residual == out.residuals ? 0 : grid_blocks(whole.num_queries, kFinishBlock / kWarp);
  MMFAST_LAUNCH((&duc_finish_kernel<T>), 1 + blocks, kFinishBlock, 0, call.stream, call.columns,
                static_cast<const A*>(whole.losses), whole.residual, static_cast<A*>(out.loss),
                static_cast<residual_t<T>*>(out.residuals), whole.num_pairs, whole.num_queries,
                whole.residual_width, whole.is_rounded, reduction);
}

Plan sigmoid_loss_plan(const DucOperands& operands, bool has_residual, Dtype dtype) {
  return plan_of(operands, nullptr, has_residual, dtype, false);
}

void sigmoid_loss_fwd(const DucOperands& operands,  // of one modality, D at least 1
                      const Workspace& workspace, const DucResults& out,
                      void* sums,             // [2, N]
                      const double* numbers,  // [2] on the device, temperature and bias; nullptr: as follows
                      double temperature, double bias, int64_t offset, Reduction reduction, Dtype dtype,
                      Stream stream) {
  constexpr const char* op = "sigmoid_loss_fwd";
  const Layout layout = layout_of(operands, nullptr, dtype, false);
  const DeviceGuard guard(op, stream.device);
  CallOf<SigmoidSweep> call{};
  View list[2];
  fill_call(call, op, operands, nullptr, layout, workspace, out.residuals, list, offset, dtype, stream);
  call.sweep.numbers = numbers, call.sweep.inverse_temperature = 1 / temperature, call.sweep.bias = bias;
  call.sweep.sums = sums;
  dispatch_dtype(op, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run<T>(call, layout, workspace, out, reduction);
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(sigmoid_loss_plan)
MMFAST_REGISTER(sigmoid_loss_fwd)

}  // namespace
}  // namespace mmfast

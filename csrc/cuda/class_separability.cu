// Moments of classes, their gradient, and in how many samples the label's centroid is nearest, dimension by
// dimension.
//
//   mean_k = sum_{y_i = k} x_i / n_k,  var_k = sum_{y_i = k} (x_i - mean_k)^2 / n_k
//   dx_i = (dmean_y + 2 (x_i - mean_y) dvar_y) / n_y
//   hits_d = sum_i [low_{y_i d} <= x_id < high_{y_i d}]
//
// Moments (class_moments.cuh): a block orders up to 1,024 rows by class in shared memory, its warps sum
// stretches of that order about a shift, a second kernel merges the blocks' parts in float64, in a fixed
// order. Hits (class_intervals.cuh): the interval in which each centroid is nearest, then one read of the
// features. Floor: the features read once, for the gradient read and written once.
#include <algorithm>
#include <initializer_list>

#include "class_intervals.cuh"
#include "class_moments.cuh"
#include "class_separability_operands.h"
#include "codes.h"

namespace mmfast {
namespace {

// Rows that a thread of the gradient and the hits has in flight.
constexpr int kRows = 4;

// Which rows and columns a thread serves: where rows are short, several share a warp.
template <int n>
struct Position {
  int group, num_groups;  // of rows, in the block
  int place;              // of the thread's pack in its slab
  int64_t column;

  __device__ Position(int log_lanes, int64_t slab) {
    const int lane = threadIdx.x % kWarp;
    num_groups = kBlock >> log_lanes;
    group = static_cast<int>(threadIdx.x) >> log_lanes;
    place = lane & ((1 << log_lanes) - 1);
    column = ((slab << log_lanes) + place) * n;
  }
};

template <class T, int n>
__global__ void __launch_bounds__(kBlock)
    class_moments_bwd_kernel(const accumulate_t<T>* __restrict__ dmean,  // [C, D]
                             const accumulate_t<T>* __restrict__ dvar,   // [C, D]
                             const T* __restrict__ x,                    // [N, D]
                             const int64_t* __restrict__ labels,         // [N]
                             const int64_t* __restrict__ count,          // [C]
                             const accumulate_t<T>* __restrict__ mean,   // [C, D]
                             T* __restrict__ dx,                         // [N, D]
                             int64_t num_rows, int64_t num_columns, int num_classes, int64_t stride,
                             int log_lanes, unsigned num_slabs) {
  using A = accumulate_t<T>;
  const Position<n> position(log_lanes, blockIdx.x % num_slabs);
  if (position.column >= num_columns) return;
  const int64_t block = blockIdx.x / num_slabs;
  const int64_t first = block * kRows * position.num_groups + position.group;
  Pack<T, n> loaded[kRows];
  int64_t label[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * position.num_groups;
    if (row >= num_rows) continue;
    label[r] = labels[row];
    loaded[r] = load_pack<n>(x + row * stride + position.column);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r * position.num_groups;
    if (row >= num_rows) continue;
    Pack<T, n> stored{};
    // A label that names no class must not be looked up.
    if (label[r] >= 0 && label[r] < num_classes) {
      const int64_t at = label[r] * num_columns + position.column;
      const auto class_mean = load_pack<n>(mean + at), class_dmean = load_pack<n>(dmean + at),
                 class_dvar = load_pack<n>(dvar + at);
      const A scale = A(1) / static_cast<A>(count[label[r]]);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const A deviation = static_cast<A>(loaded[r].values[i]) - class_mean.values[i];
        // The factors of the class first: a deviation times dvar alone may be out of range.
        const A slope = class_dvar.values[i] * (2 * scale);
        stored.values[i] = static_cast<T>(class_dmean.values[i] * scale + deviation * slope);
      }
    }
    store_pack(dx + row * num_columns + position.column, stored);
  }
}

template <class T, int n>
__global__ void __launch_bounds__(kBlock)
    dimension_hits_kernel(const T* __restrict__ x,                   // [N, D]
                          const int64_t* __restrict__ labels,        // [N]
                          const accumulate_t<T>* __restrict__ low,   // [C, D]
                          const accumulate_t<T>* __restrict__ high,  // [C, D]
                          unsigned long long* __restrict__ hits,     // [D], zeros
                          int64_t num_rows, int64_t num_columns, int num_classes, int64_t stride,
                          int log_lanes, unsigned num_slabs, int64_t rows_per_block) {
  using A = accumulate_t<T>;
  MMFAST_SHARED(int, sums, [kWarp * n]);
  for (int i = threadIdx.x; i < kWarp * n; i += kBlock) sums[i] = 0;
  __syncthreads();

  const int64_t block = blockIdx.x / num_slabs, slab = blockIdx.x % num_slabs;
  const Position<n> position(log_lanes, slab);
  const int64_t begin = block * rows_per_block;
  const int64_t end = min(begin + rows_per_block, num_rows);
  const bool has_columns = position.column < num_columns;
  int inside[n] = {};
  for (int64_t first = begin + position.group; has_columns && first < end;
       first += kRows * position.num_groups) {
    Pack<T, n> loaded[kRows];
    int64_t label[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * position.num_groups;
      label[r] = -1;
      if (row >= end) continue;
      label[r] = labels[row];
      loaded[r] = load_pack<n>(x + row * stride + position.column);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      // A label that names no class must not be looked up.
      if (label[r] < 0 || label[r] >= num_classes) continue;
      const int64_t at = label[r] * num_columns + position.column;
      const auto from = load_pack<n>(low + at), to = load_pack<n>(high + at);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const A value = static_cast<A>(loaded[r].values[i]);
        inside[i] += value >= from.values[i] && value < to.values[i] ? 1 : 0;
      }
    }
  }
  // Over the rows of a warp, then over the warps, then over the blocks: integers, in any order the same.
#pragma unroll
  for (int i = 0; i < n; ++i) {
    inside[i] = warp_sum_modulo(inside[i], 1 << log_lanes);
    if (static_cast<int>(threadIdx.x % kWarp) == position.place && inside[i] > 0) {
      atomicAdd(&sums[position.place * n + i], inside[i]);
    }
  }
  __syncthreads();
  const int64_t first_column = (slab << log_lanes) * n;
  for (int i = threadIdx.x; i < n << log_lanes; i += kBlock) {
    // Behind the last column nothing was found.
    if (sums[i] > 0) atomicAdd(hits + first_column + i, static_cast<unsigned long long>(sums[i]));
  }
}

// Calls function(pointer to T, width of packs) where every row's columns of all `tables` fall into whole
// aligned packs, else with single elements. Rows of the first table are `stride` apart.
template <class Function>
void with_packs(const char* op, Dtype dtype, std::initializer_list<const void*> tables, int64_t num_columns,
                int64_t stride, Function&& function) {
  const bool is_aligned = std::all_of(tables.begin(), tables.end(), [](const void* table) {
    return reinterpret_cast<uintptr_t>(table) % 16 == 0;
  });
  dispatch_dtype(op, dtype, [&](auto* type) {
    constexpr int n = 16 / sizeof(*type);
    if (num_columns % n == 0 && stride % n == 0 && is_aligned) {
      function(type, std::integral_constant<int, n>{});
    } else {
      function(type, std::integral_constant<int, 1>{});
    }
  });
}

// Lanes that a row is spread over, as a power of two, and how often those go into a row.
struct Slabs {
  int log_lanes = 0;
  unsigned count;

  Slabs(int64_t num_columns, int n) {
    const int64_t packs = ceil_div(num_columns, n);
    while (log_lanes < 5 && 1 << log_lanes < packs) ++log_lanes;
    count = static_cast<unsigned>(ceil_div(packs, 1 << log_lanes));
  }
};

void check_classes(const char* op, int64_t num_classes) {
  if (num_classes >= 1 && num_classes <= INT32_MAX) return;
  throw std::invalid_argument(std::string(op) + ": num_classes must lie in [1, 2^31), got " +
                              std::to_string(num_classes));
}

// How the samples of the moments are shared out. It depends on nothing but the call, and so do all bits.
struct MomentsShares {
  int64_t rows_per_block, num_blocks;
  bool is_ordering;  // blocks order their samples by class themselves

  // Enough samples of a class to a block, and enough blocks.
  MomentsShares(int64_t num_samples, int64_t num_dims, int64_t num_classes, int64_t element_size) {
    // Two for each SM of an H100. A block takes 16 bytes of a row a lane.
    constexpr int64_t enough_blocks = 264, bytes_of_block = 16 * kWarp;
    constexpr int64_t min_rows = 64, min_rows_of_class = 16, multiple = 16;
    // What blocks that order their samples leave of each class stays in the L2 cache up to so many elements.
    constexpr int64_t max_part_elements = 1 << 20;
    const int64_t num_slabs = std::max<int64_t>(1, ceil_div(num_dims * element_size, bytes_of_block));
    rows_per_block = std::max(min_rows, ceil_div(num_samples * num_slabs, enough_blocks));
    const bool has_few_parts = num_samples * num_dims <= max_part_elements * kMaxRows / num_classes;
    is_ordering = num_classes <= (has_few_parts ? kMaxOrderedClasses : kMaxOrderedClasses / 2);
    if (is_ordering) rows_per_block = std::max(rows_per_block, min_rows_of_class * num_classes);
    rows_per_block = std::min<int64_t>(kMaxRows, round_up(rows_per_block, multiple));
    num_blocks = ceil_div(num_samples, rows_per_block);
  }
};

// What Python prepares for the moments: parts, [parts, D] elements each, and counts, and, where blocks do not
// order the samples, their order.
struct MomentsPlan {
  int64_t is_ordering, num_parts, num_counts;
};

MomentsPlan class_separability_moments_plan(int64_t num_samples, int64_t num_dims, int64_t num_classes,
                                            Dtype dtype) {
  constexpr const char* op = "class_separability_moments_fwd";
  check_classes(op, num_classes);
  MomentsPlan plan{};
  dispatch_dtype(op, dtype, [&](auto* type) {
    const MomentsShares shares(num_samples, num_dims, num_classes, sizeof(*type));
    const int64_t num_blocks = shares.num_blocks;
    plan = shares.is_ordering ? MomentsPlan{1, num_blocks * num_classes, num_blocks * num_classes}
                              : MomentsPlan{0, num_blocks + num_classes, 0};
  });
  return plan;
}

struct SampleOrder {
  const int64_t* labels;         // [N] where blocks order the samples, else nullptr and the next two
  const int64_t* order;          // [N] rows by class
  const int32_t* sorted_labels;  // [N] in that order
};

// Workspace.
struct PartMoments {
  void* mean;      // [parts, D] float64
  void* squares;   // [parts, D] in the dtype of sums
  int32_t* count;  // [blocks, C] where blocks order the samples
};

void class_separability_moments_fwd(const Strided<2>& features,  // [N, D], rows contiguous
                                    const SampleOrder& samples, int64_t num_classes, const PartMoments& parts,
                                    const ClassMoments& out, Dtype dtype, Stream stream) {
  constexpr const char* op = "class_separability_moments_fwd";
  check_classes(op, num_classes);
  const DeviceGuard guard(op, stream.device);
  const int64_t num_samples = features.sizes[0], num_dims = features.sizes[1], stride = features.strides[0];
  const int classes = static_cast<int>(num_classes);
  const std::initializer_list<const void*> tables = {features.data, parts.mean, parts.squares};
  with_packs(op, dtype, tables, num_dims, stride, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    constexpr int n = decltype(width)::value;
    const MomentsShares shares(num_samples, num_dims, num_classes, sizeof(T));
    if (num_samples > 0 && shares.is_ordering != (samples.labels != nullptr))
      throw std::invalid_argument(std::string(op) + ": samples must be ordered where the plan says so");
    const auto rows = static_cast<int>(shares.rows_per_block);
    // Without columns there are still samples to count.
    const auto num_slabs = static_cast<unsigned>(num_dims == 0 ? 1 : ceil_div(num_dims, kWarp * n));
    const auto num_groups = static_cast<unsigned>(num_dims == 0 ? 1 : ceil_div(num_dims, kWarp));
    using M = part_mean_t<T>;
    M* const means = static_cast<M*>(parts.mean);
    A* const squares = static_cast<A*>(parts.squares);
    const T* const x = static_cast<const T*>(features.data);
    if (shares.num_blocks > 0) {
      MMFAST_LAUNCH((class_moments_fwd_kernel<T, n>), static_cast<unsigned>(shares.num_blocks * num_slabs),
                    kBlock, 0, stream.handle, x, samples.labels, samples.order, samples.sorted_labels, means,
                    squares, parts.count, num_samples, num_dims, classes, stride, rows, num_slabs);
      check_cuda(op, cudaGetLastError());
    }
    MMFAST_LAUNCH((class_moments_merge_kernel<T>), static_cast<unsigned>(num_classes * num_groups), kBlock, 0,
                  stream.handle, means, squares, parts.count, samples.sorted_labels, x, samples.labels,
                  samples.order, stride, out.count, static_cast<A*>(out.mean), static_cast<A*>(out.var),
                  num_samples, num_dims, classes, shares.num_blocks, rows, num_groups);
  });
  check_cuda(op, cudaGetLastError());
}

void class_separability_moments_bwd(const ClassGradients& gradients,
                                    const Strided<2>& features,  // [N, D], rows contiguous
                                    const int64_t* labels,       // [N]
                                    void* dfeatures,             // [N, D] contiguous
                                    int64_t num_classes, Dtype dtype, Stream stream) {
  constexpr const char* op = "class_separability_moments_bwd";
  check_classes(op, num_classes);
  const int64_t num_samples = features.sizes[0], num_dims = features.sizes[1], stride = features.strides[0];
  if (num_samples == 0 || num_dims == 0) return;
  const DeviceGuard guard(op, stream.device);
  // Gradients may be views that begin anywhere.
  const std::initializer_list<const void*> tables = {features.data, gradients.dmean, gradients.dvar,
                                                     gradients.mean, dfeatures};
  with_packs(op, dtype, tables, num_dims, stride, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    constexpr int n = decltype(width)::value;
    const Slabs slabs(num_dims, n);
    const int64_t num_blocks = ceil_div(num_samples, kRows * (kBlock >> slabs.log_lanes)) * slabs.count;
    MMFAST_LAUNCH((class_moments_bwd_kernel<T, n>), static_cast<unsigned>(num_blocks), kBlock, 0,
                  stream.handle, static_cast<const A*>(gradients.dmean),
                  static_cast<const A*>(gradients.dvar), static_cast<const T*>(features.data), labels,
                  gradients.count, static_cast<const A*>(gradients.mean), static_cast<T*>(dfeatures),
                  num_samples, num_dims, static_cast<int>(num_classes), stride, slabs.log_lanes, slabs.count);
  });
  check_cuda(op, cudaGetLastError());
}

void class_separability_hits(const Strided<2>& features,  // [N, D], rows contiguous
                             const int64_t* labels,       // [N]
                             const void* centroids,       // [C, D] contiguous, float32 or float64
                             Dtype centroid_dtype, int64_t num_classes,
                             void* intervals,  // [2, C, D] in the dtype of sums, written
                             int64_t* hits,    // [D], zeros
                             Dtype dtype, Stream stream) {
  constexpr const char* op = "class_separability_hits";
  check_classes(op, num_classes);
  if (centroid_dtype != Dtype::kFloat32 && centroid_dtype != Dtype::kFloat64)
    throw std::invalid_argument(std::string(op) + ": centroids must be float32 or float64");
  const int64_t num_samples = features.sizes[0], num_dims = features.sizes[1], stride = features.strides[0];
  if (num_samples == 0 || num_dims == 0) return;
  const DeviceGuard guard(op, stream.device);
  const int num_sms = device_attribute(op, cudaDevAttrMultiProcessorCount, stream.device);
  const int classes = static_cast<int>(num_classes);
  with_packs(op, dtype, {features.data, intervals}, num_dims, stride, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = accumulate_t<T>;
    constexpr int n = decltype(width)::value;
    A *const low = static_cast<A*>(intervals), *const high = low + num_classes * num_dims;
    const auto interval_slabs = static_cast<unsigned>(ceil_div(num_dims, kIntervalColumns));
    const auto interval_blocks =
        static_cast<unsigned>(interval_slabs * ceil_div(num_classes, kClassGroups * kClassesPerThread));
    if (centroid_dtype == Dtype::kFloat64) {
      MMFAST_LAUNCH((class_intervals_kernel<double, A>), interval_blocks, kBlock, 0, stream.handle,
                    static_cast<const double*>(centroids), low, high, classes, num_dims, interval_slabs);
    } else {
      MMFAST_LAUNCH((class_intervals_kernel<float, A>), interval_blocks, kBlock, 0, stream.handle,
                    static_cast<const float*>(centroids), low, high, classes, num_dims, interval_slabs);
    }
    check_cuda(op, cudaGetLastError());
    const Slabs slabs(num_dims, n);
    // Four blocks an SM, and no block so small that adding up what it found costs more.
    const int64_t turn = kRows * (kBlock >> slabs.log_lanes);
    const int64_t wanted = ceil_div(4 * int64_t{num_sms}, slabs.count);
    const int64_t rows = std::min<int64_t>(ceil_div(ceil_div(num_samples, wanted), turn) * turn, 1 << 24);
    const int64_t num_blocks = ceil_div(num_samples, rows) * slabs.count;
    MMFAST_LAUNCH((dimension_hits_kernel<T, n>), static_cast<unsigned>(num_blocks), kBlock, 0, stream.handle,
                  static_cast<const T*>(features.data), labels, low, high,
                  reinterpret_cast<unsigned long long*>(hits), num_samples, num_dims, classes, stride,
                  slabs.log_lanes, slabs.count, rows);
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(class_separability_moments_plan)
MMFAST_REGISTER(class_separability_moments_fwd)
MMFAST_REGISTER(class_separability_moments_bwd)
MMFAST_REGISTER(class_separability_hits)

}  // namespace
}  // namespace mmfast

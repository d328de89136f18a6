// Utilities of the logits of given coalitions: rows of a [N, S, C] table, each with a team of lanes to
// itself.
//
// A row is read once from memory, four classes a lane; longer ones a second time out of the L1 cache, after
// their maximum is known.
#pragma once

#include "additive_shapley.cuh"

namespace mmfast {
namespace {

constexpr int kRowsBlock = 256;

template <class T>
struct Table {
  const T* logits;        // [N, S, C]
  const int64_t* labels;  // [N]
  int64_t num_rows;       // N S
  int S, C;
  int64_t stride_n, stride_s, stride_c;
  int utility, threads;
  bool is_packed;
  Format format;
};

// The logits of a row; those of the first chunk stay in registers.
template <class T>
struct TableRow {
  using A = accumulate_t<T>;
  static constexpr int H = kClassesPerThread<T>;
  Classes<H> classes;
  const T* row;
  int64_t stride_c;
  A held[H];

  __device__ TableRow(const Table<T>& table, int64_t index, const Team<false>& team)
      : classes(table.C, table.is_packed, table.format, team),
        row(table.logits + index / table.S * table.stride_n + index % table.S * table.stride_s),
        stride_c(table.stride_c) {
    classes.load(row, stride_c, 0, held);
  }

  __device__ void load(int chunk, A (&z)[H]) const {
    if (chunk > 0) return classes.load(row, stride_c, chunk, z);
#pragma unroll
    for (int i = 0; i < H; ++i) z[i] = held[i];
  }

  // Labels on a GPU are not checked: 0 in place of what lies outside.
  __device__ A logit_of(int64_t label) const {
    return label >= 0 && label < classes.C ? classes.format.widen(row[label * stride_c]) : A(0);
  }
};

template <class T>
__global__ void __launch_bounds__(kRowsBlock, 2)
    coalition_utilities_fwd_kernel(Table<T> table,
                                   T* __restrict__ values) {  // [N, S]
  using A = accumulate_t<T>;
  const Team<false> team(table.threads, nullptr);
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * team.teams() + team.place();
  // A team without a row works on the last one, since all lanes take part in the exchanges.
  const int64_t index = wanted < table.num_rows ? wanted : table.num_rows - 1;
  const TableRow<T> row(table, index, team);
  const int64_t label = table.labels[index / table.S];
  const int y = static_cast<int>(label);
  const bool is_softmax = table.utility == kProbability || table.utility == kLogProbability;
  A u = is_softmax ? softmax_utility(row, y, row.logit_of(label), table.utility, team)
                   : largest_utility(row, y, row.logit_of(label), table.utility, team);
  if (table.utility == kCardinality) u *= static_cast<A>(__popcll(index % table.S));
  if (wanted < table.num_rows && team.lane == 0) values[index] = table.format.template narrow<T>(u);
}

template <class T>
__global__ void __launch_bounds__(kRowsBlock, 2)
    coalition_utilities_bwd_kernel(const T* __restrict__ dvalues,  // [N, S]
                                   Table<T> table,
                                   T* __restrict__ dlogits) {  // [N, S, C]
  using A = accumulate_t<T>;
  const Team<false> team(table.threads, nullptr);
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * team.teams() + team.place();
  const int64_t index = wanted < table.num_rows ? wanted : table.num_rows - 1;
  const TableRow<T> row(table, index, team);
  const int label = static_cast<int>(table.labels[index / table.S]);
  const A label_logit = row.logit_of(label), du = table.format.widen(dvalues[index]);
  const auto& classes = row.classes;
  constexpr int H = kClassesPerThread<T>;
  const int chunks = classes.chunks();

  A z[H], label_gradient = du, weight = 0, top = -kInfinity<A>;
  int runner_up = kNoClass;
  if (table.utility == kMargin) {
    for_other_classes(row, label, [&](int, A z) { top = Max()(top, z); });
    top = team.all(top, Max());
    for_other_classes(row, label,
                      [&](int c, A z) { runner_up = Min()(runner_up, runner_up_key(c, z, top)); });
    runner_up = class_of_key(team.all(runner_up, Min()));
  } else {
    const Softmax<A> softmax = softmax_of(row, label, label_logit, team);
    const A total = softmax.label + softmax.others;
    weight = (table.utility == kProbability ? du * (softmax.label / total) : du) / total;
    // Of an infinite du the formula, du - du p, would make NaN.
    label_gradient = weight * softmax.others + (du - du);
    top = softmax.top;
  }
  if (wanted >= table.num_rows) return;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    row.load(chunk, z);
#pragma unroll
    for (int i = 0; i < H; ++i) {
      const int c = classes.class_of(chunk, i);
      const A other = table.utility == kMargin ? (c == runner_up ? -du : A(0))
                                               : (c == label ? A(0) : -weight * exponential(z[i] - top));
      z[i] = c == label ? label_gradient + (table.utility == kMargin ? other : A(0)) : other;
    }
    classes.store(dlogits + index * classes.C, chunk, z);
  }
}

template <class T>
Table<T> make_table(const Strided<3>& logits, const int64_t* labels, Utility utility, const void* output,
                    Format format) {
  const auto& [N, S, C] = logits.sizes;
  const auto& [stride_n, stride_s, stride_c] = logits.strides;
  const bool is_packed = fits_packs<T, kClassesPerThread<T>>(logits.data, C, stride_c) &&
                         stride_n % kClassesPerThread<T> == 0 && stride_s % kClassesPerThread<T> == 0 &&
                         (output == nullptr || fits_packs<T, kClassesPerThread<T>>(output, C, 1));
  return {static_cast<const T*>(logits.data),
          labels,
          N * S,
          static_cast<int>(S),
          static_cast<int>(C),
          stride_n,
          stride_s,
          stride_c,
          static_cast<int>(utility),
          lanes_for<kClassesPerThread<T>>(C),
          is_packed,
          format};
}

template <class T>
unsigned num_row_blocks(const Table<T>& table) {
  return grid_blocks(table.num_rows, kRowsBlock / table.threads);
}

void coalition_utilities_fwd(const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous, in [0, C)
                             void* values,              // [N, S] contiguous
                             Utility utility, Dtype dtype, Stream stream) {
  constexpr const char* op = "coalition_utilities_fwd";
  if (logits.sizes[0] * logits.sizes[1] == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto table = make_table<T>(logits, labels, utility, nullptr, format);
    MMFAST_LAUNCH((coalition_utilities_fwd_kernel<T>), num_row_blocks(table), kRowsBlock, 0, stream.handle,
                  table, static_cast<T*>(values));
  });
  check_cuda(op, cudaGetLastError());
}

void coalition_utilities_bwd(const void* dvalues,       // [N, S] contiguous
                             const Strided<3>& logits,  // [N, S, C]
                             const int64_t* labels,     // [N] contiguous, in [0, C)
                             void* dlogits,             // [N, S, C] contiguous
                             Utility utility, Dtype dtype, Stream stream) {
  constexpr const char* op = "coalition_utilities_bwd";
  if (logits.sizes[0] * logits.sizes[1] == 0) return;
  const DeviceGuard guard(op, stream.device);
  dispatch_storage(op, dtype, [&](auto* type, Format format) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto table = make_table<T>(logits, labels, utility, dlogits, format);
    MMFAST_LAUNCH((coalition_utilities_bwd_kernel<T>), num_row_blocks(table), kRowsBlock, 0, stream.handle,
                  static_cast<const T*>(dvalues), table, static_cast<T*>(dlogits));
  });
  check_cuda(op, cudaGetLastError());
}

MMFAST_REGISTER(coalition_utilities_fwd)
MMFAST_REGISTER(coalition_utilities_bwd)

}  // namespace
}  // namespace mmfast

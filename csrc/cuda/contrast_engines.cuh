// What the host knows of a call of a loss that sweeps packed keys, and the engines of duc_loss: which kernels
// sweep on which GPU. A new one is a file duc_loss_sm<arch>.cu, which setup.py compiles for that architecture
// alone, and a row of kEngines.
#pragma once

#include <algorithm>

#include "codes.h"
#include "duc_loss.cuh"

namespace mmfast::duc {

constexpr const char* kOp = "duc_loss_fwd";
// Queries are packed up to a multiple of this, which all tiles divide.
constexpr int64_t kQueryMultiple = 128;

// Address and strides of a modality's features or keys.
struct View {
  const void* data;
  int64_t stride_row, stride_dim;
};

// Which columns a pair uses. Pair (m, n) is number m (M - 1) + n less the pairs (i, i) left out.
struct Columns {
  const bool* effective;  // [M, D]; nullptr: one pair, all columns
  int* columns;           // [P, D], those in use, ascending
  int* positions;         // [P, D], where a column went, -1 where nowhere
  int* counts;            // [P]
  int num_modalities, num_dims;

  __device__ int count(int pair) const { return effective == nullptr ? num_dims : counts[pair]; }
  __device__ int column(int pair, int position) const {
    return effective == nullptr ? position : columns[static_cast<int64_t>(pair) * num_dims + position];
  }
  __device__ int position(int pair, int column) const {
    return effective == nullptr ? column : positions[static_cast<int64_t>(pair) * num_dims + column];
  }
  __device__ int pair(int teacher, int student) const {
    return effective == nullptr ? 0 : teacher * (num_modalities - 1) + student - (student > teacher);
  }
};

// What the host knows of a call; the sizes are those of all that Python has taken memory for.
template <class S>
struct CallOf {
  Columns columns;
  S sweep;
  // The sweep of those blocks of kQueryMultiple queries that are split: as `sweep`, from block 0 on, or what
  // an engine that splits the rest does to the last ones, behind so many whole blocks of all pairs.
  S parts;
  int64_t num_whole;
  const View* views;     // [M, 2] on the host
  const int64_t* sizes;  // [M, M] on the host, columns of each pair; nullptr: not known here
  int num_sms;
  Dtype dtype;
  const char* op;  // for errors
  // Where queries and keys are packed to; keys row by row of float32 and float64 alone, and only where those
  // that are there cannot be read as they lie.
  void *queries, *keys, *keys_by_row;
  KeyRows rows_of_keys;
  void* stream;
};
using Call = CallOf<Sweep>;

// How many pairs are known on the host to have as many columns as the bucket is for.
template <class S>
int num_pairs_of(const CallOf<S>& call, const Tiling& tiling, int bucket) {
  const auto is_in = [&](int64_t size) {
    return size > 0 && tiling.bucket(static_cast<int>(size)) == bucket;
  };
  const Columns& columns = call.columns;
  if (columns.effective == nullptr) return is_in(columns.num_dims);
  if (call.sizes == nullptr) return 0;
  return static_cast<int>(
      std::count_if(call.sizes, call.sizes + columns.num_modalities * columns.num_modalities, is_in));
}

struct Engine {
  int first_major, last_major;  // of compute capabilities
  unsigned dtypes;              // bits of those it takes
  Tiling tiling;                // how half precision is packed; not for float32 and float64
  // Half precision: sweeps the pairs of a bucket below `wide`, packed before. Else packs and sweeps all
  // pairs.
  void (*launch)(const Call& call, int bucket);
  bool splits_rest = false;  // whether it sweeps some blocks whole, others in parts
};

constexpr int kLater = 1 << 16;
constexpr unsigned bit(Dtype dtype) { return 1u << static_cast<int>(dtype); }
constexpr unsigned kFloat32Or64 = bit(Dtype::kFloat32) | bit(Dtype::kFloat64),
                   kBfloat16OrFloat16 = bit(Dtype::kBFloat16) | bit(Dtype::kFloat16);

constexpr Tiling kSm90aTiling{{128, 128, 96, 64, 64}, 4};
constexpr Tiling kMmaTiling{{64, 64, 32, 64, 64}, 3};

void launch_sm90a(const Call& call, int bucket);  // duc_loss_sm90a.cu
void launch_mma(const Call& call, int bucket);    // duc_loss.cu, by contrast_mma.cuh
void launch_plain(const Call& call, int bucket);  // duc_loss.cu, by contrast_plain.cuh

// The first that fits is taken.
constexpr Engine kEngines[] = {
    {9, 9, kBfloat16OrFloat16, kSm90aTiling, launch_sm90a, true},
    {8, kLater, kBfloat16OrFloat16, kMmaTiling, launch_mma},
    {8, kLater, kFloat32Or64, {}, launch_plain},
};

}  // namespace mmfast::duc

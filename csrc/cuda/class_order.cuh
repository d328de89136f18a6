// What the kernels of class_separability.cu share, and the order of a block's rows by class.
#pragma once

#include "math.cuh"
#include "warp.cuh"

namespace mmfast {
namespace {

constexpr int kBlock = 256, kWarps = kBlock / kWarp;
// Rows of a block, and classes up to which a block orders its rows itself.
constexpr int kMaxRows = 1024, kMaxOrderedClasses = 128;

// One warp: turns the warps' counts of each class into the places where their rows of it begin. Returns how
// many rows there are.
__device__ __forceinline__ int assign_places(int num_classes,
                                             int* places,    // shared [kWarps, kMaxOrderedClasses]
                                             int* counts) {  // [C], written
  const int lane = threadIdx.x % kWarp;
  int before = 0;
  for (int first_class = 0; first_class < num_classes; first_class += kWarp) {
    const int k = first_class + lane;
    int count = 0;
    for (int w = 0; k < num_classes && w < kWarps; ++w) count += places[w * kMaxOrderedClasses + k];
    const int up_to = warp_prefix_sum(count);
    if (k < num_classes) {
      counts[k] = count;
      int place = before + up_to - count;
      for (int w = 0; w < kWarps; ++w) {
        const int added = places[w * kMaxOrderedClasses + k];
        places[w * kMaxOrderedClasses + k] = place;
        place += added;
      }
    }
    before += __shfl_sync(kFullMask, up_to, kWarp - 1);
  }
  return before;
}

// Orders a block's rows by class, and by place within a class. Returns how many have a class at all.
__device__ inline int order_rows(const int64_t* labels,  // [N]
                                 int64_t first, int num_rows, int num_classes,
                                 int* places,     // shared [kWarps, kMaxOrderedClasses]
                                 int64_t* rows,   // shared [kMaxRows], written
                                 int* classes,    // shared [kMaxRows], written
                                 int* num_known,  // shared [1]
                                 int* counts) {   // [C], written
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int share = ceil_div(num_rows, kBlock) * kWarp;
  const int begin = min(warp * share, num_rows), end = min(begin + share, num_rows);
  int* warp_places = places + warp * kMaxOrderedClasses;
  for (int k = lane; k < num_classes; k += kWarp) warp_places[k] = 0;
  __syncwarp();
  // Twice over the labels: to count a warp's rows of each class, then to give each row its place.
  for (int pass = 0; pass < 2; ++pass) {
    for (int start = begin; start < end; start += kWarp) {
      const int64_t label = start + lane < end ? labels[first + start + lane] : -1;
      // A label that names no class must not be looked up.
      const bool is_known = label >= 0 && label < num_classes;
      const int k = is_known ? static_cast<int>(label) : -1;
      const unsigned peers = __match_any_sync(kFullMask, k);
      const int rank = rank_in(peers);
      if (pass == 1 && is_known) {
        const int place = warp_places[k] + rank;
        rows[place] = first + start + lane;
        classes[place] = k;
      }
      __syncwarp();
      if (is_known && rank == 0) warp_places[k] += __popc(peers);
      __syncwarp();
    }
    __syncthreads();
    if (pass == 0) {
      if (warp == 0) {
        const int before = assign_places(num_classes, places, counts);
        if (lane == 0) *num_known = before;
      }
      __syncthreads();
    }
  }
  return *num_known;
}

}  // namespace
}  // namespace mmfast

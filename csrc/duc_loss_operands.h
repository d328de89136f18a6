// What duc_loss_fwd is given and what it writes, on CPU and GPU alike.
#pragma once

#include <cstdint>

namespace mmfast {

struct DucOperands {
  const int64_t* views;   // [M, 2, 3] on the host: address and strides of features [N, D] and keys [K, D]
  const void* effective;  // bool [M, D] contiguous; nullptr: keys[0] teaches features[0] in all dimensions
  int64_t num_modalities, num_keys, num_samples, num_dims;
};

struct DucResults {
  void* loss;       // [] or [N]
  void* residuals;  // [M, N, D], of float16 in float32; nullptr: not wanted
};

}  // namespace mmfast

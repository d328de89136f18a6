// What the functions of class_separability are given and what they write, on CPU and GPU alike.
#pragma once

#include <cstdint>

namespace mmfast {

// Written, the floats in the dtype of sums.
struct ClassMoments {
  int64_t* count;  // [C]
  void* mean;      // [C, D]
  void* var;       // [C, D]
};

// All contiguous, the floats in the dtype of sums.
struct ClassGradients {
  const void* dmean;     // [C, D]
  const void* dvar;      // [C, D]
  const int64_t* count;  // [C]
  const void* mean;      // [C, D]
};

}  // namespace mmfast

// The check of labels before a kernel takes them for indices. Here it costs one read of them; by torch it
// would be two calls and two numbers handed to Python, 2 microseconds.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

// Throws what mmfast/ops/_checks.py raises of labels for other backends, in the same words.
inline void check_labels(const int64_t* labels, int64_t num_samples, int64_t num_classes,
                         int64_t num_threads) {
  int64_t low = 0, high = -1;
  bool is_first = true;
  parallel_for(num_samples, sizeof(int64_t), num_threads, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    int64_t least = labels[begin], most = labels[begin];
    for (int64_t i = begin; i < end; ++i) {
      least = std::min(least, labels[i]);
      most = std::max(most, labels[i]);
    }
#pragma omp critical(mmfast_check_labels)
    {
      low = is_first ? least : std::min(low, least);
      high = is_first ? most : std::max(high, most);
      is_first = false;
    }
  });
  if (low >= 0 && high < num_classes) return;
  throw std::invalid_argument("labels must lie in [0, C) = [0, " + std::to_string(num_classes) +
                              "), got values from " + std::to_string(low) + " to " + std::to_string(high));
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

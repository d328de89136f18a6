// The check of labels before a kernel takes them for indices. Here it costs one read of them; by torch it
// would be two calls and two numbers handed to Python, 2 microseconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "vec.h"

namespace mmfast {
inline namespace MMFAST_ISA_NAMESPACE {

// Throws what mmfast/ops/_checks.py raises of labels for other backends, in the same words.
inline void check_labels(const int64_t* labels, int64_t num_samples, int64_t num_classes,
                         int64_t num_threads) {
  std::atomic<bool> is_outside{false};
  parallel_for(num_samples, sizeof(int64_t), num_threads, [&](int64_t begin, int64_t end) {
    // Its highest bit is set by a label below 0, and by one above the last class.
    uint64_t signs = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t label = static_cast<uint64_t>(labels[i]);
      signs |= label | (static_cast<uint64_t>(num_classes) - 1 - label);
    }
    if (signs >> 63 != 0) is_outside = true;
  });
  if (!is_outside) return;
  const auto [low, high] = std::minmax_element(labels, labels + num_samples);
  throw std::invalid_argument("labels must lie in [0, C) = [0, " + std::to_string(num_classes) +
                              "), got values from " + std::to_string(*low) + " to " + std::to_string(*high));
}

}  // namespace MMFAST_ISA_NAMESPACE
}  // namespace mmfast

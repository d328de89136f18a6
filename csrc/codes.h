// What Python names and kernels number: each enum's values are places in the tuple of names beside it, which
// a test holds against Python's own (mmfast/ops).
#pragma once

#include <cstdint>

namespace mmfast {

enum Dtype : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr const char* kDtypeNames[] = {"float32", "float64", "bfloat16", "float16"};

enum Reduction : int64_t { kMean, kSum, kNone };
constexpr const char* kReductionNames[] = {"mean", "sum", "none"};

// Of a coalition's logits for the true class.
enum Utility : int64_t { kCardinality, kCorrect, kProbability, kLogProbability, kMargin };
constexpr const char* kUtilityNames[] = {"cardinality", "correct", "probability", "log_probability",
                                         "margin"};

// By which unimodal logits are fused.
enum Score : int64_t { kEntropy, kCertainty };
constexpr const char* kScoreNames[] = {"entropy", "certainty"};

}  // namespace mmfast

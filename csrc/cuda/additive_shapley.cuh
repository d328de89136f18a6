// What the kernels of additive_shapley.cu share: elements and how they are loaded, and utilities of logits.
#pragma once

#include <cstring>

#include "codes.h"
#include "shapley.cuh"
#include "team.cuh"

namespace mmfast {
namespace {

// Classes that a thread takes at a time: those of a vector of 16 bytes (two for double).
template <class T>
constexpr int kClassesPerThread = sizeof(T) == 2 ? 8 : 4;
constexpr int kNoClass = std::numeric_limits<int>::max();

// A bfloat16 or a float16: which, a kernel is told when it runs. To widen both is cheap, and half as many
// kernels need be compiled.
struct Half16 {
  uint16_t bits;
};

struct Format {
  bool is_bfloat;

  template <class T>
  __device__ accumulate_t<T> widen(T x) const {
    if constexpr (std::is_same_v<T, Half16>) {
      __half half;
      memcpy(&half, &x, sizeof x);
      return is_bfloat ? __uint_as_float(static_cast<unsigned>(x.bits) << 16) : __half2float(half);
    } else {
      return x;
    }
  }

  template <class T, class A>
  __device__ T narrow(A x) const {
    if constexpr (std::is_same_v<T, Half16>) {
      const __half half = __float2half_rn(x);
      const __nv_bfloat16 bfloat = __float2bfloat16_rn(x);
      Half16 result;
      if (is_bfloat) {
        memcpy(&result, &bfloat, sizeof result);
      } else {
        memcpy(&result, &half, sizeof result);
      }
      return result;
    } else {
      return x;
    }
  }
};

// As dispatch_dtype, calling function(pointer to storage, format).
template <class Function>
void dispatch_storage(const char* op, Dtype dtype, Function&& function) {
  dispatch_dtype(op, dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == sizeof(Half16)) {
      function(static_cast<Half16*>(nullptr), Format{std::is_same_v<T, __nv_bfloat16>});
    } else {
      function(type, Format{false});
    }
  });
}

__device__ inline float exponential(float x) { return expf(x); }
// Not inlined, as it is long, nor the logarithm.
__device__ MMFAST_NOINLINE double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return natural_log(x); }
__device__ MMFAST_NOINLINE double logarithm(double x) { return natural_log(x); }

// How the classes of a sample are dealt out to a team: H neighbours to a thread where vectors can be loaded,
// else one to each thread in turn; in chunks if there are more.
template <int H>
struct Classes {
  int C, first, step, span;
  bool is_packed;
  Format format;

  template <bool is_block>
  __device__ Classes(int C, bool is_packed, Format format, const Team<is_block>& team)
      : C(C),
        first(is_packed ? team.index() * H : team.index()),
        step(is_packed ? 1 : team.size()),
        span(team.size() * H),
        is_packed(is_packed),
        format(format) {}

  __device__ int class_of(int chunk, int i) const { return chunk * span + first + i * step; }
  __device__ int chunks() const { return ceil_div(C, span); }

  // `pad` beyond the last class.
  template <class T, class A>
  __device__ void load(const T* row, int64_t stride_c, int chunk, A (&z)[H], A pad = 0) const {
    if (is_packed) {
      Pack<T, H> loaded{};
      const bool is_pad = class_of(chunk, 0) >= C;
      if (!is_pad) loaded = load_pack<H>(row + class_of(chunk, 0));
#pragma unroll
      for (int i = 0; i < H; ++i) z[i] = is_pad ? pad : format.widen(loaded.values[i]);
    } else {
      load_scalars([&](int c) { return format.widen(row[c * stride_c]); }, chunk, z, pad);
    }
  }

  // As load, of elements side by side that need not be aligned.
  template <class A>
  __device__ void load_scalars(const A* row, int chunk, A (&z)[H], A pad = 0) const {
    load_scalars([&](int c) { return row[c]; }, chunk, z, pad);
  }

  template <class Function, class A>
  __device__ void load_scalars(Function&& element, int chunk, A (&z)[H], A pad) const {
#pragma unroll
    for (int i = 0; i < H; ++i) {
      const int c = class_of(chunk, i);
      z[i] = c < C ? element(c) : pad;
    }
  }

  template <class T, class A>
  __device__ void store(T* row, int chunk, const A (&z)[H]) const {
    if (is_packed) {
      if (class_of(chunk, 0) >= C) return;
      Pack<T, H> stored;
#pragma unroll
      for (int i = 0; i < H; ++i) stored.values[i] = format.narrow<T>(z[i]);
      store_pack(row + class_of(chunk, 0), stored);
    } else {
#pragma unroll
      for (int i = 0; i < H; ++i) {
        const int c = class_of(chunk, i);
        if (c < C) row[c] = format.narrow<T>(z[i]);
      }
    }
  }
};

template <class T, int H>
bool fits_packs(const void* address, int64_t C, int64_t stride_c) {
  return stride_c == 1 && C % H == 0 && is_aligned_for_packs<T, H>(address);
}

// Lanes of a warp that hold a sample's classes at once, if there are enough.
template <int H>
int lanes_for(int64_t C) {
  int lanes = 1;
  while (lanes < kWarp && lanes * H < C) lanes *= 2;
  return lanes;
}

// The least of these names the lowest class of the largest logit, `top` unless it is NaN: a NaN is larger
// than all numbers.
template <class A>
__device__ int runner_up_key(int c, A x, A top) {
  return x != x ? c - kNoClass : x == top ? c : kNoClass;
}
__device__ inline int class_of_key(int key) { return key < 0 ? key + kNoClass : key; }

template <class A>
struct Softmax {
  A top, label, others;  // of exp(z - top): the label's, and the sum over all other classes
};

// Calls function(c, z) for the thread's logits of one sample, `source.load(chunk, z)`, but the label's.
template <class Source, class Function>
__device__ __forceinline__ void for_other_classes(const Source& source, int label, Function&& function) {
  const auto& classes = source.classes;
  typename Source::A z[Source::H];
  const int chunks = classes.chunks();
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    source.load(chunk, z);
#pragma unroll
    for (int i = 0; i < Source::H; ++i) {
      const int c = classes.class_of(chunk, i);
      if (c < classes.C && c != label) function(c, z[i]);
    }
  }
}

// Logits of one sample, `source.load(chunk, z)`: exact, class by class, NaN and infinities as torch has them.
template <class A, class Source, bool is_block>
__device__ Softmax<A> softmax_of(const Source& source, int label, A label_logit, const Team<is_block>& team) {
  A top = label_logit, others = 0;
  for_other_classes(source, label, [&](int, A z) { top = Max()(top, z); });
  top = team.all(top, Max());
  for_other_classes(source, label, [&](int, A z) { others += exponential(z - top); });
  return {top, exponential(label_logit - top), team.all(others, Sum())};
}

// "probability" or "log_probability".
template <class A, class Source, bool is_block>
__device__ A softmax_utility(const Source& source, int label, A label_logit, int utility,
                             const Team<is_block>& team) {
  const Softmax<A> softmax = softmax_of(source, label, label_logit, team);
  const A total = softmax.label + softmax.others;
  return utility == kProbability ? softmax.label / total : label_logit - softmax.top - logarithm(total);
}

// "margin" or "correct", which stands for "cardinality", too.
template <class A, class Source, bool is_block>
__device__ A largest_utility(const Source& source, int label, A label_logit, int utility,
                             const Team<is_block>& team) {
  A top = -kInfinity<A>, poison = 0;
  int beaten = 0;
  for_other_classes(source, label, [&](int c, A z) {
    const bool is_nan = z != z;
    top = Max()(top, z);
    poison += is_nan ? z : A(0);
    // Of equal logits the first counts as largest, and a NaN as larger than all numbers.
    beaten |= z > label_logit || (is_nan && label_logit == label_logit) ||
              (c < label && (z == label_logit || is_nan));
  });
  if (utility != kMargin) return team.all(beaten, Sum()) == 0 ? A(1) : A(0);
  top = team.all(top, Max());
  // The maximum passes over a NaN.
  return label_logit - top + team.all(poison, Sum());
}

}  // namespace
}  // namespace mmfast

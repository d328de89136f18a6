// What the tensors of lists are and where they lie, for plans that must notice when that changes: asked of
// their framework through DLPack's exchange table, a C interface of stable structs, in 45 ns a
// tensor. Python's questions for address, shape, strides and dtype take 250.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace mmfast {

// As dlpack.h, major version 1, lays them out.
struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t rank;
  uint8_t kind, bits;
  uint16_t lanes;
  const int64_t* sizes;
  const int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(DlTensor) == 48);

struct DlExchange {
  uint32_t major, minor;
  const void* previous;
  // Five functions, of which this is the fourth: it owns nothing and waits for no stream.
  const void* unused[3];
  int (*view)(void* object, DlTensor* out);
  const void* current_stream;
};

// That of a class of tensors; null where it is of another version or views are not to be had.
inline const DlExchange* dl_exchange(const pybind11::capsule& capsule) {
  const void* address = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  const auto* found = static_cast<const DlExchange*>(address);
  if (found == nullptr) throw pybind11::error_already_set();
  return found->major == 1 && found->view != nullptr ? found : nullptr;
}

// Hands the words that tell all about the tensors of two lists to put(words, count) until that says no:
// address, device and dtype, sizes, strides. False where it did, and where something is no tensor of the two
// classes or lies nowhere.
template <class Put>
bool put_tensors(const DlExchange& exchange, const pybind11::list& first, const pybind11::list& second,
                 const pybind11::tuple& classes, Put&& put) {
  const PyObject* const plain = PyTuple_GET_ITEM(classes.ptr(), 0);
  const PyObject* const other = PyTuple_GET_ITEM(classes.ptr(), 1);
  const auto length = static_cast<int64_t>(PyList_GET_SIZE(first.ptr()));
  if (!put(&length, 1)) return false;
  for (PyObject* list : {first.ptr(), second.ptr()}) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      PyObject* object = PyList_GET_ITEM(list, i);
      const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(object));
      if (type != plain && type != other) return false;
      DlTensor tensor;
      if (exchange.view(object, &tensor) != 0) {
        PyErr_Clear();
        return false;
      }
      const uint64_t what = static_cast<uint64_t>(tensor.rank & 0xFFFF) << 48 |
                            static_cast<uint64_t>(tensor.device_index & 0xFFFF) << 32 |
                            static_cast<uint64_t>(tensor.device_type & 0xFFFF) << 16 |
                            static_cast<uint64_t>(tensor.kind) << 8 | tensor.bits;
      const int64_t words[] = {
          static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset),
          static_cast<int64_t>(what)};
      if (!put(words, 2) || !put(tensor.sizes, tensor.rank) || !put(tensor.strides, tensor.rank))
        return false;
    }
  }
  return true;
}

// The words as bytes, None where put_tensors fails.
inline pybind11::object tensor_words(const pybind11::capsule& capsule, const pybind11::list& first,
                                     const pybind11::list& second, const pybind11::tuple& classes) {
  const DlExchange* exchange = dl_exchange(capsule);
  if (exchange == nullptr) return pybind11::none();
  std::vector<int64_t> words;
  words.reserve(1 + 4 * (first.size() + second.size()));
  const bool is_known = put_tensors(*exchange, first, second, classes, [&](const int64_t* more, int64_t n) {
    words.insert(words.end(), more, more + n);
    return true;
  });
  if (!is_known) return pybind11::none();
  return pybind11::bytes(reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t));
}

// Whether the words would be these.
inline bool has_words(const pybind11::capsule& capsule, const pybind11::list& first,
                      const pybind11::list& second, const pybind11::tuple& classes,
                      const pybind11::bytes& known) {
  const DlExchange* exchange = dl_exchange(capsule);
  if (exchange == nullptr) return false;
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(known.ptr(), &data, &size) != 0) throw pybind11::error_already_set();
  const bool is_same = put_tensors(*exchange, first, second, classes, [&](const int64_t* words, int64_t n) {
    const auto count = static_cast<Py_ssize_t>(n * sizeof(int64_t));
    if (count > size || (count > 0 && std::memcmp(data, words, count) != 0)) return false;
    data += count, size -= count;
    return true;
  });
  return is_same && size == 0;
}

}  // namespace mmfast

// What the tensors of lists are and where they lie, for plans that must notice when that changes: asked of
// their framework through DLPack's exchange table, a C interface of stable structs, in 45 ns a
// tensor. Python's questions for address, shape, strides and dtype take 250.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "python.h"

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

// What both functions are called with.
struct TensorLists {
  const DlExchange* exchange;  // of the class of tensors; null where it is of another version or has no views
  PyObject* lists[2];
  const PyObject* classes[2];
};

// Reads capsule, lists and classes of a call, and what else `format` names. False if that raised.
template <class... Others>
bool read_lists(PyObject* arguments, const char* format, TensorLists& found, Others*... others) {
  PyObject *capsule, *plain, *other;
  if (!PyArg_ParseTuple(arguments, format, &capsule, &PyList_Type, &found.lists[0], &PyList_Type,
                        &found.lists[1], &plain, &other, others...))
    return false;
  found.classes[0] = plain, found.classes[1] = other;
  const void* address = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (address == nullptr) return false;
  const auto* exchange = static_cast<const DlExchange*>(address);
  found.exchange = exchange->major == 1 && exchange->view != nullptr ? exchange : nullptr;
  return true;
}

// Hands the words that tell all about the tensors of two lists to put(words, count) until that says no:
// address, device and dtype, sizes, strides. False where it did, and where something is no tensor of the two
// classes or lies nowhere.
template <class Put>
bool put_tensors(const TensorLists& given, Put&& put) {
  const auto length = static_cast<int64_t>(PyList_Size(given.lists[0]));
  if (!put(&length, 1)) return false;
  for (PyObject* list : given.lists) {
    const Py_ssize_t size = PyList_Size(list);
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* object = PyList_GetItem(list, i);
      const auto* type = reinterpret_cast<const PyObject*>(Py_TYPE(object));
      if (type != given.classes[0] && type != given.classes[1]) return false;
      DlTensor tensor;
      if (given.exchange->view(object, &tensor) != 0) {
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

// (capsule, first, second, (class, class)): the words as bytes, None where put_tensors fails.
inline PyObject* tensor_words(PyObject*, PyObject* arguments) {
  TensorLists given;
  if (!read_lists(arguments, "OO!O!(OO):tensor_words", given)) return nullptr;
  std::vector<int64_t> words;
  const auto put = [&](const int64_t* more, int64_t n) {
    words.insert(words.end(), more, more + n);
    return true;
  };
  try {
    words.reserve(1 + 4 * (PyList_Size(given.lists[0]) + PyList_Size(given.lists[1])));
    if (given.exchange == nullptr || !put_tensors(given, put)) Py_RETURN_NONE;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)));
}

// (capsule, first, second, (class, class), known): whether the words would be these bytes.
inline PyObject* has_words(PyObject*, PyObject* arguments) {
  TensorLists given;
  PyObject* known;
  if (!read_lists(arguments, "OO!O!(OO)S:has_tensor_words", given, &known)) return nullptr;
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(known, &data, &size) != 0) return nullptr;
  const auto put = [&](const int64_t* words, int64_t n) {
    const auto count = static_cast<Py_ssize_t>(n * sizeof(int64_t));
    if (count > size || (count > 0 && std::memcmp(data, words, count) != 0)) return false;
    data += count, size -= count;
    return true;
  };
  return PyBool_FromLong(given.exchange != nullptr && put_tensors(given, put) && size == 0);
}

}  // namespace mmfast

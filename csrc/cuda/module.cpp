// The Python module mmfast._cuda: every registered op. It links the CUDA runtime statically and loads without
// a GPU.
#include "bind.h"

namespace {

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(MMFAST_CUDA_ARCHITECTURES); }

PyMethodDef functions[] = {
    {"architectures", &architectures, METH_NOARGS, "The compute capabilities compiled in."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cuda",
                          "CUDA kernels on raw addresses and a stream; mmfast.ops checks their arguments.",
                          -1,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      (!mmfast::bind_ops(module, 0) || PyModule_AddStringConstant(module, "nvcc", MMFAST_NVCC) != 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}

// The Python module mmfast._cuda: every registered op. It links the CUDA runtime statically and loads without
// a GPU.
#include "bind.h"

namespace {

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(MMFAST_CUDA_ARCHITECTURES); }
PyObject* nvcc(PyObject*, PyObject*) { return PyUnicode_FromString(MMFAST_NVCC); }

PyMethodDef functions[] = {
    {"architectures", &architectures, METH_NOARGS, "The compute capabilities compiled in."},
    {"nvcc", &nvcc, METH_NOARGS, "The release of nvcc that compiled it."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = mmfast::definition_of(
    "_cuda", "CUDA kernels on raw addresses and a stream; mmfast.ops checks their arguments.", functions);

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return mmfast::make_module(definition, 0); }

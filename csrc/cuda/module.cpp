// The Python module mmfast._cuda: every registered op. It links the CUDA runtime statically and loads without
// a GPU.
#include "bind.h"

PYBIND11_MODULE(_cuda, module) {
  module.attr("interface") = mmfast::kInterface;
  module.doc() = "CUDA kernels on raw addresses and a stream; mmfast.ops checks their arguments.";
  module.def(
      "architectures", [] { return MMFAST_CUDA_ARCHITECTURES; }, "The compute capabilities compiled in.");
  mmfast::bind_ops(module, 0);
}

"""Compile an op's Triton kernels for what its launchers pass: python -m support.launched_kernels OP.

Triton compiles a kernel anew for an integer argument of 1, which becomes a constant, for a multiple of 16
and for pointers to 16 bytes; its interpreter, which the other tests use, knows none of this. So the ops are
called here with sizes of 1, odd ones and multiples of 16, on CPU tensors: where a kernel would be launched
it is compiled, for a GPU that need not be there, by Triton's own passes, and nothing is computed. Prints the
kernels and what does not compile. Needs TRITON_INTERPRET=0.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from mmfast import backend as _backend
from mmfast import ops
from mmfast.errors import dtype_name
from mmfast.ops import _partial_reinit_table as reinit_table

CAPABILITY = 90
# Half precision and float64 at a few sizes: what an argument of 1 does is the same in every dtype.
HALF, WIDE = torch.bfloat16, torch.float64


class _Device:
    """What Triton asks of its driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


class Launches:
    """From its making on, launches compile and are noted."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.failures: dict[str, str] = {}
        launch, stages = JITFunction.run, CUDABackend.add_stages

        def run(kernel: JITFunction, *args: Any, grid: Sequence[int], warmup: bool, **kwargs: Any) -> None:
            self.kernels.add(f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}")
            try:
                if min(grid) < 1 or max(grid[1:], default=1) > 65535:
                    raise ValueError(f"no GPU takes the grid {grid}")
                launch(kernel, *args, grid=grid, warmup=True, **kwargs)
            except Exception as error:
                given = dict(zip(kernel.arg_names, args)) | kwargs
                text = ", ".join(f"{name}={_shown(value)}" for name, value in given.items())
                self.failures[f"{kernel.__name__}({text})"] = str(error)

        def add_stages(backend: CUDABackend, to: dict[str, Callable], *args: Any) -> None:
            stages(backend, to, *args)
            # LLVM and the assembler take most of the time; what an argument can break is broken before.
            to["llir"] = lambda _, metadata: metadata.update(shared=0, tmem_size=0) or ""
            to["ptx"] = lambda _, metadata: metadata.update(name="kernel") or ""
            to["cubin"] = lambda *_: b""

        triton.runtime.driver.set_active(_Device())
        JITFunction.run, CUDABackend.add_stages = run, add_stages
        # Tensors on the CPU go to Triton, in any dtype, and the loss takes the tiles of the GPU.
        _backend.interpreting, _backend.supports = lambda: True, lambda *_: True
        _backend.kernels("duc_loss")._machine = lambda _: (CAPABILITY, 132)


def _shown(argument: object) -> str:
    if not isinstance(argument, Tensor):
        return str(argument)
    aligned = "" if argument.data_ptr() % 16 == 0 else " unaligned"
    return f"{dtype_name(argument.dtype)}{list(argument.shape)}{aligned}"


def sizes(*ordinary: int) -> Iterator[tuple[int, ...]]:
    """Yield sizes: those given, all odd, all 1, and each at 1 beside the others as given."""
    yield ordinary
    yield tuple(size // 2 | 1 for size in ordinary)
    yield (1,) * len(ordinary)
    if len(ordinary) > 1:
        for index in range(len(ordinary)):
            yield (*ordinary[:index], 1, *ordinary[index + 1 :])


def tensor(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Return zeros that want a gradient: contiguous, not on 16 bytes, or with dimensions in reverse order."""
    if layout == "reversed":
        x = torch.zeros(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
    else:
        start = layout == "unaligned"
        x = torch.zeros(int(torch.Size(shape).numel()) + start, dtype=dtype)[start:].view(shape)
    return x.detach().requires_grad_()


def labels(size: int, dtype: torch.dtype = torch.int64, step: int = 1) -> Tensor:
    """Return labels of class 0, `step` numbers apart."""
    return torch.zeros(size * step, dtype=dtype)[::step]


def layouts(*shapes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], torch.dtype, str]]:
    """Yield shapes with dtypes and layouts: all shapes in float32, the first two in the others as well."""
    for index, shape in enumerate(shapes):
        yield shape, torch.float32, "contiguous"
        if index < 2:
            yield shape, HALF, "contiguous"
            yield shape, torch.float32, "reversed"
            yield shape, torch.float32, "unaligned"
    yield shapes[0], WIDE, "contiguous"


def backward(result: Tensor | tuple[Tensor, ...], *inputs: Tensor, expanded: bool = False) -> None:
    """Run backward with gradients that lie in memory as autograd's, or are one number expanded."""
    results = (result,) if isinstance(result, Tensor) else result
    smooth = [y for y in results if y.requires_grad]
    seeds = [
        torch.ones((), dtype=y.dtype).expand(y.shape) if expanded else torch.ones_like(y) for y in smooth
    ]
    torch.autograd.grad(smooth, inputs, seeds)


def shapley_values() -> None:
    for shape, dtype, layout in layouts((32, 8), (7, 8), (1, 8), (32, 2), (1, 2), (32, 16), (33, 512)):
        v = tensor(*shape, dtype=dtype, layout=layout)
        backward(ops.shapley_values(v, backend="triton"), v)
        backward(ops.shapley_values(v, backend="triton"), v, expanded=True)


def additive_shapley() -> None:
    for shape, dtype, layout in layouts(*sizes(3, 32, 16), (16, 32, 16), (2, 7, 2048)):
        _, num_samples, num_classes = shape
        z, b = tensor(*shape, dtype=dtype, layout=layout), tensor(num_classes)
        y = labels(num_samples, torch.int32 if layout == "reversed" else torch.int64)
        for bias in (None, b):
            phi = ops.additive_shapley(z, y, bias, utility="log_probability", backend="triton")
            backward(phi, z, *([] if bias is None else [bias]))
        ops.additive_shapley(z, y, utility="cardinality", backend="triton")
        if num_classes > 1:
            backward(ops.additive_shapley(z, y, utility="margin", backend="triton"), z)
    for (num_samples, num_players, num_classes), dtype, layout in layouts(*sizes(32, 3, 16)):
        u = tensor(num_samples, 2**num_players, num_classes, dtype=dtype, layout=layout)
        for utility in ("cardinality", "probability"):
            values = ops.coalition_utilities(
                u, labels(num_samples, step=2), utility=utility, backend="triton"
            )
            if utility == "probability":
                backward(values, u)


def duc_loss() -> None:
    # Samples, dimensions, modalities and every how many dimensions one is effective.
    shapes = [(32, 64, 3, 2), (15, 33, 3, 2), (1, 1, 2, 1), (1, 64, 2, 1), (32, 1, 2, 1), (257, 80, 2, 5)]
    for (num_samples, num_dims, num_modalities, step), dtype, layout in layouts(*shapes, (64, 520, 2, 2)):
        x = [tensor(num_samples, num_dims, dtype=dtype, layout=layout) for _ in range(num_modalities)]
        # On the device the host does not know how many there are; in DucDims it does.
        effective = torch.arange(num_modalities * num_dims).view(num_modalities, num_dims) % step == 0
        effective[-1] = ~effective[0] if step > 1 else False
        for dims in (effective, ops.DucDims(effective)):
            backward(ops.duc_loss(x, dims, temperature=0.5, backend="triton"), *x)
            with torch.no_grad():
                ops.duc_loss(x, dims, reduction="none", backend="triton")
    pairs = [(32, 64), (15, 33), (1, 1), (1, 64), (32, 1), (32, 256), (1000, 64), (20_000, 64), (64, 512)]
    for shape, dtype, layout in layouts(*pairs, (32, 128), (20_000, 128), (20_000, 256)):
        q = tensor(*shape, dtype=dtype, layout=layout)
        backward(ops.unidirectional_info_nce(q, q.detach(), backend="triton"), q)
        with torch.no_grad():
            ops.unidirectional_info_nce(q, q.detach(), backend="triton")
    for shape in pairs[-4:]:
        q = tensor(*shape, dtype=HALF)
        backward(ops.unidirectional_info_nce(q, q.detach(), backend="triton"), q)


def sigmoid_loss() -> None:
    shapes = [(32, 64), (15, 33), (1, 1), (1, 64), (32, 1), (32, 256), (1000, 64), (20_000, 64), (64, 512)]
    for shape, dtype, layout in layouts(*shapes, (32, 128), (20_000, 128), (20_000, 256)):
        q = tensor(*shape, dtype=dtype, layout=layout)
        numbers = [(tensor(1).detach() + 1).requires_grad_() for _ in range(2)]
        loss = ops.unidirectional_sigmoid_loss
        backward(loss(q, q.detach(), backend="triton"), q)
        backward(loss(q, q.detach(), temperature=numbers[0], bias=numbers[1], backend="triton"), q, *numbers)
        with torch.no_grad():
            loss(q, q.detach(), reduction="none", backend="triton")
    for shape in shapes[-4:]:
        q = tensor(*shape, dtype=HALF)
        backward(ops.unidirectional_sigmoid_loss(q, q.detach(), backend="triton"), q)


def class_separability() -> None:
    # effective_dimensions, which calls these two, refuses centroids that nobody computed.
    for (num_samples, num_dims, num_classes), dtype, layout in layouts(
        *sizes(64, 32, 16), (300, 257, 3), (2000, 33, 5)
    ):
        x = tensor(num_samples, num_dims, dtype=dtype, layout=layout)
        for y in (labels(num_samples), labels(num_samples, torch.int32, step=2)):
            for expanded in (False, True):
                backward(ops.class_moments(x, y, num_classes, backend="triton")[1:], x, expanded=expanded)
            centroids = tensor(num_classes, num_dims, dtype=dtype, layout=layout).detach()
            ops.dimension_accuracy(x, y, centroids, backend="triton")


def kmeans() -> None:
    for (num_samples, num_dims, num_clusters), dtype, layout in layouts(
        *sizes(64, 32, 16), (80, 80, 64), (2000, 33, 5)
    ):
        num_clusters = min(num_clusters, num_samples)
        x = tensor(num_samples, num_dims, dtype=dtype, layout=layout).detach()
        ops.kmeans(x, num_clusters, init=x[:num_clusters], max_iter=2, backend="triton")
    # Each wide and narrow, and all of them at strides.
    kinds = list(itertools.product((torch.int64, torch.int32), (1, 2)))
    for size, (kind, step) in itertools.product((64, 33, 1), kinds):
        y = labels(size, kind, step)
        ops.cluster_purity(labels(size, step=step), y, backend="triton")


def partial_reinit() -> None:
    for count, size, dtype in itertools.product((1, 3, 16), (1, 33, 4096), (torch.float32, HALF, WIDE)):
        params = [tensor(size, dtype=dtype).detach() for _ in range(count)]
        initial = [torch.zeros(size, dtype=dtype) for _ in range(count)]
        for is_capturing in (False, True):
            # A graph's plan is written by a kernel.
            with mock.patch.object(reinit_table, "_is_capturing", lambda _, yes=is_capturing: yes):
                for alpha in (0.5, [0.5 - 0.25 * is_capturing] * count):
                    ops.partial_reinit_(params, initial, alpha, backend="triton")


def gradient_projection() -> None:
    for (size, num_rows), dtype, layout in layouts(*sizes(64, 16), (300, 7)):
        wide = torch.promote_types(dtype, torch.float32)
        projector = tensor(size, size, dtype=wide, layout=layout).detach()
        for step in (1, 2):
            feature = torch.zeros(size * step, dtype=dtype)[::step]
            ops.update_projector_(projector, feature, alpha=0.5, backend="triton")
        grad = tensor(num_rows, size, dtype=dtype, layout=layout).detach()
        ops.project_gradient(grad, projector, backend="triton")
    for (size, num_rows), dtype, layout in layouts(*sizes(64, 16), (300, 7), (300, 1), (128, 1)):
        wide = torch.promote_types(dtype, torch.float32)
        projector = tensor(size, size, dtype=wide, layout=layout).detach()
        grad = tensor(num_rows, size, dtype=dtype, layout=layout).detach()
        for step in (1, 2):
            feature = torch.zeros(size * step, dtype=dtype)[::step]
            ops.update_and_project_(projector, feature, grad, alpha=0.5, backend="triton")


def logit_fusion() -> None:
    for shape, dtype, layout in layouts(*sizes(3, 32, 16), (2, 33, 10_000)):
        z = tensor(*shape, dtype=dtype, layout=layout)
        mask, turned = (torch.ones(n, dtype=torch.bool) for n in (shape[:2], shape[1::-1]))
        for present in (None, mask, turned.T):
            fused = ops.certainty_fusion(z, temperature=0.5, present=present, backend="triton")
            backward(fused, z)
            backward(ops.entropy_fusion(z, present=present, backend="triton"), z, expanded=True)


CALLS = {
    call.__name__: call
    for call in (
        shapley_values,
        additive_shapley,
        duc_loss,
        sigmoid_loss,
        class_separability,
        kmeans,
        partial_reinit,
        gradient_projection,
        logit_fusion,
    )
}


def main() -> None:
    """Print kernels and failures of the op named, as JSON."""
    launches = Launches()
    # What nobody computes shall be the same in every run: it decides what is launched next.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    CALLS[sys.argv[1]]()
    print(json.dumps({"kernels": sorted(launches.kernels), "failures": launches.failures}))


if __name__ == "__main__":
    main()

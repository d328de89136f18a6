"""How a fit is executed: steps compiled, and by deterministic algorithms alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import nn

from mmfast.models import MultimodalModel

# What cuBLAS must be told before it gives the same bits each time.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


class CompiledSteps:
    """Contexts in which encoders and head of a model run compiled, with the weights and names they have.

    They are for training steps. Passes in eval mode run as they are: their batches have other sizes, each of
    which would be compiled anew, and a model that is loaded from a checkpoint predicts the same.

    Args:
        model: whose encoders and head are compiled, at their first step.
    """

    def __init__(self, model: MultimodalModel) -> None:
        self._calls = [(module, _compiled_call(module)) for module in (*model.encoders.values(), model.head)]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        before = [module._compiled_call_impl for module, _ in self._calls]
        try:
            for module, call in self._calls:
                module._compiled_call_impl = call
            yield
        finally:
            for (module, _), call in zip(self._calls, before, strict=True):
                module._compiled_call_impl = call


def _compiled_call(module: nn.Module):
    """Return what `module.compile()` lets a call run; the module itself stays as it is."""
    before = module._compiled_call_impl
    module.compile()
    call, module._compiled_call_impl = module._compiled_call_impl, before
    return call


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let torch run deterministic algorithms alone, and raise where it has none; settings come back."""
    algorithms = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    try:
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark = flags
        if workspace is None:
            os.environ.pop(_CUBLAS, None)

"""What kernels cannot read as it lies is copied in parts: an expanded input may stand for any number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import ops
from mmfast.ops import _launch
from mmfast.ops._registration import FUNCTIONS
from support.stems import EMULATED, FILES

MOST = 100
N, D, C, S = 30, 12, 3, 8
BACKENDS = pytest.mark.parametrize("backend", [*FILES, EMULATED], indirect=True)


class LargestCopy(TorchDispatchMode):
    """Keeps the largest number of elements copied at once by an op's function, which is called as such."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.numel = max(self.numel, result.numel())
        return result


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.arange(N) % C
MATRICES = {
    "column-major": _random(D, N).T,
    "equal columns": _random(N, 1).expand(N, D),
    "one number": _random(1, 1).expand(N, D),
    "every second": _random(N, 2 * D)[:, ::2],
}
TABLES = {
    "equal tables": _random(N, 1, S).expand(N, 5, S),
    "equal tables inside": _random(2, N, 1, S).expand(2, N, 5, S),
    "swapped": _random(5, 2, N, S).permute(2, 0, 1, 3),
    "one of many": _random(1, 4, S, N).transpose(2, 3).transpose(1, 2),
}
CENTROIDS = _random(C, D)
# A whole part of the columns has no class with samples.
CENTROIDS[:, : MOST // N] = torch.nan
CALLS = {
    "moments": lambda x, b: FUNCTIONS["class_moments_fwd"][b](x, LABELS.to(x.device), C),
    "hits": lambda x, b: [FUNCTIONS["dimension_hits"][b](x, LABELS.to(x.device), CENTROIDS.to(x.device))],
    "shapley fwd": lambda x, b: [FUNCTIONS["shapley_values_fwd"][b](x)],
    "shapley bwd": lambda x, b: [FUNCTIONS["shapley_values_bwd"][b](x[..., :3])],
}
CASES = [(name, kind) for name in ("moments", "hits") for kind in MATRICES]
CASES += [(name, kind) for name in ("shapley fwd", "shapley bwd") for kind in TABLES]


@BACKENDS
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_parts_give_what_the_whole_gives(name, kind, backend, device, monkeypatch):
    if backend == "reference":
        pytest.skip("it has chunks of its own")
    x = (MATRICES | TABLES)[kind].to(device)
    whole = CALLS[name](x, backend)
    monkeypatch.setattr(_launch, "_MOST_PACKED", MOST)
    with LargestCopy() as largest:
        parts = CALLS[name](x, backend)
    assert largest.numel <= MOST
    for y, z in zip(whole, parts, strict=True):
        assert (y.shape, y.stride(), y.dtype) == (z.shape, z.stride(), z.dtype)
        torch.testing.assert_close(z, y, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_lies_apart_is_looked_at_in_parts(value):
    """Whether all is finite is asked before any iteration, and what is not is counted."""
    for x in MATRICES.values():
        wide = torch.full_like(x, value)[:1, :1].expand(2**12, 2**10)
        with LargestCopy() as largest, pytest.raises(ValueError, match=f"got {2**22} NaN or infinite"):
            ops.kmeans(wide, 2)
        assert largest.numel <= 2**20

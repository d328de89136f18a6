"""A NaN is one whatever its bits: kernels that take numbers apart by their bits, on the CPU."""

from __future__ import annotations

import pytest
import torch

from mmfast import ops
from support.cases import dtype_name

# The one that torch writes, those of x86 and of NVIDIA's GPUs, and one with the lowest bit alone.
PAYLOADS = {
    torch.float32: (0x7FC00000, -0x400000, 0x7FFFFFFF, 0x7F800001),
    torch.float64: (0x7FF8 << 48, -(1 << 51), 0x7FFFFFFFFFFFFFFF, (0x7FF << 52) + 1),
}


def calls(x):
    """Return what each op with an exponential or a logarithm makes of logits or features x, [4, 6]."""
    labels = torch.arange(4)
    for utility in ("probability", "log_probability", "margin"):
        yield ops.coalition_utilities(x[None], labels[:1], utility=utility, backend="cpu")
        yield ops.additive_shapley(x[None], labels, utility=utility, backend="cpu")
    yield ops.unidirectional_info_nce(x, x.roll(1, 0), backend="cpu")
    yield ops.unidirectional_sigmoid_loss(x, x.roll(1, 0), backend="cpu")
    yield ops.shapley_values(x[:, :4], backend="cpu")


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("dtype", PAYLOADS, ids=dtype_name)
@pytest.mark.usefixtures("cpu_module")
def test_every_nan_stays_one(dtype, index):
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(integers)[:, 1] = PAYLOADS[dtype][index]
    assert x[:, 1].isnan().all()
    for result in calls(x):
        assert result.isnan().all()

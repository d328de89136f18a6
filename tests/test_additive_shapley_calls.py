"""additive_shapley as it is called: layouts, autocast, torch.compile, torch.library, bad input."""

from __future__ import annotations

import pytest
import torch

from mmfast import backend as _backend
from mmfast import ops
from support.additive_shapley import make
from support.cases import HALF, dtype_name

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_layouts_and_label_dtypes(backend, device):
    partial_logits, labels, bias = make((3, 33, 7), device=device)
    expected = ops.additive_shapley(partial_logits, labels, bias, backend=backend)
    strided = partial_logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    spread = torch.stack([bias, bias], dim=1)[:, 0]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        actual = ops.additive_shapley(strided, labels.to(dtype), spread, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_more_classes_than_a_block_holds():
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    most = _backend.kernels("additive_shapley").MAX_CLASSES
    device = "cpu" if _backend.interpreting() else "cuda"
    partial_logits = torch.zeros(2, 1, most + 1, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(_backend.BackendUnavailableError, match=f"up to {most} classes, got {most + 1}"):
        ops.additive_shapley(partial_logits, labels, backend="triton")


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_autocast_and_mixed_bias(dtype, backend, device):
    partial_logits, labels, bias = make((2, 16, 5), dtype, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        phi = ops.additive_shapley(partial_logits, labels, bias.float(), backend=backend)
    expected = ops.additive_shapley(partial_logits.double(), labels, bias.double(), backend=backend)
    assert phi.dtype == dtype
    torch.testing.assert_close(phi.double(), expected)


def test_compiles(backend, device):
    partial_logits, labels, bias = make((3, 16, 5), device=device)

    def loss(partial_logits, bias):
        phi = ops.additive_shapley(2 * partial_logits, labels, bias, utility="margin", backend=backend)
        return phi.square().sum() + ops.additive_shapley(partial_logits, labels, bias, backend=backend).sum()

    leaves = [partial_logits.requires_grad_(), bias.requires_grad_()]
    expected, actual = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


BAD = {
    "rank": (lambda p, y, b: (p[0], y, b), {}, "partial_logits must have shape [M, N, C], got [4, 3]"),
    "no modality": (lambda p, y, b: (p[:0], y, b), {}, "must hold M modalities, from 1 to 20, got 0"),
    "labels": (lambda p, y, b: (p, y[:, None], b), {}, "labels must have shape [N] = [4], got [4, 1]"),
    "label range": (lambda p, y, b: (p, y + 3, b), {}, "labels must lie in [0, C) = [0, 3)"),
    "bias": (lambda p, y, b: (p, y, b[:2]), {}, "bias must have shape [C] = [3], got [2]"),
    "utility": (lambda p, y, b: (p, y, b), {"utility": "loss"}, "utility must be one of 'cardinality'"),
    "one class": (
        lambda p, y, b: (p[..., :1], y * 0, b[:1]),
        {"utility": "margin"},
        "must have C >= 2 classes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, message = BAD[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ops.additive_shapley(*change(*make((2, 4, 3))), **options)
    assert message in str(error.value)


def test_bad_types_and_tables():
    partial_logits, labels, _ = make((2, 4, 3))
    with pytest.raises(TypeError, match="labels must have an integer dtype, got float64"):
        ops.additive_shapley(partial_logits, labels.double())
    with pytest.raises(TypeError, match="logits must have dtype float32"):
        ops.coalition_utilities(torch.zeros(4, 4, 3, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match="a power of two from 2 on, got 3"):
        ops.coalition_utilities(torch.zeros(4, 3, 3), labels)
    with pytest.raises(ValueError, match="a power of two from 2 on, got 0"):
        ops.coalition_utilities(torch.zeros(4, 0, 3), labels)

"""Sizes of 0 and 1 in every position: the same result, or the same error, in every backend, and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmfast import backend as _backend
from support import every_op
from support.cases import dtype_name
from support.every_op import CALLS
from support.numerics import assert_close_to_truth
from support.stems import EMULATED, FILES

CASES = [pytest.param(stem, make, id=make.__name__) for stem, makes in CALLS.items() for make in makes]
# A fifth of N is what the pairwise losses take; two letters at once where one hides the other.
SIZES = [{"N": 0}, {"N": 1}, {"N": 5}, {"D": 0}, {"D": 1}, {"C": 1}, {"M": 0}, {"M": 1}]
SIZES += [
    {"N": 0, "D": 0},
    {"N": 1, "D": 0},
    {"N": 5, "D": 0},
    {"N": 5, "D": 1},
    {"N": 0, "C": 1},
    {"N": 0, "M": 1},
]


def _outcome(
    make: every_op.Make, device: torch.device, dtype: torch.dtype, backend: str
) -> list[Tensor] | str:
    """Return the results and gradients, or what the error says."""
    try:
        return make(device, dtype, backend)[1]()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: " ".join(f"{k}{v}" for k, v in sizes.items()))
@pytest.mark.parametrize("backend", [*FILES, EMULATED], indirect=True)
@pytest.mark.parametrize(("stem", "make"), CASES)
def test_small_sizes(stem, make, backend, device, sizes, dtype, monkeypatch):
    if not _backend.implements(backend, stem):
        pytest.skip(f"{stem} has no {backend} kernel")
    for letter, size in ({"N": 20, "D": 6, "C": 4} | sizes).items():
        monkeypatch.setattr(every_op, letter, size)
    truth = _outcome(make, torch.device("cpu"), torch.float64, "reference")
    plain = _outcome(make, torch.device("cpu"), dtype, "reference")
    actual = _outcome(make, device, dtype, backend)
    if isinstance(truth, str) or isinstance(actual, str) or isinstance(plain, str):
        assert actual == plain == truth
        return
    for value, wide, expected in zip(actual, truth, plain, strict=True):
        # A Python number has become a tensor on the CPU.
        assert value.device.type == (device.type if make is not every_op.cluster_purity else "cpu")
        if value.is_floating_point():
            assert_close_to_truth(value.cpu(), wide.double(), expected)
        else:
            assert value.dtype == expected.dtype
            assert torch.equal(value.cpu(), expected)

"""How far results may be off, in tests and benchmarks: the one table and the one way to measure an error."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to twice the error of plain torch. One unit in the last place of 1 for half precision, whose results
# are rounded once from float32; sixteen roundings (1e-6 in float32) for the others, where the order of a sum
# decides.
CONSTANTS = {
    torch.float64: 16 * 2.0**-53,
    torch.float32: 16 * 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def error_against(
    truth: Tensor,  # in float64
    value: Tensor,  # the same shape
) -> float:
    """Return the largest error of `value`, relative to the largest true magnitude where that exceeds 1."""
    if truth.numel() == 0:
        return 0.0
    truth, value = truth.double().cpu(), value.double().cpu()
    return ((value - truth).abs().max() / truth.abs().max().clamp(min=1.0)).item()


def allowed_error(
    truth: Tensor,  # in float64
    plain: Tensor,  # what plain torch returns in the tested dtype
    dtype: torch.dtype,
) -> float:
    """Return how far a result of a dtype may be off: twice as far as plain torch, plus a constant."""
    return 2 * error_against(truth, plain) + CONSTANTS[dtype]

"""The rules of accuracy: an op errs at most twice as far as plain torch, plus a constant, and rounds once."""

from __future__ import annotations

import torch
from torch import Tensor

# The table lies in the installed package: benchmarks, which cannot import tests, hold results to it, too.
from mmfast.bench.accuracy import CONSTANTS, allowed_error, error_against

__all__ = [
    "CONSTANTS",
    "allowed_error",
    "as_plain_float64",
    "assert_close_to_truth",
    "assert_rounded_once",
    "error_against",
]


def assert_close_to_truth(
    actual: Tensor,  # what an op returned, any dtype
    truth: Tensor,  # the same in float64
    plain: Tensor,  # what plain torch returns in the dtype of `actual`
) -> None:
    """Assert the rule; shapes and dtype must agree, and nothing but what is NaN in truth may be NaN."""
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{actual.dtype}, expected {plain.dtype}"
    assert truth.dtype == torch.float64
    assert torch.equal(actual.isnan().cpu(), truth.isnan().cpu()), (
        "NaN where there should be none, or the reverse"
    )
    dtype = actual.dtype
    truth, actual, plain = (tensor.detach().double().nan_to_num(0.0) for tensor in (truth, actual, plain))
    limit = allowed_error(truth, plain, dtype)
    error = error_against(truth, actual)
    assert error <= limit, f"error {error:.3e} against float64, at most {limit:.3e} allowed"


def as_plain_float64(
    truth: Tensor,  # in float64
    plain: Tensor,  # the same in float32
) -> Tensor:
    """Return a stand-in for plain torch in float64, whose own rounding nothing wider tells.

    It is as far from `truth`, relative to the last place, as float32 is: `truth` itself errs as much.
    """
    return truth + (plain.double() - truth) * (2.0**-53 / 2.0**-24)


def assert_rounded_once(
    actual: Tensor,  # bfloat16 or float16
    truth: Tensor,  # the same in float64
    slack: float = 1e-6,  # of what comes before the rounding, relative to the largest true magnitude
) -> None:
    """Assert that each element is what float32 arithmetic and one rounding at its end give.

    Sums kept in half precision stay within `assert_close_to_truth` where terms are few, but not within this.
    """
    assert actual.shape == truth.shape
    actual, truth, info = actual.detach().cpu(), truth.cpu(), torch.finfo(actual.dtype)
    _, exponent = torch.frexp(truth.abs().clamp(min=info.smallest_normal))
    half_a_unit = torch.ldexp(torch.full_like(truth, info.eps / 4), exponent)
    error = (actual.double() - truth).abs()
    limit = 1.001 * half_a_unit + slack * truth.abs().max()
    assert bool((error <= limit).all()), (
        f"{(error / half_a_unit).max():.2f} halves of a unit in the last place off"
    )

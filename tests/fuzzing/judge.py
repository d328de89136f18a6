"""What counts as right: classes first (NaN, +inf, -inf, finite), then errors within a bound that is derived.

The exact value is the docstring's formula in extended precision: 64 bits of mantissa and exponents to 16,383
on x86-64, so that nothing overflows that float64 holds, and its own error is 2^-11 of float64's.

1. NaN and infinities follow IEEE rules through the formula as torch reads it (softmax of a row with +inf, or
   of -inf alone, is NaN; argmax takes the first NaN for the largest), unless a docstring says otherwise.
2. A finite exact value must come out finite, unless it lies beyond the dtype of the result (then +-inf), or
   an intermediate of the formula (a product, a sum of them, a difference) lies beyond the dtype that the op
   accumulates in. Such elements are `loose`: they may be NaN or infinite, but never finite and wrong. `void`
   is only what follows from a sum of products of which a part lies beyond the dtype: by the order of its
   terms it is either infinity or NaN, and a score of -infinity is one.
   Intermediates that a docstring's formula does not have excuse nothing, but for one: sum_j exp(s_j) k_j of
   a softmax, less k_i times sum_j exp(s_j), divided by that afterwards, whose size is up to 2 N max |k|.
3. The bound of an element is the first-order error of the formula in the dtype of accumulation, with
   u = 2^-24 or 2^-53: a sum of n terms in any order errs by at most (n - 1) u sum |terms|, a product or
   quotient by u of itself, exp and log by EXP_ERRORS u of themselves; an error e in the argument of exp
   costs a factor of e^e. To it comes one rounding to the dtype of the result, to nearest.
4. Kernels may take exponentials below FLUSHED times the least normal number for 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuzzing.tensors import exact

U = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Four units in the last place.
EXP_ERRORS = 8
# exp(-86.5) and exp(-706), below which the kernels of a CPU take 0, over the least normal number.
FLUSHED = 16


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype of accumulation: the widest, at least float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def unit(dtype: torch.dtype) -> float:
    """Return u, half a unit in the last place of 1."""
    return torch.finfo(dtype).eps / 2


def flushed(dtype: torch.dtype) -> float:
    """Return below what an exponential may be 0."""
    return FLUSHED * torch.finfo(dtype).tiny


def grain(dtype: torch.dtype) -> np.longdouble:
    """Return the least number above 0: a rounding below the normal numbers errs by up to half of it."""
    info = torch.finfo(dtype)
    return np.longdouble(info.tiny) * info.eps


def gamma(count: float, u: float) -> float:
    """Return the relative error of `count` roundings one after the other."""
    return count * u / (1 - count * u)


def clean(x: np.ndarray) -> np.ndarray:
    """Return a bound without what infinite values made of it; classes decide there."""
    return np.where(np.isnan(x), 0, x)


def class_of(x: np.ndarray) -> np.ndarray:
    """Return 0 for finite, 1 and -1 for the infinities, 2 for NaN."""
    return np.where(np.isnan(x), 2, np.where(np.isinf(x), np.sign(x), 0)).astype(int)


_NAMES = {0: "finite", 1: "inf", -1: "-inf", 2: "NaN"}


def _report(name: str, place: np.ndarray, actual: np.ndarray, truth: np.ndarray, text: str) -> str:
    index = tuple(int(i) for i in place)
    return f"{name}{list(index)} = {float(actual[index]):.9g}, right is {float(truth[index]):.9g} ({text})"


def check(
    name: str,
    actual: Tensor,
    truth: np.ndarray,  # extended, the exact values
    bound: np.ndarray | float,  # of the error before the result is rounded to its dtype
    *,
    dtype: torch.dtype,
    loose: np.ndarray | bool = False,
    void: np.ndarray | bool = False,  # nothing can be said of these
) -> None:
    """Raise AssertionError unless `actual` is right by the rules above."""
    assert isinstance(actual, Tensor), f"{name} is no tensor but {type(actual).__name__}"
    assert actual.dtype == dtype, f"{name} has dtype {actual.dtype}, expected {dtype}"
    truth = np.asarray(truth)
    assert tuple(actual.shape) == truth.shape, (
        f"{name} has shape {list(actual.shape)}, expected {list(truth.shape)}"
    )
    if truth.size == 0:
        return
    got, info = exact(actual), torch.finfo(dtype)
    with np.errstate(all="ignore"):
        loose = np.broadcast_to(np.asarray(loose), truth.shape)
        limit = np.broadcast_to(clean(np.asarray(bound, np.longdouble)), truth.shape)
        limit = limit + unit(dtype) * np.abs(truth) + float(info.smallest_normal) * info.eps
        is_finite, top = np.isfinite(truth), np.longdouble(info.max)
        got_class, true_class = class_of(got), class_of(truth)
        # Beyond the largest number by more than half its unit rounds to infinity.
        overflow = np.sign(truth).astype(int)
        must = is_finite & (np.abs(truth) - limit >= top * (1 + unit(dtype)))
        may = is_finite & (np.abs(truth) + limit > top)
        right_class = np.where(must, got_class == overflow, got_class == true_class)
        right_class |= may & ~must & (got_class == overflow)
        # Where the bound alone reaches beyond the largest number, either infinity.
        right_class |= is_finite & (limit - np.abs(truth) > top) & (np.abs(got_class) == 1)
        right_class |= loose & (got_class != 0)
        near = np.abs(got - truth) <= limit
        right_class |= np.asarray(void)
        right = right_class & (near | (got_class != 0) | np.asarray(void))
    if right.all():
        return
    wrong = ~right_class if not right_class.all() else ~right
    text = f"{int((~right).sum())} of {right.size} wrong"
    place = np.argwhere(wrong)[0]
    index = tuple(place)
    if not right_class.all():
        expected = overflow[index] if must[index] else true_class[index]
        text = f"class {_NAMES[int(got_class[index])]} for {_NAMES[int(expected)]}; {text}"
    else:
        with np.errstate(all="ignore"):
            error = np.abs(got - truth)
            place = np.argwhere(wrong & (error / limit == (error / limit)[wrong].max()))[0]
        index = tuple(place)
        text = f"error {float(error[index]):.3g}, bound {float(limit[index]):.3g}; {text}"
    raise AssertionError(_report(name, place, got, truth, text))


def check_same(name: str, actual: Tensor, truth: np.ndarray) -> None:
    """Raise AssertionError unless whole numbers are the same."""
    assert list(actual.shape) == list(truth.shape), (
        f"{name} has shape {list(actual.shape)}, not {list(truth.shape)}"
    )
    got = actual.detach().numpy()
    if not np.array_equal(got, truth):
        index = tuple(int(i) for i in np.argwhere(got != truth)[0])
        wrong = int((got != truth).sum())
        raise AssertionError(
            f"{name}{list(index)} = {got[index]}, right is {truth[index]} ({wrong} of {got.size} wrong)"
        )

"""The softmax in extended precision, with the errors of a softmax in the dtype of accumulation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzzing.judge import EXP_ERRORS, clean


class Softmax(NamedTuple):
    """Probabilities and their logarithms over the last dimension, and bounds of their errors."""

    p: np.ndarray
    log_p: np.ndarray
    p_error: np.ndarray
    log_p_error: np.ndarray


def _log_sum(x: np.ndarray) -> np.ndarray:  # [..., C] -> [..., 1]
    top = np.maximum(x.max(-1, keepdims=True), -np.finfo(np.longdouble).max)
    return top + np.log(np.exp(x - top).sum(-1, keepdims=True))


def softmax(
    z: np.ndarray,  # [..., C] extended
    u: float,
    flush: float,  # below what an exponential may be 0
    z_error: np.ndarray | float = 0.0,  # of z before the softmax
) -> Softmax:
    """Return exp(z - max) / sum exp(z - max) and z - max - log sum exp(z - max).

    With x = z - max, a computed exp(x_j) errs by the factor 1 + r_j, r_j = u |x_j| + EXP_ERRORS u, and their
    sum of C terms by r = sum_j p_j r_j + C u. An error d_j of z_j multiplies exp(x_j) by at most e^d_j, and
    their sum by at most the mean of e^d_j with the weights p_j.
    A row whose maximum is NaN or +inf, or -inf, is NaN.
    """
    top = z.max(-1, keepdims=True)
    x = z - top
    e = np.exp(x)
    total = e.sum(-1, keepdims=True)
    p, log_p = e / total, x - np.log(total)
    size = np.abs(clean(np.where(np.isfinite(x), x, 0)))
    shift = np.where(np.isfinite(z), z_error, 0) * np.ones_like(z)
    finite_p = clean(p)
    relative = u * size + EXP_ERRORS * u
    # Between p e^-d / sum p e^d and p e^d / sum p e^-d.
    known = np.where(np.isfinite(z), log_p, -np.inf)
    most, least = (_log_sum(known + sign * shift) for sign in (1, -1))
    above = np.exp(np.minimum(clean(known + shift - least), 0)) - finite_p
    below = np.minimum(shift + most, 1) * finite_p
    total_error = (finite_p * relative).sum(-1, keepdims=True) + z.shape[-1] * (u + flush)
    rounding = total_error + relative + 2 * u
    shifted = np.maximum(np.maximum(clean(above), clean(below)), 0)
    p_error = np.minimum(shifted * (1 + rounding) + finite_p * rounding + flush, 1)
    total_error = total_error + np.maximum(clean(most), -clean(least))
    # Twice `shift` where it is small, for the argument itself and for the sum.
    log_error = shift + total_error + 2 * u * size + EXP_ERRORS * u * np.abs(clean(np.log(total)))
    return Softmax(p, log_p, p_error, log_error)

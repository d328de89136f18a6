"""Cases of entropy_fusion and certainty_fusion."""

from __future__ import annotations

import numpy as np
import torch

from fuzzing.draw import Draw
from fuzzing.judge import check, clean, flushed, gamma, grain, unit, wide
from fuzzing.shapley import gradients, leaf
from fuzzing.softmax import softmax
from fuzzing.tensors import assert_unchanged, exact, float_dtype, floats, mask
from mmfast import ops


def _finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, 0)


def _scores(
    z: np.ndarray,  # [M, N, C]
    score: str,
    u: float,
    flush: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # [M, N] twice, [M, N, C] twice
    """Return -entropy or the largest probability, a bound of its error, its derivative and a bound of that.

    -H = sum p log p may be computed term by term or as sum p x - log sum exp(x), x = z - max. An error of p
    costs it |log p| + |x| + 1, its C terms are added in any order. Where p is 0, so is p log p.
    """
    soft = softmax(z, u, flush)
    p, x = soft.p, _finite(z - z.max(-1, keepdims=True))
    if score == "certainty":
        top = z.argmax(-1)[..., None]
        p_top, top_error = (np.take_along_axis(a, top, -1) for a in (p, soft.p_error))
        onehot = np.arange(z.shape[-1]) == top
        size = onehot + clean(p)
        slope = p_top * (onehot - p)
        slope_error = top_error * size + clean(p_top) * (soft.p_error + 4 * u * size)
        return p_top[..., 0], top_error[..., 0], slope, slope_error
    log_p = np.where(p == 0, 0, soft.log_p)
    finite_p, reach = clean(p), np.abs(_finite(log_p)) + np.abs(x)
    terms = finite_p * reach
    normalizer = np.abs(clean(x - _finite(log_p))).max(-1)
    # At most the error of p, and at least what is lost where p is taken for 0.
    loss = soft.p_error * (reach + 1)
    error = loss.sum(-1) + gamma(z.shape[-1] + 16, u) * (terms.sum(-1) + normalizer)
    value = (p * log_p).sum(-1)
    # d(-H)/dz = p (log p + H)
    slope = p * (log_p - value[..., None])
    around = reach + np.abs(clean(value))[..., None]
    slope_error = soft.p_error * (around + 1) + finite_p * (error[..., None] + 8 * u * around)
    return value, error, slope, slope_error


def _fusion(draw: Draw, backend: str, small: bool, score: str) -> None:
    dtype = float_dtype(draw, backend)
    shape = (
        draw.choice((2, 1, 3, 4, 5)),
        draw.size(17 if small else 65),
        draw.size(33 if small else 129, zero=0),
    )
    logits = floats(draw, shape, dtype)
    present = mask(draw, shape[:2]) if draw.chance(0.5) else None
    temperature, options = 1.0, {}
    if score == "certainty":
        temperature = draw.choice((1.0, 0.5, 1e-2, 1e-3, 7.0, 1e-4, 1e-6, 1e-12, 1e-30, 1e30, 3e-38))
        options["temperature"] = temperature
    op = ops.entropy_fusion if score == "entropy" else ops.certainty_fusion
    x = leaf(logits)
    fused, weights = op(x, present=None if present is None else present.tensor, backend=backend, **options)
    acc = wide(dtype)
    u, flush = unit(acc), flushed(acc)
    here = np.ones(shape[:2], bool) if present is None else present.tensor.numpy()
    z = np.where(here[..., None], exact(logits.tensor), 0)
    value, error, slope, slope_error = _scores(z, score, u, flush)
    # Of the quotient, of a reciprocal instead, and of a temperature rounded to the dtype.
    heat = np.longdouble(temperature)
    scaled = np.where(here, value / heat, -np.inf)
    scaled_error = np.where(here, error / heat + 4 * u * np.abs(clean(value)) / heat, 0)
    soft = softmax(np.moveaxis(scaled, 0, -1), u, flush, np.moveaxis(scaled_error, 0, -1))
    w, w_error = (np.where(here, np.moveaxis(a, -1, 0), 0) for a in (soft.p, soft.p_error))
    # A weight is above 0 where a modality is present: -inf excludes a class whatever the temperature.
    product = np.where(here[..., None], w[..., None] * z, 0)
    product = np.where(here[..., None] & (z == -np.inf) & ~np.isnan(w)[..., None], -np.inf, product)
    truth = product.sum(0)
    size = np.abs(_finite(z))
    bound = ((w_error + gamma(shape[0] + 2, u) * clean(w))[..., None] * size).sum(0) + (shape[0] + 2) * grain(
        acc
    )
    # A sum of rounded weights may pass the largest number where the weighted mean is near it.
    check("weights", weights, w, w_error, dtype=dtype)
    check("fused", fused, truth, bound, dtype=dtype)

    dweights = gradients(draw, shape[:2], dtype)
    dfused = gradients(draw, (shape[1], shape[2]), dtype)
    # Nothing flows back from an excluded class; what follows a fusion, a softmax, does the same.
    df = torch.where(torch.from_numpy(np.isneginf(truth)), 0, dfused.tensor)
    (dlogits,) = torch.autograd.grad([fused, weights], x, [df, dweights.tensor])
    df, dw = exact(df), exact(dweights.tensor)
    # An excluded class has logit -inf and gradient 0; their product is 0.
    terms = np.where((df == 0) & (z == -np.inf), 0, df * z)
    dweight = dw + terms.sum(-1)
    dw_size = np.abs(dw) + np.abs(_finite(terms)).sum(-1)
    dw_error = gamma(shape[2] + 1, u) * dw_size
    w_finite, dweight_finite = clean(w), _finite(dweight)
    mean = (np.where(here, w * dweight, 0)).sum(0)
    mean_error = (
        w_error * np.abs(dweight_finite)
        + w_finite * (dw_error + gamma(shape[0] + 2, u) * np.abs(dweight_finite))
    ).sum(0)
    off = np.where(here, dweight - mean, 0)
    off_error = dw_error + mean_error + u * (np.abs(dweight_finite) + np.abs(clean(mean)))
    dscore = np.where(here, w * off / heat, 0)
    finite_off = np.abs(_finite(off))
    dscore_error = (w_error * (finite_off + off_error) + w_finite * (off_error + 6 * u * finite_off)) / heat
    dscore_error = np.where(here, dscore_error, 0)
    truth = np.where(here[..., None], w[..., None] * df + dscore[..., None] * slope, 0)
    bound = (w_error + 4 * u * w_finite)[..., None] * np.abs(df)
    finite_slope = np.abs(_finite(slope))
    bound = bound + dscore_error[..., None] * (finite_slope + slope_error)
    bound = bound + np.abs(_finite(dscore))[..., None] * (slope_error + 4 * u * finite_slope)
    # Products below the normal numbers, of which the difference, or its product with the weight, is
    # multiplied by what follows it: 1 / T and the slope.
    least = (shape[2] + shape[0] + 8) * grain(acc)
    bound = bound + least * (1 + ((w_finite + 1) / heat)[..., None] * (finite_slope + slope_error))
    bound = np.where(here[..., None], bound, 0)
    # Products of large logits and gradients, and what a low temperature makes of their differences, may lie
    # beyond the dtype although the gradient does not.
    top = np.longdouble(torch.finfo(acc).max)
    beyond = ((dw_size > top) | ((finite_off + off_error) / heat > top)).any(0)
    check("dlogits", dlogits, truth, bound, dtype=dtype, loose=beyond[None, :, None])
    assert_unchanged(logits=logits, present=present, dweights=dweights, dfused=dfused)


def entropy_fusion(draw: Draw, backend: str, small: bool) -> None:
    """One call of entropy_fusion and its vector-Jacobian product."""
    _fusion(draw, backend, small, "entropy")


def certainty_fusion(draw: Draw, backend: str, small: bool) -> None:
    """One call of certainty_fusion and its vector-Jacobian product."""
    _fusion(draw, backend, small, "certainty")

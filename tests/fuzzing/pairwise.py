"""Cases of unidirectional_sigmoid_loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fuzzing.contrast import REDUCTIONS, units
from fuzzing.draw import Draw
from fuzzing.judge import EXP_ERRORS, check, clean, flushed, gamma, grain, unit, wide
from fuzzing.shapley import gradients
from fuzzing.tensors import assert_unchanged, exact, float_dtype, floats
from mmfast import ops

_TEMPERATURES = (1.0, 0.1, 0.07, 10.0, 1e-3, 1000.0, 1e-6, 1e6, 1e-20, 1e30)
_BIASES = (0.0, -10.0, 1.0, -1.0, 30.0, -80.0, 1e4, -1e4, 1e-6, 1e30, -1e30)
# Tensor cores take weights of float16 times so much, lest small ones vanish.
_ENLARGED = 2.0**15


class _Rows(NamedTuple):
    """A number for each sample, or several, with a bound of its error."""

    value: np.ndarray  # [N] or [N, d]
    error: np.ndarray  # the same


def _finite(x: np.ndarray) -> np.ndarray:
    return np.abs(np.where(np.isfinite(x), x, 0))


def _softplus(t: np.ndarray) -> np.ndarray:
    return np.maximum(t, 0) + np.log1p(np.exp(-np.abs(t)))


def _sigmoid(t: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(t))
    return np.where(t > 0, 1, e) / (1 + e)


def unidirectional_sigmoid_loss(draw: Draw, backend: str, small: bool) -> None:
    """One call of unidirectional_sigmoid_loss and its vector-Jacobian product.

    A score of d products errs by (d + 6) u (sum |q k| / temperature + |bias|), as in `contrast.pair`, and an
    error e of it moves log(1 + exp(t)) by at most e times the largest sigmoid on the way.
    """
    dtype = float_dtype(draw, backend)
    key_dtype = dtype if draw.chance(0.95) else float_dtype(draw, backend)
    shape = (draw.size(17 if small else 65), draw.size(33 if small else 129))
    query, key = floats(draw, shape, dtype), floats(draw, shape, key_dtype)
    temperature, bias = draw.choice(_TEMPERATURES), draw.choice(_BIASES)
    reduction, learns = draw.choice(REDUCTIONS), draw.chance(0.5)
    if backend == "cpu" and draw.chance(0.2):
        backend = "auto"
    x = query.tensor.detach().requires_grad_()
    numbers = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (temperature, bias)]
    loss = ops.unidirectional_sigmoid_loss(
        x,
        key.tensor,
        temperature=numbers[0] if learns else temperature,
        bias=numbers[1] if learns else bias,
        reduction=reduction,
        backend=backend,
    )
    common = torch.promote_types(dtype, key_dtype)
    acc = wide(common)
    u, flush, top = unit(acc), flushed(acc), np.longdouble(torch.finfo(acc).max)
    half, least = units(common, backend)
    num_samples, num_dims = shape
    q, k, heat = exact(query.tensor), exact(key.tensor), np.longdouble(np.float64(temperature))
    products = (q @ k.T) / heat
    s = products + np.longdouble(np.float64(bias))
    size = _finite(q) @ _finite(k).T
    lost = [np.where(np.abs(y) < least, _finite(y), 0) for y in (q, k)]
    missing = lost[0] @ _finite(k).T + _finite(q) @ lost[1].T + 2 * num_dims * least
    product_error = np.where(np.isfinite(s), (gamma(num_dims + 4, u) * size + missing) / heat, 0)
    product_error = product_error + grain(acc) * (num_dims + 2) * max(1, 1 / temperature)
    s_error = product_error + np.where(np.isfinite(s), 2 * u * (np.abs(s) + abs(bias)), 0)
    own = np.eye(num_samples, dtype=bool)
    t, sign = np.where(own, -s, s), np.where(own, -1, 1)
    g = sign * _sigmoid(t)
    relative = u * _finite(t) + (EXP_ERRORS + 4) * u
    g_error = np.maximum(_sigmoid(t + s_error) - np.abs(g), np.abs(g) - _sigmoid(t - s_error))
    g_error = clean(g_error) * (1 + relative) + clean(np.abs(g)) * relative + flush
    loss_error = clean(_sigmoid(t + s_error) * s_error) + _finite(_softplus(t)) * relative + flush
    # The sum before the division, or after it.
    beyond = (size * np.maximum(1, 1 / heat) + abs(bias) > top).any(-1)
    void = ((size > top) & np.isfinite(s)).any(-1)
    # 0 times infinity, where a unit takes for 0 what is none.
    zeros = (lost[0] > 0).astype(int) @ np.isinf(k).T.astype(int) + np.isinf(q).astype(int) @ (lost[1] > 0).T
    beyond |= (zeros > 0).any(-1)
    losses = _Rows(_softplus(t).sum(-1), loss_error.sum(-1))
    losses = _Rows(losses.value, losses.error + gamma(num_samples + 4, u) * _finite(_softplus(t)).sum(-1))
    residual = g @ k
    spread = (clean(np.abs(g)) + g_error) @ _finite(k)
    residual_error = g_error @ _finite(k) + (gamma(num_samples + 4, u) + half) * spread
    residual_error = residual_error + clean(np.abs(g)) @ lost[1] + 2 * num_samples * least
    if half == unit(torch.float16):
        residual_error = residual_error + grain(torch.float16) / 2 / _ENLARGED * _finite(k).sum(0)
    if half == unit(torch.bfloat16):
        # Of float32's range, it may be stored before it is scaled; float16 may not.
        residual_error = residual_error * (1 + half) + half * _finite(residual) + grain(torch.bfloat16)
    # Sums of keys near the largest number.
    crowded = 2 * num_samples * _finite(k).max(0, initial=0) * _ENLARGED > top
    weights = _Rows(g.sum(-1), g_error.sum(-1) + gamma(num_samples + 4, u) * clean(np.abs(g)).sum(-1))
    heats = g * products
    heat_error = g_error * _finite(products) + clean(np.abs(g)) * product_error
    heat_error = heat_error.sum(-1) + gamma(num_samples + 4, u) * _finite(heats).sum(-1)
    heated = _Rows(heats.sum(-1), heat_error)

    over = _finite(losses.value).sum() > top
    truth, bound = _reduced(losses, reduction, u)
    whole = reduction != "none"
    loose = bool(beyond.any()) or bool(over) if whole else beyond
    check("loss", loss, truth, bound, dtype=acc, loose=loose, void=void.any() if whole else void)
    given = gradients(draw, tuple(loss.shape), acc)
    found = torch.autograd.grad(loss, [x, *numbers] if learns else [x], given.tensor)
    factor = exact(given.tensor) / num_samples if reduction == "mean" and num_samples else exact(given.tensor)
    rows = np.broadcast_to(factor, (num_samples,))
    by_row = rows[:, None] / heat
    reach = _finite(k).sum(0)
    subnormal = grain(acc) * (2 * (_finite(residual) + reach * max(1, 1 / temperature)) + num_samples)
    bound = residual_error + 6 * u * _finite(residual) + num_samples * grain(acc)
    bound = np.abs(by_row) * bound + subnormal
    # A factor that is 0 in the dtype of accumulation makes NaN of an infinite residual.
    nothing = np.isinf(residual) & (np.abs(by_row) < torch.finfo(acc).tiny)
    loose = beyond[:, None] | crowded | nothing | (np.abs(by_row) * reach > top)
    check("dquery", found[0], residual * by_row, bound, dtype=dtype, loose=loose, void=void[:, None])
    parts = (("dtemperature", heated, -1 / heat), ("dbias", weights, np.longdouble(1)))
    for result, (name, sums, scale) in zip(found[1:], parts):
        terms = rows * sums.value * scale
        most = np.maximum(1, np.abs(scale))
        bound = (np.abs(rows * scale) * sums.error).sum() + gamma(num_samples + 8, u) * _finite(terms).sum()
        bound = bound + grain(acc) * (num_samples + _finite(sums.value).sum()) * most
        sizes = np.abs(rows) * _finite(sums.value) * most
        loose = bool(beyond.any()) or bool(sizes.sum() > top) or bool((_finite(sums.value) > top).any())
        check(name, result, terms.sum(), bound, dtype=torch.float64, loose=loose, void=bool(void.any()))
    assert_unchanged(query=query, key=key, dloss=given)


def _reduced(rows: _Rows, reduction: str, u: float) -> tuple[np.ndarray, np.ndarray]:
    if reduction == "none":
        return rows
    count = len(rows.value) if reduction == "mean" else 1
    total = rows.value.sum() / np.longdouble(count) if count else np.longdouble(np.nan)
    error = rows.error.sum() + gamma(len(rows.value) + 2, u) * _finite(rows.value).sum()
    return np.asarray(total), np.asarray(error / max(count, 1))

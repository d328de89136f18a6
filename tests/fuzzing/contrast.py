"""Cases of unidirectional_info_nce and duc_loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fuzzing.draw import Draw
from fuzzing.judge import check, clean, flushed, gamma, grain, unit, wide
from fuzzing.shapley import gradients
from fuzzing.softmax import softmax
from fuzzing.tensors import Made, assert_unchanged, exact, float_dtype, floats, mask
from mmfast import ops

REDUCTIONS = ("mean", "sum", "none")
_TEMPERATURES = (1.0, 0.07, 10.0, 1e-3, 1000.0, 1e-6, 1e6, 1e-20, 1e30)


class Pair(NamedTuple):
    """The losses [N] of one pair, temperature times their gradients [N, d], bounds, and what is loose."""

    loss: np.ndarray
    loss_error: np.ndarray
    residual: np.ndarray
    residual_error: np.ndarray
    beyond: np.ndarray  # [N], a score lies beyond the dtype
    void: np.ndarray  # [N], so may do a sum on the way to a score, whose infinity may then be of either sign
    unsure: np.ndarray  # [N, d], loose gradients
    reach: np.ndarray  # [d], sums of |k|


def pair(
    q: np.ndarray,  # [N, d]
    k: np.ndarray,  # [N, d]
    temperature: float,
    u: float,
    flush: float,
    top: float,  # the largest number of the dtype of accumulation
    half: float,  # u of the features' dtype where tensor cores may take the softmax rounded to it, else 0
    least: float,  # what is below it such units take for 0
) -> Pair:
    """Return logsumexp_j(s_ij) - s_ii and sum_j p_ij k_j - k_i, s = q k^T / temperature.

    A score of d products errs by (d + 4) u sum |q k| / temperature: the sum, the division or a reciprocal,
    and a change of base. What a unit takes for 0 is missing whole: a factor, a product or a sum on the way.
    """
    num_samples = len(q)
    heat = np.longdouble(np.float64(temperature))
    s = (q @ k.T) / heat
    size = np.abs(np.where(np.isfinite(q), q, 0)) @ np.abs(np.where(np.isfinite(k), k, 0)).T
    s_error = np.where(np.isfinite(s), gamma(q.shape[1] + 4, u) * size / heat, 0)
    lost = [np.where(np.abs(x) < least, np.abs(x), 0) for x in (q, k)]
    sizes = [np.abs(np.where(np.isfinite(x), x, 0)) for x in (q, k)]
    missing = lost[0] @ sizes[1].T + sizes[0] @ lost[1].T + 2 * q.shape[1] * least
    s_error = np.where(np.isfinite(s), s_error + missing / heat, 0)
    soft = softmax(s, u, flush, s_error) if num_samples else None
    if soft is None:
        nothing = np.zeros(0, np.longdouble)
        return Pair(nothing, nothing, q, q, nothing > 0, nothing > 0, q > 0, sizes[1].sum(0))
    # The sum before the division, or after it.
    beyond = (size * np.maximum(1, 1 / heat) > top).any(-1)
    # A key's score of -infinity, which it may be for +infinity, leaves a finite loss.
    void = ((size > top) & np.isfinite(s)).any(-1)
    # 0 times infinity, where a unit takes for 0 what is none.
    beyond |= (
        (lost[0] > 0).astype(int) @ np.isinf(k).T.astype(int) + np.isinf(q).astype(int) @ (lost[1] > 0).T > 0
    ).any(-1)
    k_size = sizes[1]
    # Keys near the largest number are added up, and the own one N times subtracted, before the division.
    crowded = 2 * num_samples * k_size.max(0, initial=0) > top
    own = np.arange(num_samples)
    loss, error = -soft.log_p[own, own], soft.log_p_error[own, own]
    residual = soft.p @ k - k
    p = clean(soft.p)
    spread = p @ k_size
    # The product of probabilities, whose sum divides before or after, with the keys.
    residual_error = soft.p_error @ k_size + (gamma(num_samples + 4, u) + half) * spread + 2 * u * k_size
    residual_error = residual_error + p @ lost[1] + lost[1] + 2 * num_samples * least
    if half == unit(torch.float16):
        # Probabilities of which the largest is 1 become float16 in tensor cores: small ones err by its grain.
        residual_error = residual_error + grain(torch.float16) / 2 * k_size.sum(0)
    if half == unit(torch.bfloat16):
        # Of float32's range, it may be stored before it is scaled; float16 may not.
        size = np.abs(np.where(np.isfinite(residual), residual, 0))
        residual_error = residual_error + half * size + grain(torch.bfloat16)
    # Where the own key is infinite, p k - k and (p - 1) k are NaN or infinite, not always alike.
    vanishing = (soft.p < top**-0.9) & (soft.p > 0)
    vanishing = vanishing.astype(np.longdouble) @ np.isinf(k).astype(np.longdouble) > 0
    return Pair(
        loss, error, residual, residual_error, beyond, void, vanishing | crowded | np.isinf(k), k_size.sum(0)
    )


def units(dtype: torch.dtype, backend: str) -> tuple[float, float]:
    """Return u of what tensor cores round a softmax to, and what they take for 0.

    Those of a processor that multiply pairs of bfloat16 take numbers below the normal ones for 0.
    """
    half = unit(dtype) if dtype.itemsize == 2 else 0.0
    return half, torch.finfo(dtype).tiny if dtype == torch.bfloat16 and backend in ("cpu", "auto") else 0.0


def _reduced(
    values: np.ndarray, errors: np.ndarray, reduction: str, u: float
) -> tuple[np.ndarray, np.ndarray]:
    if reduction == "none":
        return values, errors
    count = len(values) if reduction == "mean" else 1
    total = values.sum() / np.longdouble(count) if count else np.longdouble(np.nan)
    size = np.abs(np.where(np.isfinite(values), values, 0)).sum()
    return np.asarray(total), np.asarray((errors.sum() + gamma(len(values) + 2, u) * size) / max(count, 1))


def _check_loss(
    draw: Draw,
    loss: torch.Tensor,
    leaves: list[torch.Tensor],  # M of [N, D]
    pairs: list[tuple[int, np.ndarray, Pair]],  # student, its columns, what the pair gives
    temperature: float,
    reduction: str,
    acc: torch.dtype,
) -> None:
    u, flush, num_samples = unit(acc), flushed(acc), leaves[0].shape[0]
    values, errors = (np.zeros(num_samples, np.longdouble) for _ in range(2))
    beyond, void = np.zeros(num_samples, bool), np.zeros(num_samples, bool)
    for _, _, one in pairs:
        values = values + one.loss
        errors = (
            errors + one.loss_error + len(pairs) * u * np.abs(np.where(np.isfinite(one.loss), one.loss, 0))
        )
        beyond, void = beyond | one.beyond, void | one.void
    # A sum over samples beyond the dtype whose mean is not.
    total = np.abs(np.where(np.isfinite(values), values, 0)).sum()
    over = total > np.longdouble(torch.finfo(acc).max)
    truth, bound = _reduced(values, errors + num_samples * flush, reduction, u)
    loose = beyond if reduction == "none" else bool(beyond.any()) or bool(over)
    check(
        "loss", loss, truth, bound, dtype=acc, loose=loose, void=void if reduction == "none" else void.any()
    )
    if loss.requires_grad is False:
        return
    given = gradients(draw, tuple(loss.shape), acc)
    results = torch.autograd.grad(loss, leaves, given.tensor)
    factor = exact(given.tensor) / np.longdouble(np.float64(temperature))
    if reduction == "mean" and num_samples:
        factor = factor / num_samples
    factor = np.broadcast_to(factor, (num_samples,))[:, None]
    for student, result in enumerate(results):
        mine = [(columns, one) for index, columns, one in pairs if index == student]
        truth, bound = (np.zeros(tuple(result.shape), np.longdouble) for _ in range(2))
        unsure = np.zeros(tuple(result.shape), bool)
        rows, reach = np.zeros(num_samples, bool), np.zeros(result.shape[1], np.longdouble)
        for columns, one in mine:
            truth[:, columns] += one.residual
            size = np.abs(np.where(np.isfinite(one.residual), one.residual, 0))
            bound[:, columns] += one.residual_error + (len(mine) + 2) * u * size
            unsure[:, columns] |= one.unsure
            reach[columns] += one.reach
            rows |= one.beyond
        size = np.abs(np.where(np.isfinite(truth), truth, 0))
        # Where the factor, or a probability times it, is below the normal numbers, it errs by their grain;
        # taken before the N products with the keys, each of these and of their sums does by half.
        products = num_samples * max(len(mine), 1)
        subnormal = grain(acc) * (2 * (size + reach * max(1, 1 / temperature)) + products)
        bound = np.abs(factor) * (bound + 6 * u * size + num_samples * grain(acc)) + subnormal
        # 0 times an infinite key is NaN, but a probability next to 0 times it infinite. Where the factor is
        # taken before the products, these may leave the dtype either way.
        loose = rows[:, None] | unsure | (np.abs(factor) * reach > np.longdouble(torch.finfo(acc).max))
        name = f"dfeatures[{student}]" if len(results) > 1 else "dquery"
        check(name, result, truth * factor, bound, dtype=result.dtype, loose=loose, void=void[:, None])
    assert_unchanged(dloss=given)


def unidirectional_info_nce(draw: Draw, backend: str, small: bool) -> None:
    """One call of unidirectional_info_nce and its vector-Jacobian product."""
    dtype = float_dtype(draw, backend)
    key_dtype = dtype if draw.chance(0.95) else float_dtype(draw, backend)
    shape = (draw.size(17 if small else 65), draw.size(33 if small else 129))
    query, key = floats(draw, shape, dtype), floats(draw, shape, key_dtype)
    temperature, reduction = draw.choice(_TEMPERATURES), draw.choice(REDUCTIONS)
    if backend == "cpu" and draw.chance(0.2):
        backend = "auto"
    x = query.tensor.detach().requires_grad_()
    loss = ops.unidirectional_info_nce(
        x, key.tensor, temperature=temperature, reduction=reduction, backend=backend
    )
    common = torch.promote_types(dtype, key_dtype)
    acc = wide(common)
    half, least = units(common, backend)
    top = np.longdouble(torch.finfo(acc).max)
    found = pair(
        exact(query.tensor), exact(key.tensor), temperature, unit(acc), flushed(acc), top, half, least
    )
    _check_loss(draw, loss, [x], [(0, np.arange(shape[1]), found)], temperature, reduction, acc)
    assert_unchanged(query=query, key=key)


def duc_loss(draw: Draw, backend: str, small: bool) -> None:
    """One call of duc_loss and its vector-Jacobian products."""
    dtype, num_modalities = float_dtype(draw, backend), draw.choice((2, 1, 3, 2, 4))
    shape = (draw.size(13 if small else 47), draw.size(17 if small else 97))
    features: list[Made] = [floats(draw, shape, dtype) for _ in range(num_modalities)]
    effective = mask(draw, (num_modalities, shape[1]))
    temperature, reduction = draw.choice(_TEMPERATURES), draw.choice(REDUCTIONS)
    dims = ops.DucDims(effective.tensor) if draw.chance(0.5) else effective.tensor
    leaves = [feature.tensor.detach().requires_grad_() for feature in features]
    loss = ops.duc_loss(leaves, dims, temperature=temperature, reduction=reduction, backend=backend)
    acc = wide(dtype)
    half, least = units(dtype, backend)
    top, is_effective = np.longdouble(torch.finfo(acc).max), effective.tensor.numpy()
    values, pairs = [exact(feature.tensor) for feature in features], []
    for teacher in range(num_modalities):
        for student in range(num_modalities):
            columns = np.flatnonzero(is_effective[teacher] & ~is_effective[student])
            if len(columns):
                q, k = values[student][:, columns], values[teacher][:, columns]
                found = pair(q, k, temperature, unit(acc), flushed(acc), top, half, least)
                pairs.append((student, columns, found))
    _check_loss(draw, loss, leaves, pairs, temperature, reduction, acc)
    assert_unchanged(effective=effective, **{f"features[{m}]": one for m, one in enumerate(features)})

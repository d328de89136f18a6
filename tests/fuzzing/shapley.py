"""Cases of shapley_values, coalition_utilities and additive_shapley."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fuzzing.draw import Draw
from fuzzing.judge import check, clean, flushed, gamma, grain, unit, wide
from fuzzing.softmax import softmax
from fuzzing.tensors import Made, assert_unchanged, exact, float_dtype, float_dtypes, floats, labels
from mmfast import ops
from mmfast.ops.additive_shapley import SMOOTH_UTILITIES, UTILITIES

_GRADIENTS = ("normal", "ties", "tiny")
_LARGEST = np.finfo(np.longdouble).max


def _weights(num_players: int) -> np.ndarray:  # [S / 2]
    """Return |R|! (M - |R| - 1)! / M! of every coalition R of the others."""
    sizes = [r.bit_count() for r in range(2 ** (num_players - 1))]
    return np.array([1 / np.longdouble(num_players * math.comb(num_players - 1, size)) for size in sizes])


def _halves(table: np.ndarray, player: int) -> tuple[np.ndarray, np.ndarray]:  # [..., S / 2] each
    """Return the part of [..., S] without a player and the part with it, in the same order of the others."""
    split = table.reshape(*table.shape[:-1], table.shape[-1] // 2 ** (player + 1), 2, 2**player)
    flat = (*table.shape[:-1], table.shape[-1] // 2)
    return split[..., 0, :].reshape(flat), split[..., 1, :].reshape(flat)


def values_of(
    table: np.ndarray,  # [..., S]
    error: np.ndarray | float,  # of the table
    u: float,
) -> tuple[np.ndarray, np.ndarray]:  # [..., M] each
    """Return phi_m = sum_R w(R) (v(R + m) - v(R)) and a bound of its error.

    S terms are added in any order, each with a weight that has been rounded: (S + 4) u sum w (|v| + |v|).
    """
    num_players, phi, bound = table.shape[-1].bit_length() - 1, [], []
    weights, error = _weights(num_players), error * np.ones_like(table)
    size = np.abs(np.where(np.isfinite(table), table, 0))
    for player in range(num_players):
        without, present = _halves(table, player)
        phi.append((weights * (present - without)).sum(-1))
        sizes, errors = _halves(size, player), _halves(error, player)
        relative = gamma(table.shape[-1] + 4, u)
        bound.append((weights * (errors[0] + errors[1] + relative * (sizes[0] + sizes[1]))).sum(-1))
    return np.stack(phi, -1), np.stack(bound, -1)


def _is_crowded(size: np.ndarray, acc: torch.dtype) -> np.ndarray:  # [..., 1]
    """Return where sums of utilities may lie beyond the dtype.

    A difference of two is up to 2 max |v|. Folding the weighted table adds up b_|s| = |s|! (M-|s|-1)! / M! of
    every coalition, 1 + 1 / 2 + ... + 1 / M in all, and 1 more with b_{|s|-1}.
    """
    num_players = size.shape[-1].bit_length() - 1
    most = 1 + sum(1 / m for m in range(1, num_players + 1))
    return most * size.max(-1, keepdims=True) > np.longdouble(torch.finfo(acc).max)


def table_of(
    dphi: np.ndarray,  # [..., M]
    u: float,
) -> tuple[np.ndarray, np.ndarray]:  # [..., S] each
    """Return W dphi, the transposed map, and a bound of its error: 2 M terms of rounded weights.

    sum_{m in s} w(s - m) dphi_m - sum_{m not in s} w(s) dphi_m, or, as a kernel may, with
    w(s) times the sum of all dphi less that of the members.
    """
    num_players = dphi.shape[-1]
    table = np.zeros((*dphi.shape[:-1], 2**num_players), np.longdouble)
    size, weights = np.zeros_like(table), _weights(num_players)
    for player in range(num_players):
        share = weights * dphi[..., player, None]
        for target, without, present in ((table, -share, share), (size, np.abs(share), np.abs(share))):
            split = target.reshape(*target.shape[:-1], 2 ** (num_players - 1 - player), 2, 2**player)
            split[..., 0, :] += without.reshape(split[..., 0, :].shape)
            split[..., 1, :] += present.reshape(split[..., 1, :].shape)
    counts = [s.bit_count() for s in range(2**num_players)]
    # 0 for all players together.
    again = [
        0 if n == num_players else 2 / np.longdouble(num_players * math.comb(num_players - 1, n))
        for n in counts
    ]
    members = np.arange(2**num_players)[:, None] >> np.arange(num_players) & 1  # [S, M]
    size += np.array(again) * (np.abs(dphi) @ members.T)
    return table, gamma(2 * num_players + 4, u) * clean(size)


def gradients(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Made:
    """Return a gradient that comes in from above."""
    return floats(draw, shape, dtype, kinds=_GRADIENTS)


def leaf(made: Made) -> Tensor:
    """Return the tensor as a leaf of autograd that keeps its layout."""
    return made.tensor.detach().requires_grad_()


def shapley_values(draw: Draw, backend: str, small: bool) -> None:
    """One call of shapley_values and its vector-Jacobian product."""
    dtype = float_dtype(draw, backend)
    num_players = draw.choice((1, 2, 3, 4, 5, 6, 7) if small else (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13))
    # Tables wider than the number of rows, but enough rows to fill vectors of them.
    most = 33 if small else max(3, min(129, 2**13 >> num_players))
    rows = draw.choice(((), (draw.size(most),), (draw.size(most),), (draw.size(3), draw.size(5))))
    utilities = floats(draw, (*rows, 2**num_players), dtype)
    dphi = gradients(draw, (*rows, num_players), dtype)
    acc = wide(dtype)
    u = unit(acc)
    x = leaf(utilities)
    phi = ops.shapley_values(x, backend=backend)
    (dutilities,) = torch.autograd.grad(phi, x, dphi.tensor)
    table = exact(utilities.tensor)
    truth, bound = values_of(table, 0.0, u)
    size = np.abs(np.where(np.isfinite(table), table, 0))
    loose = np.broadcast_to(_is_crowded(size, acc), truth.shape)
    tiny = 2**num_players * grain(acc)
    check("phi", phi, truth, bound + tiny, dtype=dtype, loose=loose)
    truth, bound = table_of(exact(dphi.tensor), u)
    check("dutilities", dutilities, truth, bound + tiny, dtype=dtype)
    assert_unchanged(utilities=utilities, dphi=dphi)


def utilities_of(
    z: np.ndarray,  # [N, S, C] extended
    y: np.ndarray,  # [N]
    utility: str,
    u: float,
    flush: float,
    z_error: np.ndarray | float,  # of z
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # [N, S], [N, S], [N, S, C], [N, S, C]
    """Return the utilities, a bound of their errors, their derivatives by the logits, and a bound of those.

    argmax takes the first NaN for the largest, of equal logits the lowest class. Where logits carry errors
    (sums of them do, a table of them does not), what may be the largest may win.
    """
    own = np.arange(z.shape[-1]) == y[:, None, None]
    own = np.broadcast_to(own, z.shape)
    z_error = np.where(np.isfinite(z), z_error * np.ones_like(z), 0)
    others = np.where(own, -np.inf, z)
    # The others in the order of argmax, the label itself below all of them.
    order = np.where(np.isnan(z), _LARGEST, np.where(z == np.inf, _LARGEST / 2, z))
    order = np.where(own, -np.inf, np.where(z == -np.inf, -_LARGEST, order))
    if utility in ("cardinality", "correct"):
        sizes = np.array([s.bit_count() for s in range(z.shape[1])]) if utility == "cardinality" else 1
        largest = z.argmax(-1) == y[:, None]
        low, high = z - z_error, z + z_error
        mine_high = np.where(own, high, -np.inf).max(-1)
        mine_low = np.where(own, low, -np.inf).max(-1)
        rival_high = np.where(own, -np.inf, high).max(-1)
        rival_low = np.where(own, -np.inf, low).max(-1)
        has_error = (z_error > 0).any(-1)
        unsure = has_error & (mine_high >= rival_low) & (mine_low <= rival_high)
        return sizes * largest.astype(np.longdouble), sizes * unsure.astype(np.longdouble), z, z
    if utility == "margin":
        runner = order == order.max(-1, keepdims=True)
        runner &= np.cumsum(runner, -1) == 1
        values = np.where(own, z, 0).sum(-1) - others.max(-1)
        errors = np.where(own, z_error, 0).sum(-1) + np.where(own, 0, z_error).max(-1)
        close = (others + z_error >= (others - z_error).max(-1, keepdims=True)) & ~own
        ambiguous = (np.where(own, 0, z_error).max(-1, keepdims=True) > 0) & close
        ambiguous &= close.sum(-1, keepdims=True) > 1
        slope = own.astype(np.longdouble) - runner
        return values, errors + u * np.abs(clean(values)), slope, ambiguous.astype(np.longdouble)
    soft = softmax(z, u, flush, z_error)

    def picked(x: np.ndarray) -> np.ndarray:
        return np.where(own, x, 0).sum(-1)

    off = own - soft.p
    if utility == "log_probability":
        return picked(soft.log_p), picked(soft.log_p_error), off, soft.p_error + 3 * u * (own + clean(soft.p))
    p, p_error = picked(soft.p), picked(soft.p_error)
    size, slope = own + clean(soft.p), p[..., None] * off
    slope_error = p_error[..., None] * size + clean(p)[..., None] * (soft.p_error + 4 * u * size)
    return p, p_error, slope, slope_error


def coalition_utilities(draw: Draw, backend: str, small: bool) -> None:
    """One call of coalition_utilities and its vector-Jacobian product."""
    dtype, utility = float_dtype(draw, backend), draw.choice(UTILITIES)
    shape = (draw.size(9 if small else 33), 2 ** draw.integer(1, 3 if small else 4))
    shape = (*shape, draw.size(33 if small else 129, 2 if utility == "margin" else 1, zero=0))
    logits, target = floats(draw, shape, dtype), labels(draw, shape[0], shape[2])
    acc = wide(dtype)
    u, flush = unit(acc), flushed(acc)
    x = leaf(logits)
    values = ops.coalition_utilities(x, target.tensor, utility=utility, backend=backend)
    z, y = exact(logits.tensor), target.tensor.long().numpy()
    truth, bound, slope, slope_error = utilities_of(z, y, utility, u, flush, 0.0)
    check("utilities", values, truth, bound, dtype=dtype)
    if utility in SMOOTH_UTILITIES:
        given = gradients(draw, shape[:2], dtype)
        (dlogits,) = torch.autograd.grad(values, x, given.tensor)
        du = exact(given.tensor)[..., None]
        # The label's is minus the sum of all others, each of which may lie below the normal numbers.
        grains = (8 + shape[2]) * grain(acc)
        check("dlogits", dlogits, du * slope, np.abs(du) * slope_error + grains, dtype=dtype)
        assert_unchanged(dutilities=given)
    else:
        assert not values.requires_grad, "a step function carries a gradient"
    assert_unchanged(logits=logits, labels=target)


def _coalition_logits(
    parts: np.ndarray,  # [M, N, C]
    bias: np.ndarray,  # [C]
) -> np.ndarray:  # [N, S, C]
    table = np.broadcast_to(bias, (parts.shape[1], 1, parts.shape[2]))
    for part in parts:
        table = np.concatenate([table, table + part[:, None]], 1)
    return table


def additive_shapley(draw: Draw, backend: str, small: bool) -> None:
    """One call of additive_shapley and its vector-Jacobian products."""
    dtype, utility = float_dtype(draw, backend), draw.choice(UTILITIES)
    least = 2 if utility == "margin" else 1
    num_modalities = draw.choice((2, 1, 3, 4) if small else (2, 1, 3, 4, 5, 6, 7))
    shape = (num_modalities, draw.size(9 if small else 17), draw.size(17 if small else 65, least, zero=0))
    partial, target = floats(draw, shape, dtype), labels(draw, shape[1], shape[2])
    bias = None
    if draw.chance(0.6):
        kinds = ("ties", "normal", "minus infinity", "huge")
        bias = floats(
            draw, shape[2:], draw.choice((dtype, torch.float32, *float_dtypes(backend))), kinds=kinds
        )
    acc = wide(dtype, dtype if bias is None else bias.tensor.dtype)
    u, flush = unit(acc), flushed(acc)
    x, b = leaf(partial), None if bias is None else leaf(bias)
    phi = ops.additive_shapley(x, target.tensor, b, utility=utility, backend=backend)
    parts, y = exact(partial.tensor), target.tensor.long().numpy()
    offset = np.zeros(shape[2], np.longdouble) if bias is None else exact(bias.tensor)
    z = _coalition_logits(parts, offset)
    size = _coalition_logits(*(np.abs(np.where(np.isfinite(x), x, 0)) for x in (parts, offset)))
    # M additions in any order; whole numbers below 1 / u are added exactly.
    is_whole = all((x == np.rint(x))[np.isfinite(x)].all() for x in (parts, offset))
    is_exact = is_whole and float(size.max(initial=0)) < 1 / u
    z_error = np.zeros_like(size) if is_exact else gamma(num_modalities + 1, u) * size
    top = np.longdouble(torch.finfo(acc).max)
    beyond = (size > top).any(-1)
    z_error = np.where(beyond[..., None], np.inf, z_error)
    table, error, slope, slope_error = utilities_of(z, y, utility, u, flush, z_error)
    error = np.where(beyond & np.isnan(error), np.inf, error)
    truth, bound = values_of(table, error, u)
    amount = np.abs(np.where(np.isfinite(table), table, 0))
    over = np.broadcast_to(_is_crowded(amount, acc), truth.shape)
    loose = over if utility not in SMOOTH_UTILITIES else over | beyond.any(1)[:, None]
    check("phi", phi, truth, bound + 2**num_modalities * flush, dtype=dtype, loose=loose)
    if utility in SMOOTH_UTILITIES:
        _check_gradients(draw, phi, x, b, (table, slope, slope_error), beyond, acc)
    else:
        assert not phi.requires_grad, "a step function carries a gradient"
    assert_unchanged(partial_logits=partial, labels=target, bias=bias)


def _check_gradients(
    draw: Draw,
    phi: Tensor,  # [N, M]
    x: Tensor,  # [M, N, C]
    b: Tensor | None,  # [C]
    found: tuple[np.ndarray, np.ndarray, np.ndarray],  # utilities, their derivatives and the errors of those
    beyond: np.ndarray,  # [N, S] coalitions whose logits lie beyond the dtype
    acc: torch.dtype,
) -> None:
    u, num_modalities = unit(acc), x.shape[0]
    given = gradients(draw, tuple(phi.shape), phi.dtype)
    results = torch.autograd.grad(phi, [x] if b is None else [x, b], given.tensor)
    _, slope, slope_error = found
    dv, dv_error = table_of(exact(given.tensor), u)
    terms = dv[..., None] * slope
    slope_error = np.where(beyond[..., None], 2, np.minimum(slope_error, 2))
    finite_slope = np.abs(np.where(np.isfinite(slope), slope, 0))
    term_error = np.abs(dv)[..., None] * slope_error + dv_error[..., None] * (finite_slope + slope_error)
    # The label's is minus the sum of all others, each of which may lie below the normal numbers.
    term_error = term_error + (8 + x.shape[2]) * grain(acc)
    size = np.abs(dv)[..., None] * finite_slope
    members = (np.arange(terms.shape[1])[None] >> np.arange(num_modalities)[:, None]) & 1 > 0
    truth = np.stack([terms[:, s].sum(1) for s in members])
    relative = gamma(terms.shape[1] + 4, u)
    bound = np.stack([(term_error + relative * size)[:, s].sum(1) for s in members])
    loose = np.stack([beyond[:, s].any(1) for s in members])[..., None]
    check("dpartial_logits", results[0], truth, bound, dtype=x.dtype, loose=loose)
    if b is not None:
        bound = (term_error + gamma(terms[..., 0].size + 4, u) * size).sum((0, 1))
        check("dbias", results[1], terms.sum((0, 1)), bound, dtype=b.dtype, loose=bool(beyond.any()))
    assert_unchanged(dphi=given)

"""Cases of partial_reinit_, update_projector_ and project_gradient."""

from __future__ import annotations

import numpy as np
import torch

from fuzzing.draw import Draw
from fuzzing.judge import check, clean, gamma, unit, wide
from fuzzing.moved import is_on_gpu
from fuzzing.shapley import gradients, leaf
from fuzzing.tensors import (
    Made,
    assert_around_unchanged,
    assert_unchanged,
    bits,
    exact,
    float_dtype,
    float_dtypes,
    floats,
    laid_out,
)
from mmfast import ops

_WRITABLE = ("contiguous", "transposed", "tail", "stepped", "unaligned")
_KINDS = ("normal", "ties", "offset", "huge", "tiny", "wide", "special")


def _size(x: np.ndarray) -> np.ndarray:
    return np.abs(np.where(np.isfinite(x), x, 0))


def partial_reinit(draw: Draw, backend: str, small: bool) -> None:
    """One call of partial_reinit_, or of a plan, with a list of tensors."""
    params: list[Made] = []
    initial: list[Made] = []
    one_dtype = draw.choice((None, float_dtype(draw, backend)))
    for _ in range(draw.choice((1, 2, 3, 7, 0))):
        dtype = float_dtype(draw, backend) if one_dtype is None else one_dtype
        shape = tuple(draw.size(17 if small else 129) for _ in range(draw.choice((1, 2, 3, 0))))
        shape = shape if len(shape) < 3 else tuple(min(size, 9) for size in shape)
        params.append(floats(draw, shape, dtype, _KINDS, draw.choice(_WRITABLE)))
        initial.append(floats(draw, shape, dtype, _KINDS))
    strengths = [
        draw.choice((0.5, 0.0, 1.0, 0.1, 0.999, 1e-6, 1 - 1e-10, 1e-30, 1e-42))
        for _ in range(max(1, len(params)))
    ]
    is_one = draw.chance(0.5)
    start = [exact(one.tensor) for one in params]
    start_bits = [bits(one.tensor.clone()) for one in params]
    alpha = strengths[0] if is_one else strengths[: len(params)]
    lists = [p.tensor for p in params], [p.tensor for p in initial]
    if draw.chance(0.5) and not is_on_gpu():
        ops.ReinitPlan(*lists, backend=backend).apply_(alpha)
    else:
        ops.partial_reinit_(*lists, alpha, backend=backend)
    for index, (one, other) in enumerate(zip(params, initial, strict=True)):
        name, a = f"params[{index}]", strengths[0 if is_one else index]
        dtype = one.tensor.dtype
        assert_around_unchanged(name, one)
        assert_unchanged(**{f"init_params[{index}]": other})
        if a in (0.0, 1.0):
            expected = bits(other.tensor.clone()) if a else start_bits[index]
            assert torch.equal(bits(one.tensor.clone()), expected), f"{name} differs in bits for alpha = {a}"
            continue
        # Both products and their sum round once; each strength may be rounded to the dtype before.
        u, info = unit(wide(dtype)), torch.finfo(wide(dtype))
        theta, theta_0 = start[index], exact(other.tensor)
        share = np.longdouble(a)
        truth = (1 - share) * theta + share * theta_0
        bound = 3 * u * ((1 - share) * _size(theta) + share * _size(theta_0))
        # A strength below the least normal number of the dtype keeps fewer bits.
        subnormal = np.longdouble(info.tiny * info.eps)
        bound = bound + (subnormal * _size(theta_0) if a < info.tiny else 0) + 2 * subnormal
        check(name, one.tensor, truth, bound, dtype=dtype)


def _projector(draw: Draw, size: int, dtype: torch.dtype) -> torch.Tensor:  # [D, D]
    """Return the identity less a few directions, symmetric to the last bit."""
    random, p = draw.generator(), np.eye(size, dtype=np.longdouble)
    for _ in range(draw.choice((0, 1, 2, 5))):
        h, alpha = random.standard_normal(size).astype(np.longdouble), draw.choice((1.0, 1e-2, 1e-6))
        ph = p @ h
        p = p - np.outer(ph, ph) / (alpha + h @ ph)
    return torch.from_numpy(((p + p.T) / 2).astype(np.float64)).to(dtype)


def update_projector(draw: Draw, backend: str, small: bool) -> None:
    """One call of update_projector_, or of update_and_project_, whose product is judged by its projector.

    Where h P h cancels, as in a direction that is already gone, its rounding decides what the formula gives:
    its sign, or the divisor, where only symmetry and finite numbers are asked for.
    """
    dtype, size = draw.choice((torch.float32, torch.float64)), draw.size(33 if small else 129)
    values = _projector(draw, size, dtype)
    projector = laid_out(draw, values, draw.choice(_WRITABLE))
    feature = floats(draw, (size,), draw.choice((dtype, *float_dtypes(backend))), _KINDS)
    alpha = draw.choice((1.0, 0.1, 1e-3, 1e-6, 1e3, 1e-9, 1e-15, 1e20, 1e-30))
    if draw.chance(0.5) and not is_on_gpu():
        grad = floats(draw, (draw.size(17), size), float_dtype(draw, backend))
        result = ops.update_and_project_(
            projector.tensor, feature.tensor, grad.tensor, alpha=alpha, backend=backend
        )
        _check_product("projected", result, grad, exact(projector.tensor), dtype)
        assert_unchanged(grad=grad)
    else:
        ops.update_projector_(projector.tensor, feature.tensor, alpha=alpha, backend=backend)
    u, info = unit(dtype), torch.finfo(dtype)
    p, h = exact(values), exact(feature.tensor)
    if feature.tensor.dtype == torch.float64:
        h = exact(feature.tensor.to(dtype))
    ph = p @ h
    ph_size = np.abs(p) @ _size(h)
    quadratic = h @ ph
    quadratic_size = _size(h) @ ph_size
    ph_error = gamma(size + 1, u) * ph_size
    quadratic_error = gamma(2 * size + 4, u) * quadratic_size
    least = np.maximum(np.longdouble(alpha), 16 * np.longdouble(info.eps) * (h @ h))
    denominator = least + np.abs(quadratic)
    denominator_error = gamma(2 * size + 4, u) * least + quadratic_error
    truth = p - np.outer(ph / denominator, ph) * (-1 if quadratic < 0 else 1)
    symmetric = np.array_equal(exact(projector.tensor), exact(projector.tensor).T, equal_nan=True)
    assert symmetric, "the projector is not symmetric to the last bit"
    assert_around_unchanged("projector", projector)
    assert_unchanged(mean_feature=feature)
    top = np.longdouble(info.max)
    ph_amount = _size(ph)
    outer = np.outer(ph_amount, ph_amount)
    # Squares are taken in float64.
    loose = bool(quadratic_size > np.finfo(np.float64).max) or bool((ph_size > top).any())
    if np.isfinite(truth).all() and denominator_error >= denominator / 4:
        if not loose:
            assert bool(projector.tensor.isfinite().all()), "the projector is not finite"
        return
    with np.errstate(all="ignore"):
        relative = clean(denominator_error / (denominator - denominator_error))
        crossed = np.outer(ph_error, ph_amount + ph_error) + np.outer(ph_amount, ph_error)
        bound = (crossed * (1 + relative) + outer * (relative + 8 * u)) / np.abs(
            denominator
        ) + 2 * u * np.abs(p)
        if np.abs(quadratic) <= quadratic_error:
            bound = bound + 2 * outer / denominator
    # A product of two numbers below the least normal one, over alpha.
    bound = bound + np.longdouble(info.tiny) * (1 + size / np.sqrt(np.longdouble(alpha)))
    check("projector", projector.tensor, truth, bound, dtype=dtype, loose=loose)


def _check_product(
    name: str, actual: torch.Tensor, grad: Made, p: np.ndarray, projector_dtype: torch.dtype
) -> None:
    acc = wide(grad.tensor.dtype, projector_dtype)
    u, info = unit(acc), torch.finfo(acc)
    left, top, tiny = exact(grad.tensor), np.longdouble(info.max), np.longdouble(info.tiny)
    size = _size(left) @ _size(p)
    bound = gamma(len(p) + 1, u) * size + tiny
    check(name, actual, left @ p, bound, dtype=grad.tensor.dtype, loose=size > top)


def project_gradient(draw: Draw, backend: str, small: bool) -> None:
    """One call of project_gradient and its vector-Jacobian product."""
    dtype = float_dtype(draw, backend)
    projector_dtype = draw.choice((torch.float32, torch.float64))
    shape = (draw.size(17 if small else 33), draw.size(33 if small else 129))
    grad = floats(draw, shape, dtype)
    if draw.chance(0.5):
        projector = laid_out(draw, _projector(draw, shape[1], projector_dtype))
    else:
        projector = floats(draw, (shape[1], shape[1]), projector_dtype)
    if backend == "cpu" and draw.chance(0.2):
        backend = "auto"
    x = leaf(grad)
    result = ops.project_gradient(x, projector.tensor, backend=backend)
    acc = wide(dtype, projector_dtype)
    u, info = unit(acc), torch.finfo(acc)
    p, top, tiny = exact(projector.tensor), np.longdouble(info.max), np.longdouble(info.tiny)
    given = gradients(draw, shape, dtype)
    (dgrad,) = torch.autograd.grad(result, x, given.tensor)
    for name, actual, left, right in (
        ("projected", result, exact(grad.tensor), p),
        ("dgrad", dgrad, exact(given.tensor), p.T),
    ):
        size = _size(left) @ _size(right)
        check(name, actual, left @ right, gamma(shape[1] + 1, u) * size + tiny, dtype=dtype, loose=size > top)
    assert_unchanged(grad=grad, projector=projector, dprojected=given)

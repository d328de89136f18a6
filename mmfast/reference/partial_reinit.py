"""Soft re-initialisation of a list of parameters, as the formula is written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmfast.reference._common import accumulation_dtype


def partial_reinit_(
    params: Sequence[Tensor],  # any shapes; changed in place
    init_params: Sequence[Tensor],  # the same shapes
    alpha: float | Sequence[float],
) -> None:
    """Set every parameter to (1 - alpha) theta + alpha theta_0; exact for alpha 0 and 1."""
    alphas = [alpha] * len(params) if isinstance(alpha, float | int) else alpha
    for theta, theta_0, a in zip(params, init_params, alphas, strict=True):
        if a == 1:
            theta.copy_(theta_0)
        elif a != 0:
            dtype = accumulation_dtype(theta.dtype)
            theta.copy_((1 - a) * theta.to(dtype) + a * theta_0.to(dtype))

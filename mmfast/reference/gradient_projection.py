"""Projection of a head's gradient off the features it has learnt, as the formulas are written."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype


def update_projector_(
    projector: Tensor,  # [D, D] changed in place
    mean_feature: Tensor,  # [D]
    *,
    alpha: float,
) -> None:
    """Set P to P - P h (P h)^T / (alpha + h^T P h), with both terms of the divisor kept above rounding.

    P is known to about eps, h^T P h so to a few eps |h|^2: by less than that nothing is divided, as it would
    make digits of rounding. Where the direction is all but gone, h^T P h is rounding itself and can be below
    0; the term is added then, which takes an eigenvalue below 0 towards it. Subtracted it would be fed until
    P overflows.
    """
    if len(mean_feature) == 0:
        return
    h = mean_feature.to(projector.dtype)
    # Times a power of two, and alpha times its square, which changes nothing: products of large or small
    # features stay in range. Squares are taken in float64.
    most = 120 if h.dtype == torch.float32 else 1000
    unit = torch.exp2(-torch.frexp(h.abs().amax())[1].double().clamp(-most, most))
    h = h * unit.to(h.dtype)
    ph = projector @ h
    h, wide = h.double(), ph.double()
    kept = h @ wide
    least = 16 * torch.finfo(projector.dtype).eps * (h @ h)
    # The root on both sides makes the outer product symmetric to the last bit.
    u = (wide / (torch.maximum(least, alpha * unit.square()) + kept.abs()).sqrt()).to(projector.dtype)
    updated = projector - torch.outer(u, torch.where(kept < 0, -u, u))
    projector.copy_((updated + updated.T) / 2)


def project_gradient(
    grad: Tensor,  # [C, D]
    projector: Tensor,  # [D, D]
) -> Tensor:  # [C, D]
    """Return grad @ P in the dtype of `grad`."""
    dtype = accumulation_dtype(grad.dtype, projector.dtype)
    return (grad.to(dtype) @ projector.to(dtype)).to(grad.dtype)


def update_and_project_(
    projector: Tensor,  # [D, D] changed in place
    mean_feature: Tensor,  # [D]
    grad: Tensor,  # [C, D]
    alpha: float,
) -> Tensor:  # [C, D]
    """Return grad @ P in the dtype of `grad` with the updated P; a gradient out of P is that before."""
    grad = grad.clone()
    update_projector_(projector, mean_feature, alpha=alpha)
    return project_gradient(grad, projector)

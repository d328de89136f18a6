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
    """Set P to P - P h (P h)^T / (alpha + h^T P h), made symmetric."""
    h = mean_feature.to(projector.dtype)
    ph = projector @ h
    # Once P has next to nothing left along h, h^T P h is rounding, of either sign and far above a small
    # alpha: dividing by less than its size would feed an eigenvalue just below 0 until P overflows.
    rounding = len(h) * torch.finfo(h.dtype).eps * (h @ h)
    denominator = rounding.clamp_min(alpha) + (h @ ph).clamp_min(0)
    # The root on both sides makes the outer product symmetric to the last bit.
    u = ph / denominator.sqrt()
    updated = projector - torch.outer(u, u)
    projector.copy_((updated + updated.T) / 2)


def project_gradient(
    grad: Tensor,  # [C, D]
    projector: Tensor,  # [D, D]
) -> Tensor:  # [C, D]
    """Return grad @ P in the dtype of `grad`."""
    dtype = accumulation_dtype(grad.dtype, projector.dtype)
    return (grad.to(dtype) @ projector.to(dtype)).to(grad.dtype)

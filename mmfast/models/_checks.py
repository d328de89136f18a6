"""Checks that encoders, fusion heads and the model share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmfast.errors import dtype_name


def check_size(name: str, value: object) -> int:
    """Return `value` as an int; raise unless it is an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    size = value.__index__()
    if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return size


def check_dropout(value: float) -> float:
    """Return `value`; raise ValueError unless it is a probability below 1."""
    if not 0 <= value < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {value}")
    return value


def nobody_waits_for(value: Tensor) -> bool:
    """Whether the host may read a tensor's values without waiting for a device."""
    return value.device.type == "cpu"


def check_present(name: str, value: object, letters: str, sizes: tuple[int, ...]) -> Tensor:
    """Return `value`; raise unless it is a bool tensor of shape `sizes`, written with `letters` ("M, N")."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype bool, got {dtype_name(value.dtype)}")
    if tuple(value.shape) != sizes:
        raise ValueError(f"{name} must have shape [{letters}] = {list(sizes)}, got {list(value.shape)}")
    return value


def check_features(
    features: Sequence[Tensor],  # M tensors [N, D_m]
    names: Sequence[str],
    dims: Sequence[int],
) -> None:
    """Raise unless `features` holds one [N, D_m] tensor per modality, all of one N."""
    if len(features) != len(dims):
        raise ValueError(f"features must hold M = {len(dims)} tensors, got {len(features)}")
    for name, h, dim in zip(names, features, dims, strict=True):
        if not isinstance(h, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(h).__name__}")
        if h.dim() != 2 or h.shape[1] != dim:
            raise ValueError(f"{name} must have shape [N, D] = [N, {dim}], got {list(h.shape)}")
        if h.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"{name} must hold N = {features[0].shape[0]} samples as {names[0]} does, got {h.shape[0]}"
            )

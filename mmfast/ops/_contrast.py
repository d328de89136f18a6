"""What the contrastive losses of one-sided pairs share: checks, constant keys, factors of the gradient."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.ops._autograd import is_transformed
from mmfast.ops._checks import check_choice, check_positive, check_scale_tensor
from mmfast.ops._launch import cast
from mmfast.reference._common import accumulation_dtype, gather_keys

REDUCTIONS = ("mean", "sum", "none")


def check_options(temperature: float | Tensor, reduction: str) -> None:
    """Raise unless temperature and reduction are what the losses' docstrings say."""
    if isinstance(temperature, Tensor):
        check_scale_tensor("temperature", temperature)
    else:
        check_positive("temperature", temperature)
    check_choice("reduction", reduction, REDUCTIONS)


def as_key(
    x: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return features as a constant that autograd can save, which it refuses of what inference mode made."""
    if torch.compiler.is_compiling() or is_transformed():
        return x.detach()
    x = x.detach() if x.requires_grad else x
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def gathered(features: list[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], int]:
    """Return all processes' keys and where this one's begin; no keys where they are the features."""
    if group is None or dist.get_world_size(group) == 1:
        return [], 0
    keys, offset = gather_keys(torch.stack([feature.detach() for feature in features]), group)
    return list(keys.unbind(0)), offset


def loss_like(query: Tensor, reduction: str) -> Tensor:  # [] or [N]
    """Return room for the loss of queries [N, D]."""
    shape = query.shape[:1] if reduction == "none" else ()
    return query.new_empty(shape, dtype=accumulation_dtype(query.dtype))


def views_of(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]
) -> array:  # int64 [M, 2, 3]
    """Return the addresses and strides of all matrices, as `DucOperands` of csrc has them."""
    numbers: list[int] = []
    for feature, key in zip(features, keys):
        numbers += feature.data_ptr(), *feature.stride(), key.data_ptr(), *key.stride()
    return array("q", numbers)


def workspace_of(
    loss: Tensor,  # [] or [N]
    query: Tensor,  # [N, D]
    plan: Sequence[int],
) -> tuple[Tensor, ...]:
    """Return the memory that a CUDA kernel's plan asks for, as `Workspace` of csrc has it."""
    num_packed, num_residual_bytes, num_partial, num_losses, num_indices = plan
    return (
        query.new_empty(num_packed),
        query.new_empty(num_residual_bytes, dtype=torch.uint8),
        loss.new_empty(num_partial),
        loss.new_empty(num_losses),
        loss.new_empty(num_indices, dtype=torch.int32),
    )


def scaled(
    residuals: Tensor,  # [N, D] or [M, N, D]
    dloss: Tensor,  # [] or [N]
    temperature: float | Tensor,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:  # like `residuals`, in `dtype`
    """Return the gradient: the residuals, which are that of the sum at temperature 1, times their factors."""
    if isinstance(temperature, Tensor):
        dloss, temperature = dloss / temperature.to(dloss).reshape(()), 1.0
    elif temperature > 1e30:
        # Times N it might be out of float32's range, and the gradient 0.
        dloss, temperature = dloss / temperature, 1.0
    divisor = temperature * residuals.shape[-2] if reduction == "mean" else temperature
    if dloss.dim() == 0 and residuals.dtype == dloss.dtype == dtype:
        return residuals * (dloss / divisor)
    # A factor without dimensions would be rounded to half precision before the product; with them, the
    # product is taken in float32 and rounded once.
    return cast(residuals * (dloss / divisor).reshape(-1, 1), dtype)

"""What the processes of a data-parallel run tell each other, beside gradients; alone, nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> dist.ProcessGroup | None:
    """Return the group of all processes of the run, or None where there is one alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@torch.no_grad()
def total(
    values: Tensor,  # any shape
) -> Tensor:  # same shape
    """Return the sum of a tensor over all processes; nothing flows back through it."""
    values = values.detach().clone()
    if (group := world()) is not None:
        dist.all_reduce(values, group=group)
    return values


def share_of_batch(
    present: Tensor,  # bool [..., N]
) -> Tensor:  # [...]
    """Return the part of the whole batch, over all processes, for which `present` holds, and never 0.

    A process's mean over its N samples of a loss that is 0 where not present, divided by this share, averages
    over processes to the mean over the present samples of the whole batch. Where none is, the loss is 0.
    """
    samples = torch.full_like(present[..., 0], present.shape[-1], dtype=torch.float32)
    found, samples = total(torch.stack([present.sum(-1).float(), samples]))
    return found.clamp(min=1) / samples


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers, as data-parallel training does before each forward.

    Batch-norm statistics differ by process after the last batch of an epoch, and what is decided from
    features in eval mode must not.
    """
    if (group := world()) is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0, group=group)

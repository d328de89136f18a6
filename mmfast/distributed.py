"""What the processes of a data-parallel run tell each other, beside gradients; alone, nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> dist.ProcessGroup | None:
    """Return the group of all processes of the run, or None where there is one alone."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


@torch.no_grad()
def sum_over_processes(
    values: Tensor,  # any shape
) -> Tensor:  # same shape
    """Return the sum of a tensor over all processes; nothing flows back through it."""
    values = values.detach().clone()
    if (group := world()) is not None:
        dist.all_reduce(values, group=group)
    return values


@torch.no_grad()
def max_over_processes(
    values: Tensor,  # any shape, on the device of the run
) -> Tensor:  # same shape
    """Return the largest of each value over all processes."""
    values = values.detach().clone()
    if (group := world()) is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def share_of_batch(
    present: Tensor,  # bool [..., N]
) -> Tensor:  # [...]
    """Return the part of the whole batch, over all processes, for which `present` holds, and never 0.

    A process's mean over its N samples of a loss that is 0 where not present, divided by this share, averages
    over processes to the mean over the present samples of the whole batch. Where none is, the loss is 0.
    """
    samples = torch.full_like(present[..., 0], present.shape[-1], dtype=torch.float32)
    found, samples = sum_over_processes(torch.stack([present.sum(-1).float(), samples]))
    return found.clamp(min=1) / samples


def min_over_processes(number: int) -> int:
    """Return the least number of all processes."""
    return min(gathered(number))


def check_agreement(what: str, number: int) -> None:
    """Raise in every process unless all have the same number; one that went on would wait for ever."""
    found = gathered(number)
    if len(set(found)) > 1:
        counts = ", ".join(map(str, found))
        raise ValueError(
            f"processes must agree on the number of {what}, got {counts}: give each the same data, in full"
        )


def gathered(value: Any) -> list[Any]:
    """Return what each process has, plain values and tensors on the CPU, in order of rank."""
    if (group := world()) is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def broadcast_from_first(value: Any) -> Any:
    """Return the first process's value, plain or a tensor on the CPU, in every process.

    What a method decides from features, which differ in their last bits from process to process, is decided
    once: a difference of one copy would go unnoticed, a larger one would make processes wait for each other.
    """
    if (group := world()) is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=group)
    return values[0]


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers, as data-parallel training does before each forward.

    Batch-norm statistics differ by process after the last batch of an epoch, and what is decided from
    features in eval mode must not.
    """
    if (group := world()) is not None:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0, group=group)

"""Batches on their way to the device of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.nests import mapped, tensors

Batch = dict[str, Any]


def pinned(batch: Batch) -> Batch:
    # What a data set gives on a device already is not the host's to pin.
    return mapped(lambda value: value.pin_memory() if value.device.type == "cpu" else value, batch)


def copied_ahead(
    batches: Iterator[Batch], move: Callable[[Batch], Batch], device: torch.device
) -> Iterator[Batch]:
    """Yield batches on a GPU, which copies the next one while it works on this one."""
    copies = torch.cuda.Stream(device)
    ready: tuple[Batch, Any] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            coming = move(batch), copies.record_event()
        if ready is not None:
            yield _arrived(*ready, device)
        ready = coming
    if ready is not None:
        yield _arrived(*ready, device)


def _arrived(batch: Batch, event: Any, device: torch.device) -> Batch:
    """Let the device's current stream wait for a copy, and memory be free only after its use there."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for value in tensors(batch):
        if value.device.type == "cuda":
            value.record_stream(stream)
    return batch


def to_device(
    batch: Batch, modalities: Sequence[str], device: torch.device, dtype: torch.dtype | None
) -> Batch:
    def plain(value: Tensor) -> Tensor:
        return value.to(device, non_blocking=True)

    def cast(value: Tensor) -> Tensor:
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {key: mapped(cast if key in modalities else plain, value) for key, value in batch.items()}


def model_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype of a model, by its first floating parameter."""
    example = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    return example.device, example.dtype


def fits_on(device: torch.device, num_bytes: int) -> bool:
    """Whether so many bytes are at most a quarter of what is free on a GPU; anywhere else they are."""
    return device.type != "cuda" or num_bytes <= torch.cuda.mem_get_info(device)[0] // 4

"""From data sets to batches: reproducible order, shards of processes, views with modalities hidden."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert

from mmfast.coalitions import present_key
from mmfast.data.arrays import LABEL, ArrayDataset
from mmfast.data.workers import outlive_sigterm

# Key of a batch, bool [N, M]: which of its modalities each sample shows in this epoch. What is not shown goes
# through its encoder as it is, and loses its features then; what is lacking (`<m>__present`) goes as zeros.
SHOWN = "coalition"


def takes_batches(dataset: Any) -> bool:
    """Whether `dataset[[i, j, ...]]` gives a whole batch, which spares a call per sample."""
    return getattr(dataset, "takes_batches", isinstance(dataset, ArrayDataset))


class Entries(Dataset):
    """Chosen samples of a data set, in any number of copies, each optionally shown with some modalities only.

    Args:
        base: data set of N samples.
        indices: [E] int64, the sample of each entry.
        shown: bool [E, M], the modalities it shows; the others count as absent.
    """

    def __init__(self, base: Any, indices: Tensor, shown: Tensor | None = None) -> None:
        self.base = base
        self.indices = indices  # [E]
        self.shown = shown  # bool [E, M]
        self.takes_batches = takes_batches(base)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, entry: Any) -> dict[str, Tensor]:
        key = self.indices[entry]
        sample = dict(self.base[key if key.ndim else int(key)])
        if self.shown is not None:
            sample[SHOWN] = self.shown[entry]
        return sample


def dataset_indices(entries: Any, chosen: Sequence[int]) -> list[int]:
    """Return the samples of the data set that these entries of an epoch show."""
    return entries.indices[list(chosen)].tolist() if isinstance(entries, Entries) else list(chosen)


def presence(
    batch: Mapping[str, Tensor],
    modalities: Sequence[str],  # M names
) -> Tensor | None:  # bool [M, N]
    """Return which modalities each sample of a batch shows, or None where all show all."""
    present = batch[SHOWN].T.contiguous() if SHOWN in batch else None
    marked = [present_key(name) for name in modalities]
    if not any(key in batch for key in marked):
        return present
    size = len(batch["label"]) if "label" in batch else len(batch[modalities[0]])
    device = batch[modalities[0]].device
    everyone = torch.ones(size, dtype=torch.bool, device=device)
    given = torch.stack([batch.get(key, everyone) for key in marked])
    return given if present is None else given & present


@dataclass(frozen=True)
class Shard:
    """One process's batches of an epoch, and what to scale each batch's mean loss by.

    The scale makes the mean over processes of gradients equal the gradient on the whole batch, also where the
    processes' parts differ in size.
    """

    batches: list[list[int]]
    scales: list[float]


def epoch_shard(
    num_samples: int,
    batch_size: int,  # over all processes
    generator: torch.Generator,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Shard:
    """Return one process's part of an epoch in shuffled order; all processes draw the same order.

    A last batch with fewer than two samples for every process, as batch norm needs, joins the one before.
    """
    order = torch.randperm(num_samples, generator=generator, device="cpu").tolist()
    whole = [order[start : start + batch_size] for start in range(0, num_samples, batch_size)]
    if len(whole) > 1 and len(whole[-1]) < 2 * world_size:
        runt = whole.pop()
        whole[-1] += runt
    parts = [batch[rank::world_size] for batch in whole]
    scales = [len(part) * world_size / len(batch) for part, batch in zip(parts, whole, strict=True)]
    return Shard(parts, scales)


def loader(dataset: Any, batches: list[list[int]], num_workers: int = 0) -> DataLoader:
    """Return a loader of the given batches of sample indices, with labels in int64."""
    options: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": outlive_sigterm}
    if takes_batches(dataset):
        return DataLoader(dataset, sampler=batches, batch_size=None, collate_fn=_convert, **options)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=_collate, **options)


def _collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return _with_long_labels(default_collate(samples))


def _convert(batch: Any) -> dict[str, Tensor]:
    return _with_long_labels(default_convert(batch))


def _with_long_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    # torch's losses take no int32, which is what some platforms and files have.
    return batch | {LABEL: batch[LABEL].long()} if LABEL in batch else batch


def iterate(
    dataset: Any,
    batch_size: int,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[dict[str, Tensor]]:
    """Yield a data set in order, in batches on `device`; of several processes, each its share."""
    order = range(rank, len(dataset), world_size)
    batches = [list(order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    for batch in loader(dataset, batches):
        yield {
            key: value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)
            for key, value in batch.items()
        }


def evaluation_batches(
    module: nn.Module, dataset: Any, batch_size: int = 256, *, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Yield a data set's batches in order, on the device and in the dtype of the module.

    A data set whose samples are augmented gives its plain form as its attribute `evaluation`.
    """
    example = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    yield from iterate(
        getattr(dataset, "evaluation", dataset),
        batch_size,
        example.device,
        dtype=example.dtype,
        rank=rank,
        world_size=world_size,
    )


class evaluating:
    """Context: eval mode without gradients; every module gets its own mode back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        self.no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        for module, mode in self.modes:
            module.training = mode

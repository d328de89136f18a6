"""What batches are made of: a reproducible order, shards of processes, views with modalities hidden."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmfast.coalitions import SHOWN, present_key
from mmfast.data.arrays import LABEL, ArrayDataset

# Rows of a batch that each encoder gets at least, as batch norm needs.
_MIN_ROWS = 2


def takes_batches(dataset: Any) -> bool:
    """Whether `dataset[[i, j, ...]]`, given a list, returns a whole batch, which spares a call per sample."""
    return getattr(dataset, "takes_batches", isinstance(dataset, ArrayDataset))


class Entries(Dataset):
    """Chosen samples of a data set, in any number of copies, each optionally shown with some modalities only.

    Args:
        base: data set of N samples.
        indices: [E] int64, the sample of each entry.
        shown: bool [E, M], the modalities it shows; the others count as absent. A reader reads them alone.
    """

    def __init__(self, base: Any, indices: Tensor, shown: Tensor | None = None) -> None:
        self.base = base
        self.indices = indices  # [E]
        self.shown = shown  # bool [E, M]
        self.takes_batches = takes_batches(base)

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        shown = "" if self.shown is None else ", modalities hidden"
        return f"Entries({len(self):,} of {len(self.base):,} samples{shown})"

    def __getitem__(self, entry: Any) -> dict[str, Tensor]:
        key = self.indices[entry]
        sample = dict(self.base[key if key.ndim else int(key)])
        if self.shown is not None:
            sample[SHOWN] = self.shown[entry]
        return sample


def dataset_indices(
    entries: Any,
    chosen: Tensor,  # [B] int64
) -> Tensor:  # [B] int64
    """Return the samples of the data set that these entries of an epoch show."""
    return entries.indices[chosen] if isinstance(entries, Entries) else chosen


def to_read(
    shown: Tensor,  # bool [B, M]
) -> Tensor:  # bool [B, M]
    """Return what must be read of the samples of a batch: what is shown, of each modality at least two."""
    counts = shown.sum(0)
    few = counts < min(_MIN_ROWS, len(shown))
    if not few.any():
        return shown
    read = shown.clone()
    for m in few.nonzero().flatten().tolist():
        hidden = (~shown[:, m]).nonzero().flatten()
        read[hidden[: _MIN_ROWS - int(counts[m])], m] = True
    return read


def presence(
    batch: Mapping[str, Tensor],
    modalities: Sequence[str],  # M names
) -> Tensor | None:  # bool [M, N]
    """Return which modalities each sample of a batch shows, or None where all show all."""
    present = batch[SHOWN].T.contiguous() if SHOWN in batch else None
    marked = [present_key(name) for name in modalities]
    if not any(key in batch for key in marked):
        return present
    # One that is there tells N, which labels may not: data to be predicted have none.
    everyone = torch.ones_like(next(batch[key] for key in marked if key in batch))
    given = torch.stack([batch.get(key, everyone) for key in marked])
    return given if present is None else given & present


def marks_of(
    present: Tensor | None,  # bool [M, N]
    labels: Tensor,  # [N, ...]
    num_modalities: int,
) -> Tensor:  # bool [N, M]
    """Return what `presence` gives of a batch as rows, also where it is None: another batch may tell."""
    if present is not None:
        return present.T
    return torch.ones(len(labels), num_modalities, dtype=torch.bool, device=labels.device)


def all_marks(
    batch: Mapping[str, Any],  # label: [N, ...]
    modalities: Sequence[str],
) -> dict[str, Tensor]:  # <m>__present: bool [N] each
    """Return the marks of a batch, of each modality: what it tells nothing of, all its samples have."""
    given = {present_key(name): batch.get(present_key(name)) for name in modalities}
    everyone = torch.ones(len(batch[LABEL]), dtype=torch.bool, device=batch[LABEL].device)
    return {key: everyone if mask is None else mask for key, mask in given.items()}


@dataclass(frozen=True)
class Shard:
    """One process's batches of an epoch, and what to scale each batch's mean loss by.

    The scale makes the mean over processes of gradients equal the gradient on the whole batch, also where the
    processes' parts differ in size.
    """

    batches: list[Tensor]  # [B] int64 each
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
    order = torch.randperm(num_samples, generator=generator, device="cpu")
    whole = list(order.split(batch_size))
    if len(whole) > 1 and len(whole[-1]) < 2 * world_size:
        runt = whole.pop()
        whole[-1] = torch.cat([whole[-1], runt])
    parts = [batch[rank::world_size] for batch in whole]
    scales = [len(part) * world_size / len(batch) for part, batch in zip(parts, whole, strict=True)]
    return Shard(parts, scales)


class evaluating:
    """Context: eval mode without gradients, in the precision of training; modules get their modes back."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            # Of a learner: what its trainer computes in, such as bfloat16.
            stack.enter_context(getattr(self.module, "autocast", contextlib.nullcontext)())
            self.contexts = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.contexts.__exit__(*error)
        for module, mode in self.modes:
            module.training = mode

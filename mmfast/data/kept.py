"""Features that are encoded once and kept: in memory, beyond a size in a file that is mapped into it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfast.coalitions import features_key, present_key
from mmfast.data.arrays import LABEL
from mmfast.data.batches import evaluating, presence
from mmfast.data.devices import fits_on
from mmfast.data.reader import evaluation_batches, reader_of
from mmfast.distributed import gather_rows, rank_and_size

# Bytes of a data set's features that are kept in memory; more go to a file in the folder for temporary files
# (the variable TMPDIR), which goes with its last reader.
MAX_BYTES = 2**30


class KeptFeatures(Dataset):
    """The features of a data set's samples, with their labels and marks; its batches need no encoder.

    Args:
        features: by modality, [N, D_m] each.
        labels: [N] int64.
        present: bool [N, M], which modalities each sample has; None: all.
    """

    takes_batches = True

    def __init__(
        self,
        features: dict[str, Tensor],  # [N, D_m] each
        labels: Tensor,  # [N]
        present: Tensor | None,  # bool [N, M]
    ) -> None:
        self.labels = labels
        self.tensors = {features_key(name): h for name, h in features.items()}
        if present is not None:
            self.tensors |= {present_key(name): mask for name, mask in zip(features, present.T, strict=True)}
        self.tensors[LABEL] = labels

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def dtype(self) -> None:
        """Features are taken as they are."""
        return None

    @property
    def sample_bytes(self) -> int:
        return sum(value[:1].nbytes for value in self.tensors.values())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.tensors.items()}

    def gather(
        self,
        index: Tensor,  # [B] int64
    ) -> dict[str, Tensor]:
        """Return the batch at indices that lie on the device of the features and in [0, N)."""
        return {key: value.index_select(0, index) for key, value in self.tensors.items()}


@torch.no_grad()
def encode_once(learner: Any, dataset: Any, *, whole: bool) -> KeptFeatures:
    """Return a data set's features in eval mode, each sample read and encoded by one of the processes.

    Args:
        learner: encodes, and has a reader.
        dataset: map-style.
        whole: every process gets the features of all samples; otherwise each its own share, samples rank,
            rank + world_size, ...
    """
    rank, world_size = rank_and_size()
    share = len(range(rank, len(dataset), world_size))
    names = learner.modalities
    held: dict[str, Tensor] = {}
    start = 0
    for labels, features, present in _encoded(learner, dataset):
        rows = {LABEL: labels, **dict(zip(names, features, strict=True))}
        if present is not None:
            rows[""] = present
        if whole:
            rows = {key: gather_rows(value) for key, value in rows.items()}
        if not held:
            held = _make_room(rows, len(dataset) if whole else share)
        end = start + len(rows[LABEL])
        for key, value in rows.items():
            held[key][start:end] = value
        start = end
    return KeptFeatures({name: held[name] for name in names}, held[LABEL], held.get(""))


def _encoded(
    learner: Any, dataset: Any
) -> Iterator[tuple[Tensor, list[Tensor], Tensor | None]]:  # [n], M x [n, D_m], bool [n, M]
    """Yield labels, features and marks batch by batch; of several processes all yield as many."""
    rank, world_size = rank_and_size()
    size = reader_of(learner).evaluation_size(dataset)
    steps = -(-len(range(0, len(dataset), world_size)) // size)
    batches = evaluation_batches(learner, dataset, rank=rank, world_size=world_size)
    example: tuple[Tensor, list[Tensor], Tensor | None] | None = None
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            # The last batch of this process was its last share's.
            assert example is not None, f"{len(dataset)} samples are too few for {world_size} processes"
            labels, features, present = example
            yield labels[:0], [h[:0] for h in features], None if present is None else present[:0]
            continue
        with evaluating(learner):
            marks, features = presence(batch, learner.modalities), learner.encode(batch)
        example = batch[LABEL], features, None if marks is None else marks.T
        yield example


def _make_room(rows: dict[str, Tensor], num_samples: int) -> dict[str, Tensor]:
    """Return tensors for as many samples, like `rows` of a few."""
    shapes = {key: (num_samples, *value.shape[1:]) for key, value in rows.items()}
    total = sum(math.prod(shapes[key]) * value.element_size() for key, value in rows.items())
    device = rows[LABEL].device
    if not fits_on(device, total):
        device = torch.device("cpu")
    if device.type == "cpu" and total > MAX_BYTES:
        return {key: _mapped_file(shapes[key], value.dtype) for key, value in rows.items()}
    return {key: torch.empty(shapes[key], dtype=value.dtype, device=device) for key, value in rows.items()}


def _mapped_file(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor in a file that is gone with it."""
    count = math.prod(shape)
    descriptor, name = tempfile.mkstemp(prefix="mmfast-features-")
    try:
        if hasattr(os, "posix_fallocate"):
            # A disk that is full must say so now: written through the map it would kill the process.
            os.posix_fallocate(descriptor, 0, max(1, count * dtype.itemsize))
        found = torch.from_file(name, shared=True, size=count, dtype=dtype)
    finally:
        os.close(descriptor)
        if os.name == "posix":
            Path(name).unlink()
    return found.view(shape)

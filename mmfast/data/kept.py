"""Features that are encoded once and kept: in memory, beyond a size in a file that is mapped into it."""

from __future__ import annotations

import errno
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
from mmfast.data.batches import evaluating, marks_of, presence
from mmfast.data.devices import fits_on, model_place
from mmfast.data.reader import evaluation_batches, no_labels, reader_of
from mmfast.distributed import gather_rows, rank_and_size
from mmfast.errors import shown

# Bytes of a data set's features that are kept in memory; more go to a file in the folder for temporary files
# (the variable TMPDIR), which goes with its last reader; on Windows, which removes no open file, it stays.
MAX_BYTES = 2**30
# Beside features by their modalities' names, none of which is empty.
_PRESENT = ""


class KeptFeatures(Dataset):
    """The features of a data set's samples, with their labels and marks; its batches need no encoder.

    Args:
        features: by modality, [N, D_m] each.
        labels: [N] int64, or what the task takes.
        present: bool [N, M], which modalities each sample has; None: all.
    """

    takes_batches = True

    def __init__(
        self,
        features: dict[str, Tensor],  # [N, D_m] each
        labels: Tensor,  # [N] or [N, C]
        present: Tensor | None,  # bool [N, M]
    ) -> None:
        self.labels = labels
        self.tensors = {features_key(name): h for name, h in features.items()}
        self.features = frozenset(self.tensors)
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

    def __repr__(self) -> str:
        return f"KeptFeatures({len(self):,} samples, {shown(self.tensors)})"

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.tensors.items()}

    def gather(
        self,
        index: Tensor,  # [B] int64
        modalities: Sequence[str] | None = None,
        *,
        labels: bool = True,
    ) -> dict[str, Tensor]:
        """Return the batch at indices that lie on the device of the features and in [0, N).

        Args:
            index: of the samples.
            modalities: those whose features are gathered; None: all.
            labels: with labels, and with the marks of which samples have which modality.
        """
        wanted = None if modalities is None else {features_key(name) for name in modalities}
        return {
            key: value.index_select(0, index)
            for key, value in self.tensors.items()
            if (labels if key not in self.features else wanted is None or key in wanted)
        }


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
        rows = {LABEL: labels, _PRESENT: present, **dict(zip(names, features, strict=True))}
        if whole:
            rows = {key: gather_rows(value) for key, value in rows.items()}
        if not held:
            held = _make_room(rows, len(dataset) if whole else share)
        end = start + len(rows[LABEL])
        for key, value in rows.items():
            held[key][start:end] = value
        start = end
    marks = held[_PRESENT]
    return KeptFeatures(
        {name: held[name] for name in names}, held[LABEL], None if bool(marks.all()) else marks
    )


def _encoded(
    learner: Any, dataset: Any
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:  # [n, ...], M x [n, D_m], bool [n, M]
    """Yield labels, features and marks batch by batch; of several processes all yield as many."""
    rank, world_size = rank_and_size()
    size = reader_of(learner).evaluation_size(dataset)
    steps = -(-len(range(0, len(dataset), world_size)) // size)
    batches = evaluation_batches(learner, dataset, rank=rank, world_size=world_size)
    # What a process gives whose share has come to its end, while that of another has not.
    device, dtype = model_place(learner)
    nothing = [torch.zeros(0, dim, dtype=dtype, device=device) for dim in learner.model.dims]
    labels = None
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            marks = torch.ones(0, len(nothing), dtype=torch.bool, device=device)
            labels = no_labels(learner, dataset) if labels is None else labels[:0]
            yield labels, nothing, marks
            continue
        with evaluating(learner):
            present, features = presence(batch, learner.modalities), learner.encode(batch)
        nothing, labels = [h[:0] for h in features], batch[LABEL]
        yield labels, features, marks_of(present, labels, len(features))


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
            _reserve(descriptor, max(1, count * dtype.itemsize))
        found = torch.from_file(name, shared=True, size=count, dtype=dtype)
    finally:
        os.close(descriptor)
        if os.name == "posix":
            Path(name).unlink()
    return found.view(shape)


def _reserve(descriptor: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        # Some file systems cannot.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise

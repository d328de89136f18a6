"""Batches as they are read on the host: gathered from memory, or sample by sample, here or in a worker."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from mmfast.coalitions import PRESENT_SUFFIX, present_key, rows_key
from mmfast.data.arrays import LABEL, as_label
from mmfast.data.batches import takes_batches, to_read
from mmfast.data.collate import collate, takes_parts
from mmfast.data.seeds import kept_draws, mixed, seed_host
from mmfast.data.workers import held_sigterm, outlive_sigterm
from mmfast.errors import describe
from mmfast.nests import mapped

Batch = dict[str, Any]

# Bytes of batches that are gathered together from memory.
_GATHERED_BYTES = 2**18


class Key(NamedTuple):
    """What a batch is made of; arrays of numpy, which go to workers by value."""

    indices: np.ndarray  # [B] int64
    read: np.ndarray | None  # bool [B, M]: modalities to read of each sample; None: all
    plain: bool  # of the data set's form without augmentation
    seed: int


def make_keys(
    indices: Sequence[Tensor],  # [B] int64 each
    shown: Sequence[Tensor] | None,  # bool [B, M] each
    plain: bool,
    seed: int,
    first: int,
) -> Iterator[Key]:
    for number, index in enumerate(indices):
        read = None if shown is None else to_read(shown[number]).numpy()
        yield Key(index.numpy(), read, plain, mixed(seed, first + number))


def in_memory(dataset: Any) -> bool:
    """Whether a data set gathers batches by itself, from indices that are known to be in range.

    One whose class has a `__getitem__` of its own over an inherited `gather` is asked by that.
    """
    if not (hasattr(dataset, "gather") and takes_batches(dataset)):
        return False
    return "gather" in next(vars(kind) for kind in type(dataset).__mro__ if "__getitem__" in vars(kind))


def gathered(
    dataset: Any,
    indices: Sequence[Tensor],  # [B] int64 each
    shown: Sequence[Tensor] | None,  # bool [B, M] each
    modalities: Sequence[str],
) -> Iterator[Batch]:
    if shown is not None:
        for index, mask in zip(indices, shown, strict=True):
            yield _parts_of_batch(dataset, index, to_read(mask), modalities)
        return
    sizes = [len(index) for index in indices]
    # All indices go to the device together; labels and marks, which are small, are gathered all at once, and
    # features of small batches several batches at a time.
    every = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *indices]).to(dataset.device)
    told = {key: iter(_pieces(value, sizes)) for key, value in dataset.gather(every, ()).items()}
    several = max(1, _GATHERED_BYTES // max(1, dataset.sample_bytes * max(sizes, default=1)))
    groups = [sizes[first : first + several] for first in range(0, len(sizes), several)]
    for group, index in zip(groups, _pieces(every, [sum(group) for group in groups])):
        features = dataset.gather(index, modalities, labels=False)
        keys = (*features, *told)
        # The pieces of features end first, so that no label is passed over.
        for values in zip(*(_pieces(value, group) for value in features.values()), *told.values()):
            yield dict(zip(keys, values))


def _pieces(
    value: Tensor,  # [N, ...]
    sizes: list[int],
) -> Sequence[Tensor]:
    return value.split(sizes) if len(sizes) > 1 else (value,) * len(sizes)


def _parts_of_batch(
    dataset: Any,
    index: Tensor,  # [B] int64
    read: Tensor,  # bool [B, M]
    modalities: Sequence[str],
) -> Batch:
    batch = dataset.gather(index.to(dataset.device), ())
    for m, name in enumerate(modalities):
        rows = read[:, m].nonzero().flatten()
        if len(rows) < len(index):
            batch[rows_key(name)] = rows
        batch |= dataset.gather(index[rows].to(dataset.device), (name,), labels=False)
    return batch


class Source(Dataset):
    """What reads the batches of a data set, in this process or in a worker's.

    Args:
        dataset: of samples, or one that takes batches.
        modalities: names of the M modalities.
        collate_fn: from samples to a batch; None for the default.
    """

    def __init__(self, dataset: Any, modalities: tuple[str, ...], collate_fn: Callable | None) -> None:
        self.dataset = dataset
        self.modalities = modalities
        self.collate = collate_fn or collate
        self.is_own = collate_fn is not None

    def form(self, plain: bool) -> Any:
        """Return the data set, or what it gives where nothing is to be augmented."""
        return getattr(self.dataset, "evaluation", self.dataset) if plain else self.dataset

    def __getitem__(self, key: Key) -> Batch:
        # A worker's generators are its own.
        seed_host(key.seed)
        return self._fetch(key)

    def fetch_here(self, key: Key) -> Batch:
        """Return a batch; the generators of this process stay as they are."""
        with kept_draws():
            return self[key]

    def _fetch(self, key: Key) -> Batch:
        dataset, read = self.form(key.plain), key.read
        if takes_batches(dataset):
            batch = default_convert(dataset[key.indices.tolist()])
            return _with_fitting_labels(batch if read is None else self._without_hidden(batch, read))
        if read is not None and not takes_parts(self.collate):
            read = None
        samples = self._samples(dataset, key.indices.tolist(), read)
        batch = self.collate(samples)
        if self.is_own and not isinstance(batch, Mapping):
            raise TypeError(f"collate_fn must return a dict of the batch's values, got {describe(batch)}")
        batch = dict(batch) if read is not None else self._with_marks(batch, len(samples))
        return _with_fitting_labels(batch)

    def _with_marks(self, batch: Mapping[str, Any], num_samples: int) -> Batch:
        """Return a batch that tells of every modality which some of its samples do not hold who has it.

        They may say so themselves, by `<modality>__present`, or lack the key alone.
        """
        found = dict(batch)
        for name in self.modalities:
            rows = found.get(rows_key(name))
            if rows is None and name not in found and takes_parts(self.collate):
                rows = found[rows_key(name)] = torch.zeros(0, dtype=torch.int64, device="cpu")
            if rows is not None and present_key(name) not in found:
                mark = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
                found[present_key(name)] = mark.index_fill_(0, rows, True)
        return found

    def _samples(self, dataset: Any, indices: list[int], read: np.ndarray | None) -> list[Any]:
        if hasattr(dataset, "__getitems__") and (read is None or not _offers_parts(dataset)):
            samples = dataset.__getitems__(indices)
        elif read is None or not _offers_parts(dataset):
            samples = [dataset[index] for index in indices]
        else:
            return _with_all_marks(
                [
                    dataset[index] if mask.all() else dict(dataset.get(index, self._names(mask)))
                    for index, mask in zip(indices, read, strict=True)
                ]
            )
        if read is None:
            return samples
        hidden = [{name for name, shown in zip(self.modalities, mask) if not shown} for mask in read]
        return [
            {key: value for key, value in sample.items() if key not in names}
            for sample, names in zip(samples, hidden, strict=True)
        ]

    def _names(self, mask: np.ndarray) -> tuple[str, ...]:
        return tuple(itertools.compress(self.modalities, mask))

    def _without_hidden(self, batch: Batch, read: np.ndarray) -> Batch:
        batch = dict(batch)
        for m, name in enumerate(self.modalities):
            if not read[:, m].all():
                rows = batch[rows_key(name)] = torch.from_numpy(read[:, m].nonzero()[0])
                batch[name] = mapped(functools.partial(torch.index_select, dim=0, index=rows), batch[name])
        return batch


def _offers_parts(dataset: Any) -> bool:
    """Whether a data set has a method `get(index, modalities)`; others of that name take other arguments."""
    try:
        inspect.signature(dataset.get).bind(0, ())
    except (AttributeError, TypeError, ValueError):
        return False
    return True


def _with_all_marks(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples that all tell whether they have a modality, if one does; what is not read is absent."""
    marks = {key for sample in samples for key in sample if key.endswith(PRESENT_SUFFIX)}
    # A sample that is read and tells nothing has it.
    return [{key: key.removesuffix(PRESENT_SUFFIX) in sample for key in marks} | sample for sample in samples]


def _with_fitting_labels(batch: Batch) -> Batch:
    if isinstance(batch.get(LABEL), Tensor):
        batch[LABEL] = as_label(batch[LABEL])
    return batch


class _Order:
    """The keys of the pass under way, which a DataLoader asks for at the beginning of each."""

    def __init__(self) -> None:
        self.keys: Iterator[Key] = iter(())
        self.length = 0

    def __iter__(self) -> Iterator[Key]:
        return self.keys

    def __len__(self) -> int:
        return self.length


class Pool:
    """Workers that read one data set, pass after pass."""

    def __init__(self, source: Source, num_workers: int, prefetch: int, pin: bool) -> None:
        self.order = _Order()
        self.source = source  # holds the data set, by whose identity the pool is found
        self.loader = DataLoader(
            source,
            sampler=self.order,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=True,
            prefetch_factor=prefetch,
            pin_memory=pin,
            collate_fn=_as_it_is,
            worker_init_fn=outlive_sigterm,
            # Not the generator that dropout draws from: results do not depend on the number of workers.
            generator=torch.Generator("cpu"),
        )

    def read(self, keys: Iterator[Key], length: int) -> Iterator[Batch]:
        self.order.keys, self.order.length = keys, length
        with held_sigterm():
            return iter(self.loader)


def _as_it_is(batch: Any) -> Any:
    return batch

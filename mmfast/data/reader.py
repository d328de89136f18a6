"""How data sets are read: here or by workers that stay, in batches, and on to the model's device."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_convert

from mmfast.coalitions import PRESENT_SUFFIX, rows_key
from mmfast.data.arrays import LABEL
from mmfast.data.batches import SHOWN, Entries, takes_batches, to_read
from mmfast.data.collate import collate, takes_parts
from mmfast.data.drawing import kept_draws, mixed, seed_host
from mmfast.data.marks import Marks
from mmfast.errors import describe
from mmfast.nests import mapped, tensors

Batch = dict[str, Any]

# Bytes of batches that are gathered together from memory.
_GATHERED_BYTES = 2**18
# Data sets whose workers are kept at a time: training, validation and one more.
_MAX_POOLS = 3


class Key(NamedTuple):
    """What a batch is made of; arrays of numpy, which go to workers by value."""

    indices: np.ndarray  # [B] int64
    read: np.ndarray | None  # bool [B, M]: modalities to read of each sample; None: all
    plain: bool  # of the data set's form without augmentation
    seed: int


@dataclass
class Reader:
    """Reads data sets in batches, for every pass over them that training, evaluation and valuation make.

    Whoever reads a sample finds the generators of torch (on the CPU), numpy and random seeded by the pass and
    the batch: what it draws does not depend on the number of workers.

    Attributes:
        num_workers: processes that read samples; 0 reads in this one. Data in memory (`ArrayDataset`) are
            always read in this one.
        collate_fn: from a list of samples to a batch; None: `mmfast.data.collate`. One without an attribute
            `takes_parts` that is true gets whole samples also where only some modalities are shown.
        batch_size: samples of a batch in evaluation mode.
        pin_memory: whether batches lie in pinned memory, from which a GPU takes them beside its work; "auto":
            where they go to a GPU.
        prefetch: batches that each worker reads ahead.
    """

    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None
    batch_size: int = 256
    pin_memory: bool | str = "auto"
    prefetch: int = 2
    _pools: dict[int, _Pool] = field(default_factory=dict, init=False, repr=False, compare=False)
    _marks: dict[int, Marks] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stays: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 0), ("batch_size", 1), ("prefetch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {describe(value)}")
        if self.collate_fn is not None and not callable(self.collate_fn):
            raise TypeError(
                f"collate_fn must be a function of a list of samples, got {describe(self.collate_fn)}"
            )
        if not isinstance(self.pin_memory, bool) and self.pin_memory != "auto":
            raise ValueError(f'pin_memory must be True, False or "auto", got {describe(self.pin_memory)}')

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a learner, and processes it is sent to, start workers of their own.
        return self.__dict__ | {"_pools": {}, "_marks": {}, "_stays": False}

    @contextlib.contextmanager
    def staying(self) -> Iterator[None]:
        """Keep the workers from pass to pass within this context; without it each pass starts its own."""
        before, self._stays = self._stays, True
        try:
            yield
        finally:
            self._stays = before
            if not before:
                self._pools.clear()
                self._marks.clear()

    def read(
        self,
        entries: Any,
        batches: Sequence[Tensor],  # [B] int64 each
        modalities: Sequence[str],
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        plain: bool = False,
        seed: int = 0,
        first: int = 0,
    ) -> Iterator[Batch]:
        """Yield the given batches of a data set, on `device`.

        Args:
            entries: data set, or Entries of one.
            batches: indices of the entries of each batch.
            modalities: names of the M modalities.
            device: where batches go.
            dtype: that the modalities' floating tensors are cast to; None leaves them.
            plain: take the data set's attribute `evaluation`, where it has one.
            seed: of what the data set draws, together with the number of the batch.
            first: number of the first batch.
        """
        base, shown, indices = entries, None, batches
        if isinstance(entries, Entries):
            base, indices = entries.base, [entries.indices[batch] for batch in batches]
            if entries.shown is not None:
                shown = [entries.shown[batch] for batch in batches]
        source = _Source(base, tuple(modalities), self.collate_fn)
        form = source.form(plain)
        is_there = in_memory(form) and form.device.type != "cpu"
        # What is on a device already is not the host's to pin.
        pin = not is_there and (device.type == "cuda" if self.pin_memory == "auto" else bool(self.pin_memory))
        if in_memory(form):
            found = _gathered(form, indices, shown, modalities)
            found = map(_pinned, found) if pin else found
        else:
            found = self._fetched(source, _keys(indices, shown, plain, seed, first), len(indices), pin)
            found = self._noted(found, self.marks(base, modalities), indices, shown)
        if shown is not None:
            found = ({**batch, SHOWN: mask} for batch, mask in zip(found, shown))
        move = functools.partial(_to_device, modalities=modalities, device=device, dtype=dtype)
        if in_memory(form) and form.device == device and dtype in (form.dtype, None):
            move = _as_it_is
        yield from (
            _copied_ahead(found, move, device) if device.type == "cuda" and not is_there else map(move, found)
        )

    def marks(self, dataset: Any, modalities: Sequence[str]) -> Marks:
        """Return what is known of which samples of a data set have which modality."""
        found = self._marks.get(id(dataset))
        if found is None or found.modalities != tuple(modalities):
            found = self._marks[id(dataset)] = Marks(dataset, modalities)
            while len(self._marks) > _MAX_POOLS:
                self._marks.pop(next(iter(self._marks)))
        return found

    @staticmethod
    def _noted(
        batches: Iterator[Batch],
        marks: Marks,
        indices: Sequence[Tensor],  # [B] int64 each
        shown: Sequence[Tensor] | None,  # bool [B, M] each
    ) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            marks.note(indices[number], None if shown is None else shown[number], batch)
            yield batch

    def _fetched(self, source: _Source, keys: Iterator[Key], length: int, pin: bool) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from (_pinned(batch) if pin else batch for batch in map(source.fetch_here, keys))
            return
        # Out of the table while it reads: a second pass meanwhile takes workers of its own.
        key = id(source.dataset)
        pool = self._pools.pop(key, None) or _Pool(source, self.num_workers, self.prefetch, pin)
        yield from pool.read(keys, length)
        if self._stays:
            self._pools[key] = pool
            while len(self._pools) > _MAX_POOLS:
                self._pools.pop(next(iter(self._pools)))


def _keys(
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
    """Whether a data set gathers batches by itself, from indices that are known to be in range."""
    return hasattr(dataset, "gather") and takes_batches(dataset)


def _gathered(
    dataset: Any,
    indices: Sequence[Tensor],  # [B] int64 each
    shown: Sequence[Tensor] | None,  # bool [B, M] each
    modalities: Sequence[str],
) -> Iterator[Batch]:
    if shown is None:
        # All indices go to the device together, and small batches are gathered several at a time.
        sizes = [len(index) for index in indices]
        every = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *indices]).to(dataset.device)
        several = max(1, _GATHERED_BYTES // max(1, dataset.sample_bytes * max(sizes, default=1)))
        start = 0
        for first in range(0, len(sizes), several):
            group = sizes[first : first + several]
            end = start + sum(group)
            yield from _split(dataset.gather(every[start:end]), group)
            start = end
        return
    for index, mask in zip(indices, shown, strict=True):
        yield _parts_of_batch(dataset, index, to_read(mask), modalities)


def _split(batch: Batch, sizes: list[int]) -> Iterator[Batch]:
    if len(sizes) == 1:
        yield batch
        return
    pieces = [value.split(sizes) for value in batch.values()]
    for values in zip(*pieces, strict=True):
        yield dict(zip(batch, values, strict=True))


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


class _Source(Dataset):
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
            batch = default_convert(dataset[torch.from_numpy(key.indices)])
            return _with_long_labels(batch if read is None else self._without_hidden(batch, read))
        if read is not None and not takes_parts(self.collate):
            read = None
        samples = self._samples(dataset, key.indices.tolist(), read)
        batch = self.collate(samples)
        if self.is_own and not isinstance(batch, Mapping):
            raise TypeError(f"collate_fn must return a dict of the batch's values, got {describe(batch)}")
        return _with_long_labels(dict(batch))

    def _samples(self, dataset: Any, indices: list[int], read: np.ndarray | None) -> list[Any]:
        if hasattr(dataset, "__getitems__") and (read is None or not hasattr(dataset, "get")):
            samples = dataset.__getitems__(indices)
        elif read is None or not hasattr(dataset, "get"):
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
                batch[name] = mapped(lambda value, rows=rows: value[rows], batch[name])
        return batch


def _with_all_marks(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return samples that all tell whether they have a modality, if one does; what is not read is absent."""
    marks = {key: False for sample in samples for key in sample if key.endswith(PRESENT_SUFFIX)}
    return [marks | sample for sample in samples] if marks else samples


class _Order:
    """The keys of the pass under way, which a DataLoader asks for at the beginning of each."""

    def __init__(self) -> None:
        self.keys: Iterator[Key] = iter(())
        self.length = 0

    def __iter__(self) -> Iterator[Key]:
        return self.keys

    def __len__(self) -> int:
        return self.length


class _Pool:
    """Workers that read one data set, pass after pass."""

    def __init__(self, source: _Source, num_workers: int, prefetch: int, pin: bool) -> None:
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
            # Not the generator that dropout draws from: results do not depend on the number of workers.
            generator=torch.Generator("cpu"),
        )

    def read(self, keys: Iterator[Key], length: int) -> Iterator[Batch]:
        self.order.keys, self.order.length = keys, length
        return iter(self.loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _with_long_labels(batch: Batch) -> Batch:
    # torch's losses take no int32, which is what some platforms and files have.
    if isinstance(batch.get(LABEL), Tensor) and batch[LABEL].dtype != torch.int64:
        batch[LABEL] = batch[LABEL].long()
    return batch


def _pinned(batch: Batch) -> Batch:
    return mapped(Tensor.pin_memory, batch)


def _copied_ahead(
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


def _to_device(
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


def evaluation_batches(
    module: Any,
    dataset: Any,
    batch_size: int | None = None,
    *,
    reader: Reader | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Yield a data set's batches in order, on the device and in the dtype of the module.

    A data set whose samples are augmented gives its plain form as its attribute `evaluation`.

    Args:
        module: a model or a learner, which names its modalities.
        dataset: map-style.
        batch_size: None takes the reader's.
        reader: None takes the learner's, or for a model one that reads here.
        rank, world_size: of several processes, each reads samples rank, rank + world_size, ...
    """
    reader = reader or reader_of(module)
    device, dtype = model_place(module)
    mine = torch.arange(rank, len(dataset), world_size, device="cpu")
    batches = mine.split(batch_size or reader.batch_size) if len(mine) else ()
    yield from reader.read(dataset, batches, module.modalities, device, dtype=dtype, plain=True)


def reader_of(module: Any) -> Reader:
    """Return the reader of a learner; a model's reads in this process."""
    return getattr(module, "reader", None) or Reader()

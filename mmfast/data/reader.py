"""How data sets are read: here or by workers that stay, in batches, and on to the model's device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmfast.coalitions import SHOWN
from mmfast.data.arrays import LABEL
from mmfast.data.batches import Entries
from mmfast.data.devices import copied_ahead, model_place, pinned, to_device
from mmfast.data.marks import Marks
from mmfast.data.sources import Batch, Key, Pool, Source, gathered, in_memory, make_keys
from mmfast.errors import changed, describe, shown

# A pass in evaluation mode makes so many batches, where it can, for as many workers to read.
_SPREAD, _LEAST = 16, 16
# Data sets whose workers are kept at a time: training, validation and one more.
_MAX_POOLS = 3


@dataclass(repr=False)
class Reader:
    """Reads data sets in batches, for every pass over them that training, evaluation and valuation make.

    Whoever reads a sample finds the generators of torch (on the CPU), numpy and random seeded by the pass and
    the batch: what it draws does not depend on the number of workers.

    Attributes:
        num_workers: processes that read samples; 0 reads in this one. Data in memory (`ArrayDataset`) are
            always read in this one.
        collate_fn: from a list of samples to a batch; None: `mmfast.data.collate`. Data sets that give
            batches by themselves, such as `ArrayDataset`, have no use for it. One without an attribute
            `takes_parts` that is true gets whole samples also where only some modalities are shown.
        batch_size: samples of a batch in evaluation mode, at most.
        pin_memory: whether batches lie in pinned memory, from which a GPU takes them beside its work; "auto":
            where they go to a GPU.
        prefetch: batches that each worker reads ahead.
    """

    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None
    batch_size: int = 256
    pin_memory: bool | str = "auto"
    prefetch: int = 2
    _pools: dict[int, Pool] = field(default_factory=dict, init=False, repr=False, compare=False)
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

    def __repr__(self) -> str:
        return f"Reader({shown(changed(self))})"

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
    ) -> Generator[Batch, None, None]:
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
        source = Source(base, tuple(modalities), self.collate_fn)
        form = source.form(plain)
        is_there = in_memory(form) and form.device.type != "cpu"
        # What is on a device already is not the host's to pin.
        pin = device.type == "cuda" if self.pin_memory == "auto" else bool(self.pin_memory)
        # Without a GPU no memory can be pinned, nor would it serve any.
        pin = pin and not is_there and torch.accelerator.is_available()
        if in_memory(form):
            found = gathered(form, indices, shown, modalities)
            found = map(pinned, found) if pin else found
        else:
            found = self._fetched(source, make_keys(indices, shown, plain, seed, first), len(indices), pin)
            found = self._noted(found, self.marks(base, modalities), indices, shown)
        if shown is not None:
            found = ({**batch, SHOWN: mask} for batch, mask in zip(found, shown))
        is_cast = in_memory(form) and (dtype is None or form.dtype in (dtype, None))
        if shown is None and is_cast and form.device == device:
            # All of it is where it must be.
            yield from found
            return
        move = functools.partial(to_device, modalities=modalities, device=device, dtype=dtype)
        ahead = device.type == "cuda" and not is_there
        yield from copied_ahead(found, move, device) if ahead else map(move, found)

    def evaluation_size(self, dataset: Any, most: int | None = None) -> int:
        """Return how many samples make a batch in evaluation mode, of which a worker reads one at a time.

        It depends on the data alone: results are the same with any number of workers.

        Args:
            dataset: map-style.
            most: None takes `batch_size`.
        """
        most = most or self.batch_size
        return most if in_memory(dataset) else min(most, max(_LEAST, -(-len(dataset) // _SPREAD)))

    def marks(self, dataset: Any, modalities: Sequence[str]) -> Marks:
        """Return what is known of which samples of a data set have which modality."""
        found = self._marks.get(id(dataset))
        # A list may have grown.
        if found is None or found.modalities != tuple(modalities) or len(found.known) != len(dataset):
            found = Marks(dataset, modalities)
            if not self._stays:
                return found
            self._marks[id(dataset)] = found
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

    def _fetched(self, source: Source, keys: Iterator[Key], length: int, pin: bool) -> Iterator[Batch]:
        if self.num_workers == 0:
            yield from (pinned(batch) if pin else batch for batch in map(source.fetch_here, keys))
            return
        # Out of the table while it reads: a second pass meanwhile takes workers of its own.
        key = id(source.dataset)
        pool: Pool | None = self._pools.pop(key, None)
        pool = pool or Pool(source, self.num_workers, self.prefetch, pin)
        try:
            yield from pool.read(keys, length)
        except Exception:
            # Workers that have failed are not asked again; of a pass that is given up they are.
            pool = None
            raise
        finally:
            if pool is not None and self._stays:
                self._pools[key] = pool
                while len(self._pools) > _MAX_POOLS:
                    self._pools.pop(next(iter(self._pools)))


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
    mine = torch.arange(min(rank, len(dataset)), len(dataset), world_size, device="cpu")
    size = reader.evaluation_size(dataset, batch_size)
    batches = mine.split(size) if len(mine) else ()
    yield from reader.read(dataset, batches, module.modalities, device, dtype=dtype, plain=True)


def no_labels(module: Any, dataset: Any) -> Tensor:  # [0] or [0, C]
    """Return the labels of no sample, like those of a data set's batches."""
    first = Entries(dataset, torch.zeros(min(1, len(dataset)), dtype=torch.int64, device="cpu"))
    here = replace(reader_of(module), num_workers=0)
    for batch in evaluation_batches(module, first, reader=here):
        return batch[LABEL][:0]
    return torch.zeros(0, dtype=torch.int64, device=model_place(module)[0])


def reader_of(module: Any) -> Reader:
    """Return the reader of a learner; a model's reads in this process."""
    return getattr(module, "reader", None) or Reader()

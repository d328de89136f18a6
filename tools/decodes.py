"""Data sets that note each decode: of which sample, of which modality, when, and by which process.

A data set writes a record to the end of a file, whole, at each decode. So no decode is lost, however workers
are started and however many write at a time, and what was made by a certain moment is known afterwards.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import mmfast

# Modalities of the data sets, and how much of its class each shows.
STRENGTHS = {"a": 3.0, "b": 1.5}
MODALITIES = tuple(STRENGTHS)
PARTS = ("train", "val", "test")
DIM = 16
_RECORD = struct.Struct("<diihh")
# The same, as numpy reads it; `seconds` are those of time.monotonic, one clock for all processes.
RECORDS = np.dtype(
    [("seconds", "<f8"), ("process", "<i4"), ("sample", "<i4"), ("modality", "<i2"), ("place", "<i2")]
)
_PACKAGE = str(Path(mmfast.__file__).parent) + os.sep
# Files that read what others ask for; of those in data/ only these ask by themselves.
_READERS, _ASKING = (
    "data" + os.sep,
    tuple(os.path.join("data", name) for name in ("samples.py", "threads.py")),
)
_SHOWN = 3  # functions of a place
UNKNOWN = -1


class DecodeLog:
    """The decodes of a data set, from all processes that have it.

    Args:
        path: file of the records, made at the first decode.
        with_places: note, of decodes in this process, which code of mmfast asked for them.
    """

    def __init__(self, path: Path, *, with_places: bool = False) -> None:
        self.path = path
        self.places: list[str] = []
        self._owner = os.getpid() if with_places else None
        self._file: int | None = None

    def note(self, sample: int, modality: int) -> None:
        """Write one record."""
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        process = os.getpid()
        place = self._place() if process == self._owner else UNKNOWN
        os.write(self._file, _RECORD.pack(time.monotonic(), process, sample, modality, place))

    def read(self) -> np.ndarray:  # [decodes] of RECORDS
        """Return all decodes so far, in the order of their records."""
        return np.fromfile(self.path, RECORDS) if self.path.exists() else np.empty(0, RECORDS)

    def _place(self) -> int:
        place = _asking()
        if place not in self.places:
            self.places.append(place)
        return self.places.index(place)

    def __getstate__(self) -> dict[str, Any]:
        # A file's number means nothing in a process that is not forked from this one.
        return self.__dict__ | {"_file": None}


def _asking() -> str:
    """Return the innermost functions of mmfast that ask for the present decode, without those that read."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < _SHOWN:
        code, file = frame.f_code, frame.f_code.co_filename.removeprefix(_PACKAGE)
        is_ours = file != code.co_filename
        if is_ours and (file in _ASKING or not file.startswith(_READERS)):
            found.append(f"{file}:{frame.f_lineno} {code.co_qualname}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "no function of mmfast"


class WholeSamples(Dataset):
    """Vectors of two modalities that tell C classes apart, slow to decode.

    Args:
        num_samples: N.
        log: takes note of each decode; a modality that a sample lacks is none.
        num_classes: C.
        seconds: of sleep that a sample's decode takes, shared equally by its modalities.
        absent: share of the samples that lacks a modality, drawn for each; above 0 samples have
            `<modality>__present`, and no sample lacks all.
        has_labels: offer the labels as attribute `labels`.
        seed: of the vectors and of what is absent.
    """

    def __init__(
        self,
        num_samples: int,
        log: DecodeLog,
        *,
        num_classes: int = 4,
        seconds: float = 0.0,
        absent: float = 0.0,
        has_labels: bool = True,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        # The same for all data sets: they are parts of one.
        centres = torch.randn(len(MODALITIES), num_classes, DIM, generator=torch.Generator().manual_seed(17))
        self._labels = torch.arange(num_samples) % num_classes  # [N]
        noise = torch.randn(len(MODALITIES), num_samples, DIM, generator=draw)
        strengths = torch.tensor(list(STRENGTHS.values()))
        self._values = noise + strengths[:, None, None] * centres[:, self._labels] / DIM**0.5  # [M, N, D]
        self.presence = torch.rand(len(MODALITIES), num_samples, generator=draw) >= absent  # bool [M, N]
        self.presence[0] |= ~self.presence.any(0)
        self._has_flags = absent > 0
        self._seconds = seconds / len(MODALITIES)
        self.log = log
        if has_labels:
            self.labels = self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._sample(index, MODALITIES)

    def _sample(self, index: int, modalities: Iterable[str]) -> dict[str, Any]:
        index = range(len(self))[int(index)]
        sample: dict[str, Any] = {"label": int(self._labels[index])}
        for name in modalities:
            m = MODALITIES.index(name)
            sample[name] = self._decoded(index, m)
            if self._has_flags:
                sample[f"{name}__present"] = self.presence[m, index]
        return sample

    def _decoded(self, index: int, m: int) -> Tensor:  # [D]
        if not self.presence[m, index]:
            return torch.zeros(DIM)
        self.log.note(index, m)
        if self._seconds:
            time.sleep(self._seconds)
        return self._values[m, index]


class PartialSamples(WholeSamples):
    """Samples that can be had without the modalities that are not needed."""

    def get(self, index: int, modalities: Iterable[str]) -> dict[str, Any]:
        """Return a sample with these modalities alone."""
        return self._sample(index, modalities)


def counts_of(data: WholeSamples, ends: Sequence[float]) -> dict[str, Any]:
    """Return how many decodes of a data set were made so far.

    "in" this process and in workers; "of" each modality; the fewest and the most "times" of one modality of a
    sample; by "places" that asked for them; "by_epoch", where `ends` are the times at which epochs ended, and
    one more for what came then; and which "processes" made any.
    """
    records = data.log.read()
    epochs = np.searchsorted(ends, records["seconds"])
    # How often each sample's modalities were decoded, [M, N].
    times = np.zeros(data.presence.shape, dtype=np.int64)
    np.add.at(times, (records["modality"], records["sample"]), 1)
    places = np.bincount(records["place"][records["place"] != UNKNOWN], minlength=len(data.log.places))
    return {
        "in": _apart(records),
        "of": dict(zip(MODALITIES, times.sum(1).tolist(), strict=True)),
        "times": {"fewest": int(times[data.presence].min()), "most": int(times.max())},
        "places": dict(zip(data.log.places, places.tolist(), strict=True)),
        "by_epoch": [_apart(records[epochs == number]) for number in range(len(ends) + 1)],
        "processes": sorted(set(records["process"].tolist())),
    }


def _apart(records: np.ndarray) -> dict[str, int]:
    in_main = int((records["process"] == os.getpid()).sum())
    return {"main": in_main, "workers": len(records) - in_main}

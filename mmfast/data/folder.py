"""Folders of raw media: `FOLDER/<class>/<stem>.<ext>` or `FOLDER/<split>/<class>/<stem>.<ext>`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmfast.data.channels import channels_first
from mmfast.data.media import choose_frames, read_array, read_image
from mmfast.data.sample_files import PICTURES, Sample, find_samples, other_files
from mmfast.data.sound import SOUNDS, fft_size, log_mel, read_sound, sound_header
from mmfast.data.splits import Splits
from mmfast.data.unreadable import Unreadable

_MAX_SECONDS = 10.0


def load_folder(
    path: str | Path,
    *,
    seed: int = 0,
    standardize: bool = True,
    mels: int = 64,
    seconds: float | None = None,
    size: int = 64,
    frames: int = 3,
    skip_unreadable: bool = False,
    num_workers: int = 0,
) -> Splits:
    """Read a folder of raw media, one folder per class, optionally under `train`, `val` and `test`.

    The files of one sample share their stem; a modality without a file for a sample is absent (`present`
    False).

    - `clip.wav`, `.flac`, `.ogg`: modality `audio`, log-mel spectrogram [1, mels, frames of 10 ms]. Whatever
      encoding libsndfile knows; channels are averaged.
    - `clip.png`, `.jpg`: `image`, [3, size, size].
    - `clip_000.png`, `clip_001.png`, ... (two or more, from 000): `video`, [frames, 3, size, size].
    - `clip.pose.npy`: `pose`, the array as it is, one shape for all; `clip.npy`: `array`. Pictures
      [H, W, C] and video [T, H, W, C] with C of 1, 3 or 4 become [C, H, W] and [T, C, H, W] where H and W are
      larger than 4, and the description says so.

    Args:
        path: The folder. Hidden files and files of other kinds are passed over.
        seed: Seed of the split, where the folder leaves it or its validation part open.
        standardize: Scale features by statistics of the training part.
        mels: Mel bands of a spectrogram.
        seconds: Length that recordings are cut or padded to; by default that of the longest (in `train`,
            where there is a split), at most 10.
        size: Height and width that pictures are resized to, in pixels.
        frames: Pictures taken from a video, spread evenly.
        skip_unreadable: Leave out files that cannot be read: their samples lack the modality, and a sample
            without any other file is left out whole. The description tells how many.
        num_workers: Processes that read files; 0 reads them in this one.

    Raises:
        ImportError: recordings or pictures without the package that reads them.
        ValueError: no usable file, two files for one modality of a sample, unreadable files (all of them in
            one message), sample rates or array shapes that differ, and what `Splits.from_arrays` refuses.
            Files are named.
    """
    path = Path(path)
    for name, value in (("mels", mels), ("size", size), ("frames", frames), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    samples = find_samples(path)
    bad = Unreadable(path)
    sound = audio_length(samples, seconds, bad)
    files = read_files(path, samples, bad, sound, mels, size, frames, skip_unreadable, num_workers)
    # Of all samples: a class that loses its last one is refused, not forgotten.
    class_names = sorted({sample.label for sample in samples})
    number = {name: label for label, name in enumerate(class_names)}
    try:
        splits = Splits.from_arrays(
            files.arrays,
            [number[sample.label] for sample in files.samples],
            split=[sample.part for sample in files.samples] if samples[0].part else None,
            present=files.present,
            class_names=class_names,
            seed=seed,
            standardize=standardize,
            name=path.resolve().name,
            sample_keys=[sample.key for sample in files.samples],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return replace(splits.with_notes(files.notes), sound=sound if sound[0] else None)


class Files(NamedTuple):
    """What the files of a folder hold.

    Attributes:
        arrays: [N, ...] of each modality, zeros where a sample has none.
        present: bool [N] of the modalities that some samples lack.
        samples: the N samples.
        notes: remarks on how they were read.
    """

    arrays: dict[str, Tensor]  # [N, ...] each
    present: dict[str, np.ndarray]  # bool [N] each
    samples: list[Sample]
    notes: list[str]


def read_files(
    path: Path,
    samples: Sequence[Sample],
    bad: Unreadable,
    sound: tuple[int, int],
    mels: int,
    size: int,
    frames: int,
    skip_unreadable: bool,
    num_workers: int,
) -> Files:
    """Read the files of all samples.

    Args:
        path: the folder.
        samples: in it.
        bad: the files that are known to be unreadable so far.
        sound: samples a second of recordings, and how many of them are taken.
        mels, size, frames, skip_unreadable, num_workers: as `load_folder` has them.

    Raises:
        ImportError, ValueError: as `load_folder`.
    """
    total = sum(len(files) for sample in samples for files in sample.files.values())
    read = _Decoder(bad, *sound, mels, size, frames)
    names = sorted({name for sample in samples for name in sample.files})
    stacks = {name: _stack(name, samples, read, num_workers) for name in names}
    if bad.reasons and not skip_unreadable:
        raise bad.error(total, "skip_unreadable=True (--skip-unreadable) leaves such files out")
    arrays, masks = {}, {}
    for name, (stack, mask) in stacks.items():
        if stack is None:
            raise bad.error(total, f"at least one {name} file must be readable, got none")
        arrays[name], masks[name] = stack, mask
    kept = np.any([*masks.values()], axis=0)
    if not kept.all():
        arrays = {name: array[torch.from_numpy(kept)] for name, array in arrays.items()}
        masks = {name: mask[kept] for name, mask in masks.items()}
    arrays, notes = channels_first(arrays)
    if passed_over := other_files(path, samples):
        notes.append(f"files of other kinds passed over: {passed_over}")
    if bad.reasons:
        notes.append(_what_is_left_out(len(bad.reasons), int((~kept).sum())))
    remaining = [sample for sample, keep in zip(samples, kept) if keep]
    return Files(arrays, {name: mask for name, mask in masks.items() if not mask.all()}, remaining, notes)


def _what_is_left_out(num_files: int, num_samples: int) -> str:
    text = f"{num_files:,} unreadable file{'s' * (num_files != 1)} left out"
    if num_samples:
        text += f", and {num_samples:,} sample{'s' * (num_samples != 1)} without any other file"
    return text


@dataclass
class _Decoder:
    """Turns the files of one modality of a sample into features; what cannot be read is noted in `bad`."""

    bad: Unreadable
    rate: int  # samples of sound a second, 0 without any
    num_samples: int  # of a recording
    mels: int
    size: int
    frames: int

    def __call__(self, files: list[Path]) -> Tensor | None:
        """Return features, None where they are unreadable."""
        suffix = files[0].suffix.lower()
        if len(files) > 1:
            # All of them, so that every bad frame is reported.
            pictures = [self.bad.attempt(self._picture, file) for file in choose_frames(files, self.frames)]
            good = [picture for picture in pictures if picture is not None]
            return torch.stack(good) if len(good) == len(pictures) else None
        if suffix in PICTURES:
            return self.bad.attempt(self._picture, files[0])
        return self.bad.attempt(self._recording if suffix in SOUNDS else read_array, files[0])

    def _recording(self, file: Path) -> Tensor:  # [1, mels, frames]
        recording = read_sound(file, stop=max(self.num_samples, fft_size(self.rate)))
        return log_mel(recording, self.rate, num_samples=self.num_samples, mels=self.mels)

    def _picture(self, file: Path) -> Tensor:  # [3, size, size]
        return read_image(file, self.size)


class _Files(Dataset):
    """The features of one modality, sample by sample, and what was found unreadable on the way."""

    def __init__(self, files: list[list[Path]], read: _Decoder) -> None:
        self.files = files
        self.read = read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor | None, dict[Path, str]]:
        known = set(self.read.bad.reasons)
        features = self.read(self.files[index])
        return features, {file: why for file, why in self.read.bad.reasons.items() if file not in known}


def _as_it_is(item: Any) -> Any:
    return item


def audio_length(
    samples: Sequence[Sample], seconds: float | None, bad: Unreadable, rate: int | None = None
) -> tuple[int, int]:
    """Return the common sample rate and the length in samples of all recordings (0, 0 without any).

    Args:
        samples: of a folder.
        seconds: the length, where it is given.
        bad: takes note of recordings of another rate.
        rate: what all must have; None takes the most frequent one.
    """
    headers = []
    for sample in samples:
        for file, *_ in sample.files.values():
            header = bad.attempt(sound_header, file) if file.suffix.lower() in SOUNDS else None
            if header is not None:
                headers.append((sample.part, file, *header))
    if not headers:
        return 0, 0
    # The most frequent one: a single odd file is then the one that is named, wherever it stands.
    whose = "most recordings have" if rate is None else "those of training had"
    rate = rate or Counter(rate for _, _, rate, _ in headers).most_common(1)[0][0]
    for _, file, other, _ in headers:
        if other != rate:
            bad.reasons[file] = f"has {other} samples a second, {whose} {rate}; resample it"
    lengths = [length for part, _, own, length in headers if part in ("train", "") and own == rate]
    longest = min(max(lengths, default=0), round(_MAX_SECONDS * rate))
    return rate, round(seconds * rate) if seconds is not None else longest


def _stack(
    name: str, samples: Sequence[Sample], read: _Decoder, num_workers: int
) -> tuple[Tensor | None, np.ndarray]:  # [N, ...], bool [N]
    """Read one modality of all samples: zeros and False where a sample has no readable file."""
    stacked: Tensor | None = None
    mask = np.zeros(len(samples), bool)
    rows = [row for row, sample in enumerate(samples) if name in sample.files]
    files = _Files([samples[row].files[name] for row in rows], read)
    found = DataLoader(files, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
    for row, (features, reasons) in zip(rows, found, strict=True):
        read.bad.reasons.update(reasons)
        if features is None:
            continue
        if stacked is None:
            stacked, first = features.new_zeros(len(samples), *features.shape), samples[row].files[name][0]
        if features.shape != stacked.shape[1:]:
            raise ValueError(
                f"{samples[row].files[name][0]}: must have the shape of {first}, {list(stacked.shape[1:])}, "
                f"got {list(features.shape)}"
            )
        stacked[row], mask[row] = features, True
    return stacked, mask

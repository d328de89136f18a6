"""Folders of raw media: `FOLDER/<class>/<stem>.<ext>` or `FOLDER/<split>/<class>/<stem>.<ext>`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mmfast.data.media import log_mel, read_array, read_image, read_video, read_wav, wav_header
from mmfast.data.splits import PARTS, Splits

_PICTURES = (".png", ".jpg", ".jpeg")
_READABLE = (".wav", ".npy", *_PICTURES)
_FRAME = re.compile(r"(.+)_(\d{3,})")
_SUB_EXTENSION = re.compile(r"(.+)\.([A-Za-z]\w*)")
_MAX_SECONDS = 10.0


class _Sample(NamedTuple):
    part: str  # "" where the folder gives no split
    label: str
    stem: str
    files: dict[str, list[Path]]  # by modality; several only for video


def load_folder(
    path: str | Path,
    *,
    seed: int = 0,
    standardize: bool = True,
    mels: int = 64,
    seconds: float | None = None,
    size: int = 64,
    frames: int = 3,
) -> Splits:
    """Read a folder of raw media, one folder per class, optionally under `train`, `val` and `test`.

    The files of one sample share their stem; a modality without a file for a sample is absent (`present`
    False).

    - `clip.wav`: modality `audio`, log-mel spectrogram [1, mels, frames of 10 ms].
    - `clip.png`, `.jpg`: `image`, [3, size, size].
    - `clip_000.png`, `clip_001.png`, ... (two or more, from 000): `video`, [frames, 3, size, size].
    - `clip.pose.npy`: `pose`, the array as it is, one shape for all; `clip.npy`: `array`.

    Args:
        path: The folder. Hidden files and files of other kinds are passed over.
        seed: Seed of the split, where the folder leaves it or its validation part open.
        standardize: Scale features by statistics of the training part.
        mels: Mel bands of a spectrogram.
        seconds: Length that recordings are cut or padded to; by default that of the longest (in `train`,
            where there is a split), at most 10.
        size: Height and width that pictures are resized to, in pixels.
        frames: Pictures taken from a video, spread evenly.

    Raises:
        ValueError: no usable file, two files for one modality of a sample, unreadable files, sample rates or
            array shapes that differ, and what `Splits.from_arrays` refuses. Files are named.
    """
    path = Path(path)
    for name, value in (("mels", mels), ("size", size), ("frames", frames), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    samples = _find_samples(path)
    read = _reader(samples, mels=mels, seconds=seconds, size=size, frames=frames)
    names = sorted({name for sample in samples for name in sample.files})
    arrays, present = {}, {}
    for name in names:
        arrays[name] = _stack(name, samples, read)
        mask = np.array([name in sample.files for sample in samples])
        if not mask.all():
            present[name] = mask
    try:
        return Splits.from_arrays(
            arrays,
            [sample.label for sample in samples],
            split=[sample.part for sample in samples] if samples[0].part else None,
            present=present,
            seed=seed,
            standardize=standardize,
            name=path.resolve().name,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _find_samples(path: Path) -> list[_Sample]:
    top = _folders(path)
    parts = [folder.name for folder in top if folder.name in PARTS]
    if parts and len(parts) < len(top):
        other = [folder.name for folder in top if folder.name not in PARTS]
        raise ValueError(
            f"{path}: holds {', '.join(parts)}, so every folder must be a split, got {', '.join(other[:5])}"
        )
    classes = [(part, folder) for part in parts for folder in _folders(path / part)]
    if not parts:
        classes = [("", folder) for folder in top]
    samples = [
        _Sample(part, folder.name, stem, files)
        for part, folder in classes
        for stem, files in sorted(_group_files(folder).items())
    ]
    if not samples:
        raise ValueError(
            f"{path}: no usable file; expected <class>/<stem>.<ext> or <split>/<class>/<stem>.<ext> with "
            f"{', '.join(_READABLE)}"
        )
    return samples


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _group_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of one class by stem and modality."""
    found = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.suffix.lower() in _READABLE and not file.name.startswith(".")
    ]
    videos = _find_videos(found)
    samples: dict[str, dict[str, list[Path]]] = defaultdict(dict)
    for stem, pictures in videos.items():
        samples[stem]["video"] = pictures
    frames = {picture for pictures in videos.values() for picture in pictures}
    for file in found:
        if file in frames:
            continue
        stem, name = _stem_and_modality(file)
        if name in samples[stem]:
            raise ValueError(
                f"{file}: second {name} file of sample {stem!r}, beside {samples[stem][name][0].name}"
            )
        samples[stem][name] = [file]
    return samples


def _stem_and_modality(file: Path) -> tuple[str, str]:
    suffix = file.suffix.lower()
    if suffix in _PICTURES:
        return file.stem, "image"
    if suffix == ".wav":
        return file.stem, "audio"
    match = _SUB_EXTENSION.fullmatch(file.stem)
    return (match[1], match[2]) if match else (file.stem, "array")


def _find_videos(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return frames by stem, in order: pictures numbered from 000, unless other files share their stem."""
    others = {_stem_and_modality(file)[0] for file in files if file.suffix.lower() not in _PICTURES}
    numbered: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for file in files:
        match = _FRAME.fullmatch(file.stem)
        if match and file.suffix.lower() in _PICTURES and file.stem not in others:
            numbered[match[1]].append((int(match[2]), file))
    videos = {stem: sorted(pictures) for stem, pictures in numbered.items()}
    return {
        stem: [file for _, file in pictures]
        for stem, pictures in videos.items()
        if len(pictures) > 1 and pictures[0][0] == 0
    }


def _reader(
    samples: Sequence[_Sample], *, mels: int, seconds: float | None, size: int, frames: int
) -> Callable[[list[Path]], Tensor]:
    """Return the function that turns the files of one modality of a sample into features."""
    rate, num_samples = _audio_length(samples, seconds)

    def read(files: list[Path]) -> Tensor:
        suffix = files[0].suffix.lower()
        if len(files) > 1:
            return read_video(files, size, frames)
        if suffix in _PICTURES:
            return read_image(files[0], size)
        if suffix == ".wav":
            return log_mel(read_wav(files[0]), rate, num_samples=num_samples, mels=mels)
        return read_array(files[0])

    return read


def _audio_length(samples: Sequence[_Sample], seconds: float | None) -> tuple[int, int]:
    """Return the common sample rate and the length in samples of all recordings (0, 0 without any)."""
    files = [(sample.part, file) for sample in samples for (file, *_) in sample.files.values()]
    recordings = [(part, file) for part, file in files if file.suffix.lower() == ".wav"]
    if not recordings:
        return 0, 0
    headers = [(part, file, *wav_header(file)) for part, file in recordings]
    _, first, rate, _ = headers[0]
    for _, file, other, _ in headers:
        if other != rate:
            raise ValueError(f"{file}: must have the sample rate of {first}, {rate} Hz, got {other} Hz")
    lengths = [length for part, _, _, length in headers if part in ("train", "")]
    longest = min(max(lengths, default=0), round(_MAX_SECONDS * rate))
    return rate, round(seconds * rate) if seconds is not None else longest


def _stack(name: str, samples: Sequence[_Sample], read: Callable[[list[Path]], Tensor]) -> Tensor:  # [N, ...]
    """Read one modality of all samples; zeros where a sample has no file."""
    stacked: Tensor | None = None
    for row, sample in enumerate(samples):
        if name not in sample.files:
            continue
        features = read(sample.files[name])
        if stacked is None:
            stacked, first = features.new_zeros(len(samples), *features.shape), sample.files[name][0]
        if features.shape != stacked.shape[1:]:
            raise ValueError(
                f"{sample.files[name][0]}: must have the shape of {first}, {list(stacked.shape[1:])}, "
                f"got {list(features.shape)}"
            )
        stacked[row] = features
    assert stacked is not None
    return stacked

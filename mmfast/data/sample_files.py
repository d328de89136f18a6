"""Which files of a folder make up which sample."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mmfast.data.sound import SOUNDS
from mmfast.data.splits import PARTS
from mmfast.data.tables import TABLES

PICTURES = (".png", ".jpg", ".jpeg")
READABLE = (*SOUNDS, ".npy", *PICTURES)
_FRAME = re.compile(r"(.+)_(\d{3,})")
# Files that are looked at where none is usable.
_MANY = 10_000
_SUB_EXTENSION = re.compile(r"(.+)\.([A-Za-z]\w*)")


class Sample(NamedTuple):
    """One sample, its files not read yet."""

    part: str  # "" where the folder gives no split
    label: str
    stem: str
    files: dict[str, list[Path]]  # by modality; several only for video

    @property
    def key(self) -> str:
        """What its files have in common: `train/cat/clip_7` of `clip_7.wav` and `clip_7.pose.npy`."""
        return "/".join(part for part in (self.part, self.label, self.stem) if part)


def find_samples(path: Path) -> list[Sample]:
    """Return the samples of a folder, in order of part, class and stem."""
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
        Sample(part, folder.name, stem, files)
        for part, folder in classes
        for stem, files in sorted(_group_files(folder).items())
    ]
    if not samples:
        raise ValueError(
            f"{path}: no usable file; expected <class>/<stem>.<ext> or <split>/<class>/<stem>.<ext> with "
            f"{', '.join(READABLE)}{_found_instead(path)}"
        )
    return samples


def find_new_samples(path: Path) -> list[Sample]:
    """Return the samples of a folder whose files may lie in it without folders of classes; label "" then."""
    loose = [Sample("", "", stem, files) for stem, files in sorted(_group_files(path).items())]
    if not loose:
        return find_samples(path)
    filled = [folder.name for folder in _folders(path) if any(map(_is_usable, folder.rglob("*")))]
    if filled:
        raise ValueError(
            f"{path}: must hold recordings, pictures and arrays, or folders of classes with such, got files "
            f"beside the folders {', '.join(filled[:5])}"
        )
    return loose


def other_files(path: Path, samples: Sequence[Sample]) -> str:
    """Return how many files of which other kinds lie beside those of the samples: "2 .mp3, 1 .txt" or ""."""
    folders = {path / sample.part / sample.label for sample in samples}
    return _kinds(
        file
        for folder in folders
        for file in folder.iterdir()
        if _is_file(file) and file.suffix.lower() not in READABLE and not file.name.startswith(".")
    )


def _kinds(files: Iterable[Path]) -> str:
    kinds = Counter(file.suffix.lower() or file.name for file in files)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))


def _found_instead(path: Path) -> str:
    """Return what a folder without usable files holds, and what to do with it."""
    files = sorted(
        file
        for file in itertools.islice(path.rglob("*"), _MANY)
        if _is_file(file) and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        return ", got no file"
    advice = []
    if whole := [file for file in files if file.suffix == ".npz"]:
        advice.append(f"give the .npz itself, {whole[0]}")
    tables = [file for file in files if file.suffix.lower() in TABLES]
    if single := [file for file in tables if file.parent == path]:
        advice.append(f"give the table itself, {single[0]}, to be told how to make an .npz of it")
    if len(tables) > len(single):
        advice.append("make a .npy of the table of each sample by numpy.save")
    if any(map(_is_usable, files)):
        advice.append("put recordings, pictures and arrays into the folder of their class")
    return f", got {_kinds(files)}" + f": {'; or '.join(advice)}" * bool(advice)


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _is_file(path: Path) -> bool:
    # A link to nothing, as tools that keep data elsewhere leave it, is a file that cannot be read.
    return path.is_file() or (path.is_symlink() and not path.exists())


def _is_usable(file: Path) -> bool:
    return _is_file(file) and file.suffix.lower() in READABLE and not file.name.startswith(".")


def _group_files(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the files of one class by stem and modality."""
    found = [file for file in sorted(folder.iterdir()) if _is_usable(file)]
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
    if suffix in PICTURES:
        return file.stem, "image"
    if suffix in SOUNDS:
        return file.stem, "audio"
    match = _SUB_EXTENSION.fullmatch(file.stem)
    return (match[1], match[2]) if match else (file.stem, "array")


def _find_videos(files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return frames by stem, in order: pictures numbered from 000, unless other files share their stem."""
    others = {_stem_and_modality(file)[0] for file in files if file.suffix.lower() not in PICTURES}
    numbered: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    for file in files:
        match = _FRAME.fullmatch(file.stem)
        if match and file.suffix.lower() in PICTURES and file.stem not in others:
            numbered[match[1]].append((int(match[2]), file))
    videos = {stem: sorted(pictures) for stem, pictures in numbered.items()}
    return {
        stem: [file for _, file in pictures]
        for stem, pictures in videos.items()
        if len(pictures) > 1 and pictures[0][0] == 0
    }

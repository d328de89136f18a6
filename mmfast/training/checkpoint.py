"""Checkpoints: written whole or not at all, what stays the same once; read without running code."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.files import remove_drafts, replacing
from mmfast.nests import leaves

# Of format 1, which is read too, training's own state lay beside the learner's, and all in one file.
FORMAT, _READABLE = 2, (1, 2)
# Bytes from which entries are worth a file of their own.
_LEAST = 2**16
# Key under which a dict of a checkpoint names the files that hold the rest of its entries.
_FILES = "@files"


class Parted:
    """A dict of which groups of entries lie in files of their own beside the checkpoint.

    A file is named by the digest of what it holds. It is written where there is none of that name, before
    the checkpoint that refers to it, and goes when no checkpoint does: what stays the same is written once,
    whatever it is, and what two dicts have in common is there once. Small groups, and those that hold more
    than plain values and dense tensors, stay in the checkpoint.

    Args:
        entries: the dict.
        groups: keys of entries that change together, or not at all; those in none stay in the checkpoint.
        fixed: nothing changes the entries from now on, and they are tensors on the CPU.
    """

    def __init__(
        self, entries: Mapping[str, Any], groups: Sequence[Sequence[str]], *, fixed: bool = False
    ) -> None:
        self.entries = entries
        self.groups = groups
        self.fixed = fixed

    @cached_property
    def apart(self) -> dict[str, dict[str, Any]]:
        """The groups that get a file, by their digest."""
        groups = [{key: self.entries[key] for key in group} for group in self.groups]
        return {digest(group): group for group in groups if _is_large(group)}

    @property
    def inside(self) -> dict[str, Any]:
        """The other entries."""
        elsewhere = {key for group in self.apart.values() for key in group}
        return {key: value for key, value in self.entries.items() if key not in elsewhere}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, in lists and dicts, so that a reader sees the old state or the new.

    Raises:
        OSError: the disk is full, for example; what was there is there still.
    """
    digests: set[str] = set()
    written: list[Path] = []
    try:
        stored = _stored(path, state, digests, written)
        with replacing(path, "wb") as file:
            torch.save({"format": FORMAT, **stored}, file)
    except BaseException:
        for part in written:
            part.unlink(missing_ok=True)
        raise
    _remove_parts(path, digests)


def load(path: Path) -> dict[str, Any]:
    """Return what `save` wrote, on the CPU; a `Parted` is a dict again.

    Raises:
        FileNotFoundError: there is no such file, or none of those it goes with.
        ValueError: the file is cut short or damaged, is no checkpoint, holds code, or has another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return _joined(path, _read(path), {})


def remove(path: Path) -> None:
    """Remove a checkpoint and its parts, those of an interrupted write among them."""
    path.unlink(missing_ok=True)
    _remove_parts(path, set())


def digest(value: Any) -> str:
    """Return the SHA-256 of dense tensors and plain values in lists and dicts, by content."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().contiguous().flatten().view(torch.uint8).numpy()
    elif isinstance(value, Mapping):
        yield f"dict {len(value)}".encode()
        for key, item in value.items():
            yield f"{key!r}:".encode()
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield f"{value!r};".encode()


def _is_large(group: Mapping[str, Any]) -> bool:
    size = 0
    for leaf in leaves(group):
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_quantized:
                return False
            size += leaf.nbytes
        elif not isinstance(leaf, bool | int | float | str | None):
            return False
    return size >= _LEAST


def _part(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}.{name[:32]}.part")


def _stored(path: Path, value: Any, digests: set[str], written: list[Path]) -> Any:
    """Return what the checkpoint itself holds of a value, after writing the parts that are not there."""
    if isinstance(value, Parted):
        for name, group in value.apart.items():
            digests.add(name)
            if (part := _part(path, name)).exists():
                continue
            with replacing(part, "wb", part_of=path) as file:
                written.append(part)
                torch.save({"format": FORMAT, "entries": group}, file)
        files = {_FILES: list(value.apart)} if value.apart else {}
        return _stored(path, value.inside, digests, written) | files
    if isinstance(value, Mapping):
        stored = {key: _stored(path, item, digests, written) for key, item in value.items()}
        if any(item is not value[key] for key, item in stored.items()):
            return stored
    return value


def _joined(path: Path, value: Any, parts: dict[str, dict[str, Any]]) -> Any:
    """Put what lies in other files in its place within a value; `parts` are those read so far."""
    if isinstance(value, dict):
        for item in value.values():
            _joined(path, item, parts)
        for name in value.pop(_FILES, ()):
            if name not in parts:
                parts[name] = _read_part(path, name)
            value.update(parts[name])
    return value


def _read_part(path: Path, name: str) -> dict[str, Any]:
    part = _part(path, name) if re.fullmatch(r"[0-9a-f]{64}", name) else path.with_name("?")
    if not part.is_file():
        raise FileNotFoundError(
            f"{path} goes with {part.name}, which is not beside it: copy the whole folder"
        )
    entries = _read(part)["entries"]
    if digest(entries) != name:
        raise ValueError(
            f"{part} is damaged, it holds something else than what {path.name} goes with: take a copy of the "
            "file, or make the run anew"
        )
    return entries


def _remove_parts(path: Path, digests: set[str]) -> None:
    """Remove the parts of a checkpoint but those of these digests."""
    kept = {_part(path, name).name for name in digests}
    names = re.escape(path.stem) + r"\.[0-9a-f]{32}\.part"
    for part in path.parent.glob(f"{path.stem}.*.part"):
        if re.fullmatch(names, part.name) and part.name not in kept:
            part.unlink(missing_ok=True)
    remove_drafts(path.parent, names)


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            # torch writes checksums and reads none.
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is no readable checkpoint (cut short, damaged, or not written by mmfast): {error}"
        ) from error
    if damaged:
        raise ValueError(
            f"{path} is damaged, the checksum of {damaged} in it is another one: take a copy of the file, or "
            "make the run anew"
        )
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path} is no mmfast checkpoint: it has no format number")
    if state["format"] not in _READABLE:
        known = " or ".join(map(str, _READABLE))
        raise ValueError(
            f"{path} must have checkpoint format {known}, got {state['format']}: another version wrote it"
        )
    return state

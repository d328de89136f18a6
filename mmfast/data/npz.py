"""The `.npz` format: `label`, one array per modality, optional `split`, `group` and `<modality>__present`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

from mmfast.coalitions import PRESENT_SUFFIX, RESERVED, is_reserved, nearly_reserved
from mmfast.data.array_checks import refuse_misspelled
from mmfast.data.channels import channels_first
from mmfast.data.members import BROKEN, Member, read_header
from mmfast.data.splits import Splits

T = TypeVar("T")


def load_npz(
    path: str | Path,
    *,
    seed: int = 0,
    standardize: bool = True,
    modalities: Sequence[str] | None = None,
) -> Splits:
    """Read a data set from an `.npz` file.

    The features of each part are gathered in float32 from blocks of the file, which is closed then: that
    takes the memory of these features and little more, compressed or not, whatever dtype the file has.

    Args:
        path: File with `label` `[N]` (integers or strings) and one array `[N, ...]` per modality under its
            own name; optional `split` `[N]` of "train", "val", "test", `group` `[N]` (integers or strings)
            and `<modality>__present` bool `[N]`. Pictures `[N, H, W, C]` and video `[N, T, H, W, C]` with C
            of 1, 3 or 4 become `[N, C, H, W]` and `[N, T, C, H, W]` where H and W are larger than 4, and the
            description says so.
        seed: Seed of the split, where the file leaves it or its validation part open.
        standardize: Scale features by statistics of the training part.
        modalities: Names of the arrays to take; others may hold anything. By default all.

    Raises:
        ValueError: a file that is damaged, lacks `label` or holds Python objects, which are never unpickled;
            and what `Splits.from_arrays` refuses. Every message begins with the path.
    """
    path = Path(path)

    def made(arrays: Mapping[str, np.ndarray | Member]) -> Splits:
        return _splits(arrays, path.stem, seed=seed, standardize=standardize, modalities=modalities)

    return read_npz(path, made)


def read_npz(path: Path, make: Callable[[Mapping[str, np.ndarray | Member]], T]) -> T:
    """Return what `make` makes of a file's arrays, while the file is open.

    Raises:
        ValueError: a file that is damaged or holds Python objects, and what `make` raises. Every message
            begins with the path.
    """
    with _open(path) as archive:
        arrays = _arrays(path, archive)
        try:
            return make(arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {_damage(arrays) or error}") from error


def marks_among(features: dict[str, np.ndarray | Member]) -> dict[str, np.ndarray | Member]:
    """Take the arrays `<modality>__present` out of a file's arrays, and return them by modality.

    Raises:
        ValueError: an array whose name is nearly that, of a modality that is there.
    """
    for key in features:
        meant = "" if is_reserved(key) else nearly_reserved(key, features)
        if meant.removesuffix(PRESENT_SUFFIX) in features:
            refuse_misspelled(key, features)
    return {
        key.removesuffix(PRESENT_SUFFIX): features.pop(key)
        for key in list(features)
        if key.endswith(PRESENT_SUFFIX)
    }


def _splits(
    arrays: Mapping[str, np.ndarray | Member],
    name: str,
    *,
    seed: int,
    standardize: bool,
    modalities: Sequence[str] | None,
) -> Splits:
    """Return the data set of a file's arrays; of those that are not taken, only whether they are damaged."""
    features = dict(arrays)
    if "label" not in features:
        close = get_close_matches("label", features, n=1)
        hint = f" (is {close[0]!r} meant?)" if close else ""
        raise ValueError(f"must hold an array named label, got {', '.join(features) or 'no array'}{hint}")
    label, split, group = (features.pop(key, None) for key in ("label", "split", "group"))
    present = marks_among(features)
    if modalities and set(modalities) <= set(features):
        _read_through({key: array for key, array in features.items() if key not in modalities})
        features = {key: array for key, array in features.items() if key in modalities}
        present = {key: mask for key, mask in present.items() if key in modalities}
    turned, notes = channels_first(features)
    splits = Splits.from_arrays(
        turned,
        label,
        split=split,
        group=group,
        present=present,
        seed=seed,
        standardize=standardize,
        name=name,
    )
    return splits.with_notes(notes)


def _open(path: Path) -> np.lib.npyio.NpzFile:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
    except BROKEN as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(
            f"{path}: must be an .npz archive of named arrays (numpy.savez), got a single .npy array"
        )
    return archive


def _arrays(path: Path, archive: np.lib.npyio.NpzFile) -> dict[str, np.ndarray | Member]:
    """Return the arrays of a file: what may be features is read later, the rest is here."""
    arrays: dict[str, np.ndarray | Member] = {}
    files = cast(zipfile.ZipFile, archive.zip)
    for key, name in zip(archive.files, files.namelist(), strict=True):
        try:
            array = _later(files, name, key)
            arrays[key] = archive[key] if array is None else array
        except BROKEN as error:
            if "Object arrays" in str(error):
                raise ValueError(
                    f"{path}: array {key!r} holds Python objects, which are never unpickled; "
                    "save it with a numeric or string dtype"
                ) from None
            raise ValueError(f"{path}: array {key!r} is damaged: {error}") from error
        if not isinstance(arrays[key], np.ndarray | Member):
            raise ValueError(f"{path}: member {key!r} is not a .npy array")
    return arrays


def _later(archive: zipfile.ZipFile, name: str, key: str) -> Member | None:
    """Return an array that can be read block by block, None for what is small or of another kind."""
    if key in RESERVED or key.endswith(PRESENT_SUFFIX):
        return None
    with archive.open(name) as stream:
        if stream.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
            return None
    with archive.open(name) as stream:
        header = read_header(stream)
    if header is None or header[2].kind not in "biuf" or len(header[0]) < 2:
        return None
    return Member(archive, name, key, header)


def _damage(arrays: Mapping[str, np.ndarray | Member]) -> str:
    """Return what is damaged, "" if nothing: whatever else is wrong with the data may follow from it."""
    try:
        _read_through(arrays)
    except ValueError as error:
        return str(error)
    return ""


def _read_through(arrays: Mapping[str, np.ndarray | Member]) -> None:
    """Raise ValueError for what is damaged among arrays that are not read yet."""
    for array in arrays.values():
        if isinstance(array, Member):
            for _ in array.blocks():
                pass

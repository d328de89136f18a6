"""The `.npz` format: `label`, one array per modality, optional `split`, `group` and `<modality>__present`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from mmfast.coalitions import PRESENT_SUFFIX
from mmfast.data.channels import channels_first
from mmfast.data.splits import Splits

# What numpy, zipfile and zlib raise for damaged files; zipfile NotImplementedError for methods of compression
# it does not know.
_BROKEN = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


def load_npz(
    path: str | Path,
    *,
    seed: int = 0,
    standardize: bool = True,
    modalities: Sequence[str] | None = None,
) -> Splits:
    """Read a data set from an `.npz` file.

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
    arrays = _read(path)
    if "label" not in arrays:
        close = get_close_matches("label", arrays, n=1)
        hint = f" (is {close[0]!r} meant?)" if close else ""
        raise ValueError(
            f"{path}: must hold an array named label, got {', '.join(arrays) or 'no array'}{hint}"
        )
    label, split, group = (arrays.pop(key, None) for key in ("label", "split", "group"))
    present = {
        key.removesuffix(PRESENT_SUFFIX): arrays.pop(key)
        for key in list(arrays)
        if key.endswith(PRESENT_SUFFIX)
    }
    if modalities and set(modalities) <= set(arrays):
        arrays = {key: array for key, array in arrays.items() if key in modalities}
        present = {key: mask for key, mask in present.items() if key in modalities}
    turned, notes = channels_first(arrays)
    try:
        splits = Splits.from_arrays(
            turned,
            label,
            split=split,
            group=group,
            present=present,
            seed=seed,
            standardize=standardize,
            name=path.stem,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return splits.with_notes(notes)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
    except _BROKEN as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(
            f"{path}: must be an .npz archive of named arrays (numpy.savez), got a single .npy array"
        )
    arrays: dict[str, np.ndarray] = {}
    with archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except _BROKEN as error:
                if "Object arrays" in str(error):
                    raise ValueError(
                        f"{path}: array {key!r} holds Python objects, which are never unpickled; "
                        "save it with a numeric or string dtype"
                    ) from None
                raise ValueError(f"{path}: array {key!r} is damaged: {error}") from error
            if not isinstance(arrays[key], np.ndarray):
                raise ValueError(f"{path}: member {key!r} is not a .npy array")
    return arrays

"""One entry for every source of data."""

from __future__ import annotations

from pathlib import Path

from mmfast.data.folder import load_folder
from mmfast.data.htad import load_htad
from mmfast.data.npz import load_npz
from mmfast.data.splits import Splits
from mmfast.names import did_you_mean


def load(
    source: str | Path = "htad",
    *,
    seed: int = 0,
    standardize: bool = True,
    skip_unreadable: bool = False,
) -> Splits:
    """Load a data set, split into train, validation and test.

    Args:
        source: "htad" (the embedded default), `FILE.npz` (see `load_npz`) or a folder of raw media (see
            `load_folder`).
        seed: Seed of the split, where the source leaves it or its validation part open.
        standardize: Scale features by statistics of the training part.
        skip_unreadable: Leave out files of a folder that cannot be read (see `load_folder`).

    Raises:
        ValueError: a source that is none of these, and whatever its reader refuses.
    """
    if source == "htad":
        return load_htad(standardize=standardize)
    path = Path(source)
    if path.is_dir():
        return load_folder(path, seed=seed, standardize=standardize, skip_unreadable=skip_unreadable)
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path, seed=seed, standardize=standardize)
    problem = "of another kind" if path.is_file() else "not found"
    raise ValueError(
        f'data must be "htad", a FILE.npz or a FOLDER, got {str(source)!r}, {problem}{_close_names(path)}'
    )


def _close_names(path: Path) -> str:
    known = ["htad"] if len(path.parts) == 1 else []
    if path.parent.is_dir():
        known += [
            str(path.with_name(p.name)) for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".npz"
        ]
    return did_you_mean(str(path), known)

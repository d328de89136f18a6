"""One entry for every source of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmfast.data.folder import load_folder
from mmfast.data.htad import load_htad
from mmfast.data.npz import load_npz
from mmfast.data.splits import Splits
from mmfast.data.tables import how_to_convert, is_single
from mmfast.data.views import choose
from mmfast.errors import did_you_mean


def load(
    source: str | Path = "htad",
    *,
    seed: int = 0,
    standardize: bool = True,
    skip_unreadable: bool = False,
    modalities: Sequence[str] | None = None,
    encoders: Mapping[str, str] | None = None,
    num_workers: int = 0,
) -> Splits:
    """Load a data set, split into train, validation and test.

    Args:
        source: "htad" (the embedded default), `FILE.npz` (see `load_npz`) or a folder of raw media (see
            `load_folder`).
        seed: Seed of the split, where the source leaves it or its validation part open.
        standardize: Scale features by statistics of the training part.
        skip_unreadable: Leave out files of a folder that cannot be read (see `load_folder`).
        modalities: Names of those to use, in the order of the coalition bits; by default all.
        encoders: What to take a modality as, "vector", "sequence", "image" or "video", by its name; or the
            encoder to take it by. Which shapes can be taken so is said in `mmfast/data/views.py`.
        num_workers: Processes that read the files of a folder; 0 reads them in this one.

    Raises:
        ValueError: a source that is none of these, and whatever its reader refuses.
    """
    if modalities is not None or encoders:
        if Path(source).suffix == ".npz" and Path(source).is_file():
            whole = load_npz(source, seed=seed, standardize=False, modalities=modalities)
        else:
            whole = load(
                source,
                seed=seed,
                standardize=False,
                skip_unreadable=skip_unreadable,
                num_workers=num_workers,
            )
        chosen = choose(whole, modalities, encoders)
        return chosen.standardize(in_place=True) if standardize else chosen
    if source == "htad":
        return load_htad(standardize=standardize)
    path = Path(source)
    if path.is_dir():
        return load_folder(
            path,
            seed=seed,
            standardize=standardize,
            skip_unreadable=skip_unreadable,
            num_workers=num_workers,
        )
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path, seed=seed, standardize=standardize)
    if is_single(path):
        raise ValueError(how_to_convert(path))
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

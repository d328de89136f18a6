"""HTAD, the embedded default: seven home activities by microphone and wrist accelerometer."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from io import TextIOWrapper

import numpy as np

from mmfast.data.splits import Splits, block_split

_MODALITIES = {"audio": "v1_", "accelerometer": "v2_"}


def load_htad(*, standardize: bool = True) -> Splits:
    """Load Home-Tasks Activities: 1,386 windows, audio [36] (MFCC), accelerometer [16], 7 classes.

    Windows that follow each other are alike, so the split is by block: of each activity in file order the
    first 70% train, the next 15% validation, the rest test.

    Raises:
        ImportError: where the package that carries the file is not installed.

    Source: Garcia-Ceja et al., HTAD: A Home-Tasks Activities Dataset with Wrist-Accelerometer and Audio
    Features, MMM 2021; the file is part of the package multiviewstacking.
    """
    header, rows = _read_csv()
    table = np.array(rows)  # [N, columns] of strings
    names = table[:, header.index("class")]
    arrays = {}
    for modality, prefix in _MODALITIES.items():
        columns = [i for i, column in enumerate(header) if column.startswith(prefix)]
        arrays[modality] = table[:, columns].astype(np.float32)
    class_names, labels = np.unique(names, return_inverse=True)
    return Splits.from_arrays(
        arrays,
        labels,
        split=block_split(labels),
        split_note="split by block: the first 70% of each class in file order, then 15%, then the rest",
        class_names=[str(name) for name in class_names],
        standardize=standardize,
        name="htad",
    )


def _read_csv() -> tuple[list[str], list[list[str]]]:
    spec = find_spec("multiviewstacking")
    if spec is None or spec.loader is None:
        raise ImportError('the data set "htad" is part of multiviewstacking: pip install "mmfast[train]"')
    # Through the loader: importlib.resources.files would import the package, and pandas with it.
    reader = spec.loader.get_resource_reader(spec.name)  # type: ignore[attr-defined]
    with (reader.files() / "data" / "htad.csv").open("rb") as stream:
        lines = csv.reader(TextIOWrapper(stream, encoding="latin-1", newline=""))
        return next(lines), list(lines)

"""Data of tests as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmfast.data import Splits
from mmfast.data.splits import PARTS


def write_npz(
    path: Path, splits: Splits, *, parts: Sequence[str] = PARTS, class_names: Sequence[str] | None = None
) -> Path:
    """Write splits as a FILE.npz with their split, and return its path.

    Args:
        path: of the file.
        splits: what to write.
        parts: in the order of the file.
        class_names: what labels are called there; None: by number.
    """
    sets = [getattr(splits, part) for part in parts]
    labels = np.concatenate([part.labels.numpy() for part in sets])
    np.savez(
        path,
        label=labels if class_names is None else np.array(class_names)[labels],
        split=np.repeat(list(parts), [len(part) for part in sets]),
        **{name: np.concatenate([part.arrays[name].numpy() for part in sets]) for name in splits.shapes},
    )
    return path

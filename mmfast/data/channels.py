"""Pictures and video whose channels come last: which they are, and how they are turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_LAYOUTS = {4: ("[N, H, W, C]", "[N, C, H, W]"), 5: ("[N, T, H, W, C]", "[N, T, C, H, W]")}


def is_channels_last(shape: Sequence[int]) -> bool:
    """Whether `[N, H, W, C]` or `[N, T, H, W, C]` is the only reading of a shape.

    C is 1, 3 or 4. Where H or W could be a number of channels or a small feature map's width, it is not.
    """
    return len(shape) in _LAYOUTS and shape[-1] in _CHANNELS and min(shape[-3:-1]) > max(_CHANNELS)


def permutation(rank: int) -> tuple[int, ...]:
    """Return the order of axes that turns channels last into channels first."""
    return (*range(rank - 3), rank - 1, rank - 3, rank - 2)


def channels_first(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return arrays, tensors or members of files with channels first, and a note on each that was turned."""
    turned, notes = dict(arrays), []
    for name, array in arrays.items():
        if is_channels_last(array.shape):
            axes = permutation(array.ndim)
            turned[name] = np.transpose(array, axes) if isinstance(array, np.ndarray) else array.permute(axes)
            last, first = _LAYOUTS[array.ndim]
            notes.append(f"{name} was {last} and became {first}")
    return turned, notes

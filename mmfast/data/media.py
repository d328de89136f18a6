"""Decoding of pictures and arrays into features of one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from mmfast.data.unreadable import UnreadableFileError, unreadable

_NPY = b"\x93NUMPY"
# What numpy raises for damaged headers; MemoryError for a shape no file has.
_BROKEN_ARRAY = (OSError, EOFError, ValueError, MemoryError, TokenError)


def read_image(path: Path, size: int) -> Tensor:  # [3, size, size] in [0, 1]
    """Read a picture as RGB, resized without keeping its aspect ratio."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError('reading pictures needs pillow: pip install "mmfast[train]"') from error
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except UnidentifiedImageError as error:
        # Pillow's own words are the path once more.
        raise unreadable(path, "picture", ValueError("of no known format; copy it again")) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, "picture", error) from error
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def choose_frames(paths: Sequence[Path], frames: int) -> list[Path]:
    """Return `frames` pictures spread evenly from the first to the last; a short video repeats some."""
    return [paths[i] for i in np.linspace(0, len(paths) - 1, frames).round().astype(int)]


def read_array(path: Path) -> Tensor:  # [...]
    """Read a `.npy` file of finite real numbers; Python objects are refused, never unpickled."""
    kind = ".npy file of numbers"
    try:
        with path.open("rb") as stream:
            # numpy takes everything else for a pickle, and advises to trust it.
            if stream.read(len(_NPY)) != _NPY:
                raise ValueError("it does not begin like one; save it again with numpy.save")
            stream.seek(0)
            array = np.load(stream, allow_pickle=False)
    except _BROKEN_ARRAY as error:
        raise unreadable(path, kind, error) from error
    if array.dtype.kind not in "biuf":
        raise UnreadableFileError(path, f"must hold real numbers, got {array.dtype}")
    with np.errstate(over="ignore"):
        features = torch.from_numpy(array.astype(np.float32))
    if features.numel() == 0:
        raise UnreadableFileError(path, f"must hold at least one number, got shape {list(features.shape)}")
    bad = int((~torch.isfinite(features)).sum())
    if bad:
        raise UnreadableFileError(
            path, f"must be finite in float32, got {bad} NaN or infinite of {features.numel()} values"
        )
    return features

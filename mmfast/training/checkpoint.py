"""Checkpoints: written whole or not at all, read without running any code they hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from mmfast.files import replacing

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values, in lists and dicts, so that a reader sees the old file or the new."""
    with replacing(path, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Return what `save` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or damaged, is no checkpoint, holds code, or has another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
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
    if state["format"] != FORMAT:
        raise ValueError(
            f"{path} must have checkpoint format {FORMAT}, got {state['format']}: another version wrote it"
        )
    return state

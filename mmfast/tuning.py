"""Tile shapes of GPU kernels: those of the kernel's own table, unless better ones are stored for this GPU.

Nothing is measured while an op runs. `mmfast bench --tune` measures the candidates that launchers name here
and stores the fastest; $MMFAST_TUNING names the file, "" does without.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmfast.files import write_json

# Block shapes, warps and stages by name, as a launcher passes them on.
Config = dict[str, int]


@dataclass
class Session:
    """While open: which choices were asked for, and answers that replace the table's."""

    asked: dict[tuple[str, str], list[Config]] = field(default_factory=dict)  # the default comes first
    forced: dict[tuple[str, str], Config] = field(default_factory=dict)


_session: Session | None = None


def choose(
    op: str,
    key: str,  # what decides: dtype, width, size class
    default: Config,
    candidates: Callable[[], Sequence[Config]],
    device: torch.device,
) -> Config:
    """Return the configuration to launch `op` with: the stored one of this GPU and key, or the default."""
    if device.type != "cuda" and _session is None:
        return default
    chosen = _stored(_name(device)).get(f"{op} {key}", default)
    if _session is None:
        return chosen
    _session.asked.setdefault((op, key), [default, *(each for each in candidates() if each != default)])
    return _session.forced.get((op, key), chosen)


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """Record what is asked for and let the caller answer."""
    global _session
    before, _session = _session, Session()
    try:
        yield _session
    finally:
        _session = before


def path() -> Path | None:
    """Return the file of stored choices, or None where they are switched off."""
    named = os.environ.get("MMFAST_TUNING")
    if named is not None:
        return Path(named) if named else None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mmfast" / "tuning.json"


def store(device: torch.device, found: dict[tuple[str, str], Config]) -> Path:
    """Add choices for a GPU to the file, in place of what it says of the same keys.

    Raises:
        ValueError: $MMFAST_TUNING switches the file off.
    """
    file = path()
    if file is None:
        raise ValueError('MMFAST_TUNING="" leaves no file to store the tuning in')
    known = _load(file)
    known.setdefault(_name(device), {}).update({f"{op} {key}": config for (op, key), config in found.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
    _stored.cache_clear()
    return file


def _load(file: Path) -> dict[str, dict[str, Config]]:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is no file of stored tile shapes ({error}): remove it") from None


@functools.cache
def _stored(device_name: str) -> dict[str, Config]:
    file = path()
    return {} if file is None else _load(file).get(device_name, {})


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""Tile shapes of GPU kernels: those of the kernel's own table, unless better ones are stored for this GPU.

Nothing is measured while an op runs. `mmfast bench --tune` measures the candidates that launchers name here
and stores the fastest; $MMFAST_TUNING names the file, "" does without.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
    chosen = stored(name_of(device)).get(f"{op} {key}", default)
    if chosen.keys() != default.keys():
        # Stored for another version of the kernel.
        chosen = default
    if _session is None:
        return chosen
    _session.asked.setdefault((op, key), [default, *(each for each in candidates() if each != default)])
    return _session.forced.get((op, key), chosen)


def tuned(
    op: str,
    key: str,
    launch: Mapping[str, Any],  # the table's block shapes and options, as a launcher passes them on
    device: torch.device,
    *names: str,  # of those that may be others
    least: int = 1,
) -> dict[str, Any]:
    """Return what to launch `op` with: `launch`, its named sizes as chosen among it and its neighbours."""
    default = {name: launch[name] for name in names}
    return {**launch, **choose(op, key, default, lambda: neighbours(default, least), device)}


def neighbours(default: Config, least: int = 1) -> list[Config]:
    """Return configurations with each size halved, kept or doubled: blocks from `least` on, 1 to 16 warps."""
    around = [
        [size for size in (value // 2, value, 2 * value) if _is_possible(name, size, least)]
        for name, value in default.items()
    ]
    return [dict(zip(default, sizes)) for sizes in itertools.product(*around)]


def _is_possible(name: str, size: int, least: int) -> bool:
    return 1 <= size <= 16 if name == "num_warps" else size >= least


def size_class(number: int) -> str:
    """Return a key's part that numbers between two powers of four share."""
    return f"N<4^{number.bit_length() // 2 + 1}"


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


def load(file: Path) -> dict[str, dict[str, Config]]:
    """Return what a file stores: by GPU, then by op and key; nothing where there is no file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is no file of stored tile shapes ({error}): remove it") from None


@functools.cache
def stored(device_name: str) -> dict[str, Config]:
    """Return the choices stored for a device, by op and key."""
    file = path()
    return {} if file is None else load(file).get(device_name, {})


@functools.cache
def name_of(device: torch.device) -> str:
    """Return the name under which choices for a device are stored."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

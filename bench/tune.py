"""Measure the tile shapes that launchers could choose, and store the fastest for this GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmfast.files import write_json
from mmfast.kernels import _tuning as tuning

from .harness import Case, Options, interleaved

if TYPE_CHECKING:
    from rich.console import Console

# A candidate is stored where it takes at most so much of the default's time; less is within the noise.
_WORTH = 0.97

Key = tuple[str, str]


def tune(cases: dict[str, Any], options: Options, console: Console) -> dict[Key, tuning.Config]:
    """Return the configurations that beat the defaults, by op and key, from the cases of each op.

    A key is measured once, at the first case that asks for it: cases come small before large, and keys hold
    the size class.
    """
    from rich.table import Table

    found: dict[Key, tuning.Config] = {}
    table = Table(box=None, pad_edge=False)
    for heading in ("op", "tiles for", "default ms", "best ms", "candidates", "stored"):
        table.add_column(heading, justify="right" if heading.endswith(("ms", "candidates")) else "left")
    done: set[Key] = set()
    with console.status("") as status, tuning.session() as session:
        for op, op_cases in cases.items():
            for case in op_cases:
                session.asked.clear()
                case.ours()
                for key, candidates in list(session.asked.items()):
                    if key in done or len(candidates) < 2:
                        continue
                    done.add(key)
                    status.update(f"{op}: {case.name}, {case.direction}: {len(candidates)} candidates")
                    seconds = _measure(case, key, candidates, session, options)
                    default, best = seconds[0], min(seconds, key=lambda index: seconds[index])
                    if seconds[best] <= _WORTH * default:
                        found[key] = candidates[best]
                    row = [*key, *(f"{1e3 * time:.4g}" for time in (default, seconds[best]))]
                    stored = found.get(key)
                    table.add_row(*row, str(len(seconds)), "default" if stored is None else _text(stored))
    console.print(table)
    return found


def store(device: torch.device, found: dict[Key, tuning.Config]) -> Path:
    """Add choices for a GPU to the file, in place of what it says of the same keys.

    Raises:
        ValueError: $MMFAST_TUNING switches the file off.
    """
    file = tuning.path()
    if file is None:
        raise ValueError('MMFAST_TUNING="" leaves no file to store the tuning in')
    known = tuning.load(file)
    known.setdefault(tuning.name_of(device), {}).update(
        {f"{op} {key}": config for (op, key), config in found.items()}
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, known)
    tuning.stored.cache_clear()
    return file


def _measure(
    case: Case, key: Key, candidates: list[tuning.Config], session: tuning.Session, options: Options
) -> dict[int, float]:
    """Return the median seconds of each candidate that runs and is right, by its place; the default is 0."""
    clock = options.clock()
    calls: dict[str, Callable[[], Any]] = {}
    first: dict[str, float] = {}
    for index, candidate in enumerate(candidates):
        call = _forcing(case, key, candidate, session)
        try:
            case.check(call())
        except Exception:
            # Too large for this GPU: no candidate. The default has to run.
            if index == 0:
                raise
            continue
        calls[str(index)], first[str(index)] = call, clock.seconds(call, 1)
    turns = interleaved(calls, first, clock, options)
    session.forced.pop(key, None)
    return {int(index): statistics.median(times) for index, times in turns.items()}


def _forcing(case: Case, key: Key, candidate: tuning.Config, session: tuning.Session) -> Callable[[], Any]:
    def call() -> Any:
        session.forced[key] = candidate
        return case.ours()

    return call


def _text(config: tuning.Config) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())

"""The file that keeps the trials of a method, from which a search that was stopped goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmfast.errors import describe
from mmfast.experiments.trials import Trial
from mmfast.files import locked, write_json
from mmfast.methods import METHODS


class Journal:
    """Trials of one method in a file.

    Args:
        path: of the file; None keeps nothing.
        facts: what the trials depend on, as plain values.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts

    def alone(self, wait: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Return the context in which no other process adds to it; `wait` is called before it waits."""
        return contextlib.nullcontext() if self.path is None else locked(_lock(self.path), wait=wait)

    def read(self) -> list[Trial]:
        """Return the trials so far; none of a file that is damaged.

        Raises:
            ValueError: they are of other data or settings.
        """
        if self.path is None or not self.path.exists():
            return []
        try:
            found = json.loads(self.path.read_text())
            facts, trials = dict(found["facts"]), [trial_of(trial) for trial in found["trials"]]
        except (ValueError, TypeError, KeyError):
            return []
        if differ := sorted(_differing(facts, self.facts)):
            raise ValueError(
                f"{self.path} is of another configuration: {'; '.join(differ)}; give another --out, or "
                "--overwrite to start anew (in Python out_dir and overwrite=True)"
            )
        return trials

    def write(self, trials: Sequence[Trial]) -> None:
        """Keep the trials so far."""
        if self.path is not None:
            write_json(self.path, {"facts": self.facts, "trials": [asdict(trial) for trial in trials]})


def with_tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that JSON has given back, which knows lists alone, as the fields hold them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def trial_of(found: Mapping[str, Any]) -> Trial:
    """Return a trial that JSON has given back."""
    steps = [(step, score) for step, score in found["steps"]]
    return Trial(**{**found, "settings": with_tuples(found["settings"]), "steps": steps})


def clear_journals(folder: Path) -> None:
    """Remove the trials of all methods in a folder.

    Raises:
        BlockingIOError: another process tunes there.
    """
    with contextlib.ExitStack() as locks:
        paths = [folder / f"{name}.json" for name in METHODS]
        # A lock without a file: the first trial is under way.
        for path in (path for path in paths if _lock(path).exists()):
            try:
                locks.enter_context(locked(_lock(path)))
            except BlockingIOError:
                raise BlockingIOError(
                    f"another process tunes {path.stem} in {folder}: wait for its end, or give another --out"
                ) from None
        for path in paths:
            path.unlink(missing_ok=True)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Return a phrase for every value that differs, also within parts."""
    found = []
    for name in {**there, **here}:
        mine, theirs = here.get(name), there.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += _differing(theirs, mine)
        elif mine != theirs:
            found.append(f"{name} is {describe(theirs)} there, {describe(mine)} here")
    return found


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")

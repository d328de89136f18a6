"""The folder of a run: its files, held by one process at a time, and whether they are of this run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmfast.errors import describe
from mmfast.files import locked
from mmfast.methods.base import Method
from mmfast.objectives import Objective
from mmfast.training.metrics import Measures
from mmfast.training.optimization import Optimization

LAST = "last.ckpt"  # where a run stands: writing.py says how often; with it go files last.*.part
MODEL = "model.ckpt"  # the selected weights, written when a run is finished
LOCK = ".lock"  # held while a process trains there


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that no other program writes or removes its checkpoints meanwhile.

    Raises:
        BlockingIOError: another process trains there.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK))
        except BlockingIOError:
            raise BlockingIOError(
                f"another process trains in {folder}: wait for its end, or give another folder"
            ) from None
        yield


def check_same(state: Mapping[str, Any], mine: Mapping[str, Any], method: Method, *keys: str) -> None:
    """Raise ValueError unless a checkpoint agrees with a run in some of what it says of itself.

    Args:
        state: of the checkpoint.
        mine: what the run would write.
        method: of the run.
        keys: of both.
    """
    for key in keys:
        theirs, ours = state.get(key), mine[key]
        if key == "metadata":
            # Where the data came from and how they were read is free: they themselves are compared.
            free = {"source": None, "skip_unreadable": None, "sound": None}
            theirs, ours = ({**values, **free} for values in (theirs or {}, ours))
        elif key == "config":
            # An option that is younger than the checkpoint had its default there, if runs went on by it.
            defaults = type(method)().config()
            if "optimization" in keys:
                defaults |= method.before(_num_modalities(state))
            theirs = as_lists(defaults) | (theirs or {})
        elif key == "objective":
            # Runs of before knew of classes and cross-entropy alone.
            theirs = Objective().config() | Measures().config() | (theirs or {})
        elif key == "optimization":
            theirs = as_lists(asdict(Optimization()) | (theirs or {}))
        if theirs == ours:
            continue
        if isinstance(theirs, dict) and isinstance(ours, dict):
            differing = [name for name in ours if theirs.get(name) != ours[name]]
            # Statistics of the data would fill pages; their name says enough.
            ours = {name: ours[name] for name in differing if len(str(ours[name])) < 80} or differing
            theirs = {name: _brief(theirs.get(name)) for name in ours}
        raise ValueError(f"the checkpoint must be of a run with {key} {ours}, got {theirs}")


def _num_modalities(state: Mapping[str, Any]) -> int:
    """Return M of a run by its checkpoint."""
    before = "model.encoders."
    names = (key[len(before) :] for key in state.get("learner", {}) if key.startswith(before))
    return len({name.partition(".")[0] for name in names})


def as_lists(value: Any) -> Any:
    """Return tuples as lists, as a checkpoint gives them back."""
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _brief(value: Any) -> Any:
    return value if len(str(value)) < 80 else describe(value)

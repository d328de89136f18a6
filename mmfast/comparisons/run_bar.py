"""A bar for the runs and trials that a program makes, on a terminal or in a notebook; elsewhere lines."""

from __future__ import annotations

import contextlib
import html
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.trials import Trial
from mmfast.methods import Method

# Seconds between two states of a notebook's bar: each is a message to the browser.
_REST = 0.2
# Of those under way at a time, how many are named.
_NAMED = 3
# Shows what is made, and how many epochs of all are done.
_Show = Callable[[str, int], None]


@dataclass
class _Current:
    """One that is under way: its name, and how many epochs it has, and has made."""

    name: str
    epochs: int
    made: int = 0


class RunBar:
    """How far a number of runs are, some of them at a time, counted by epochs.

    Args:
        noun: what they are called.
        number: of them.
        show: called with every change.
    """

    def __init__(self, noun: str, number: int, show: _Show) -> None:
        self._noun, self._number, self._show = noun, number, show
        self._made, self._epochs = 0, 0
        self._current: dict[Any, _Current] = {}
        # What several processes tell comes from a thread.
        self._lock = threading.Lock()

    def begin(self, key: Any, name: str, epochs: int) -> None:
        """Note that one begins, which goes by a key."""
        with self._lock:
            self._current[key] = _Current(name, epochs)
            self._look()

    def advance(self, key: Any) -> None:
        """Note that it has made an epoch."""
        with self._lock:
            if key in self._current:
                self._current[key].made += 1
            self._look()

    def done(self, key: Any) -> None:
        """Note that it is made, also where it ended before its last epoch."""
        with self._lock:
            # On a folder that machines share an event may be seen late.
            ended = self._current.pop(key, None)
            self._made, self._epochs = self._made + 1, self._epochs + (0 if ended is None else ended.epochs)
            self._look()

    def event(self, planned: PlannedRun, epoch: int | None) -> None:
        """Note that a run begins, or has made an epoch, as `ComparisonRunner.make_all` calls `on_event`."""
        key = planned.method.name, planned.seed
        if epoch is None:
            self.begin(key, f"{planned.method.title}, seed {planned.seed}", planned.epochs)
        else:
            self.advance(key)

    def end(self, entry: Mapping[str, Any]) -> None:
        """Note that a run is made; `entry` is what results hold of it."""
        self.done((entry["method"], entry["seed"]))

    def _look(self) -> None:
        names = [each.name for each in self._current.values()]
        if not names:
            return
        more = f"; {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        first, last = self._made + 1, self._made + len(names)
        which = f"{self._noun} {first}" if first == last else f"{self._noun}s {first} to {last}"
        text = f"{which} of {self._number}: {'; '.join(names[:_NAMED])}{more}"
        self._show(text, self._epochs + sum(each.made for each in self._current.values()))


class TrialBar:
    """Tells a bar of the trials of methods, as `tuner.TrialListener` has it.

    Args:
        bar: of trials.
        epochs: of a trial, by method.
    """

    def __init__(self, bar: RunBar, epochs: Mapping[str, int]) -> None:
        self._bar, self._epochs = bar, epochs

    def begin(self, method: Method, number: int) -> None:
        self._bar.begin(method.name, f"{method.title}, trial {number + 1}", self._epochs[method.name])

    def epoch(self, method: Method) -> None:
        self._bar.advance(method.name)

    def end(self, method: Method, number: int, trial: Trial) -> None:
        self._bar.done(method.name)

    def wait(self, text: str) -> None:
        """Say nothing: the bar stands still."""


@contextlib.contextmanager
def run_bar(noun: str, number: int, epochs: int, *, wanted: bool | None) -> Iterator[RunBar]:
    """Yield what is told of runs; it shows nothing where there are none, or nobody looks.

    Args:
        noun: what they are called, such as "run".
        number: of runs to be made.
        epochs: of all of them.
        wanted: show it; None: on a terminal and in a notebook alone.
    """
    console = Console(stderr=True)
    is_seen = console.is_terminal or console.is_jupyter if wanted is None else wanted
    if not (epochs and is_seen):
        yield RunBar(noun, number, lambda text, done: None)
        return
    if console.is_jupyter:
        shown = _in_notebook(epochs)
    else:
        shown = _on_terminal(epochs, console) if console.is_terminal else _in_lines(console)
    with shown as show:
        yield RunBar(noun, number, show)


@contextlib.contextmanager
def _on_terminal(total: int, console: Console) -> Iterator[_Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text, done: progress.update(task, description=text, completed=done)


@contextlib.contextmanager
def _in_lines(console: Console) -> Iterator[_Show]:
    before = ""

    def show(text: str, done: int) -> None:
        nonlocal before
        if text != before:
            console.print(text, highlight=False, soft_wrap=True)
        before = text

    yield show


@contextlib.contextmanager
def _in_notebook(total: int) -> Iterator[_Show]:
    """Show HTML in the cell, which needs no widgets; it is gone in the end."""
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    last = 0.0

    def show(text: str, done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _REST:
            last = time.monotonic()
            bar = f'<progress value="{done}" max="{total}"></progress>'
            handle.update(HTML(f"{bar} {html.escape(text)}"))

    try:
        yield show
    finally:
        handle.update(HTML(""))

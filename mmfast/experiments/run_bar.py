"""A bar for the runs that a program makes, on a terminal or in a notebook; elsewhere a line a run."""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmfast.experiments.runs import PlannedRun

# Seconds between two states of a notebook's bar: each is a message to the browser.
_REST = 0.2
# Shows which run is made, and how many epochs of all are done.
_Show = Callable[[str, int], None]


class RunBar:
    """How far a number of runs are, counted by epochs.

    Args:
        runs: to be made.
        show: called with every change.
    """

    def __init__(self, runs: Sequence[PlannedRun], show: _Show) -> None:
        self._show, self._num_runs = show, len(runs)
        self._made, self._text, self._before, self._epochs = 0, "", 0, 0

    def begin(self, planned: PlannedRun) -> None:
        """Note that a run begins."""
        number = f"run {self._made + 1} of {self._num_runs}"
        self._text, self._epochs = f"{number}: {planned.method.title}, seed {planned.seed}", 0
        self._show(self._text, self._before)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Note that the run has made an epoch, as `Trainer` calls `on_epoch`."""
        self._epochs += 1
        self._show(self._text, self._before + self._epochs)

    def end(self, planned: PlannedRun) -> None:
        """Note that a run is made, also where it ended before its last epoch."""
        self._made, self._before = self._made + 1, self._before + planned.epochs
        self._show(self._text, self._before)


@contextlib.contextmanager
def run_bar(runs: Sequence[PlannedRun], *, wanted: bool | None) -> Iterator[RunBar]:
    """Yield what is told of the runs; it shows nothing where there are none, or nobody looks.

    Args:
        runs: to be made.
        wanted: show it; None: on a terminal and in a notebook alone.
    """
    console = Console(stderr=True)
    total = sum(planned.epochs for planned in runs)
    is_seen = console.is_terminal or console.is_jupyter if wanted is None else wanted
    if not (total and is_seen):
        yield RunBar(runs, lambda text, done: None)
        return
    if console.is_jupyter:
        shown = _in_notebook(total)
    else:
        shown = _on_terminal(total, console) if console.is_terminal else _in_lines(console)
    with shown as show:
        yield RunBar(runs, show)


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

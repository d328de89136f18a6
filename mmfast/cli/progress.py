"""Progress of a comparison: bars on a terminal, a line a run elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmfast.experiments.runs import PlannedRun


def bars_on(console: Console, *, wanted: bool) -> Progress:
    """Return bars with a description, how many are done of how many, and the time that is left.

    Args:
        console: where to; one that is no terminal shows none.
        wanted: whether there is anything to wait for.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and wanted),
    )


class RunProgress:
    """Shows how many runs are made, and how far each of those under way is.

    Args:
        console: where to.
        total: runs of the comparison.
        left: runs still to make.
    """

    def __init__(self, console: Console, total: int, left: int) -> None:
        self.console = console
        self.total = total
        self.made = total - left
        self.bars = bars_on(console, wanted=left > 0)
        self.runs = self.bars.add_task("Runs", total=total, completed=self.made)
        self.current: dict[tuple[str, int], Any] = {}

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def event(self, planned: PlannedRun, epoch: int | None) -> None:
        """Note that a run begins, or has made an epoch, as `Comparison.make_all` calls `on_event`."""
        key = planned.method.name, planned.seed
        if epoch is not None:
            if key in self.current:
                self.bars.advance(self.current[key])
            return
        text = f"{planned.method.title}, seed {planned.seed}"
        self.current[key] = self.bars.add_task(text, total=planned.epochs)

    def end(self, planned: PlannedRun, entry: dict[str, Any]) -> None:
        """Note that a run is made; `entry` is what results.json holds of it."""
        if (bar := self.current.pop((planned.method.name, planned.seed), None)) is not None:
            self.bars.remove_task(bar)
        self.made += 1
        self.bars.advance(self.runs)
        if not self.console.is_terminal:
            width = len(str(self.total))
            said = f"diverged, {entry['diverged']}" if "diverged" in entry else _figures(entry)
            self.console.print(
                f"{self.made:{width}}/{self.total} {planned.method.name} seed {planned.seed}: {said}",
                highlight=False,
                soft_wrap=True,
            )


def _figures(entry: dict[str, Any]) -> str:
    accuracy = 100 * entry["metrics"]["accuracy"]
    return f"accuracy {accuracy:.1f}%, {entry['epochs']} epochs in {entry['seconds']:.1f} s"

"""The trials of a comparison: bars on a terminal, a line a trial elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console

from mmfast.cli.progress import bars_on
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.trials import Trial
from mmfast.experiments.tuning import TRIALS, Tuned
from mmfast.methods import Method
from mmfast.reports.tuning_tables import trial_text
from mmfast.training.stopping import Stopped


class TrialProgress:
    """Shows how many trials are made, and how far each of those under way is.

    Args:
        console: where to.
        comparison: whose trials are made.
        made: those that are there before.
    """

    def __init__(self, console: Console, comparison: ComparisonRunner, made: int) -> None:
        assert comparison.tuning is not None
        setup, methods = comparison.setup, comparison.methods
        self.console, self.made = console, made
        self.total = comparison.tuning.trials * len(methods)
        self.select = f"val/{setup.trainer(methods[0], 0, None).measures.selected}"
        self._epochs = {m.name: setup.check(m) * comparison.tuning.num_seeds for m in methods}
        self.bars = bars_on(console, wanted=made < self.total)
        self.trials = self.bars.add_task("Trials", total=self.total, completed=made)
        self._current: dict[str, Any] = {}

    def __enter__(self) -> TrialProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def begin(self, method: Method, number: int) -> None:
        """Note that a trial of a method begins."""
        text = f"{method.title}, trial {number + 1}"
        self._current[method.name] = self.bars.add_task(text, total=self._epochs[method.name])

    def epoch(self, method: Method) -> None:
        """Note that the current trial of a method has made an epoch."""
        self.bars.advance(self._current[method.name])

    def end(self, method: Method, number: int, trial: Trial) -> None:
        """Note what a trial has become."""
        self.made += 1
        self.bars.remove_task(self._current.pop(method.name))
        self.bars.advance(self.trials)
        if not self.console.is_terminal:
            width = len(str(self.total))
            said = trial_text(trial, self.select)
            self.console.print(
                f"{self.made:{width}}/{self.total} {method.name} trial {number + 1}: {said}",
                highlight=False,
                soft_wrap=True,
            )

    def wait(self, text: str) -> None:
        """Print what the trials of a method wait for."""
        self.console.print(text, soft_wrap=True)


def tune_methods(
    console: Console, comparison: ComparisonRunner, left: list[PlannedRun], jobs: int
) -> tuple[list[Tuned], list[PlannedRun]]:
    """Make the trials of all methods; return what they found, and the runs with these settings.

    Args:
        console: where progress is shown.
        comparison: whose methods are tuned.
        left: runs still to make.
        jobs: methods that are tuned at a time.
    """
    made = sum(comparison.num_trials(method) for method in comparison.methods)
    where = comparison.out / TRIALS
    with TrialProgress(console, comparison, made) as progress:
        if made:
            console.print(f"{made} of {progress.total} trials: already in {where}.", soft_wrap=True)
        try:
            found = comparison.tune_all(jobs, progress)
        except (KeyboardInterrupt, Stopped) as end:
            counted = f"{progress.made} of {progress.total} trials in {where}"
            print(f"\nmmfast: stopped with {counted}; the same command goes on there.", file=sys.stderr)
            raise typer.Exit(getattr(end, "status", 130)) from None
    return found, [comparison.settled(planned) for planned in left]

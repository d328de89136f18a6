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
from mmfast.experiments.tuning_tables import trial_text
from mmfast.methods import Method
from mmfast.training.stopping import Stopped


class TrialProgress:
    """Shows how many trials are made, and how far the current one is.

    Args:
        console: where to.
        total: trials of the comparison.
        made: those that are there before.
        select: the figure that scores.
    """

    def __init__(self, console: Console, total: int, made: int, select: str) -> None:
        self.console, self.total, self.made, self.select = console, total, made, select
        self.bars = bars_on(console, wanted=made < total)
        self.trials = self.bars.add_task("Trials", total=total, completed=made)
        self.epochs = self.bars.add_task("Epochs", total=None)

    def __enter__(self) -> TrialProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bars.stop()

    def begin(self, method: Method, number: int, epochs: int) -> None:
        """Note that a trial begins, of so many epochs."""
        self.bars.update(
            self.epochs, description=f"{method.title}, trial {number + 1}", total=epochs, completed=0
        )

    def epoch(self, entry: dict[str, Any]) -> None:
        """Note that the current trial has made an epoch."""
        self.bars.advance(self.epochs)

    def end(self, method: Method, number: int, trial: Trial) -> None:
        """Note what a trial has become."""
        self.made += 1
        self.bars.advance(self.trials)
        if not self.console.is_terminal:
            width = len(str(self.total))
            said = trial_text(trial, self.select)
            self.console.print(
                f"{self.made:{width}}/{self.total} {method.name} trial {number + 1}: {said}",
                highlight=False,
                soft_wrap=True,
            )


def tune_methods(
    console: Console, comparison: ComparisonRunner, left: list[PlannedRun]
) -> tuple[list[Tuned], list[PlannedRun]]:
    """Make the trials of all methods; return what they found, and the runs with these settings.

    Args:
        console: where progress is shown.
        comparison: whose methods are tuned.
        left: runs still to make.
    """
    tuning, setup = comparison.tuning, comparison.setup
    assert tuning is not None
    total = tuning.trials * len(comparison.methods)
    made = sum(comparison.num_trials(method) for method in comparison.methods)
    found = []
    if made:
        where = comparison.out / TRIALS
        console.print(f"{made} of {total} trials: already in {where}.", soft_wrap=True)
    select = f"val/{setup.trainer(comparison.methods[0], 0, None).measures.selected}"
    with TrialProgress(console, total, made, select) as progress:
        try:
            for method in comparison.methods:
                found.append(_tune(comparison, method, progress))
        except (KeyboardInterrupt, Stopped) as end:
            counted = f"{progress.made} of {total} trials in {comparison.out / TRIALS}"
            print(f"\nmmfast: stopped with {counted}; the same command goes on there.", file=sys.stderr)
            raise typer.Exit(getattr(end, "status", 130)) from None
    return found, [comparison.settled(planned) for planned in left]


def _tune(comparison: ComparisonRunner, method: Method, progress: TrialProgress) -> Tuned:
    tuning = comparison.tuning
    assert tuning is not None
    epochs = comparison.setup.check(method) * tuning.num_seeds

    def end(number: int, trial: Trial) -> None:
        progress.end(method, number, trial)
        progress.begin(method, number + 1, epochs)

    progress.begin(method, comparison.num_trials(method), epochs)
    tuned = comparison.tune(method, end, progress.epoch)
    comparison.note_tuned(tuned)
    return tuned

"""What tuning has found, as lines and as a table for a terminal of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfast.experiments.trials import Trial
from mmfast.experiments.tuning import Tuned

# Figures that are printed in %.
_SHARES = ("accuracy", "macro_f1", "micro_f1")


def show_tuned(console: Console, found: Sequence[Tuned], seeds: Sequence[int]) -> None:
    """Print the settings chosen for methods, and how much better they are than those given.

    Args:
        console: where to.
        found: of each method.
        seeds: of the trials' runs.
    """
    console.print(tuned_table(found))
    console.print(Text(tuned_note(found, seeds), style="dim"))


def tuned_table(found: Sequence[Tuned]) -> Table:
    """Return the settings chosen for methods as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("Tuned", no_wrap=True)
    for header in ("As given", "Chosen", "Trial"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Settings", overflow="fold")
    for tuned in found:
        scores = [tuned.trials[number].score for number in (0, tuned.chosen)]
        table.add_row(
            tuned.method.title,
            *(score_text(score, tuned.select, unit="") for score in scores),
            str(tuned.chosen + 1),
            settings_text(tuned.settings),
        )
    return table


def tuned_note(found: Sequence[Tuned], seeds: Sequence[int]) -> str:
    """Return what the figures of `tuned_table` are."""
    trials, select = len(found[0].trials), found[0].select
    figure = f"{select}{' in %' if _is_share(select) else ''}"
    runs = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean over seeds {seeds[0]} to {seeds[-1]}"
    return (
        f"By {figure}, {runs}; {trials} trial{'s' * (trials > 1)} each, the first with the settings as "
        "given. No trial reads test data."
    )


def trial_text(trial: Trial, select: str) -> str:
    """Return what has become of a trial: its score, or why it has none, and its settings."""
    if trial.diverged:
        said = "diverged"
    elif trial.pruned is not None:
        said = f"ended after epoch {trial.pruned} at {score_text(trial.score, select)}, below the median"
    else:
        said = f"{select} {score_text(trial.score, select)}"
    return f"{said}; {settings_text(trial.settings)}"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as they are printed: lr=0.00213, epochs=8,16,24."""
    return ", ".join(f"{name}={_value(value)}" for name, value in settings.items())


def score_text(score: float | None, select: str, *, unit: str = "%") -> str:
    """Return a score as it is printed."""
    if score is None:
        return "–"
    return f"{100 * score:.1f}{unit}" if _is_share(select) else f"{score:.3f}"


def _is_share(select: str) -> bool:
    return select.rpartition("/")[2] in _SHARES


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

"""The files that a comparison leaves beside its runs: tables, pictures, a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfast.data.overview import Overview
from mmfast.experiments.file_names import PREDICTIONS, REPORT, RUNS, confusion_name
from mmfast.experiments.findings import Findings, find
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.results import RESULTS, Results
from mmfast.experiments.summary import Summary
from mmfast.files import locked
from mmfast.methods import METHODS
from mmfast.reports.confusions import (
    confusion_of,
    joint_and_best,
    plot_confusion,
)
from mmfast.reports.pictures import letters_missing, plot_comparison
from mmfast.reports.report import write_report
from mmfast.reports.run_tables import write_predictions, write_runs
from mmfast.reports.tables import sentences


def write_files(
    results: Results,
    summaries: Sequence[Summary],
    outcomes: Mapping[tuple[str, int], Outcome],
    class_names: Sequence[str],
    *,
    keys: np.ndarray | None = None,  # [N]
    confused: Sequence[str] | None = None,
    overview: Overview | None = None,
    command: str | None = None,
    tell: Callable[[str], None] = print,
) -> list[str]:
    """Write what one can keep of a comparison, and return what was written: the report first.

    Files of other runs, which an earlier call has left, are replaced or removed.

    Args:
        results: of its folder.
        summaries: one a method, of which one has runs at least.
        outcomes: of the runs, those that are known.
        class_names: of the C classes.
        keys: by which the data tell their test samples.
        confused: methods whose confusions are drawn; None: joint training and the best method.
        overview: how the data were read.
        command: that made it.
        tell: called with a sentence on what pictures or tables do not show.
    """
    # The same comparison may end in two processes at once, and the page takes in what others are written.
    with locked(results.out / f".{REPORT}.lock", wait=lambda: None):
        out, findings = results.out, find(summaries)
        results.summarize(plain_summary(summaries, findings))
        shown = [entry for summary in summaries for entry in (*summary.runs, *summary.diverged)]
        write_runs(out / RUNS, sorted(shown, key=_place))
        of_shown = _Some(outcomes, sorted(((e["method"], e["seed"]) for e in shown), key=_order))
        tables = [RUNS]
        if of_shown:
            if not write_predictions(out / PREDICTIONS, of_shown, keys, class_names):
                tell(f"{out / PREDICTIONS} has two probabilities a sample, as those of all are too many.")
            tables.append(PREDICTIONS)
        else:
            (out / PREDICTIONS).unlink(missing_ok=True)
        finite = [summary for summary in summaries if summary.runs]
        pictures = plot_comparison(finite, out, findings)
        confusions = []
        for method in METHODS:
            (out / confusion_name(method)).unlink(missing_ok=True)
        for method in joint_and_best(finite) if confused is None else confused:
            seeds = [seed for name, seed in of_shown if name == method]
            if (confusion := confusion_of(method, of_shown, seeds, class_names)) is not None:
                confusions.append((confusion, plot_confusion(confusion, out)))
        if warning := letters_missing([*finite[0].alone, *class_names]):
            tell(f"{warning}.")
        write_report(
            out / REPORT,
            summaries,
            findings,
            results.content,
            pictures=pictures,
            confusions=confusions,
            overview=overview,
            warnings=[f"{warning}."] if warning else [],
            command=command,
        )
        count = len(pictures) + len(confusions)
        return [REPORT, RESULTS, *tables, f"{count} pictures"]


def plain_summary(summaries: Sequence[Summary], findings: Findings) -> dict[str, Any]:
    """Return what a comparison comes to, for results.json: figures by method, marks, and the sentences."""
    return {
        "sentences": sentences(summaries, findings),
        "methods": {summary.name: _figures(summary, findings) for summary in summaries},
    }


def _figures(summary: Summary, findings: Findings) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seeds": [entry["seed"] for entry in summary.runs],
        "diverged_seeds": [entry["seed"] for entry in summary.diverged],
        "accuracy": _mean_std(summary.accuracy),
        "macro_f1": _mean_std(summary.macro_f1),
        "ece": summary.ece,
        "alone": summary.alone,
        "probe": summary.probe,
        "contribution": summary.contribution,
        "missing": summary.missing,
        "seconds": summary.seconds,
        "seconds_per_epoch": summary.seconds_per_epoch,
        "marks": findings.marks(summary.name),
    }
    return found | findings.as_dict().get(summary.name, {})


def _mean_std(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and the standard deviation over seeds, None where there are too few for it."""
    return {
        "mean": float(np.mean(values)) if values else None,
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _place(entry: Mapping[str, Any]) -> tuple[int, int]:
    return _order((entry["method"], entry["seed"]))


def _order(run: tuple[str, int]) -> tuple[int, int]:
    return list(METHODS).index(run[0]), run[1]


class _Some(Mapping[tuple[str, int], Outcome]):
    """Some of the outcomes, in an order; each is read when it is asked for."""

    def __init__(self, outcomes: Mapping[tuple[str, int], Outcome], runs: Sequence[tuple[str, int]]) -> None:
        self.outcomes, self.runs = outcomes, [run for run in runs if run in outcomes]

    def __getitem__(self, run: tuple[str, int]) -> Outcome:
        return self.outcomes[run]

    def __iter__(self) -> Any:
        return iter(self.runs)

    def __len__(self) -> int:
        return len(self.runs)

"""What the runs of each method come to: figures over seeds, and what they make of each test sample."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfast.experiments.outcomes import Outcome
from mmfast.methods import METHODS


@dataclass(frozen=True, eq=False)
class Answers:
    """What S runs of a method, each with its seed, make of N test samples with a label.

    Attributes:
        seeds: of the runs.
        right: float32 [S, N], 1 where the prediction is right, else 0.
        probes: float32 [S, M, N], the same of each modality's probe, NaN where a sample lacks the modality;
            None where a run has none.
        contributions: float32 [S, M, N], NaN where a sample lacks the modality.
        gains: float32 [S, M, N], what each modality adds to the accuracy, NaN as above; None where a run does
            not tell.
    """

    seeds: tuple[int, ...]
    right: np.ndarray
    probes: np.ndarray | None
    contributions: np.ndarray
    gains: np.ndarray | None = None

    def of(self, seeds: Sequence[int]) -> Answers:
        """Return the runs with these seeds alone, in this order."""
        rows = [self.seeds.index(seed) for seed in seeds]
        probes = None if self.probes is None else self.probes[rows]
        gains = None if self.gains is None else self.gains[rows]
        return replace(
            self,
            seeds=tuple(seeds),
            right=self.right[rows],
            probes=probes,
            contributions=self.contributions[rows],
            gains=gains,
        )


@dataclass(frozen=True)
class Summary:
    """One method over seeds; accuracies in [0, 1], per-modality figures by name, None where not measurable.

    Attributes:
        name, title: of the method.
        protocol: how a modality alone is measured: "masked" or "own-head"; "–" where no run has a result.
        accuracy, macro_f1: one figure a seed.
        alone: mean accuracy of each modality alone.
        contribution: mean Shapley value of each modality.
        probe: mean accuracy of each modality by protocol `probe`, empty where not measured.
        missing: mean accuracy without each modality, empty where not measured.
        ece: mean expected calibration error, None where not measured.
        seconds: mean training time of a run, None where no run has a result.
        seconds_per_epoch: mean over seeds, None where no run has a result.
        runs: the entries of results.json that have figures; all of the above is of these alone.
        diverged: the entries of runs whose loss or predictions were NaN or infinite.
        answers: to each test sample; None where they are not known of each run.
    """

    name: str
    title: str
    protocol: str
    accuracy: list[float]
    macro_f1: list[float]
    alone: dict[str, float | None]
    contribution: dict[str, float | None]
    probe: dict[str, float | None]
    missing: dict[str, float | None]
    ece: float | None
    seconds: float | None
    seconds_per_epoch: float | None
    runs: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    answers: Answers | None = None

    @property
    def mean_accuracy(self) -> float:
        return statistics.fmean(self.accuracy)


def summarize(
    runs: Iterable[dict[str, Any]],
    methods: Sequence[str] | None = None,
    num_seeds: int | None = None,
    *,
    outcomes: Mapping[tuple[str, int], Outcome] | None = None,
) -> list[Summary]:
    """Return the summaries of the runs of results.json, in the order of `METHODS`.

    Args:
        runs: entries of results.json.
        methods: only these.
        num_seeds: only seeds below this.
        outcomes: what runs make of each test sample, by method and seed; those not in it are not known.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        if (methods is None or entry["method"] in methods) and (
            num_seeds is None or entry["seed"] < num_seeds
        ):
            by_method.setdefault(entry["method"], []).append(entry)
    return [_summary(name, by_method[name], outcomes or {}) for name in METHODS if name in by_method]


def _summary(
    name: str, entries: list[dict[str, Any]], outcomes: Mapping[tuple[str, int], Outcome]
) -> Summary:
    runs = [entry for entry in entries if "diverged" not in entry]
    metrics = [entry["metrics"] for entry in runs]
    return Summary(
        name=name,
        title=METHODS[name].title,
        protocol=runs[0]["protocol"] if runs else "–",
        accuracy=[m["accuracy"] for m in metrics],
        macro_f1=[m["macro_f1"] for m in metrics],
        alone=_mean_by_name(m["modality_accuracy"] for m in metrics),
        contribution=_mean_by_name(m["contribution"] for m in metrics),
        probe=_mean_by_name(entry.get("probe", {}) for entry in runs),
        missing=_mean_by_name(entry.get("missing", {}) for entry in runs),
        ece=_mean(entry.get("ece") for entry in runs),
        seconds=_mean(entry.get("seconds") for entry in runs),
        seconds_per_epoch=_mean(entry["seconds_per_epoch"] for entry in runs),
        runs=runs,
        diverged=[entry for entry in entries if "diverged" in entry],
        answers=_answers(name, [entry["seed"] for entry in runs], outcomes),
    )


def _answers(name: str, seeds: Sequence[int], outcomes: Mapping[tuple[str, int], Outcome]) -> Answers | None:
    """Return the answers of a method's runs, None unless all are known of the same samples."""
    if not seeds or any((name, seed) not in outcomes for seed in seeds):
        return None
    rows, labels = [], None
    for seed in seeds:
        # One at a time: probabilities may be large.
        outcome = outcomes[name, seed]
        labels = outcome.labels if labels is None else labels
        if not np.array_equal(outcome.labels, labels):
            return None
        rows.append(_told(outcome))
    right, probes, contributions, gains = zip(*rows, strict=True)
    return Answers(
        tuple(seeds),
        np.stack(right),
        _stacked(probes),
        np.stack(contributions),
        _stacked(gains),
    )


def _stacked(tables: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [table for table in tables if table is not None]
    return np.stack(known) if len(known) == len(tables) else None


def _told(outcome: Outcome) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Return what Answers tell of one run: [N] and three times [M, N]."""
    known = outcome.labelled
    probed = [each for m in range(outcome.present.shape[1]) if (each := outcome.probe_of(m)) is not None]
    phi, gains = (
        None if values is None else np.where(outcome.present, values, np.nan).T[:, known].astype(np.float32)
        for values in (outcome.contributions, outcome.gains)
    )
    assert phi is not None
    return (
        outcome.correct[known].astype(np.float32),
        np.stack(probed)[:, known].astype(np.float32) if probed else None,
        phi,
        gains,
    )


def highest(summaries: Iterable[Summary]) -> Summary:
    """Return the method of the highest mean accuracy among those that have most runs.

    A mean over few seeds, where others of the method have diverged, is not held against one over more.
    """
    ended = [summary for summary in summaries if summary.runs]
    most = max(len(summary.runs) for summary in ended)
    return max((s for s in ended if len(s.runs) == most), key=lambda summary: summary.mean_accuracy)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _mean_by_name(figures: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    collected: dict[str, list[float]] = {}
    for by_name in figures:
        for name, value in by_name.items():
            collected.setdefault(name, []).extend([] if value is None else [value])
    return {name: statistics.fmean(values) if values else None for name, values in collected.items()}


def mean_std(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return "mean ± std" over seeds, or the one figure, or "–"."""
    if not values:
        return "–"
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"

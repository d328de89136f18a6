"""What a comparison says: figures per method over seeds, and the sentences they support."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mmfast.methods import METHODS

# Smaller losses of accuracy are not called neglect.
_NEGLIGIBLE = 0.01


@dataclass(frozen=True)
class Summary:
    """One method over seeds; accuracies in [0, 1], per-modality figures by name, None where not measurable.

    Attributes:
        name, title: of the method.
        protocol: how a modality alone is measured: "masked" or "own-head".
        accuracy, macro_f1: one figure a seed.
        alone: mean accuracy of each modality alone.
        contribution: mean Shapley value of each modality.
        probe: mean accuracy of each modality by protocol `probe`, empty where not measured.
        seconds_per_epoch: mean over seeds.
        runs: the entries of results.json.
    """

    name: str
    title: str
    protocol: str
    accuracy: list[float]
    macro_f1: list[float]
    alone: dict[str, float | None]
    contribution: dict[str, float | None]
    probe: dict[str, float | None]
    seconds_per_epoch: float
    runs: list[dict[str, Any]]

    @property
    def mean_accuracy(self) -> float:
        return statistics.fmean(self.accuracy)


def summarize(
    runs: Iterable[dict[str, Any]],
    methods: Sequence[str] | None = None,
    num_seeds: int | None = None,
) -> list[Summary]:
    """Return the summaries of the runs of results.json, in the order of `METHODS`.

    Args:
        runs: entries of results.json.
        methods: only these.
        num_seeds: only seeds below this.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for entry in runs:
        if (methods is None or entry["method"] in methods) and (
            num_seeds is None or entry["seed"] < num_seeds
        ):
            by_method.setdefault(entry["method"], []).append(entry)
    return [_summary(name, by_method[name]) for name in METHODS if name in by_method]


def _summary(name: str, runs: list[dict[str, Any]]) -> Summary:
    metrics = [entry["metrics"] for entry in runs]
    return Summary(
        name=name,
        title=METHODS[name].title,
        protocol=runs[0]["protocol"],
        accuracy=[m["accuracy"] for m in metrics],
        macro_f1=[m["macro_f1"] for m in metrics],
        alone=_mean_by_name(m["modality_accuracy"] for m in metrics),
        contribution=_mean_by_name(m["contribution"] for m in metrics),
        probe=_mean_by_name(entry.get("probe", {}) for entry in runs),
        seconds_per_epoch=statistics.fmean(entry["seconds_per_epoch"] for entry in runs),
        runs=runs,
    )


def _mean_by_name(figures: Iterable[dict[str, float | None]]) -> dict[str, float | None]:
    collected: dict[str, list[float]] = {}
    for by_name in figures:
        for name, value in by_name.items():
            collected.setdefault(name, []).extend([] if value is None else [value])
    return {name: statistics.fmean(values) if values else None for name, values in collected.items()}


def mean_std(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Return "mean ± std" over seeds, or the one figure."""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


def neglect_sentence(summaries: Sequence[Summary]) -> str:
    """Return which modality the joint model neglects, or "" where there is no joint model."""
    by_name = {summary.name: summary for summary in summaries}
    joint, apart = by_name.get("joint"), _trained_alone(by_name)
    known = {m: phi for m, phi in joint.contribution.items() if phi is not None} if joint else {}
    if joint is None or len(known) < 2:
        return ""
    lowest = min(known, key=lambda m: known[m])
    highest = max(known, key=lambda m: known[m])
    least = f"{known[lowest]:.2f}, against {known[highest]:.2f} of {highest}"
    gaps = {m: _gaps(apart, joint, m) for m in known} if apart else {}
    gaps = {m: values for m, values in gaps.items() if values}
    if apart is None or not gaps:
        return f"In the joint model {lowest} contributes least: {least}."
    neglected = max(gaps, key=lambda m: statistics.fmean(gaps[m]))
    if not _is_clear(gaps[neglected]):
        return (
            f"The joint model neglects no modality clearly: alone ({joint.protocol}) each reaches about what "
            f"it reaches when trained alone ({apart.protocol}). The least contribution is that of {lowest}: "
            f"{least}."
        )
    text = (
        f"The joint model neglects {neglected}: alone ({joint.protocol}) it reaches "
        f"{_percent(joint.alone[neglected])}, when trained alone ({apart.protocol}) "
        f"{_percent(apart.alone[neglected])}"
    )
    if neglected == lowest:
        return f"{text}. It also contributes least: {least}."
    return f"{text}. The least contribution is that of {lowest}: {least}."


def _gaps(apart: Summary, joint: Summary, modality: str) -> list[float]:
    """Return, for the seeds both have, what a modality loses in the joint model."""
    reached = {e["seed"]: e["metrics"]["modality_accuracy"][modality] for e in joint.runs}
    found = []
    for entry in apart.runs:
        own, masked = entry["metrics"]["modality_accuracy"][modality], reached.get(entry["seed"])
        if own is not None and masked is not None:
            found.append(own - masked)
    return found


def _is_clear(gaps: Sequence[float]) -> bool:
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return statistics.fmean(gaps) > max(spread, _NEGLIGIBLE)


def _trained_alone(by_name: dict[str, Summary]) -> Summary | None:
    return by_name.get("unimodal") or by_name.get("ensemble") or by_name.get("frozen-unimodal")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def ranking_sentence(summaries: Sequence[Summary]) -> str:
    """Return which methods beat joint training and the best unimodal model, and by how much."""
    by_name = {summary.name: summary for summary in summaries}
    bars = [by_name[name] for name in ("joint", "unimodal") if name in by_name]
    rest = [summary for summary in summaries if summary not in bars]
    best = max(summaries, key=lambda summary: summary.mean_accuracy)
    opening = f"Best accuracy: {best.title}, {mean_std(best.accuracy)}%."
    if not bars or not rest:
        return opening
    against = " and ".join(f"{bar.title} ({_percent(bar.mean_accuracy)})" for bar in bars)
    # A difference that prints as +0.0 is none.
    better = [s for s in rest if all(s.mean_accuracy - bar.mean_accuracy >= 0.0005 for bar in bars)]
    better.sort(key=lambda summary: -summary.mean_accuracy)
    if not better:
        return f"{opening} No other method beats {'both ' if len(bars) == 2 else ''}{against}."
    listed = ", ".join(f"{s.title} by {' and '.join(_difference(s, bar) for bar in bars)}" for s in better)
    note = " (~: within one standard deviation over seeds)" if "~" in listed else ""
    return f"{opening} Above {against}, in points: {listed}{note}."


def idle_sentence(summaries: Sequence[Summary]) -> str:
    """Return which methods gave the joint model itself, as where a run ends before they intervene."""
    joint = next((s for s in summaries if s.name == "joint"), None)
    if joint is None:
        return ""
    figures = [entry["metrics"] for entry in joint.runs]
    same = [s.title for s in summaries if s is not joint and [e["metrics"] for e in s.runs] == figures]
    if not same:
        return ""
    return f"Without effect in these runs, the same as {joint.title} in every figure: {', '.join(same)}."


def _difference(summary: Summary, bar: Summary) -> str:
    """Return the mean difference in points over common seeds; "~" before what is within one deviation."""
    mine = {entry["seed"]: entry["metrics"]["accuracy"] for entry in summary.runs}
    theirs = {entry["seed"]: entry["metrics"]["accuracy"] for entry in bar.runs}
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not differences:
        return f"{100 * (summary.mean_accuracy - bar.mean_accuracy):+.1f}"
    mean = statistics.fmean(differences)
    unsure = len(differences) > 1 and abs(mean) <= statistics.stdev(differences)
    return f"{'~' if unsure else ''}{100 * mean:+.1f}"

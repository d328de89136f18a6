"""What a comparison says: figures per method over seeds, and the sentences they support."""

from __future__ import annotations

import math
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
        protocol: how a modality alone is measured: "masked" or "own-head"; "–" where no run has a result.
        accuracy, macro_f1: one figure a seed.
        alone: mean accuracy of each modality alone.
        contribution: mean Shapley value of each modality.
        probe: mean accuracy of each modality by protocol `probe`, empty where not measured.
        seconds_per_epoch: mean over seeds, None where no run has a result.
        runs: the entries of results.json that have figures; all of the above is of these alone.
        diverged: the entries of runs whose loss or predictions were NaN or infinite.
    """

    name: str
    title: str
    protocol: str
    accuracy: list[float]
    macro_f1: list[float]
    alone: dict[str, float | None]
    contribution: dict[str, float | None]
    probe: dict[str, float | None]
    seconds_per_epoch: float | None
    runs: list[dict[str, Any]]
    diverged: list[dict[str, Any]]

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


def _summary(name: str, entries: list[dict[str, Any]]) -> Summary:
    runs = [entry for entry in entries if "diverged" not in entry]
    metrics = [entry["metrics"] for entry in runs]
    seconds = [entry["seconds_per_epoch"] for entry in runs]
    return Summary(
        name=name,
        title=METHODS[name].title,
        protocol=runs[0]["protocol"] if runs else "–",
        accuracy=[m["accuracy"] for m in metrics],
        macro_f1=[m["macro_f1"] for m in metrics],
        alone=_mean_by_name(m["modality_accuracy"] for m in metrics),
        contribution=_mean_by_name(m["contribution"] for m in metrics),
        probe=_mean_by_name(entry.get("probe", {}) for entry in runs),
        seconds_per_epoch=statistics.fmean(seconds) if seconds else None,
        runs=runs,
        diverged=[entry for entry in entries if "diverged" in entry],
    )


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


def diverged_sentence(summaries: Sequence[Summary]) -> str:
    """Return which runs have no result, and why, or "" where all have one."""
    lost = []
    for summary in summaries:
        if summary.diverged:
            seeds = ", ".join(str(entry["seed"]) for entry in summary.diverged)
            plural = "s" * (len(summary.diverged) > 1)
            lost.append(f"{summary.title} with seed{plural} {seeds}")
    if not lost:
        return ""
    entries = [entry for summary in summaries for entry in summary.diverged]
    which = "The first of them" if len(entries) > 1 else "The cause"
    return f"Diverged, and in no figure: {'; '.join(lost)}. {which}: {entries[0]['diverged']}."


def neglect_sentence(summaries: Sequence[Summary], num_test: int | None = None) -> str:
    """Return which modality the joint model neglects, or "" where there is no joint model.

    Args:
        summaries: one a method.
        num_test: samples of the test part, of which so few may differ that it is chance; None: not known.
    """
    by_name = {summary.name: summary for summary in summaries if summary.runs}
    joint, apart = by_name.get("joint"), _trained_alone(by_name)
    known = {m: phi for m, phi in joint.contribution.items() if phi is not None} if joint else {}
    if joint is None or len(known) < 2:
        return ""
    lowest = min(known, key=lambda m: known[m])
    least = _least(joint, known, lowest, num_test)
    gaps = {m: _gaps(apart, joint, m) for m in known} if apart else {}
    gaps = {m: values for m, values in gaps.items() if values}
    if apart is None or not gaps:
        return f"In the joint model {least[0]}."
    neglected = max(gaps, key=lambda m: statistics.fmean(gaps[m]))
    # Figures of the seeds that both have, as the gaps are.
    own, masked = (_alone_over(s, other, neglected) for s, other in ((apart, joint), (joint, apart)))
    chance = _chance(own, masked, num_test)
    if not _is_clear(gaps[neglected], chance):
        return (
            f"The joint model neglects no modality clearly: alone ({joint.protocol}) each reaches about what "
            f"it reaches when trained alone ({apart.protocol}). In it {least[0]}."
        )
    opening = "The joint model"
    if len(gaps[neglected]) == 1:
        # A difference that may be chance.
        opening = "In this one run" if len(joint.runs) == 1 else "With the one seed that both have"
        opening += " the joint model"
    text = (
        f"{opening} neglects {neglected}: alone ({joint.protocol}) it reaches {_percent(masked)}, when "
        f"trained alone ({apart.protocol}) {_percent(own)}"
    )
    if neglected == lowest and least[1]:
        return f"{text}. It also contributes least: {least[1]}."
    return f"{text}. All the same {least[0]}."


def _least(joint: Summary, known: dict[str, float], lowest: str, num_test: int | None) -> tuple[str, str]:
    """Return what is to say of the least contribution, and its figures where it differs beyond the spread."""
    highest = max(known, key=lambda m: known[m])
    found = [entry["metrics"]["contribution"] for entry in joint.runs]
    gaps = [phi[highest] - phi[lowest] for phi in found if None not in (phi[highest], phi[lowest])]
    # The standard error of a mean of values that lie M apart at most.
    chance = len(known) / (2 * math.sqrt(num_test)) if num_test else 0.0
    if highest == lowest or not _is_clear(gaps, chance):
        low, high = f"{known[lowest]:.2f}", f"{known[highest]:.2f}"
        span = f"each {low}" if low == high else f"{low} to {high}"
        return f"no modality contributes clearly less than the others: {span}", ""
    figures = f"{known[lowest]:.2f}, against {known[highest]:.2f} of {highest}"
    return f"{lowest} contributes least: {figures}", figures


def _alone_over(summary: Summary, other: Summary, modality: str) -> float | None:
    """Return a modality's mean accuracy alone over the seeds that another method has, too."""
    shared = {entry["seed"] for entry in other.runs}
    found = [e["metrics"]["modality_accuracy"][modality] for e in summary.runs if e["seed"] in shared]
    known = [value for value in found if value is not None]
    return statistics.fmean(known) if known else None


def _gaps(apart: Summary, joint: Summary, modality: str) -> list[float]:
    """Return, for the seeds both have, what a modality loses in the joint model."""
    reached = {e["seed"]: e["metrics"]["modality_accuracy"][modality] for e in joint.runs}
    found = []
    for entry in apart.runs:
        own, masked = entry["metrics"]["modality_accuracy"][modality], reached.get(entry["seed"])
        if own is not None and masked is not None:
            found.append(own - masked)
    return found


def _is_clear(gaps: Sequence[float], chance: float = 0.0) -> bool:
    """Return whether differences, one a seed, lie beyond their spread, beyond chance and worth a word."""
    spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
    return bool(gaps) and statistics.fmean(gaps) > max(spread, chance, _NEGLIGIBLE)


def _chance(one: float | None, other: float | None, num_test: int | None) -> float:
    """Return the standard error of the difference of two accuracies on test sets of this size."""
    if one is None or other is None or not num_test:
        return 0.0
    return math.sqrt((one * (1 - one) + other * (1 - other)) / num_test)


def _trained_alone(by_name: dict[str, Summary]) -> Summary | None:
    return by_name.get("unimodal") or by_name.get("ensemble") or by_name.get("frozen-unimodal")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def ranking_sentence(summaries: Sequence[Summary]) -> str:
    """Return which methods beat joint training and the best unimodal model, and by how much.

    Methods are compared over the seeds that all of them have; differences count where their mean is beyond
    their deviation.
    """
    summaries = [summary for summary in summaries if summary.runs]
    if not summaries:
        return ""
    seeds = [{entry["seed"] for entry in summary.runs} for summary in summaries]
    shared = set.intersection(*seeds)
    if not shared:
        return "No seed has a result of every method, so they are not ranked."
    opening = ""
    if any(found != shared for found in seeds):
        summaries = [_summary(s.name, [e for e in s.runs if e["seed"] in shared]) for s in summaries]
        listed = ", ".join(map(str, sorted(shared)))
        opening = f"Over the seed{'s' * (len(shared) > 1)} that all methods have, {listed}: "
    best = max(summaries, key=lambda summary: summary.mean_accuracy)
    opening += _best_sentence(best, summaries)
    by_name = {summary.name: summary for summary in summaries}
    bars = [by_name[name] for name in ("joint", "unimodal") if name in by_name]
    rest = [summary for summary in summaries if summary not in bars]
    if not bars or not rest:
        return opening
    against = " and ".join(f"{bar.title} ({_percent(bar.mean_accuracy)})" for bar in bars)
    better = [s for s in rest if all(_is_above(s, bar) for bar in bars)]
    better.sort(key=lambda summary: -summary.mean_accuracy)
    if not better:
        clearly = "" if len(shared) == 1 else " beyond the spread over seeds"
        both = "both " if len(bars) == 2 else ""
        return f"{opening} No other method beats {both}{against}{clearly}."
    listed = ", ".join(
        f"{s.title} by {' and '.join(f'{100 * statistics.fmean(_differences(s, bar)):+.1f}' for bar in bars)}"
        for s in better
    )
    return f"{opening} Above {against}, in points: {listed}."


def _best_sentence(best: Summary, summaries: Sequence[Summary]) -> str:
    figure, is_one = f"{mean_std(best.accuracy)}%", len(best.runs) == 1
    level = [s for s in summaries if s is not best and not _is_above(best, s)]
    if len(summaries) > 1 and len(level) == len(summaries) - 1:
        than = "the others" if is_one else "another beyond the spread over seeds"
        return f"No method is clearly best: the highest, {best.title} with {figure}, is not above {than}."
    opening = f"Best accuracy: {best.title}, {figure}"
    if is_one:
        opening = f"Best accuracy in this one run: {best.title}, {figure}"
    if not level:
        return f"{opening}."
    named = ", ".join(s.title for s in level)
    if is_one:
        return f"{opening}; the same: {named}."
    return f"{opening}; seed by seed not told apart from it: {named}."


def _is_above(summary: Summary, other: Summary) -> bool:
    """Return whether a method's accuracy lies above another's, beyond the spread over seeds."""
    differences = _differences(summary, other)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    # A difference that prints as +0.0 is none.
    return statistics.fmean(differences) >= 0.0005 and statistics.fmean(differences) > spread


def _differences(summary: Summary, other: Summary) -> list[float]:
    """Return the differences of accuracy over the seeds, which both have."""
    mine, theirs = ({e["seed"]: e["metrics"]["accuracy"] for e in s.runs} for s in (summary, other))
    return [mine[seed] - theirs[seed] for seed in mine]


def idle_sentence(summaries: Sequence[Summary]) -> str:
    """Return which methods gave the joint model itself, as where a run ends before they intervene."""
    joint = next((s for s in summaries if s.name == "joint" and s.runs), None)
    if joint is None:
        return ""
    figures = [entry["metrics"] for entry in joint.runs]
    same = [s.title for s in summaries if s is not joint and [e["metrics"] for e in s.runs] == figures]
    if not same:
        return ""
    return f"Without effect in these runs, the same as {joint.title} in every figure: {', '.join(same)}."

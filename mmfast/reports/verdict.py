"""Sentences about a comparison, each no stronger than what the runs support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmfast.experiments.differences import Estimate
from mmfast.experiments.findings import JOINT, Findings, Margin, find
from mmfast.experiments.journal import with_tuples
from mmfast.experiments.summary import Summary, highest
from mmfast.methods import METHODS

# What the words of a verdict mean.
EXPLANATION = (
    "How much a modality is used is its mean Shapley value over samples that have all, of M for all together "
    "where every prediction is right, and not 0 for one that changes no prediction; the points it adds are "
    "its Shapley value of the accuracy itself, 0 for such a one; what is unlearnt is how far a linear probe "
    "on its encoder's features stays below one on those of the encoder trained alone, in points of accuracy, "
    "one at least. ± is half of the 95% interval over seeds and test samples, and where intervals overlap "
    "nothing is claimed."
)

# A difference between validation and test data that is worth a word.
_GAP = 0.05


def verdict(summaries: Sequence[Summary], findings: Findings | None = None) -> str:
    """Return which modality joint training uses least and what it leaves unlearnt, "" without joint runs."""
    findings = find(summaries) if findings is None else findings
    use = findings.use.get(JOINT, {})
    if len(use) < 2:
        return ""
    least, neglected = findings.least_used(JOINT), findings.neglected(JOINT)
    told = _use_text(use, least, findings.gain.get(JOINT, {}))
    text = f"Joint training {told}"
    if next(iter(use.values())).num_seeds < 2:
        # The interval is that of the samples alone.
        text = f"In this one run joint training {told}"
    gaps = findings.unlearnt.get(JOINT)
    if not gaps:
        return f"{text}."
    if next(iter(gaps.values())).num_seeds < 2:
        return f"{text}. What it leaves unlearnt is not told from one seed: give more."
    if not neglected:
        if any(gap.low > 0 for gap in gaps.values()):
            return f"{text}, and leaves less than a point of any modality clearly unlearnt."
        each = ", ".join(f"{name} {gap.text(100, 1)}" for name, gap in gaps.items())
        return (
            f"{text}, and leaves nothing of any modality unlearnt that these runs can tell ({each} points)."
        )
    parts = [
        f"{gap.text(100, 1)} points of {'it' if name == least else name}" for name, gap in neglected.items()
    ]
    return f"{text} and leaves {_listed(parts)} unlearnt."


def _use_text(use: Mapping[str, Estimate], least: str | None, gain: Mapping[str, Estimate]) -> str:
    if least is not None:
        adds = f"; it adds {gain[least].text(100, 1)} points of accuracy" if least in gain else ""
        return f"uses {least} least ({use[least].text()} of {len(use)}{adds})"
    means = [each.mean for each in use.values()]
    low, high = f"{min(means):.2f}", f"{max(means):.2f}"
    span = f"each {low}" if low == high else f"{low} to {high}"
    return f"uses no modality clearly less than all others ({span} of {len(use)})"


def ranking(summaries: Sequence[Summary], findings: Findings | None = None) -> str:
    """Return which methods lie above or below joint training, and above every simple baseline."""
    findings = find(summaries) if findings is None else findings
    ended = [summary for summary in summaries if summary.runs]
    if len(ended) < 2:
        return ""
    best = highest(ended)
    figure = f"{best.title}, {100 * best.mean_accuracy:.1f}%"
    margins = findings.over_joint or findings.over_baselines
    if not margins:
        return f"Highest accuracy: {figure}."
    if all(len(summary.runs) == 1 for summary in ended):
        return (
            f"Highest accuracy in this one run: {figure}. One seed does not tell methods apart, as another "
            "may rank them otherwise: give more."
        )
    parts = [f"Highest accuracy: {figure}."]
    if findings.over_joint:
        joint = next(summary for summary in ended if summary.name == JOINT)
        parts.append(_against_joint(joint, findings.over_joint))
    if text := _against_baselines(findings.over_baselines):
        parts.append(text)
    return " ".join(parts)


def _against_joint(joint: Summary, margins: Mapping[str, Margin]) -> str:
    clear = {name: margin for name, margin in margins.items() if margin.is_clear}
    of = f"Joint ({100 * joint.mean_accuracy:.1f}%) at 95%, Holm-corrected over {_count(margins)}"
    above = _ranked(clear, lambda margin: margin.estimate.mean > 0)
    below = _ranked(clear, lambda margin: margin.estimate.mean < 0)
    if not above and not below:
        return f"No method is told apart from {of}."
    found = f"Better than {of}: {above}." if above else f"No method is better than {of}."
    return f"{found} Worse: {below}." if below else found


def _against_baselines(margins: Mapping[str, Margin]) -> str:
    if not margins:
        return ""
    clear = {name: margin for name, margin in margins.items() if margin.is_clear}
    if not clear:
        return "None is better than every simple baseline."
    return f"Better than every simple baseline: {_listed([METHODS[name].title for name in clear])}."


def _ranked(margins: Mapping[str, Margin], chosen: Callable[[Margin], bool]) -> str:
    kept = {name: margin for name, margin in margins.items() if chosen(margin)}
    order = sorted(kept, key=lambda name: -abs(kept[name].estimate.mean))
    points = [f"{METHODS[name].title} by {_points(kept[name].estimate)}" for name in order]
    return ", ".join(points) + (" points" if points else "")


def _points(estimate: Estimate) -> str:
    return f"{100 * abs(estimate.mean):.1f} ± {100 * estimate.half_width:.1f}"


def _count(margins: Mapping[str, Margin]) -> str:
    return f"{len(margins)} methods" if len(margins) > 1 else "one method"


def _listed(parts: Sequence[str]) -> str:
    """Return "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


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


def idle_sentence(summaries: Sequence[Summary]) -> str:
    """Return which methods gave the joint model itself, as where a run ends before they intervene."""
    same = [summary.title for summary in _idle(summaries)]
    if not same:
        return ""
    joint = METHODS[JOINT].title
    return f"Without effect in these runs, the same as {joint} in every figure: {', '.join(same)}."


def _idle(summaries: Sequence[Summary]) -> list[Summary]:
    joint = next((s for s in summaries if s.name == JOINT and s.runs), None)
    if joint is None:
        return []
    figures = [entry["metrics"] for entry in joint.runs]
    return [s for s in summaries if s is not joint and [e["metrics"] for e in s.runs] == figures]


def early_sentence(summaries: Sequence[Summary]) -> str:
    """Return of how many runs the weights are of an epoch before their method first acts.

    Validation data select the epoch, and may prefer one in which the method still trains as Joint does, or
    the run ends before: its figures say nothing of the method then.
    """
    idle, never, early = _idle(summaries), list[str](), list[str]()
    for summary in (summary for summary in summaries if summary not in idle):
        runs = [entry for entry in summary.runs if _last_of(entry) <= _joint_epochs(entry)]
        if runs and all(entry["epochs"] <= _joint_epochs(entry) for entry in summary.runs):
            never.append(summary.title)
        elif runs:
            plural = "s" * (len(summary.runs) > 1)
            early.append(f"{len(runs)} of {len(summary.runs)} run{plural} of {summary.title}")
    joint, found = METHODS[JOINT].title, list[str]()
    if never:
        found.append(
            f"Too short for the method to act, so that it trained as {joint} does: {_listed(never)}."
        )
    if early:
        found.append(
            f"In {_listed(early)} validation data chose weights from before the method acts, when it trains "
            f"as {joint} does."
        )
    return " ".join(found)


def gap_sentence(summaries: Sequence[Summary]) -> str:
    """Return by how much joint training is better on validation data than on the test set, if clearly.

    The best of many epochs is a little better where it was selected; more are few samples, or data of another
    kind.
    """
    joint = next((s for s in summaries if s.name == JOINT and s.runs), None)
    selected = [_selected_accuracy(entry) for entry in joint.runs] if joint is not None else []
    known = [accuracy for accuracy in selected if accuracy is not None]
    if joint is None or len(known) < len(joint.runs):
        return ""
    accuracy = statistics.fmean(known)
    gap = accuracy - joint.mean_accuracy
    if gap < _GAP:
        return ""
    return (
        f"Validation data, by which weights are selected, give {joint.title} {100 * accuracy:.1f}%, "
        f"{100 * gap:.1f} points more than the test set: what is best on the one need not be so on the other."
    )


def _selected_accuracy(entry: Mapping[str, Any]) -> float | None:
    """Return a run's accuracy on validation data in the epoch whose weights it kept; None if not told."""
    last = max((entry.get("kept_epochs") or {}).values(), default=0)
    found = entry["history"][last - 1].get("val", {}).get("accuracy") if last else None
    return None if found is None else float(found)


def _last_of(entry: Mapping[str, Any]) -> float:
    """Return the last epoch whose weights a run kept; runs of before do not tell."""
    return max((entry.get("kept_epochs") or {}).values(), default=math.inf)


def _joint_epochs(entry: Mapping[str, Any]) -> float:
    return METHODS[entry["method"]](**with_tuples(entry.get("config", {}))).joint_epochs

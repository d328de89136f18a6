"""What the pictures of a comparison are headed by: the answer, as far as the runs support one."""

from __future__ import annotations

from collections.abc import Sequence

from mmfast.experiments.findings import JOINT, Findings
from mmfast.experiments.summary import Summary, highest, mean_std


def accuracy_title(summaries: Sequence[Summary], findings: Findings) -> str:
    """Return which method reaches most, and whether that is above joint training and the simple baselines."""
    best = highest(summaries)
    figure = f"{mean_std(best.accuracy)}%"
    if len(summaries) == 1:
        return f"{best.title} reaches {figure}"
    if len(best.runs) == 1:
        return f"In this one run {best.title} is highest: {figure}"
    text = f"{best.title} is highest: {figure}"
    marks, margin = findings.marks(best.name), findings.over_joint.get(best.name)
    if "†" in marks:
        return f"{text}, above {'joint training and ' if '*' in marks else ''}every simple baseline"
    if "*" in marks:
        return f"{text}, above joint training"
    return f"{text}, not told apart from joint training" if margin is not None else text


def contribution_title(findings: Findings) -> str:
    """Return which modality joint training uses least, where intervals tell."""
    least = findings.least_used(JOINT)
    if least is None:
        return "What each modality contributes"
    use = findings.use[JOINT]
    if use[least].num_seeds < 2:
        return f"In this one run joint training uses {least} least: {use[least].text()} of {len(use)}"
    return f"Joint training uses {least} least: {use[least].text()} of {len(use)}"


def probe_title(findings: Findings) -> str:
    """Return what joint training leaves unlearnt, where intervals tell."""
    gaps, neglected = findings.unlearnt.get(JOINT, {}), findings.neglected(JOINT)
    if neglected:
        parts = [f"{gap.text(100, 1)} points of {name}" for name, gap in neglected.items()]
        return f"Joint training leaves {' and '.join(parts)} unlearnt"
    if gaps and all(gap.num_seeds > 1 for gap in gaps.values()):
        if any(gap.low > 0 for gap in gaps.values()):
            return "Joint training leaves less than a point of any modality clearly unlearnt"
        return "Joint training leaves nothing of any modality unlearnt that these runs can tell"
    return "What a linear probe reads out of each encoder"


def missing_title(summaries: Sequence[Summary]) -> str:
    """Return what is left to joint training, or to the only method, without the modality it misses most."""
    chosen = next((s for s in summaries if s.name == JOINT), summaries[0])
    known = {name: value for name, value in chosen.missing.items() if value is not None}
    if not known or (chosen.name != JOINT and len(summaries) > 1):
        return "What is left of the accuracy where a modality is missing"
    worst = min(known, key=lambda name: known[name])
    whole, left = 100 * chosen.mean_accuracy, 100 * known[worst]
    return f"{chosen.title} reaches {whole:.1f}% with all modalities, {left:.1f}% without {worst}"

"""What the runs of a comparison support: neglect, use of modalities, differences between methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmfast.experiments.differences import LEVEL, Estimate, difference, holm, mean_of
from mmfast.experiments.summary import Answers, Summary
from mmfast.methods import METHODS

# Smaller losses of accuracy are not called neglect.
NEGLIGIBLE = 0.01
# What neglect is measured on, and what differences are from.
JOINT = "joint"
# Whose encoders were trained alone; the first that there is.
_APART = ("unimodal", "ensemble", "frozen-unimodal")


@dataclass(frozen=True)
class Margin:
    """How far a method's accuracy lies above another's.

    Attributes:
        over: name of the other method.
        estimate: of the difference, paired by seed and test sample.
        p: corrected by Holm over the methods that are held against the same.
    """

    over: str
    estimate: Estimate
    p: float

    @property
    def is_clear(self) -> bool:
        """Whether it is told from chance; of one seed nothing is."""
        return self.estimate.num_seeds > 1 and self.p < 1 - LEVEL

    def as_dict(self) -> dict[str, Any]:
        return {"over": self.over, **self.estimate.as_dict(), "corrected_p": self.p}


@dataclass(frozen=True)
class Findings:
    """Estimates by the name of a method, in [0, 1] of accuracy; modalities by name.

    Attributes:
        use: mean Shapley value of each modality over the samples that have all, of M where all are right.
        gain: mean Shapley value of the accuracy itself, over the same samples: 0 for a modality that changes
            no prediction, whose `use` is not.
        unlearnt: how far the probe on a modality's features lies below the one on those of the encoder that
            was trained alone, of methods that train encoders together.
        over_joint: how far each method's accuracy lies above that of joint training.
        over_baselines: the same over the simple baseline that it is closest to, or furthest below: better
            than this one is better than each (Berger's intersection-union test, Technometrics 1982). Only
            where every baseline has runs.
    """

    use: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    gain: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    unlearnt: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    over_joint: Mapping[str, Margin] = field(default_factory=dict)
    over_baselines: Mapping[str, Margin] = field(default_factory=dict)

    def neglected(self, method: str) -> dict[str, Estimate]:
        """Return the modalities that a method neglects, most first, Holm-corrected over modalities.

        Of one seed nothing is said.
        """
        gaps = self.unlearnt.get(method, {})
        corrected = holm([gap.p for gap in gaps.values()])
        found = {
            name: gap
            for (name, gap), p in zip(gaps.items(), corrected, strict=True)
            if gap.num_seeds > 1 and gap.low > 0 and p < 1 - LEVEL and gap.mean > NEGLIGIBLE
        }
        return dict(sorted(found.items(), key=lambda item: -item[1].mean))

    def least_used(self, method: str) -> str | None:
        """Return the modality whose interval lies below those of all others, if there is one."""
        shares = self.use.get(method, {})
        if len(shares) < 2:
            return None
        lowest = min(shares, key=lambda name: shares[name].mean)
        others = [share.low for name, share in shares.items() if name != lowest]
        return lowest if shares[lowest].high < min(others) else None

    def marks(self, method: str) -> str:
        """Return the marks of a method in tables: * above joint training, † above every simple baseline."""
        above = [
            mark
            for mark, margins in (("*", self.over_joint), ("†", self.over_baselines))
            if (margin := margins.get(method)) is not None and margin.is_clear and margin.estimate.mean > 0
        ]
        return "".join(above)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, by method."""
        found: dict[str, dict[str, Any]] = {}
        for name in ("use", "gain", "unlearnt"):
            for method, by_modality in getattr(self, name).items():
                told = {modality: each.as_dict() for modality, each in by_modality.items()}
                if told:
                    found.setdefault(method, {})[name] = told
        for name in ("over_joint", "over_baselines"):
            for method, margin in getattr(self, name).items():
                found.setdefault(method, {})[name] = margin.as_dict()
        return found


def find(summaries: Sequence[Summary]) -> Findings:
    """Return what summaries support; nothing of those whose answers to each test sample are not known."""
    known = {summary.name: summary for summary in summaries if summary.answers is not None}
    modalities = list(next(iter(known.values())).contribution) if known else []
    return Findings(
        use={name: _means(each.answers, "contributions", modalities) for name, each in known.items()},
        gain={name: _means(each.answers, "gains", modalities) for name, each in known.items()},
        unlearnt=_unlearnt(known, modalities),
        over_joint=_over_joint(known),
        over_baselines=_over_baselines(known),
    )


def _means(answers: Answers | None, table: str, modalities: Sequence[str]) -> dict[str, Estimate]:
    phi = getattr(answers, table)
    if phi is None:
        return {}
    # Samples that lack one say what the others do without it, and their values add up to less.
    phi = np.where(np.isnan(phi).any(1, keepdims=True), np.nan, phi)
    found = {name: mean_of(phi[:, m], unit=1.0) for m, name in enumerate(modalities)}
    return {name: each for name, each in found.items() if each is not None}


def _unlearnt(known: Mapping[str, Summary], modalities: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    found: dict[str, dict[str, Estimate]] = {}
    for name, summary in known.items():
        if name in _APART:
            continue
        pairs = [_shared(known[apart], summary, "probes") for apart in _APART if apart in known]
        # The one with most seeds that both have; the first of several.
        own, together = max(pairs, key=_num_seeds, default=(None, None))
        if own is None or together is None:
            continue
        gaps = {m: difference(own[:, i], together[:, i]) for i, m in enumerate(modalities)}
        found[name] = {m: gap for m, gap in gaps.items() if gap is not None}
    return found


def _num_seeds(pair: tuple[np.ndarray | None, np.ndarray | None]) -> int:
    return 0 if pair[0] is None else len(pair[0])


def _over_joint(known: Mapping[str, Summary]) -> dict[str, Margin]:
    if JOINT not in known:
        return {}
    found = {name: _margin(known[name], known[JOINT]) for name in known if name != JOINT}
    return _corrected({name: margin for name, margin in found.items() if margin is not None})


def _over_baselines(known: Mapping[str, Summary]) -> dict[str, Margin]:
    simple = [name for name, method in METHODS.items() if method.is_baseline]
    if not set(simple) <= set(known):
        return {}
    found = {}
    for name, summary in known.items():
        if METHODS[name].is_baseline:
            continue
        margins = [margin for other in simple if (margin := _margin(summary, known[other])) is not None]
        if margins and len(margins) == len(simple):
            # Below one of them it is not above all, however clearly.
            found[name] = max(margins, key=lambda margin: (margin.estimate.mean <= 0, _order(margin)))
    return _corrected({n: replace(m, p=m.p if m.estimate.mean > 0 else 1.0) for n, m in found.items()})


def _order(margin: Margin) -> float:
    """Return what is largest of the margin that says least for a method."""
    return margin.p if margin.estimate.mean > 0 else -margin.estimate.mean


def _margin(summary: Summary, other: Summary) -> Margin | None:
    mine, theirs = _shared(summary, other, "right")
    if mine is None or theirs is None:
        return None
    estimate = difference(mine, theirs)
    if estimate is None:
        return None
    # Of one seed nothing is told apart, and it counts for no other's correction.
    return Margin(other.name, estimate, estimate.p if estimate.num_seeds > 1 else 1.0)


def _corrected(margins: Mapping[str, Margin]) -> dict[str, Margin]:
    values = holm([margin.p for margin in margins.values()])
    return {name: replace(margins[name], p=p) for name, p in zip(margins, values, strict=True)}


def _shared(one: Summary, other: Summary, table: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return a table of two summaries' answers over the seeds and samples that both have; None without."""
    assert one.answers is not None
    assert other.answers is not None
    seeds = [seed for seed in one.answers.seeds if seed in other.answers.seeds]
    if not seeds:
        return None, None
    found = [getattr(each.of(seeds), table) for each in (one.answers, other.answers)]
    if any(each is None for each in found) or found[0].shape != found[1].shape:
        return None, None
    return found[0], found[1]

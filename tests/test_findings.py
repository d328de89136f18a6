"""What a comparison claims: only what the answers to each test sample support."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mmfast.experiments.findings import find
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.summary import summarize
from mmfast.methods import METHODS
from mmfast.reports.verdict import ranking, verdict

NAMES = ("audio", "image")


def made(accuracy=0.7, probes=(0.5, 0.6), shares=(0.6, 0.8), num=1000, seed=0, probed=True):
    """An outcome of about these figures; the same samples are the easy ones for every run."""
    draw = np.random.default_rng(seed)
    # Which samples are easy is the same for all runs, save for a tenth.
    ease = np.random.default_rng(99).random(num)
    ease = np.where(draw.random(num) < 0.1, draw.random(num), ease)
    labels = np.zeros(num, np.int64)
    predicted = np.where(ease < accuracy, 0, 1)
    phi = np.stack([2 * share * (ease < 0.5) for share in shares], 1).astype(np.float32)
    present = np.ones((num, len(shares)), bool)
    right = np.stack([ease < probe for probe in probes])
    probabilities = np.eye(2, dtype=np.float32)[predicted]
    return Outcome(probabilities, predicted, labels, phi, present, right, right if probed else None)


def runs_of(figures, names=NAMES):
    """Entries and outcomes of {method: [outcome of each seed]}."""
    outcomes = {(m, seed): each for m, row in figures.items() for seed, each in enumerate(row)}
    entries = []
    for (method, seed), each in outcomes.items():
        accuracy = float(each.correct.mean())
        metrics = {"accuracy": accuracy, "macro_f1": accuracy, "loss": 1.0}
        by_name = dict(zip(names, each.contributions.mean(0).tolist(), strict=True))
        entries.append(
            {
                "method": method,
                "seed": seed,
                "metrics": metrics | {"modality_accuracy": by_name, "contribution": by_name},
                "protocol": METHODS[method].learner.protocol,
                "seconds": 1.0,
                "seconds_per_epoch": 0.05,
                "history": [],
                **each.figures(names),
            }
        )
    return summarize(entries, outcomes=outcomes)


def seeds(count=5, **figures):
    return [made(seed=seed, **figures) for seed in range(count)]


def test_neglect_is_what_the_probe_loses_against_the_encoder_trained_alone():
    summaries = runs_of(
        {"joint": seeds(probes=(0.45, 0.6)), "unimodal": seeds(probes=(0.55, 0.6)), "mla": seeds()}
    )
    findings = find(summaries)
    assert list(findings.neglected("joint")) == ["audio"]
    gap = findings.unlearnt["joint"]["audio"]
    assert gap.mean == pytest.approx(0.1, abs=0.03)
    assert 0 < gap.half_width < 0.05
    assert list(findings.neglected("mla")) == ["audio"]
    assert "unimodal" not in findings.unlearnt
    use = findings.use["joint"]["audio"]
    assert verdict(summaries) == (
        f"Joint training uses audio least ({use.mean:.2f} ± {use.half_width:.2f} of 2) and leaves "
        f"{100 * gap.mean:.1f} ± {100 * gap.half_width:.1f} points of it unlearnt."
    )


def test_what_the_least_used_adds_to_the_accuracy_is_told():
    def with_gains(each):
        # As under the size of a coalition, but for a modality that decides alone.
        gains = np.stack([np.zeros(len(each)), each.correct - 0.5], 1).astype(np.float32)
        return dataclasses.replace(each, gains=gains)

    rows = {"joint": [with_gains(each) for each in seeds()], "unimodal": seeds()}
    found = find(runs_of(rows))
    assert found.gain["joint"]["audio"].mean == 0
    assert found.gain["joint"]["image"].mean == pytest.approx(
        np.mean([each.correct.mean() for each in rows["joint"]]) - 0.5
    )
    assert found.gain["unimodal"] == {}
    assert "gain" in found.as_dict()["joint"]
    assert "gain" not in found.as_dict()["unimodal"]
    added = found.gain["joint"]["audio"].text(100, 1)
    assert f" of 2; it adds {added} points of accuracy)" in verdict(runs_of(rows))
    # Of a run of before, which does not tell, nothing is.
    rows["joint"][2] = dataclasses.replace(rows["joint"][2], gains=None)
    assert find(runs_of(rows)).gain["joint"] == {}
    assert "it adds" not in verdict(runs_of(rows))


def test_the_least_used_need_not_be_the_neglected():
    summaries = runs_of({"joint": seeds(probes=(0.5, 0.5)), "unimodal": seeds(probes=(0.5, 0.6))})
    assert verdict(summaries).endswith("points of image unlearnt.")
    assert "uses audio least" in verdict(summaries)
    both = runs_of({"joint": seeds(probes=(0.4, 0.5)), "ensemble": seeds(probes=(0.55, 0.6))})
    assert list(find(both).neglected("joint")) == ["audio", "image"]
    assert " points of it and " in verdict(both)
    assert verdict(both).endswith("points of image unlearnt.")


def test_nothing_is_claimed_where_intervals_overlap():
    summaries = runs_of(
        {"joint": seeds(probes=(0.5, 0.6), shares=(0.7, 0.71)), "unimodal": seeds(probes=(0.503, 0.6))}
    )
    said = verdict(summaries)
    assert said.startswith("Joint training uses no modality clearly less than all others (0.")
    gaps = find(summaries).unlearnt["joint"]
    # How much could have been told is seen by the intervals.
    assert said.endswith(
        " of 2), and leaves nothing of any modality unlearnt that these runs can tell "
        f"(audio {100 * gaps['audio'].mean:.1f} ± {100 * gaps['audio'].half_width:.1f}, "
        f"image {100 * gaps['image'].mean:.1f} ± {100 * gaps['image'].half_width:.1f} points)."
    )
    assert find(summaries).neglected("joint") == {}
    # Ten points in one seed and none in the others are not beyond the spread over seeds.
    wild = [made(seed=s, probes=(p, 0.6)) for s, p in enumerate((0.3, 0.5, 0.52, 0.48, 0.5))]
    assert find(runs_of({"joint": wild, "unimodal": seeds(probes=(0.5, 0.6))})).neglected("joint") == {}
    # Nor are five points of a test part of 40 samples.
    few = {"num": 40}
    small = runs_of({"joint": seeds(probes=(0.45, 0.6), **few), "unimodal": seeds(probes=(0.5, 0.6), **few)})
    assert find(small).neglected("joint") == {}


def test_differences_too_small_for_a_word_are_no_neglect():
    large = {"num": 200_000, "count": 3}
    summaries = runs_of(
        {"joint": seeds(probes=(0.5, 0.6), **large), "unimodal": seeds(probes=(0.506, 0.6), **large)}
    )
    assert find(summaries).unlearnt["joint"]["audio"].low > 0
    assert find(summaries).neglected("joint") == {}
    assert verdict(summaries).endswith("and leaves less than a point of any modality clearly unlearnt.")


def test_of_many_modalities_one_that_lags_by_chance_is_not_neglected():
    num = 12
    names = tuple(f"m{m}" for m in range(num))
    joint = seeds(probes=(0.46, *[0.5] * (num - 1)), shares=(0.5,) * num, num=150)
    alone = seeds(probes=(0.5,) * num, shares=(0.5,) * num, num=150)
    summaries = runs_of({"joint": joint, "unimodal": alone}, names)
    findings = find(summaries)
    gap = findings.unlearnt["joint"]["m0"]
    assert gap.low > 0
    assert gap.p < 0.05 < num * gap.p
    assert findings.neglected("joint") == {}


def test_use_is_that_of_samples_that_have_all_modalities():
    from dataclasses import replace

    lacking = []
    for seed in range(3):
        each = made(seed=seed)
        present = each.present.copy()
        present[::2, 1] = False
        # Where image is missing, audio has what there is.
        phi = np.where(present[:, 1:], each.contributions, np.array([[5.0, 0.0]], np.float32))
        lacking.append(replace(each, present=present, contributions=phi.astype(np.float32)))
    use = find(runs_of({"joint": lacking})).use["joint"]
    assert use["audio"].mean == pytest.approx(0.6, abs=0.05)


def test_encoders_trained_alone_are_those_with_most_seeds():
    figures = {
        "joint": seeds(5, probes=(0.45, 0.6)),
        "unimodal": seeds(1),
        "ensemble": seeds(5, probes=(0.55, 0.6)),
    }
    summaries = runs_of(figures)
    assert find(summaries).unlearnt["joint"]["audio"].num_seeds == 5
    # One surviving run of a method does not make all of the comparison one run.
    assert "one run" not in ranking(summaries)


def test_a_method_that_lost_runs_is_not_the_highest():
    summaries = runs_of(
        {"joint": seeds(4, accuracy=0.6), "mla": seeds(4, accuracy=0.7), "di-mml": seeds(2, accuracy=0.9)}
    )
    assert ranking(summaries).startswith("Highest accuracy: MLA, ")


def test_of_one_seed_nothing_is_claimed():
    figures = {
        "joint": seeds(1, probes=(0.2, 0.6)),
        "unimodal": seeds(1, probes=(0.6, 0.6)),
        "mla": seeds(1, accuracy=0.9),
    }
    summaries = runs_of(figures)
    findings = find(summaries)
    assert findings.neglected("joint") == {}
    assert findings.marks("mla") == ""
    assert verdict(summaries).startswith("In this one run joint training uses audio least (")
    assert verdict(summaries).endswith("What it leaves unlearnt is not told from one seed: give more.")
    assert findings.over_joint["mla"].p == 1.0
    assert ranking(summaries).startswith("Highest accuracy in this one run: MLA, ")


def test_without_what_is_needed_less_is_said():
    alone = runs_of({"joint": seeds()})
    assert verdict(alone).endswith("of 2).")
    assert ranking(alone) == ""
    assert verdict(runs_of({"mla": seeds()})) == ""
    unprobed = runs_of({"joint": seeds(probed=False), "unimodal": seeds()})
    assert verdict(unprobed).endswith("of 2).")
    one = runs_of({"joint": [made(probes=(0.5,), shares=(0.6,))]}, names=("audio",))
    assert verdict(one) == ""
    assert find([]).as_dict() == {}


def test_methods_are_marked_where_they_are_better():
    summaries = runs_of(
        {
            "joint": seeds(accuracy=0.6),
            "unimodal": seeds(accuracy=0.5),
            "ensemble": seeds(accuracy=0.65),
            "multi-loss": seeds(accuracy=0.6),
            "frozen-unimodal": seeds(accuracy=0.6),
            "di-mml": seeds(accuracy=0.75),
            "mla": seeds(accuracy=0.64),
        }
    )
    findings = find(summaries)
    marks = {name: findings.marks(name) for name in ("joint", "unimodal", "ensemble", "di-mml", "mla")}
    assert marks == {"joint": "", "unimodal": "", "ensemble": "*", "di-mml": "*†", "mla": "*"}
    assert set(findings.over_joint) == set(marks) - {"joint"} | {"multi-loss", "frozen-unimodal"}
    assert set(findings.over_baselines) == {"di-mml", "mla"}
    # The one that it is closest to.
    assert findings.over_baselines["di-mml"].over == "ensemble"
    assert findings.over_baselines["mla"].over == "ensemble"
    assert findings.over_baselines["mla"].p == 1.0
    # Of baselines that were not run nothing is said.
    few = runs_of({"joint": seeds(accuracy=0.6), "mla": seeds(accuracy=0.75)})
    assert find(few).marks("mla") == "*"
    assert "baseline" not in ranking(few)
    text = ranking(summaries)
    assert "Better than Joint (" in text
    assert "Holm-corrected over 6 methods: DI-MML by " in text
    assert ". Worse: Best unimodal by " in text
    assert text.endswith("Better than every simple baseline: DI-MML.")


def test_correction_counts_the_methods():
    figures = {"joint": seeds(accuracy=0.6, num=400), "mla": seeds(accuracy=0.635, num=400)}
    alone = find(runs_of(figures)).over_joint["mla"]
    assert alone.p == alone.estimate.p
    rest = {name: seeds(accuracy=0.6, num=400) for name in METHODS if name not in figures}
    among = find(runs_of(figures | rest)).over_joint["mla"]
    assert among.estimate.p == alone.estimate.p
    assert among.p == pytest.approx(min(1.0, 9 * alone.p))


def test_methods_are_compared_over_the_seeds_that_both_have():
    figures = {"joint": seeds(5, accuracy=0.6), "mla": seeds(2, accuracy=0.7)}
    assert find(runs_of(figures)).over_joint["mla"].estimate.num_seeds == 2


def test_plain_values_are_for_json():
    import json

    baselines = {name: seeds(2) for name, method in METHODS.items() if method.is_baseline}
    found = find(runs_of({**baselines, "mla": seeds(2)})).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found["mla"]) == {"use", "unlearnt", "over_joint", "over_baselines"}
    assert set(found["mla"]["over_joint"]) == {"over", "mean", "low", "high", "p", "corrected_p"}

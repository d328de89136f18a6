"""Tables at several widths, the sentences under them, and the pictures."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console

from mmfast.experiments.pictures import plot_comparison
from mmfast.experiments.summary import (
    diverged_sentence,
    idle_sentence,
    mean_std,
    neglect_sentence,
    ranking_sentence,
    summarize,
)
from mmfast.experiments.tables import hyphenate, show, show_valuation
from mmfast.methods import METHODS
from mmfast.valuation import Valuation

TWO = {"audio": 0.5, "accelerometer": 0.6}


def entry(method, seed=0, accuracy=0.7, alone=TWO, contribution=None, probe=None, epochs=3):
    contribution = contribution or dict(zip(alone, (0.5, 0.9, *[0.7] * len(alone)), strict=False))
    history = [
        {"stage": "train" if epoch < 2 else "head", "epoch": epoch, "val": {"contribution": contribution}}
        for epoch in range(epochs)
    ]
    metrics = {"accuracy": accuracy, "macro_f1": accuracy - 0.01, "loss": 1.0}
    return {
        "method": method,
        "seed": seed,
        "metrics": metrics | {"modality_accuracy": dict(alone), "contribution": contribution},
        "protocol": METHODS[method].learner.protocol,
        "seconds_per_epoch": 0.05,
        "history": history,
        **({"probe": probe} if probe else {}),
    }


def everything(modalities, seeds=2):
    alone = dict.fromkeys(modalities, 0.5)
    return summarize(
        entry(method, seed, 0.6 + 0.01 * m + 0.02 * seed, alone)
        for m, method in enumerate(METHODS)
        for seed in range(seeds)
    )


def printed(summaries, width):
    stream = io.StringIO()
    console = Console(file=stream, width=width, markup=False, highlight=False)
    show(console, summaries, data="d: 10 samples, a [3]")
    return stream.getvalue()


MODALITIES = {
    1: ("audio",),
    2: ("audio", "accelerometer"),
    4: ("audio", "image", "text", "pose"),
    6: ("fourier", "profile", "karhunen_loeve", "pixel averages", "zernike", "morphology"),
    12: tuple(f"view {m} of protein" for m in range(12)),
}


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("count", MODALITIES)
def test_tables_fit_and_lose_nothing(count, width):
    text = printed(everything(MODALITIES[count]), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    for method in METHODS.values():
        # On a line with figures: no title is broken or cut.
        assert any(method.title in line and "±" in line for line in lines), method.title
    assert "own-head" in text
    assert "masked" in text
    flat = "".join(text.replace("-\n", "").split())
    if count in (1, 4, 6, 12):
        for name in MODALITIES[count]:
            assert name.replace(" ", "") in flat


def test_two_modalities_fit_one_table_at_100_columns():
    lines = printed(everything(MODALITIES[2]), 100).splitlines()
    joint = next(line for line in lines if line.startswith("Joint "))
    assert " ".join(joint.split()) == "Joint 61.0 ± 1.4 60.0 ± 1.4 50.0 50.0 masked 0.50 0.90 0.05"


def test_one_seed_shows_no_deviation():
    text = printed(summarize([entry("joint")]), 80)
    assert "±" not in text
    assert "1 seed" in text


def test_missing_figures_are_dashes():
    text = printed(summarize([entry("joint", alone={"a": None, "b": 0.5})]), 80)
    assert "–" in next(line for line in text.splitlines() if line.startswith("Joint "))


def test_probe_gets_its_columns():
    text = printed(summarize([entry("joint", probe={"audio": 0.81, "accelerometer": 0.82})]), 120)
    assert "probe" in text
    assert "81.0" in text


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("audio", 9, ["audio"]),
        ("audio", None, ["audio"]),
        ("accelerometer", 9, ["accelero-", "meter"]),
        ("pixel averages", 9, ["pixel", "averages"]),
        ("left_wrist_acc", 9, ["left_", "wrist_acc"]),
    ],
)
def test_names_are_broken_where_they_allow_it(name, width, lines):
    assert hyphenate(name, width).split("\n") == lines


def test_mean_and_sample_deviation_over_seeds():
    assert mean_std([0.70, 0.72, 0.74]) == "72.0 ± 2.0"


def test_neglected_is_who_loses_most_in_the_joint_model():
    runs = []
    for seed in range(3):
        runs.append(entry("joint", seed, 0.7, {"audio": 0.30 + 0.01 * seed, "image": 0.6}))
        runs.append(entry("unimodal", seed, 0.6, {"audio": 0.55, "image": 0.61}))
    text = neglect_sentence(summarize(runs))
    assert text.startswith("The joint model neglects audio: alone (masked) it reaches 31.0%")
    assert "trained alone (own-head) 55.0%" in text
    assert "also contributes least: 0.50, against 0.90 of image" in text


def test_no_neglect_within_the_spread_of_seeds():
    runs = []
    for seed, masked in enumerate((0.50, 0.58, 0.54)):
        runs.append(entry("joint", seed, 0.7, {"audio": masked, "image": 0.6}))
        runs.append(entry("unimodal", seed, 0.6, {"audio": 0.55, "image": 0.6}))
    assert "neglects no modality clearly" in neglect_sentence(summarize(runs))


def test_without_unimodal_runs_the_contribution_tells():
    text = neglect_sentence(summarize([entry("joint")]))
    assert text == "In the joint model audio contributes least: 0.50, against 0.90 of accelerometer."
    assert neglect_sentence(summarize([entry("mla")])) == ""


def alike(value, seeds=3, **more):
    return [
        entry("joint", seed, contribution={"a": value, "b": value + 1e-4}, **more) for seed in range(seeds)
    ]


def test_equal_contributions_are_not_ranked():
    told = "In the joint model no modality contributes clearly less than the others: each 0.28."
    assert neglect_sentence(summarize(alike(0.28, alone={"a": 0.5, "b": 0.5}))) == told
    noisy = [
        entry("joint", seed, alone={"a": 0.5, "b": 0.5}, contribution={"a": a, "b": 0.5})
        for seed, a in enumerate((0.3, 0.6, 0.51))
    ]
    told = "In the joint model no modality contributes clearly less than the others: 0.47 to 0.50."
    assert neglect_sentence(summarize(noisy)) == told
    same = [
        entry("joint", seed, contribution={"a": 0.28, "b": 0.28}, alone={"a": 0.5, "b": 0.5})
        for seed in range(2)
    ]
    assert "against" not in neglect_sentence(summarize(same))
    alone = [entry("unimodal", seed, alone={"a": 0.9, "b": 0.5}) for seed in range(3)]
    text = neglect_sentence(summarize(alike(0.28, alone={"a": 0.5, "b": 0.5}) + alone))
    assert text.startswith("The joint model neglects a: alone (masked) it reaches 50.0%")
    assert text.endswith("All the same no modality contributes clearly less than the others: each 0.28.")


def test_one_modality_is_not_compared_with_itself():
    assert neglect_sentence(summarize([entry("joint", alone={"a": 0.5})])) == ""
    runs = [entry("joint", alone={"a": 0.5, "b": None}, contribution={"a": 0.5, "b": None})]
    assert neglect_sentence(summarize(runs)) == ""


def test_one_seed_is_said_to_be_one():
    runs = [
        entry("joint", alone={"a": 0.3, "b": 0.6}),
        entry("unimodal", accuracy=0.6, alone={"a": 0.5, "b": 0.6}),
    ]
    summaries = summarize(runs)
    assert neglect_sentence(summaries).startswith("In this one run the joint model neglects a: ")
    assert ranking_sentence(summaries) == "Best accuracy in this one run: Joint, 70.0%."


def test_methods_within_the_spread_are_level():
    runs = []
    for seed, shift in enumerate((-0.02, 0.0, 0.02)):
        runs.append(entry("joint", seed, 0.6))
        runs.append(entry("di-mml", seed, 0.7 + shift))
        runs.append(entry("mla", seed, 0.69))
    text = ranking_sentence(summarize(runs))
    assert text.startswith("Best accuracy: DI-MML, 70.0 ± 2.0%; seed by seed not told apart from it: MLA.")
    level = [entry(method, seed, 0.8) for method in ("joint", "unimodal", "mla") for seed in range(2)]
    assert ranking_sentence(summarize(level)) == (
        "No method is clearly best: the highest, Joint with 80.0 ± 0.0%, is not above another beyond the "
        "spread over seeds. No other method beats both Joint (80.0%) and Best unimodal (80.0%) beyond the "
        "spread over seeds."
    )
    # Level with the best, and yet far above joint training.
    wild = [0.8, 0.99, 0.85, 0.97, 0.83]
    runs = [entry("mla", seed, accuracy) for seed, accuracy in enumerate(wild)]
    runs += [entry("di-mml", seed, 0.85 + 0.001 * seed) for seed in range(5)]
    runs += [entry("joint", seed, 0.80 + 0.001 * seed) for seed in range(5)]
    text = ranking_sentence(summarize(runs))
    assert text.startswith("No method is clearly best: the highest, MLA with 88.8 ± 8.6%, is not above")
    assert text.endswith("Above Joint (80.2%), in points: DI-MML by +5.0.")


def test_methods_are_compared_over_the_seeds_they_share():
    joint = [0.95, 0.80, 0.82, 0.81, 0.83]
    runs = [entry("joint", seed, a, {"a": 0.7 + 0.03 * seed, "b": 0.6}) for seed, a in enumerate(joint)]
    runs += [entry("mla", 0, 0.9)]
    text = ranking_sentence(summarize(runs))
    assert text.startswith(
        "Over the seed that all methods have, 0: Best accuracy in this one run: Joint, 95.0%."
    )
    text = neglect_sentence(summarize([*runs, entry("unimodal", 0, alone={"a": 0.8, "b": 0.6})]))
    assert text.startswith(
        "With the one seed that both have the joint model neglects a: alone (masked) it reaches 70.0%"
    )
    assert "when trained alone (own-head) 80.0%" in text
    apart = [entry("joint", 0), entry("mla", 1)]
    assert (
        ranking_sentence(summarize(apart)) == "No seed has a result of every method, so they are not ranked."
    )
    ten = [entry("joint", alone={"a": 0.5, "b": 0.5}, contribution={"a": 0.5, "b": 0.6})]
    assert "no modality contributes clearly less" in neglect_sentence(summarize(ten), 10)
    assert "a contributes least" in neglect_sentence(summarize(ten), 1000)


def test_a_sample_or_two_of_a_small_test_part_are_no_neglect():
    runs = [entry("joint", alone={"a": 0.944, "b": 0.6}), entry("unimodal", alone={"a": 0.956, "b": 0.6})]
    assert "neglects no modality clearly" in neglect_sentence(summarize(runs), 90)
    assert "neglects a: " in neglect_sentence(summarize(runs), 9000)


def test_runs_without_figures_are_in_none():
    lost = {"seed": 1, "config": {}, "diverged": "the loss is NaN in epoch 2", "versions": {}}
    runs = [
        entry("joint", 0),
        entry("joint", 2),
        entry("mla", 0, 0.5),
        lost | {"method": "mla"},
        lost | {"method": "di-mml"},
    ]
    summaries = summarize(runs)
    assert [(s.name, len(s.runs), len(s.diverged)) for s in summaries] == [
        ("joint", 2, 0),
        ("di-mml", 0, 1),
        ("mla", 1, 1),
    ]
    assert diverged_sentence(summaries) == (
        "Diverged, and in no figure: DI-MML with seed 1; MLA with seed 1. The first of them: the loss is NaN "
        "in epoch 2."
    )
    assert diverged_sentence(summaries[:1]) == ""
    for width in (80, 100, 140):
        text = printed(summaries, width)
        assert max(map(len, text.splitlines())) <= width
        assert "MLA, 1 of 2 runs" in text
        assert next(line for line in text.splitlines() if line.startswith("DI-MML")).split()[1] == "diverged"
    nothing = printed(summarize([lost | {"method": "mla"}]), 80)
    assert "diverged" in nothing
    assert "Best" not in nothing


def test_ranking_is_by_differences_over_seeds():
    runs = []
    for seed, joint in enumerate((0.60, 0.64, 0.62)):
        runs.append(entry("joint", seed, joint))
        runs.append(entry("unimodal", seed, 0.61))
        runs.append(entry("di-mml", seed, joint + 0.05))
        runs.append(entry("mla", seed, 0.63))
        runs.append(entry("ensemble", seed, 0.50))
    text = ranking_sentence(summarize(runs))
    assert text.startswith("Best accuracy: DI-MML, 67.0 ± 2.0%.")
    assert "Above Joint (62.0%) and Best unimodal (61.0%), in points: DI-MML by +5.0 and +6.0" in text
    # Over Joint MLA lies by 1.0 point, within its deviation of 2.0.
    assert text.endswith("in points: DI-MML by +5.0 and +6.0.")
    assert "Ensemble" not in text


def test_ranking_admits_that_nothing_helps():
    runs = [entry("joint", accuracy=0.9), entry("unimodal", accuracy=0.5), entry("mla", accuracy=0.8)]
    assert "No other method beats both Joint (90.0%)" in ranking_sentence(summarize(runs))


def test_methods_without_effect_are_named():
    runs = [entry("joint"), entry("sample-valuation"), entry("mla", accuracy=0.8)]
    assert idle_sentence(summarize(runs)).endswith("Sample-level valuation.")


def test_summaries_choose_methods_and_seeds():
    runs = [entry(method, seed) for method in ("mla", "joint") for seed in range(3)]
    (only,) = summarize(runs, ["mla"], 2)
    assert (only.name, len(only.accuracy)) == ("mla", 2)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_pictures(count, tmp_path):
    summaries = everything(MODALITIES[count])
    for name in plot_comparison(summaries, tmp_path):
        height, width = imread(tmp_path / name).shape[:2]
        assert 600 <= height <= 2000
        assert 700 <= width <= 2500


def test_pictures_of_one_method_with_missing_figures(tmp_path):
    summaries = summarize([entry("joint", alone={"a": None, "b": 0.4}, epochs=1)])
    assert len(plot_comparison(summaries, tmp_path)) == 3


@pytest.mark.parametrize("count", [1, 2, 7])
def test_valuation_is_shown_and_drawn(count, tmp_path):
    names = tuple(f"m{m}" for m in range(count))
    valuation = Valuation(
        torch.rand(50, count), torch.zeros(50).long(), names, "cardinality", torch.linspace(0, 1, 2**count)
    )
    valuation.plot(tmp_path / "contributions.png")
    assert imread(tmp_path / "contributions.png").shape[1] >= 600
    stream = io.StringIO()
    show_valuation(Console(file=stream, width=80), valuation)
    text = stream.getvalue()
    assert "all modalities" in text
    assert all(name in text for name in names)
    assert ("of 128 coalitions" in text) == (count == 7)

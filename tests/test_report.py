"""Tables at several widths, the sentences under them, and the pictures."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console

from mmfast.methods import METHODS
from mmfast.plots import plot_comparison
from mmfast.report import hyphenate, show, show_valuation
from mmfast.summary import idle_sentence, mean_std, neglect_sentence, ranking_sentence, summarize
from mmfast.valuation import Valuation

TWO = {"audio": 0.5, "accelerometer": 0.6}
OWN_HEAD = {"unimodal", "ensemble", "multi-loss", "frozen-unimodal", "di-mml", "mla"}


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
        "protocol": "own-head" if method in OWN_HEAD else "masked",
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

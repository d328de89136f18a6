"""Tables at several widths, the sentences under them, and the pictures."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.image import imread
from rich.console import Console

from mmfast.experiments.summary import mean_std, summarize
from mmfast.methods import METHODS
from mmfast.reports.pictures import plot_comparison
from mmfast.reports.tables import hyphenate, show, show_valuation
from mmfast.reports.verdict import diverged_sentence, early_sentence, gap_sentence, idle_sentence
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
    assert " ".join(joint.split()) == "Joint 61.0 ± 1.4 60.0 ± 1.4 0.05 50.0 50.0 masked 0.50 0.90"


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


def test_methods_without_effect_are_named():
    runs = [entry("joint"), entry("sample-valuation"), entry("mla", accuracy=0.8)]
    assert idle_sentence(summarize(runs)).endswith("Sample-level valuation.")


def test_runs_that_kept_an_epoch_before_their_method_acts_are_told():
    def kept(method, seed, epoch, **config):
        made = entry(method, seed, accuracy=0.8) | {"config": METHODS[method](**config).config()}
        return made | {"kept_epochs": {"audio": epoch, "pose": epoch}, "epochs": 50}

    runs = [entry("joint", seed) for seed in range(2)]
    runs += [kept("sample-valuation", seed, 5 + seed, warmup=5) for seed in range(2)]
    runs += [kept("diagnose-relearn", seed, 21, epochs=[20, 40]) for seed in range(2)]
    runs += [kept("modality-valuation", 0, 6, warmup=5), kept("mla", 0, 1)]
    assert early_sentence(summarize(runs)) == (
        "In 1 of 2 runs of Sample-level valuation and 2 of 2 runs of Diagnose & re-learn validation data "
        "chose weights from before the method acts, when it trains as Joint does."
    )
    # Runs of before do not tell what they kept.
    assert early_sentence(summarize([entry("joint"), entry("sample-valuation")])) == ""
    short = [kept("modality-valuation", 0, 6, warmup=50), kept("diagnose-relearn", 0, 2, epochs=[])]
    short = [made | {"epochs": 50} for made in short]
    assert early_sentence(summarize(short)) == (
        "Too short for the method to act, so that it trained as Joint does: Modality-level valuation and "
        "Diagnose & re-learn."
    )


def test_validation_data_of_another_kind_are_told():
    def selected(seed, on_validation, epoch=2):
        made = entry("joint", seed, accuracy=0.7)
        made["history"] = [{"val": {"accuracy": value}} for value in (0.1, on_validation, 0.2)]
        return made | {"kept_epochs": {"audio": epoch, "accelerometer": epoch}}

    assert gap_sentence(summarize([selected(0, 0.82), selected(1, 0.80)])) == (
        "Validation data, by which weights are selected, give Joint 81.0%, 11.0 points more than the test "
        "set: what is best on the one need not be so on the other."
    )
    assert gap_sentence(summarize([selected(0, 0.74), selected(1, 0.74)])) == ""
    assert gap_sentence(summarize([selected(0, 0.9), selected(1, 0.9, epoch=1)])) == ""
    # Runs of before do not tell.
    assert gap_sentence(summarize([selected(0, 0.9), entry("joint", 1)])) == ""
    assert gap_sentence(summarize([entry("mla")])) == ""


@pytest.mark.parametrize("width", [80, 110])
@pytest.mark.parametrize("count", MODALITIES)
def test_no_cell_is_cut_off(count, width):
    """All that can be known: calibration, cost, probes, missing modalities, runs that were lost, marks."""
    alone = dict.fromkeys(MODALITIES[count], 0.5)
    known = {"ece": 0.1, "probe": alone, "missing": alone, "seconds": 12.5, "seconds_per_epoch": 0.25}
    made = [entry(method, seed, 0.6 + 0.02 * seed, alone) | known for method in METHODS for seed in range(2)]
    lost = {"seed": 2, "config": {}, "diverged": "the loss is NaN in epoch 2", "versions": {}}
    made += [lost | {"method": method} for method in METHODS]
    text = printed(summarize(made), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for figure in ("61.0 ± 1.4", "1.0x", " 0.25", "10.0"):
        assert text.count(figure) >= len(METHODS)


def test_summaries_choose_methods_and_seeds():
    runs = [entry(method, seed) for method in ("mla", "joint") for seed in range(3)]
    (only,) = summarize(runs, ["mla"], 2)
    assert (only.name, len(only.accuracy)) == ("mla", 2)


@pytest.mark.parametrize("count", [1, 2, 12])
def test_pictures(count, tmp_path):
    summaries = everything(MODALITIES[count])
    for picture in plot_comparison(summaries, tmp_path):
        height, width = imread(tmp_path / picture.name).shape[:2]
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

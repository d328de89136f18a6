"""Pictures of a comparison: what their titles claim, dots that hide no other, fonts, and names that fit."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

import matplotlib
from matplotlib import font_manager

from mmfast import plots
from mmfast.experiments.differences import Estimate
from mmfast.experiments.findings import Findings, Margin
from mmfast.experiments.summary import summarize
from mmfast.methods import METHODS
from mmfast.reports import picture_titles as titles
from mmfast.reports.picture_parts import short, swarm, wrapped
from mmfast.reports.pictures import plot_comparison


def summaries(accuracies, missing=None):
    """Summaries of methods with an accuracy a seed."""
    return summarize(
        {
            "method": method,
            "seed": seed,
            "metrics": {
                "accuracy": accuracy,
                "macro_f1": accuracy,
                "modality_accuracy": {"a": 0.4, "b": 0.5},
                "contribution": {"a": 0.5, "b": 0.9},
            },
            "missing": missing or {"a": 0.6, "b": 0.3},
            "protocol": METHODS[method].learner.protocol,
            "seconds": 1.0,
            "seconds_per_epoch": 0.5,
            "history": [
                {"stage": "train", "epoch": e, "val": {"contribution": {"a": 0.4, "b": 0.8}}} for e in (0, 1)
            ],
            "kept_epochs": {"a": 2, "b": 2},
        }
        for method, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    )


def estimate(mean, half_width, num_seeds=3, p=0.001):
    return Estimate(mean, half_width, p, num_seeds)


MLA_ABOVE = {"joint": (0.6, 0.62, 0.61), "mla": (0.70, 0.72, 0.71)}


@pytest.mark.parametrize(
    ("joint", "baselines", "end"),
    [
        (0.001, 0.001, ", above joint training and every simple baseline"),
        (0.001, 0.2, ", above joint training"),
        (0.2, 0.2, ", not told apart from joint training"),
    ],
)
def test_the_highest_accuracy_is_claimed_as_far_as_tests_go(joint, baselines, end):
    margins = [{"mla": Margin("joint", estimate(0.1, 0.02), p)} for p in (joint, baselines)]
    findings = Findings(over_joint=margins[0], over_baselines=margins[1])
    assert titles.accuracy_title(summaries(MLA_ABOVE), findings) == f"MLA is highest: 71.0 ± 1.0%{end}"


def test_of_one_seed_or_one_method_nothing_is_claimed():
    found = summaries({"joint": (0.6,), "mla": (0.7,)})
    assert titles.accuracy_title(found, Findings()) == "In this one run MLA is highest: 70.0%"
    assert titles.accuracy_title(found[:1], Findings()) == "Joint reaches 60.0%"


def test_use_and_neglect_are_claimed_where_intervals_tell():
    use = {"a": estimate(0.5, 0.02), "b": estimate(0.9, 0.02)}
    unlearnt = {"a": estimate(0.037, 0.011), "b": estimate(0.0, 0.02)}
    clear = Findings(use={"joint": use}, unlearnt={"joint": unlearnt})
    assert titles.contribution_title(clear) == "Joint training uses a least: 0.50 ± 0.02 of 2"
    assert titles.probe_title(clear) == "Joint training leaves 3.7 ± 1.1 points of a unlearnt"
    vague = Findings(
        use={"joint": use | {"a": estimate(0.5, 0.5)}}, unlearnt={"joint": {"a": estimate(0.03, 0.04)}}
    )
    assert titles.contribution_title(vague) == "What each modality contributes"
    assert "nothing of any modality" in titles.probe_title(vague)
    assert titles.probe_title(Findings()) == "What a linear probe reads out of each encoder"


def test_what_is_left_without_a_modality_is_told_of_joint_training():
    found = summaries(MLA_ABOVE)
    expected = "Joint reaches 61.0% with all modalities, 30.0% without b"
    assert titles.missing_title(found) == expected
    assert titles.missing_title(found[1:]).startswith("MLA reaches 71.0%")


def test_pictures_tell_their_figures_in_words(tmp_path):
    pictures = {picture.name: picture for picture in plot_comparison(summaries(MLA_ABOVE), tmp_path)}
    assert list(pictures) == ["accuracy.png", "contributions.png", "missing.png", "modality_accuracy.png"]
    assert pictures["accuracy.png"].text == "Test accuracy: Joint 61.0%; MLA 71.0%."
    assert "MLA a 60.0, b 30.0" in pictures["missing.png"].text
    assert "Joint a 0.50, b 0.90" in pictures["contributions.png"].text


def test_pictures_that_are_of_other_runs_do_not_stay(tmp_path):
    (tmp_path / "probes.png").touch()
    plot_comparison(summaries(MLA_ABOVE), tmp_path)
    assert not (tmp_path / "probes.png").exists()


def test_no_dot_hides_another():
    values = [70.0, 70.0, 70.0, 70.05, 72.0, 70.0]
    places = list(zip(values, swarm(values, 0.1), strict=True))
    for i, (x, y) in enumerate(places):
        assert not any(abs(x - other) < 0.1 and y == row for other, row in places[:i])
    assert swarm([1.0, 2.0, 3.0], 0.1) == [0, 0, 0]
    assert sorted(swarm([1.0] * 3, 0.1)) == [-1, 0, 1]


def test_names_and_titles_fit():
    assert short("accelerometer") == "accelerometer"
    long = "microphone array mounted on the left wrist"
    assert len(short(long, 20)) == 20
    assert (short(long, 20)[:6], short(long, 20)[-5:]) == ("microp", "wrist")
    assert wrapped("one two three", 7) == ["one two", "three"]
    # Letters of double width.
    assert wrapped("日本 日本 日本", 9) == ["日本 日本", "日本"]


@pytest.fixture
def no_other_fonts(monkeypatch):
    """A machine with fonts for ASCII alone."""
    monkeypatch.setattr(plots, "_letters_of", lambda path: frozenset(map(chr, range(32, 127))))
    plots._families.cache_clear()
    yield
    plots._families.cache_clear()


def test_letters_that_no_font_has_are_told_once_with_what_to_install(no_other_fonts, recwarn):
    with plots.fonts_for(["audio", "日本", "نص"]) as note:
        pass
    assert note.startswith("Pictures show boxes in place of ص ن 日 本 (Arabic, CJK): no installed font has")
    assert "fonts-noto-cjk" in note
    with plots.fonts_for(["audio"]) as note:
        assert note == ""


def test_fonts_help_out_for_letters_that_the_usual_one_lacks(monkeypatch):
    usual = font_manager.findfont(font_manager.FontProperties())
    entry = next(e for e in font_manager.fontManager.ttflist if e.fname != usual and e.style == "normal")
    plain = frozenset(map(chr, range(32, 127)))
    monkeypatch.setattr(plots, "_letters_of", lambda path: plain | ({"日"} if path == entry.fname else set()))
    plots._families.cache_clear()
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [entry])
    before = matplotlib.rcParams["font.family"]
    with plots.fonts_for(["日"]) as note:
        assert note == ""
        assert matplotlib.rcParams["font.family"] == [*before, entry.name]
    assert matplotlib.rcParams["font.family"] == before
    plots._families.cache_clear()


@pytest.mark.parametrize("name", ["$0-$10k", "costs $5% to $6", "a$b_$", "x^$ y^$"])
def test_dollars_in_names_are_letters(name, tmp_path):
    found = summaries(MLA_ABOVE, missing={name: 0.6, "b": 0.3})
    with plots.fonts_for([name]):
        figure = plots.Figure()
        figure.text(0.5, 0.5, name)
    figure.savefig(tmp_path / "name.png")
    assert plot_comparison(found, tmp_path)

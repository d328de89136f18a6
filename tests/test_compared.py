"""What a comparison from Python gives: the figures of the command line, a table, a verdict, pictures."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
from test_compare import invoke, npz
from test_objectives import raises
from test_tasks import DATA
from test_trainer import SPLITS, without_times
from typer.testing import CliRunner

import mmfast
from mmfast.cli.commands import app
from mmfast.experiments.findings import find
from mmfast.models import build_model

__all__ = ["npz"]

TIMES = ("seconds", "seconds_per_epoch", "wall_seconds", "history")
SETTINGS = {"max_epochs": 2, "batch_size": 32, "dim": 8, "accelerator": "cpu"}
WORDS = ["--epochs", "2", "--batch-size", "32", "--dim", "8", "--accelerator", "cpu"]


def without(entry):
    kept = {key: value for key, value in entry.items() if key not in TIMES}
    return kept | {"history": without_times(entry["history"])}


@pytest.fixture(scope="module")
def found():
    return mmfast.compare(SPLITS, "joint, ensemble, mla", seeds=2, **SETTINGS)


def of_task(task, **options):
    train = DATA[task][0]
    settings = {"seeds": 2, "max_epochs": 2, "task": task} | options

    def model():
        return build_model(train.shapes, train.num_classes, dim=8)

    return mmfast.compare(DATA[task], "all", model=model, **settings)


def test_figures_are_those_of_the_command_line(npz, tmp_path):
    choice = ["--modalities", "pose,audio", "--encoder", "pose=gru", "--fusion", "gated", "--split-seed", "1"]
    words = ["--methods", "joint,unimodal,di-mml", "--seeds", "2", "--set", "di-mml.head_epochs=1"]
    result = invoke(npz, tmp_path / "command", *WORDS, *choice, *words, "--label-smoothing", "0.1")
    assert result.exit_code == 0, result.output
    theirs = json.loads((tmp_path / "command" / "results.json").read_text())
    dimml = mmfast.methods.DIMML(head_epochs=1)
    given = {"modalities": ["pose", "audio"], "encoders": {"pose": "gru"}, "fusion": "gated", "split_seed": 1}
    given |= {"seeds": 2, "label_smoothing": 0.1} | SETTINGS
    before = torch.random.get_rng_state()
    ours = mmfast.compare(npz, ["joint", "unimodal", dimml], **given)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [without(entry) for entry in ours.runs] == [without(entry) for entry in theirs["runs"]]
    # A folder of the command is one of a program, too.
    again = mmfast.compare(
        npz, ["joint", dimml], out_dir=tmp_path / "command", resume=True, on_run=pytest.fail, **given
    )
    assert [without(entry) for entry in again.runs] == [
        without(entry) for entry in theirs["runs"] if entry["method"] != "unimodal"
    ]
    for key, outcome in again.outcomes.items():
        for name, value in vars(outcome).items():
            np.testing.assert_array_equal(value, getattr(ours.outcomes[key], name))
    kept = mmfast.compare(npz, ["joint", "unimodal", dimml], out_dir=tmp_path / "own", **given)
    assert kept.verdict == ours.verdict
    mine = json.loads((tmp_path / "own" / "results.json").read_text())
    assert mine["data"] == theirs["data"]
    assert mine["configuration"] == theirs["configuration"]
    # A run of it tells its model.
    learner = mmfast.load(tmp_path / "own" / "runs" / "joint-seed0")
    test = mmfast.data.load(npz, seed=1, modalities=["pose", "audio"]).test
    assert learner.predict(test).accuracy == pytest.approx(ours.figures("accuracy")["joint"][0])


def test_splits_are_compared_without_a_model_of_ones_own(found, tmp_path):
    trainer = mmfast.Trainer("mla", seed=1, max_epochs=2, batch_size=32, accelerator="cpu")
    torch.manual_seed(1)
    own = build_model(SPLITS.shapes, SPLITS.num_classes, dim=8)
    trainer.fit(own, SPLITS.train, SPLITS.val)
    assert found.figures("accuracy")["mla"][1] == trainer.test(own, SPLITS.test).accuracy
    with_model = mmfast.compare(
        SPLITS,
        "mla",
        model=lambda: build_model(SPLITS.shapes, SPLITS.num_classes, dim=8),
        seeds=2,
        **{name: value for name, value in SETTINGS.items() if name != "dim"},
    )
    assert with_model.figures("loss")["mla"] == found.figures("loss")["mla"]
    assert with_model.data == found.data == SPLITS.description
    kept = mmfast.compare(SPLITS, "joint", seeds=1, out_dir=tmp_path, **SETTINGS)
    assert kept.figures("loss")["joint"] == found.figures("loss")["joint"][:1]
    predicted = mmfast.load(tmp_path / "runs" / "joint-seed0").predict(SPLITS.test)
    assert predicted.accuracy == pytest.approx(found.figures("accuracy")["joint"][0])


def test_commands_take_a_run_on_splits_with_data_that_are_given(npz, tmp_path):
    found = mmfast.compare(mmfast.data.load(npz), "joint", seeds=1, out_dir=tmp_path, **SETTINGS)
    run = str(tmp_path / "runs" / "joint-seed0")
    words = [
        "predict",
        "--model",
        run,
        "--data",
        str(npz),
        "--split",
        "test",
        "--out",
        str(tmp_path / "p.csv"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"accuracy {100 * found.figures('accuracy')['joint'][0]:.1f}%" in result.stdout
    result = CliRunner().invoke(app, ["valuate", "--model", run, "--data", str(npz)])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["valuate", "--model", run])
    assert result.exit_code == 2
    assert "is of a program with data of its own, got none: --data" in " ".join(result.stderr.split())


def test_a_table_has_a_row_a_method_with_means_and_deviations(found):
    table = found.table()
    assert table.index.name == "method"
    assert list(table.index) == ["joint", "ensemble", "mla"]
    assert list(table["runs"]) == [2, 2, 2]
    assert list(table["protocol"]) == ["masked", "own-head", "own-head"]
    for figure in ("accuracy", "macro_f1", "loss"):
        values = found.figures(figure)["mla"]
        assert table.loc["mla", figure] == pytest.approx(statistics.fmean(values))
        assert table.loc["mla", f"{figure}_std"] == pytest.approx(statistics.stdev(values))
    runs = [entry for entry in found.runs if entry["method"] == "joint"]
    for column, path in (
        ("a__alone", ("metrics", "modality_accuracy", "a")),
        ("b__contribution", ("metrics", "contribution", "b")),
        ("b__missing", ("missing", "b")),
        ("a__probe", ("probe", "a")),
        ("ece", ("ece",)),
        ("seconds", ("seconds",)),
    ):
        values = []
        for value in runs:
            for key in path:
                value = value[key]
            values.append(value)
        assert table.loc["joint", column] == pytest.approx(statistics.fmean(values))
        assert table.loc["joint", f"{column}_std"] == pytest.approx(statistics.stdev(values))


def test_one_seed_has_no_deviation_and_what_diverged_no_figures():
    one = mmfast.compare(SPLITS, "joint", seeds=1, probe=False, **SETTINGS)
    assert math.isnan(one.table().loc["joint", "accuracy_std"])
    assert "a__probe" not in one.table()
    lost = mmfast.compare(SPLITS, "joint, mla", seeds=2, **SETTINGS, lr=1e30)
    assert list(lost.table()["diverged"]) == [2, 2]
    assert lost.verdict.startswith("Diverged, and in no figure: Joint with seeds 0, 1; MLA with seeds 0, 1.")
    assert "Diverged" in lost._repr_html_()
    with raises("plot needs a run that has figures, got none: all diverged"):
        lost.plot()


def test_the_verdict_is_what_is_printed_below_the_table(found):
    assert found.verdict.splitlines()
    text = " ".join(str(found).split())
    for sentence in found.verdict.splitlines():
        assert sentence in text
    # It knows each run's answers to each test sample.
    assert find(found.summaries).over_joint["mla"].estimate.num_seeds == 2


@pytest.mark.parametrize(("task", "main"), [("regression", "r2"), ("multilabel", "micro_f1")])
def test_other_tasks_have_their_figures(task, main):
    other = of_task(task)
    # All methods, and those are the ones that need no classes.
    names = ["joint", "unimodal", "ensemble", "multi-loss", "frozen-unimodal"]
    table = other.table()
    assert sorted(table.index) == sorted(names)
    assert table.loc["joint", main] == pytest.approx(statistics.fmean(other.figures(main)["joint"]))
    modality = next(iter(DATA[task][0].shapes))
    assert {f"{modality}__alone", f"{modality}__contribution_std"} <= set(table)
    assert "ece" not in table
    best = table[main].idxmax()
    title = mmfast.methods.METHODS[best].title
    assert other.verdict.startswith(f"Highest {main}: {title}, {table.loc[best, main]:.3f} ± ")
    assert other.verdict in " ".join(str(other).split())
    shown = other._repr_html_()
    assert f">{main}</th>" in shown
    assert f"Highest {main}" in shown
    with raises(f"plot is of task='multiclass', got '{task}': table() has its figures"):
        other.plot()


def test_runs_of_other_tasks_are_resumed(tmp_path):
    first = of_task("regression", out_dir=tmp_path, seeds=1)
    again = of_task("regression", out_dir=tmp_path, seeds=1, resume=True, on_run=pytest.fail)
    assert again.runs == first.runs


def test_pictures_are_figures(found, tmp_path):
    kinds = ("accuracy", "probes", "contributions", "missing", "modality_accuracy")
    for kind in kinds:
        figure = found.plot(kind, tmp_path / f"{kind}.png")
        assert figure.axes
        assert figure._repr_png_().startswith(b"\x89PNG")
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    found.plot("accuracy", tmp_path / "accuracy.svg")
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()
    listed = ", ".join(map(repr, kinds))
    with raises(f"kind must be one of {listed}, got 'acuracy'; did you"):
        found.plot("acuracy")


def test_results_of_other_metrics_are_others(tmp_path):
    from torchmetrics.classification import MulticlassAUROC

    auroc = {"metrics": {"auroc": MulticlassAUROC(3)}}
    mine = mmfast.compare(SPLITS, "joint", seeds=1, out_dir=tmp_path, **SETTINGS, **auroc)
    assert mine.table().loc["joint", "auroc"] == mine.figures("auroc")["joint"][0]
    assert "auroc" in str(mine)
    with pytest.raises(ValueError, match=r"metrics is .*auroc.* there, none here"):
        mmfast.compare(SPLITS, "joint", seeds=1, out_dir=tmp_path, resume=True, **SETTINGS)


def test_a_bar_is_shown_where_one_is_wanted(capsys):
    mmfast.compare(SPLITS, "joint", seeds=1, **SETTINGS)
    assert capsys.readouterr() == ("", "")
    mmfast.compare(SPLITS, "joint", seeds=1, progress=True, **SETTINGS)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "run 1 of 1: Joint, seed 0\n")


def test_what_one_can_keep_is_written(found, tmp_path):
    with raises("folder must be given where the comparison has no out_dir, got None"):
        found.write()
    written = found.write(tmp_path / "kept", confusion=["mla"])
    names = [path.name for path in written]
    assert names[:4] == ["report.html", "results.json", "results.csv", "predictions.parquet"]
    assert [name for name in names if name.startswith("confusion")] == ["confusion-mla.png"]
    assert all(path.stat().st_size for path in written)
    results = json.loads(written[1].read_text())
    assert [without(entry) for entry in results["runs"]] == [without(entry) for entry in found.runs]
    assert results["data"]["description"] == SPLITS.description
    assert " ".join(results["summary"]["sentences"]) == " ".join(found.verdict.splitlines())
    assert "How each modality was read" in written[0].read_text()
    # The same folder again, by the same comparison and by another one.
    assert found.write(tmp_path / "kept", confusion="none")[:4] == written[:4]
    assert not (tmp_path / "kept" / "confusion-mla.png").exists()
    other = mmfast.compare(SPLITS, "joint", seeds=1, lr=0.1, **SETTINGS)
    with pytest.raises(ValueError, match=r"lr is 0\.001 there, 0\.1 here"):
        other.write(tmp_path / "kept")
    with raises("confusion must be one of joint, ensemble, mla, all, none, got 'mlb'; did you mean mla?"):
        found.write(tmp_path / "kept", confusion="mlb")
    with raises(f"folder must be a folder, {written[1]} is a file"):
        found.write(written[1])


def test_other_figures_of_the_same_runs_are_not_written_over(found, tmp_path):
    """The model is no part of a program's configuration."""
    parts = SPLITS.train, SPLITS.val, SPLITS.test

    def with_dim(dim, chosen, seeds):
        given = {"seeds": seeds, "max_epochs": 1, "probe": False}
        model = lambda: build_model(SPLITS.shapes, 3, dim=dim)  # noqa: E731
        return mmfast.compare(parts, chosen, model=model, **given)

    with_dim(8, "joint, mla", 2).write(tmp_path)
    with raises(f"{tmp_path} holds another run of joint with seed 0: give another folder"):
        with_dim(4, "joint", 1).write(tmp_path)
    # Fewer of the same runs take none away.
    with_dim(8, "joint", 1).write(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["runs"]) == 4
    assert results["summary"]["methods"]["joint"]["seeds"] == [0]


def test_a_comparison_in_a_folder_is_written_there_as_the_command_does(npz, tmp_path):
    words = ["--methods", "joint,mla", "--seeds", "2"]
    assert invoke(npz, tmp_path / "command", *WORDS, *words).exit_code == 0
    given = {"seeds": 2, "out_dir": tmp_path / "own"} | SETTINGS
    written = mmfast.compare(npz, "joint, mla", **given).write()
    assert {path.parent for path in written} == {tmp_path / "own"}
    theirs = {path.name for path in (tmp_path / "command").iterdir() if not path.name.startswith(".")}
    assert {path.name for path in written} | {"runs"} == theirs
    one, other = (
        json.loads((tmp_path / place / "results.json").read_text())["summary"] for place in ("own", "command")
    )
    assert one["sentences"] == other["sentences"]


def test_data_sets_of_ones_own_are_written_with_numbers_for_classes(tmp_path):
    pandas = pytest.importorskip("pandas")
    parts = (SPLITS.train, SPLITS.val, SPLITS.test)
    settings = {"max_epochs": 1, "seeds": 2, "model": lambda: build_model(SPLITS.shapes, 3, dim=8)}
    found = mmfast.compare(parts, "joint", **settings)
    written = found.write(tmp_path)
    table = pandas.read_parquet(written[3])
    assert [name for name in table if name.startswith("probability")] == [
        f"probability__{c}" for c in range(3)
    ]
    with raises("write is of task='multiclass', got 'regression': table() has its figures"):
        of_task("regression").write(tmp_path)

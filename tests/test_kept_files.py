"""What a comparison leaves: tables of runs and predictions, a summary, confusions, pictures, a page."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")

import pyarrow.parquet
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.results import Results
from mmfast.reports import confusions, report, run_tables
from mmfast.reports.confusions import confused_methods, confusion_of, plot_confusion
from mmfast.reports.run_tables import write_predictions
from support.files import write_npz

CLASSES = ("<script>alert(1)</script>", "جلوس", "日本 & co")
METHODS = ("joint", "unimodal", "frozen-unimodal")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Two modalities and three classes named in HTML and several scripts; the test part comes first."""
    splits = data.synthetic(
        150, 3, dims={"<b>audio</b>": 6, "pose": 5}, unique={"<b>audio</b>": 0.2, "pose": 0.2}
    )
    path = tmp_path_factory.mktemp("data") / "named.npz"
    return write_npz(path, splits, parts=("test", "train", "val"), class_names=CLASSES)


def compared(npz, out, *words, methods=METHODS):
    fast = ["--epochs", "3", "--dim", "8", "--batch-size", "32", "--accelerator", "cpu", "--seeds", "2"]
    short = ["--set", "frozen-unimodal.head_epochs=2"] if "frozen-unimodal" in methods else []
    command = [
        "compare",
        "--data",
        str(npz),
        "--out",
        str(out),
        "--methods",
        ",".join(methods),
        *fast,
        *short,
    ]
    return CliRunner().invoke(app, [*command, *words])


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    """The folder and output of a finished comparison."""
    out = tmp_path_factory.mktemp("kept") / "out"
    result = compared(npz, out, "--confusion", "unimodal,joint")
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())


def test_the_report_is_named_first(done):
    out, text = done
    files = "report.html, results.json, results.csv, predictions.parquet, 7 pictures"
    assert f"Written to {out}: {files}." in text
    assert len(list(out.glob("*.png"))) == 7
    assert not list(out.glob("*.tmp"))


def test_a_table_has_a_row_for_each_run(done, results):
    with open(done[0] / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["seed"])) for row in rows] == [(m, s) for m in METHODS for s in range(2)]
    for row, entry in zip(rows, results["runs"], strict=True):
        metrics = entry["metrics"]
        assert float(row["accuracy"]) == metrics["accuracy"]
        assert float(row["ece"]) == entry["ece"]
        for name in ("<b>audio</b>", "pose"):
            assert float(row[f"{name}__alone"]) == metrics["modality_accuracy"][name]
            assert float(row[f"{name}__contribution"]) == metrics["contribution"][name]
            assert float(row[f"{name}__probe"]) == entry["probe"][name]
            assert float(row[f"{name}__missing"]) == entry["missing"][name]
        assert int(row["epochs"]) == entry["epochs"]
        assert row["diverged"] == ""


def test_runs_that_diverged_have_their_row(tmp_path):
    diverged = {"method": "joint", "seed": 0, "diverged": "loss is NaN, in epoch 1"}
    ended = {"method": "joint", "seed": 1, "metrics": {"accuracy": 0.5, "modality_accuracy": {"a": None}}}
    run_tables.write_runs(tmp_path / "r.csv", [diverged, ended])
    with open(tmp_path / "r.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["accuracy"], first["diverged"]) == ("", diverged["diverged"])
    assert (second["accuracy"], second["a__alone"], second["diverged"]) == ("0.5", "", "")


def test_predictions_tell_runs_samples_and_probabilities(npz, done, results):
    table = pyarrow.parquet.read_table(done[0] / "predictions.parquet").to_pandas()
    splits = data.load(str(npz))
    assert len(table) == 6 * len(splits.test)
    names = [f"probability__{name}" for name in splits.class_names]
    assert list(table.columns) == ["method", "seed", "sample", "key", "label", "prediction", *names]
    assert np.allclose(table[names].sum(axis=1), 1, atol=1e-6)
    for entry in results["runs"]:
        run = table[(table.method == entry["method"]) & (table.seed == entry["seed"])]
        assert (run.label == run.prediction).mean() == pytest.approx(entry["metrics"]["accuracy"])
        # Rows of the file, of which the test part are the first here.
        assert run.key.tolist() == splits.test.sample_keys.tolist() == list(range(len(splits.test)))
        assert run.label.tolist() == [splits.class_names[label] for label in splits.test.labels.tolist()]


def outcome(labels, predicted, num_classes):
    """An outcome of given predictions, -1 where they are NaN."""
    size = len(labels)
    probabilities = np.full((size, num_classes), np.nan, np.float32)
    known = np.flatnonzero(np.asarray(predicted) >= 0)
    probabilities[known] = 0.5 / num_classes
    probabilities[known, np.asarray(predicted)[known]] += 0.5
    return Outcome(
        probabilities=probabilities,
        predicted=np.asarray(predicted),
        labels=np.asarray(labels),
        contributions=np.zeros((size, 1), np.float32),
        present=np.ones((size, 1), bool),
        without=np.zeros((1, size), bool),
    )


class Counted(dict):
    """Outcomes that count how often each is read."""

    reads = 0

    def __getitem__(self, key):
        self.reads += 1
        return super().__getitem__(key)


def test_predictions_go_in_row_groups_and_read_each_run_once(tmp_path, monkeypatch):
    # Groups of 3 rows: some span two runs of 5 samples.
    monkeypatch.setattr(run_tables, "_NUMBERS", 3 * 8)
    runs = Counted(
        {("mla", seed): outcome([0, 1, 0, -100, 1], [0, 0, seed % 2, 1, -1], 2) for seed in range(4)}
    )
    write_predictions(tmp_path / "p.parquet", runs, np.array(list("abcde")), ("no", "yes"))
    file = pyarrow.parquet.ParquetFile(tmp_path / "p.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3] * 6 + [2]
    table = file.read().to_pydict()
    assert table["seed"] == [seed for seed in range(4) for _ in range(5)]
    assert table["key"] == list("abcde") * 4
    assert table["label"][:5] == ["no", "yes", "no", None, "yes"]
    assert table["prediction"][5:10] == ["no", "no", "yes", "yes", None]
    assert runs.reads == 4


def test_predictions_of_many_classes_have_two_probabilities(tmp_path, monkeypatch):
    whole = outcome([0, 1, -100], [0, 0, 1], 2)
    assert write_predictions(tmp_path / "p.parquet", {("mla", 0): whole}, None, ("no", "yes"))
    monkeypatch.setattr(run_tables, "MOST", 5)
    pair = {"confidence": np.float32([0.75, 0.75, 0.75]), "likelihood": np.float32([0.75, 0.25, np.nan])}
    # One of them is of before, when all were kept.
    runs = {("mla", 0): whole, ("mla", 1): dataclasses.replace(whole, probabilities=None, **pair)}
    assert not write_predictions(tmp_path / "p.parquet", runs, None, ("no", "yes"))
    table = pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pydict()
    columns = ["method", "seed", "sample", "label", "prediction", "confidence", "likelihood"]
    assert list(table) == columns
    assert table["confidence"] == [0.75] * 6
    assert table["likelihood"][3:5] == [0.75, 0.25]
    assert np.isnan(table["likelihood"][2])


def test_predictions_of_other_test_parts_are_refused(tmp_path):
    runs = {("mla", 0): outcome([0, 1], [0, 1], 2), ("mla", 1): outcome([0], [0], 2)}
    with pytest.raises(ValueError, match="of the same 2 samples, got 1 of mla with seed 1"):
        write_predictions(tmp_path / "p.parquet", runs, None, ("no", "yes"))
    assert not list(tmp_path.iterdir())


def test_results_hold_a_summary_until_there_is_another_run(done, results, tmp_path):
    summary = results["summary"]
    assert list(summary["methods"]) == list(METHODS)
    accuracies = [run["metrics"]["accuracy"] for run in results["runs"][:2]]
    assert summary["methods"]["joint"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["methods"]["joint"]["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert all(sentence in " ".join(done[1].split()) for sentence in summary["sentences"])
    found = Results(
        tmp_path, {key: value for key, value in results.items() if key not in ("runs", "checksum")}
    )
    found.content["runs"] = results["runs"][:-1]
    found.summarize(summary)
    assert "summary" in json.loads(found.path.read_text())
    found.add(results["runs"][-1], tmp_path / "runs" / "frozen-unimodal-seed1")
    assert "summary" not in json.loads(found.path.read_text())


def test_entries_tell_the_epochs_whose_weights_are_kept(results):
    for entry in results["runs"]:
        history, begun = entry["history"], 3 if entry["method"] == "frozen-unimodal" else 0
        for name in ("<b>audio</b>", "pose"):
            scores = [
                epoch["val"]["modality_accuracy"][name]
                if entry["method"] == "unimodal"
                else epoch["val"]["accuracy"]
                for epoch in history[begun:]
            ]
            assert entry["kept_epochs"][name] == begun + 1 + int(np.argmax(scores))


def test_confusions_count_labels_by_predictions():
    runs = {
        ("joint", 0): outcome([0, 0, 1, 2, -100], [0, 1, 1, -1, 2], 4),
        ("joint", 3): outcome([0, 0, 1, 2, -100], [1, 1, 0, 2, 0], 4),
    }
    found = confusion_of("joint", runs, [0, 3, 4], ("a", "b", "c", "d"))
    assert found.counts.tolist() == [[1, 3, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert found.support.tolist() == [2, 1, 1, 0]
    assert found.recall[:, :3].tolist() == [[0.5, 1, 0], [0, 0, 1]]
    assert [found.recall_text(c) for c in (0, 3)] == ["25.0 ± 35.4", "–"]
    assert found.worst() == [(0, 1), (1, 0)]
    assert found.sentence() == "Joint takes a for b most often: 75% of its samples"
    assert confusion_of("mla", runs, [0], ("a", "b", "c", "d")) is None


def test_mistakes_are_ranked_by_the_shares_that_cells_show():
    labels, predicted = [0] * 100 + [1] * 10, [0] * 81 + [1] * 19 + [1] * 8 + [0] * 2
    found = confusion_of("joint", {("joint", 0): outcome(labels, predicted, 2)}, [0], ("a", "b"))
    assert found.worst() == [(1, 0), (0, 1)]
    assert found.sentence() == "Joint takes b for a most often: 20% of its samples"


def test_of_many_classes_those_that_are_mistaken_are_drawn(tmp_path):
    labels = np.arange(100)
    predicted = labels.copy()
    predicted[[7, 90]] = [90, 91]
    found = confusion_of(
        "joint", {("joint", 0): outcome(labels, predicted, 100)}, [0], tuple(map(str, labels))
    )
    chosen, left = confusions._chosen(found)
    assert left
    assert {7, 90, 91} <= set(chosen)
    assert "3 of 100 classes" in plot_confusion(found, tmp_path).title


def test_methods_of_confusions_are_chosen_before_any_training(npz, tmp_path):
    assert confused_methods(None, METHODS) is None
    assert confused_methods("none", METHODS) == []
    assert confused_methods("all", METHODS) == list(METHODS)
    result = compared(npz, tmp_path / "out", "--confusion", "jiont")
    assert result.exit_code == 2
    assert (
        "confusion must be one of joint, unimodal, frozen-unimodal, all, none, got 'jiont'" in result.output
    )
    assert not (tmp_path / "out").exists()


def test_files_of_other_methods_do_not_stay(npz, done, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    result = compared(npz, out, "--confusion", "none", "--seeds", "1", methods=["joint"])
    assert result.exit_code == 0, result.output
    assert not list(out.glob("confusion-*.png"))
    assert len((out / "results.csv").read_text().splitlines()) == 2
    assert set(pyarrow.parquet.read_table(out / "predictions.parquet").to_pydict()["method"]) == {"joint"}
    assert set(json.loads((out / "results.json").read_text())["summary"]["methods"]) == {"joint"}
    assert "Frozen unimodal" not in (out / "report.html").read_text().partition("Options of methods")[0]


def test_a_page_asks_nothing_of_the_network_and_names_everything(done):
    page = (done[0] / "report.html").read_text(encoding="utf-8")
    # Addresses of pictures are data; there is no link, and nothing that runs.
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|http", page)
    assert not re.search(r"<script|\son\w+=|<b>", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for text in (
        "جلوس",
        "日本 &amp; co",
        "&lt;b&gt;audio&lt;/b&gt;",
        "weight_decay",
        "Frozen unimodal + head",
    ):
        assert text in page, text
    for cell in re.findall(r"<th\b[^>]*>", page):
        assert 'scope="' in cell
    alts = re.findall(r'<img [^>]*alt="([^"]+)"', page)
    assert len(alts) == page.count("<img ") == 7


def test_a_page_tells_settings_that_trials_have_found():
    tuned = {"select": "val/accuracy", "chosen": 3, "settings": {"lr": 0.00213, "rho": None}, "score": 0.71}
    configuration = {"max_epochs": 30, "methods": {"mla": {"alpha": 1.0}, "joint": {}}}
    shared, methods, trials = report._settings_grids(
        configuration | {"tuning": {"trials": 20, "seeds": [0], "drawn": {}, "methods": {"mla": tuned}}}
    )
    assert [[cell.text for cell in row] for row in shared.rows] == [["max_epochs", "30"]]
    assert [[cell.text for cell in row] for row in methods.rows] == [["MLA", "alpha=1"], ["Joint", "–"]]
    assert trials.caption == "Settings chosen by 20 trials each, on validation data"
    assert [cell.text for cell in trials.rows[0]] == ["MLA", "lr=0.00213, rho=none", "val/accuracy 71.0%"]


def test_tables_of_many_columns_come_in_parts_that_keep_kinds_together():
    names = [f"{name}\n{kind}" for kind in ("alone", "probe", "contrib.") for name in "abcd"]
    headers = ["Method", "Accuracy", *names[:4], "by", *names[4:]]
    grid = report.Grid("All", headers, [[report.Cell(header) for header in headers]], [False] * len(headers))
    parts = report._parts(grid)
    assert [part.headers[1:] for part in parts] == [["Accuracy"], [*names[:4], "by", *names[4:8]], names[8:]]
    assert all([cell.text for cell in part.rows[0]] == part.headers for part in parts)
    assert report._parts(report.Grid("Few", headers[:5], [], [False] * 5))[0].headers == headers[:5]


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_opens_the_page_with_an_empty_console(done, tmp_path, width):
    dom, said = opened(done[0] / "report.html", tmp_path, width)
    assert said == []
    assert "Joint" in dom
    assert "<script" not in dom


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed (apt-get install chromium)")
def test_a_console_that_is_not_empty_is_noticed(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>x</title><script>nothing.here()</script>")
    assert len(opened(path, tmp_path, 800)[1]) == 1


def opened(path, folder, width):
    """Return the document as a browser has read it, and what its console says."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    words += [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},2000", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

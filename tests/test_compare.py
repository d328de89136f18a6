"""Comparisons: what results.json holds, how they continue, and what stops them before any training."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

import torch
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.experiments import comparison as compare_module
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.file_names import PICTURES
from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.setup import Setup, fingerprint
from mmfast.experiments.subprocesses import train_arguments
from mmfast.methods import DIMML, METHODS, MLA, Joint
from mmfast.training.optimization import Optimization
from support.files import write_npz

FAST = ["--epochs", "2", "--dim", "8", "--batch-size", "32", "--accelerator", "cpu"]
SHORT_HEADS = [
    "--set",
    "frozen-unimodal.head_epochs=1",
    "--set",
    "di-mml.head_epochs=1",
    "--set",
    "di-mml.e0=1",
]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Two small modalities, [6] vectors and [5, 3] sequences, with a split."""
    splits = data.synthetic(140, 3, dims={"audio": 6, "pose": (5, 3)}, unique={"audio": 0.3, "pose": 0.1})
    return write_npz(tmp_path_factory.mktemp("data") / "small.npz", splits)


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    """The folder and output of a finished comparison of all methods."""
    out = tmp_path_factory.mktemp("compare") / "all"
    result = invoke(npz, out, "--seeds", "2", *SHORT_HEADS)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def invoke(npz, out, *words):
    return CliRunner().invoke(app, ["compare", "--data", str(npz), "--out", str(out), *FAST, *words])


def results(out):
    def refuse(constant):
        raise AssertionError(f"results.json holds {constant}")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def metrics(out):
    return {(entry["method"], entry["seed"]): entry["metrics"] for entry in results(out)["runs"]}


def test_results_hold_every_run_with_its_facts(done):
    found = results(done[0])
    assert set(found) == {
        "format",
        "versions",
        "machine",
        "data",
        "configuration",
        "runs",
        "summary",
        "checksum",
    }
    assert found["format"] == 1
    assert found["data"]["sizes"] == {"train": 96, "val": 21, "test": 23}
    assert found["data"]["shapes"] == {"audio": [6], "pose": [5, 3]}
    assert found["data"]["classes"] == ["0", "1", "2"]
    assert found["configuration"]["max_epochs"] == 2
    assert found["configuration"]["dim"] == 8
    assert found["configuration"]["methods"]["di-mml"]["e0"] == 1
    assert [(e["method"], e["seed"]) for e in found["runs"]] == [(m, s) for m in METHODS for s in range(2)]
    for entry in found["runs"]:
        assert set(entry["metrics"]) == {"accuracy", "macro_f1", "loss", "modality_accuracy", "contribution"}
        assert set(entry["metrics"]["contribution"]) == {"audio", "pose"}
        assert entry["protocol"] in ("masked", "own-head")
        assert entry["epochs"] == len(entry["history"]) == (3 if "head_epochs" in entry["config"] else 2)
        assert entry["seconds"] == pytest.approx(sum(e["seconds"] for e in entry["history"]))
        assert entry["seconds_per_epoch"] == pytest.approx(entry["seconds"] / entry["epochs"])
        assert {"mmfast", "torch"} <= set(entry["versions"])


def test_it_prints_a_line_a_run_the_table_and_where_files_are(done):
    out, text = done
    assert "20/20 mla seed 1: accuracy" in text
    for method in METHODS.values():
        assert method.title in text
    assert f"Written to {out}: report.html, results.json, results.csv, predictions.parquet, " in text
    assert "\x1b" not in text
    for name in PICTURES:
        assert (out / name).stat().st_size > 10_000
    assert not list(out.rglob("*.tmp"))


def test_runs_that_are_there_are_not_repeated(npz, done, monkeypatch):
    monkeypatch.setattr(compare_module, "make_run", None)
    before = metrics(done[0])
    result = invoke(npz, done[0], "--seeds", "2", *SHORT_HEADS)
    assert "20 of 20 runs: already in" in result.stdout
    assert metrics(done[0]) == before


def test_fewer_methods_show_fewer_rows_and_keep_all_results(npz, done):
    result = invoke(npz, done[0], "--seeds", "1", "--methods", "joint,mla")
    assert result.exit_code == 0
    assert "Ensemble" not in result.stdout
    assert len(results(done[0])["runs"]) == 20


def test_a_new_folder_gives_the_same_figures(npz, done, tmp_path):
    assert invoke(npz, tmp_path, "--seeds", "1", "--methods", "mla,joint").exit_code == 0
    known = metrics(done[0])
    assert metrics(tmp_path) == {key: known[key] for key in (("joint", 0), ("mla", 0))}


def test_an_interruption_says_how_to_go_on_and_loses_nothing(npz, done, tmp_path, monkeypatch):
    make = ComparisonRunner.make

    def make_two(self, item, on_epoch=None):
        if len(self.results.content["runs"]) == 2:
            raise KeyboardInterrupt
        return make(self, item, on_epoch)

    words = ("--seeds", "2", "--methods", "joint,unimodal")
    with monkeypatch.context() as patch:
        patch.setattr(ComparisonRunner, "make", make_two)
        result = invoke(npz, tmp_path, *words)
    assert result.exit_code == 130
    assert f"stopped with 2 runs in {tmp_path / 'results.json'}; the same command goes on" in result.stderr
    result = invoke(npz, tmp_path, *words)
    assert "2 of 4 runs: already in" in result.stdout
    known = metrics(done[0])
    assert metrics(tmp_path) == {key: known[key] for key in known if key[0] in ("joint", "unimodal")}


def test_results_from_before_an_option_go_on(npz, done, tmp_path):
    out = tmp_path / "before"
    shutil.copytree(done[0], out)
    found = json.loads((out / "results.json").read_text())
    # Results of those days had no checksum either.
    del found["checksum"]
    for config in (found["configuration"]["methods"]["di-mml"], *_configs_of(found, "di-mml")):
        for name in ("contrast", "bias"):
            del config[name]
    (out / "results.json").write_text(json.dumps(found))
    words = ("--seeds", "2", *SHORT_HEADS)
    result = invoke(npz, out, *words, "--set", "di-mml.contrast=sigmoid")
    assert "di-mml.contrast is infonce there, sigmoid here" in result.stderr
    assert invoke(npz, out, *words).exit_code == 0
    # Of settings that are younger than results, these tell what is set, and nothing else.
    told = json.loads((out / "results.json").read_text())["configuration"]
    assert not {"patience", "schedule", "lr_scale"} & set(told)
    result = invoke(npz, out, *words, "--patience", "5")
    assert "patience is none there, 5 here" in result.stderr
    found["configuration"]["patience"] = 4
    (out / "results.json").write_text(json.dumps(found))
    assert "patience is 4 there, none here" in invoke(npz, out, *words).stderr


def _configs_of(results, method):
    return [entry["config"] for entry in results["runs"] if entry["method"] == method]


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (("--epochs", "3"), "max_epochs is 2 there, 3 here"),
        (("--dim", "16", "--lr", "0.1"), "lr is 0.001 there, 0.1 here; dim is 8 there, 16 here"),
        (("--set", "di-mml.e0=0"), "di-mml.e0 is 1 there, 0 here"),
        (("--data", "htad"), "name is small there, htad here"),
    ],
)
def test_results_of_another_configuration_are_kept(npz, done, words, differs):
    before = (done[0] / "results.json").read_bytes()
    heads = [
        "frozen-unimodal.head_epochs=1",
        "di-mml.head_epochs=1",
        *([] if "--set" in words else ["di-mml.e0=1"]),
    ]
    result = invoke(npz, done[0], *words, *(word for head in heads for word in ("--set", head)))
    assert result.exit_code == 2
    assert "results.json is of another configuration" in result.stderr
    assert differs in result.stderr
    assert "--overwrite" in result.stderr
    assert (done[0] / "results.json").read_bytes() == before


def test_other_samples_in_the_same_file_are_noticed(npz, tmp_path):
    changed = tmp_path / "small.npz"
    changed.write_bytes(npz.read_bytes())
    out = tmp_path / "out"
    assert invoke(changed, out, "--methods", "joint", "--seeds", "1").exit_code == 0
    arrays = dict(np.load(npz))
    arrays["audio"] = arrays["audio"] + np.float32(0.5) * (np.arange(6) == 2) * arrays["audio"]
    arrays["audio"][0] += 1
    np.savez(changed, **arrays)
    result = invoke(changed, out, "--methods", "joint", "--seeds", "1")
    assert result.exit_code == 2
    assert "the samples or their split are others" in result.stderr


def test_overwrite_starts_anew_and_spares_foreign_files(npz, tmp_path):
    (tmp_path / "runs" / "mine-seed0").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert invoke(npz, tmp_path, "--methods", "joint,mla", "--seeds", "1").exit_code == 0
    result = invoke(npz, tmp_path, "--methods", "joint", "--seeds", "1", "--epochs", "1", "--overwrite")
    assert result.exit_code == 0
    assert list(metrics(tmp_path)) == [("joint", 0)]
    assert not (tmp_path / "runs" / "mla-seed0").exists()
    assert (tmp_path / "runs" / "mine-seed0").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "content", ["", "{}", "[1, 2]", '{"format": 9, "data": {}, "configuration": {}, "runs": []}']
)
def test_foreign_results_are_not_touched(npz, tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    result = invoke(npz, tmp_path, "--methods", "joint", "--seeds", "1")
    assert result.exit_code == 2
    assert "give another --out" in result.stderr
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--methods", "joint,unimodel"), "did you mean unimodal"),
        (("--set", "mla.reset=always"), "reset must be"),
        (("--optimizer", "adagrad"), "optimizer must be one of adam, adamw, sgd, got 'adagrad'"),
        (("--fusion", "concta"), "fusion must be one of"),
        (("--accelerator", "abacus"), "abacus"),
        (("--precision", "33"), "33"),
        (("--lr", "-1"), "lr must be positive, got -1.0"),
        (("--schedule", "cosin"), "got 'cosin'; did you mean cosine?"),
        (
            ("--warmup-epochs", "20", "--epochs", "30"),
            "below the 20 epochs of stage 'head' of frozen-unimodal",
        ),
        (
            ("--freeze", "encoders.video"),
            "freeze must name modules of the model, such as encoders.audio, got",
        ),
        (("--lr-scale", "audio"), "lr_scale must have the form NAME=FACTOR, such as encoders.text=0.1, got"),
        (("--lr-scale", "audio=x"), "lr_scale of audio must be a finite number, got 'x'"),
        (("--lr-scale", "encoder.audio=2"), "got 'encoder.audio'; did you mean encoders.audio"),
    ],
)
def test_bad_options_stop_it_before_any_training(npz, tmp_path, words, message):
    result = invoke(npz, tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_probe_is_added_to_runs_that_lack_it(npz, tmp_path):
    words = ("--methods", "joint", "--seeds", "1")
    assert invoke(npz, tmp_path, *words).exit_code == 0
    before = metrics(tmp_path)
    result = invoke(npz, tmp_path, *words, "--probe")
    assert "probe" in result.stdout
    (entry,) = results(tmp_path)["runs"]
    assert set(entry["probe"]) == {"audio", "pose"}
    assert metrics(tmp_path) == before


def test_all_methods_of_a_seed_begin_with_the_same_encoders(npz):
    setup = Setup(str(npz), data.load(npz), dim=8)
    first, second = (setup.model(3).encoders.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], setup.model(4).encoders.state_dict()[key]) for key in first)


def test_the_digest_depends_on_samples_and_split():
    one, other = (data.synthetic(60, 3, seed=seed) for seed in (0, 1))
    assert fingerprint(one) == fingerprint(data.synthetic(60, 3, seed=0))
    assert fingerprint(one) != fingerprint(other)


OPTIONS = {
    "accumulate_grad_batches": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "gradient_clip_val": 0.5,
    "gradient_clip_algorithm": "value",
    "no_decay_norms_and_biases": True,
    "lr_scale": {"encoders.audio": 0.1, "head.*": 2.0},
    "patience": 2,
    "freeze": ("encoders.pose", "encoders.audio"),
    "ema_decay": 0.9,
}


# What the loss and selection are told.
LEARNING = {
    "class_weights": (0.5, 1.0, 2.5),
    "label_smoothing": 0.1,
    "select": "val/loss",
    "select_mode": "min",
}


@pytest.mark.parametrize("method", [Joint(), DIMML(temperature=3.5, e0=2), MLA(weights=(0.25, 0.75))])
def test_the_command_of_a_run_sets_it_up_again(npz, tmp_path, method, monkeypatch):
    setup = Setup(
        str(npz),
        data.load(npz),
        Optimization(3, 16, optimizer="sgd", lr=0.05, **({} if isinstance(method, Joint) else OPTIONS)),
        dim=4,
        fusion="sum",
        accelerator="cpu",
        compile=isinstance(method, MLA),
        deterministic=isinstance(method, MLA),
        **({} if isinstance(method, Joint) else LEARNING),
    )
    seen = {}

    def look(setup, method, seed, out_dir, **options):
        seen.update(setup=setup, method=method, seed=seed, out_dir=out_dir, resume=options["resume"])
        raise ValueError("seen")

    monkeypatch.setattr("mmfast.experiments.runs.make_run", look)
    words = train_arguments(setup, PlannedRun(method, 7, 3), tmp_path)
    assert CliRunner().invoke(app, words).exit_code == 2
    assert (seen["method"], seen["seed"], seen["out_dir"], seen["resume"]) == (method, 7, tmp_path, True)
    for name in ("source", "optimization", "dim", "fusion", "accelerator", "devices", "precision", "probe"):
        assert getattr(seen["setup"], name) == getattr(setup, name), name
    for name in ("compile", "deterministic", *LEARNING):
        assert getattr(seen["setup"], name) == getattr(setup, name), name

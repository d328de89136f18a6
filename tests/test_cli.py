"""The commands train, valuate and info, their help, and what errors look like."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

import torch
import typer.main
from typer.testing import CliRunner

from mmfast import backend, cli
from mmfast.cli import info
from mmfast.cli.commands import app
from mmfast.models import MultimodalModel
from mmfast.training import checkpoint
from mmfast.training.optimization import Optimization

ROOT = Path(__file__).parents[1]
FAST = ["--epochs", "2", "--dim", "8", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Three modalities of [6] without a split."""
    rng = np.random.default_rng(0)
    label = np.arange(160) % 4
    arrays = {name: rng.normal(size=(160, 6)) + label[:, None] * (name != "c") for name in "abc"}
    path = tmp_path_factory.mktemp("data") / "three.npz"
    np.savez(path, label=label, **arrays)
    return path


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory):
    """The folder and output of a finished run."""
    out = tmp_path_factory.mktemp("train") / "joint"
    result = train(npz, out)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def train(npz, out, *words):
    return CliRunner().invoke(app, ["train", "--data", str(npz), "--out", str(out), *FAST, *words])


def valuate(*words):
    return CliRunner().invoke(app, ["valuate", *map(str, words)])


def mmfast(*words, **environment):
    """Run the console command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mmfast", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=120,
    )


def figures(out):
    return json.loads((out / "metrics.json").read_text())["metrics"]


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["compare", "train", "valuate", "predict", "bench", "info"])
def test_help_names_every_option_and_says_what_it_does(name):
    text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert COMMANDS[name].help.splitlines()[0] in text
    for option in COMMANDS[name].params:
        assert option.opts[0] in text
        assert option.help, option.opts
        assert option.help.endswith("."), option.opts


def test_help_lists_the_commands():
    assert set(COMMANDS) == {"compare", "train", "valuate", "predict", "bench", "info"}
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0


@pytest.mark.parametrize("command", ["compare", "train"])
def test_help_tells_the_true_defaults(command):
    options = {option.name: option.help for option in COMMANDS[command].params}
    defaults = Optimization()
    pairs = {
        "epochs": defaults.max_epochs,
        "batch_size": defaults.batch_size,
        "optimizer": defaults.optimizer,
        "lr": defaults.lr,
        "momentum": defaults.momentum,
        "weight_decay": defaults.weight_decay,
        "lr_gamma": defaults.lr_gamma,
    }
    for name, value in pairs.items():
        assert f"{value} by default." in options[name]
    assert defaults.lr_step == 0
    assert "0, the default" in options["lr_step"]


def test_every_setting_of_a_run_has_an_option():
    for command in ("compare", "train"):
        options = {option.name for option in COMMANDS[command].params}
        names = {"max_epochs": "epochs"}
        assert {names.get(field.name, field.name) for field in fields(Optimization)} <= options
        assert {"compile", "deterministic", "class_weights", "label_smoothing", "select"} <= options


def test_settings_of_a_run_reach_it(npz, tmp_path):
    words = ["--method", "mla", "--schedule", "cosine", "--warmup-steps", "3", "--gradient-clip-val", "0.5"]
    words += ["--accumulate-grad-batches", "2", "--no-decay-norms-and-biases", "--patience", "1"]
    words += ["--freeze", "encoders.a", "--freeze", "encoders.b.0", "--lr-scale", "encoders.c=0.1"]
    words += ["--ema-decay", "0.5", "--deterministic", "--select", "val/loss", "--class-weights", "balanced"]
    result = train(npz, tmp_path, *words)
    assert result.exit_code == 2
    assert "got 'encoders.b.0'; did you mean" in result.stderr
    words[words.index("encoders.b.0")] = "encoders.b"
    assert train(npz, tmp_path, *words).exit_code == 0
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert state["objective"] == {
        "task": "multiclass",
        "loss": None,
        "class_weights": "balanced",
        "label_smoothing": 0.0,
        "select": "val/loss",
        "select_mode": "min",
    }
    found = Optimization(**state["optimization"])
    expected = Optimization(
        max_epochs=2,
        schedule="cosine",
        warmup_steps=3,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        no_decay_norms_and_biases=True,
        patience=1,
        freeze=("encoders.a", "encoders.b"),
        lr_scale={"encoders.c": 0.1},
        ema_decay=0.5,
    )
    assert found == expected
    assert CliRunner().invoke(app, ["valuate", "--model", str(tmp_path)]).exit_code == 0


def test_help_lists_the_options_of_methods():
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).stdout
    assert "fusion_temperature=" in text
    assert "weights=none" in text


def test_training_prints_and_writes_its_figures(trained):
    out, text = trained
    entry = json.loads((out / "metrics.json").read_text())
    assert (entry["method"], entry["seed"], entry["epochs"]) == ("joint", 0, 2)
    assert f"test accuracy {100 * entry['metrics']['accuracy']:.1f}%" in text
    assert "Alone, masked (%)" in text
    assert "drawn with seed 0" in " ".join(text.split())
    assert f"Written to {out}: metrics.json, model.ckpt, last.ckpt." in text


def test_a_run_is_not_overwritten_by_mistake(npz, trained):
    before = (trained[0] / "model.ckpt").read_bytes()
    result = train(npz, trained[0])
    assert result.exit_code == 2
    assert "holds a run already; give --resume, --overwrite or another --out" in result.stderr
    assert (trained[0] / "model.ckpt").read_bytes() == before
    assert train(npz, trained[0], "--resume", "--overwrite").exit_code == 2


def test_a_finished_run_can_be_resumed_and_gives_the_same(npz, trained):
    before = figures(trained[0])
    assert train(npz, trained[0], "--resume").exit_code == 0
    assert figures(trained[0]) == before


def test_a_run_of_other_settings_is_not_resumed(npz, trained):
    result = train(npz, trained[0], "--resume", "--lr", "0.5")
    assert result.exit_code == 2
    assert "lr" in result.stderr


def test_options_preset_loggers_and_overwrite(npz, tmp_path):
    words = (
        "--preset",
        "di-mml/crema-d",
        "--set",
        "e0=1",
        "--set",
        "head_epochs=1",
        "--logger",
        "csv,tensorboard",
    )
    assert train(npz, tmp_path, *words, "--probe").exit_code == 0
    entry = json.loads((tmp_path / "metrics.json").read_text())
    assert entry["config"]["temperature"] == 50
    assert entry["config"]["e0"] == 1
    assert set(entry["probe"]) == set("abc")
    assert list((tmp_path / "csv").rglob("metrics.csv"))
    assert list((tmp_path / "tensorboard").rglob("events*"))
    assert train(npz, tmp_path, "--method", "mla", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["method"] == "mla"


def test_two_processes_reach_the_figures_of_one(npz, tmp_path):
    words = ["--data", npz, "--method", "di-mml", "--set", "e0=1", "--set", "head_epochs=1", *FAST]
    done = mmfast("train", *words, "--devices", 2, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    # The second process prints nothing.
    assert done.stdout.count("test accuracy") == 1
    assert CliRunner().invoke(app, ["train", *map(str, words), "--out", str(tmp_path / "one")]).exit_code == 0
    one, two = (figures(tmp_path / name) for name in ("one", "two"))
    assert two["accuracy"] == pytest.approx(one["accuracy"], abs=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["contribution"] == pytest.approx(one["contribution"], abs=1e-5)
    words = ["--model", tmp_path / "two", "--accelerator", "cpu", "--eval-batch-size", 5]
    done = mmfast("valuate", *words, "--devices", 2, "--out", tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean contribution") == 1
    assert valuate(*words, "--out", tmp_path / "alone").exit_code == 0
    shared, alone = (rows_of(tmp_path / name / "valuation.csv") for name in ("shared", "alone"))
    assert [row["label"] for row in shared] == [row["label"] for row in alone]
    for name in "abc":
        values = [[float(row[name]) for row in rows] for rows in (shared, alone)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.parametrize("status", [None, 0, 2])
def test_a_command_that_succeeds_ends_the_threads_of_its_group(status, tmp_path, monkeypatch):
    def ended() -> None:
        raise SystemExit(status)

    monkeypatch.setattr("mmfast.cli.commands.app", ended)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit):
            cli.main()
        # One that failed does not wait for others.
        assert torch.distributed.is_initialized() == bool(status)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_valuation_computes_in_the_mixed_precision_of_the_run(npz, tmp_path, monkeypatch):
    words = ["--data", npz, "--method", "joint", *FAST, "--out", str(tmp_path), "--precision", "bf16-mixed"]
    assert CliRunner().invoke(app, ["train", *map(str, words)]).exit_code == 0
    seen, plain = [], MultimodalModel.encode

    def encode(model, batch):
        seen.append(torch.is_autocast_enabled("cpu"))
        return plain(model, batch)

    monkeypatch.setattr(MultimodalModel, "encode", encode)
    assert valuate("--model", tmp_path).exit_code == 0
    assert set(seen) == {True}


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_valuation_prints_and_writes_contributions(trained, tmp_path):
    result = valuate("--model", trained[0], "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "a + b + c" in result.stdout or "all modalities" in result.stdout
    rows = rows_of(tmp_path / "valuation.csv")
    facts = json.loads((tmp_path / "coalitions.json").read_text())
    assert len(rows) == facts["samples"] == 24
    assert list(rows[0]) == ["sample", "label", "a", "b", "c", "key", "class", "prediction", "correct"]
    # The keys are rows of the file, whose labels are i modulo 4.
    assert all(int(row["key"]) % 4 == int(row["label"]) == int(row["class"]) for row in rows)
    assert all(row["correct"] == str(row["class"] == row["prediction"]) for row in rows)
    for name in "abc":
        mean = sum(float(row[name]) for row in rows) / len(rows)
        assert mean == pytest.approx(facts["mean_contribution"][name], abs=1e-5)
        assert mean == pytest.approx(figures(trained[0])["contribution"][name], abs=1e-5)
    assert facts["coalition_accuracy"]["a+b+c"] == pytest.approx(figures(trained[0])["accuracy"], abs=1e-6)
    assert len(facts["coalition_accuracy"]) == 8
    assert (tmp_path / "valuation.parquet").exists()
    assert (tmp_path / "contributions.png").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("compare my.npz", "compare takes options alone, got my.npz; did you mean --data my.npz?"),
        ("compare joint mla", "got joint mla; did you mean --methods joint,mla?"),
        ("train --out x di-mml my.npz", "got di-mml my.npz; did you mean --method di-mml --data my.npz?"),
        ("predict --model x --data y z", "got z; did you mean --data z?"),
        ("info my.npz", "info takes options alone, got my.npz "),
    ],
)
def test_a_word_without_its_option(words, text):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


def test_valuation_lies_beside_the_model_by_default(trained):
    result = valuate("--model", trained[0] / "model.ckpt", "--split", "val", "--utility", "margin")
    assert result.exit_code == 0, result.output
    facts = json.loads((trained[0] / "valuation-val" / "coalitions.json").read_text())
    assert (facts["split"], facts["utility"]) == ("val", "margin")


def test_valuation_refuses_what_does_not_fit(trained, tmp_path):
    broken = tmp_path / "model.ckpt"
    broken.write_bytes((trained[0] / "model.ckpt").read_bytes()[:1000])
    for words, message in (
        (
            ("--model", trained[0], "--data", "htad"),
            "data must have modalities a [6], b [6], c [6], got audio [36]",
        ),
        (("--model", tmp_path / "nothing"), "no checkpoint at"),
        (("--model", broken), "no readable checkpoint"),
        (
            ("--model", trained[0] / "last.ckpt", "--split", "dev"),
            "split must be one of train, val, test, got 'dev'",
        ),
        (("--model", trained[0], "--utility", "f1"), "utility must be one of cardinality"),
    ):
        result = valuate(*words)
        assert result.exit_code == 2
        assert message in result.stderr


def test_errors_are_one_sentence_and_traceback_shows_more(tmp_path):
    words = ("train", "--data", tmp_path / "none.npz", "--out", tmp_path)
    result = mmfast(*words)
    assert result.returncode == 2
    assert result.stderr.startswith("mmfast: data must be")
    assert result.stderr.count("\n") == 1
    shown = CliRunner().invoke(app, [*map(str, words), "--traceback"])
    assert isinstance(shown.exception, ValueError)


def test_a_missing_package_is_named(npz, tmp_path, monkeypatch):
    def gone(*args, **options):
        raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics.classification")

    monkeypatch.setattr("mmfast.data.load", gone)
    result = train(npz, tmp_path / "out")
    assert result.exit_code == 2
    assert 'needs torchmetrics, which is not installed: pip install "mmfast[train]"' in result.stderr


def test_without_typer_the_command_says_so_and_info_works(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "typer" else find(name))
    monkeypatch.setattr(sys, "argv", ["mmfast", "compare"])
    assert cli.main() == 2
    assert (
        'needs typer, which the core package does not bring: pip install "mmfast[train]"'
        in capsys.readouterr().err
    )
    monkeypatch.setattr(sys, "argv", ["mmfast", "info"])
    assert cli.main() == 0
    assert "backends" in capsys.readouterr().out


def test_info_tells_of_every_backend():
    text = CliRunner().invoke(app, ["info"], env={"COLUMNS": "200"}).stdout
    lines = text[text.index("\nbackends") :].splitlines()
    for name in backend.BACKENDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        reason = backend.why_not(name)
        assert ("available: " in line) if reason is None else (f"not available: {reason}" in line)
    assert "instruction set" in text
    assert "shapley_values" in info.ops()


def test_info_tells_what_was_installed_and_built():
    lines = dict(info._build())
    assert set(lines) == {"installed as", "cpu module", "cuda module"}
    assert lines["installed as"].startswith(("wheel cp311-abi3-", "editable, of file://"))
    for name in ("cpu", "cuda"):
        # Without a GPU, too.
        is_there = not isinstance(backend._load_extension(name), str)
        pattern = r"(GCC|.*[Cc]lang) [\d.]+" if is_there else "not available$"
        assert re.match(pattern, lines[f"{name} module"]), lines


def test_info_needs_only_the_core_package():
    program = (
        "import sys\n"
        "for name in ('lightning_fabric', 'torchmetrics', 'sklearn', 'matplotlib', 'rich', 'typer'):\n"
        "    sys.modules[name] = None\n"
        "from mmfast.cli import info\n"
        "print(info.text())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "tests")
    assert "reference" in done.stdout, done.stderr


def test_the_listed_extra_is_that_of_the_package():
    with open(ROOT / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert tuple(extras["train"]) == info.TRAIN_EXTRA


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("mmfast ")

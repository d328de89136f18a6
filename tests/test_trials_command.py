"""Trials by the command: the same for every method, interrupted, resumed, told of in results."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("optuna")

from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.experiments import comparison as compare_module
from mmfast.experiments import trial_runs
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.setup import Setup
from mmfast.experiments.subprocesses import train_arguments
from mmfast.experiments.trials import Trial
from mmfast.experiments.tuning import Tuned, Tuning, drawn_names
from mmfast.methods import METHODS, MLA
from mmfast.ranges import ranges_of
from mmfast.reports import kept_files
from mmfast.training.optimization import Optimization
from support.files import write_npz

FAST = Optimization(max_epochs=2, batch_size=32)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures take longer than all else here, and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_files, "plot_comparison", lambda *_: [])
        patch.setattr(kept_files, "confusion_of", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def setup():
    splits = data.synthetic(140, 3, dims={"audio": 6, "pose": (5, 3)}, unique={"audio": 0.3, "pose": 0.1})
    return Setup("synthetic", splits, FAST, dim=8, accelerator="cpu")


def space_of(method, epochs=50):
    """Return what is drawn for a method, and its defaults."""
    declared = ranges_of(Optimization) | ranges_of(method)
    values = asdict(Optimization()) | asdict(method)
    return {name: of.within(epochs) for name, of in declared.items()}, {
        name: values[name] for name in declared
    }


@pytest.fixture(scope="module")
def npz(tmp_path_factory, setup):
    return write_npz(tmp_path_factory.mktemp("data") / "small.npz", setup.splits)


def invoke(npz, out, *words):
    options = [
        "--epochs",
        "2",
        "--dim",
        "8",
        "--batch-size",
        "32",
        "--accelerator",
        "cpu",
        "--seeds",
        "1",
        "--no-probe",
    ]
    return CliRunner().invoke(app, ["compare", "--data", str(npz), "--out", str(out), *options, *words])


def results(out):
    return json.loads((out / "results.json").read_text())


def metrics(out):
    return {(entry["method"], entry["seed"]): entry["metrics"] for entry in results(out)["runs"]}


SHORT_HEADS = ["--set", "frozen-unimodal.head_epochs=1", "--set", "di-mml.head_epochs=1"]


@pytest.fixture(scope="module")
def done(npz, tmp_path_factory):
    """The folder and output of a tuned comparison of all methods."""
    out = tmp_path_factory.mktemp("compare") / "all"
    result = invoke(npz, out, "--trials", "2", *SHORT_HEADS)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def test_every_method_has_the_same_number_of_trials_in_its_ranges(done):
    found = results(done[0])["configuration"]["tuning"]
    assert (found["trials"], found["seeds"]) == (2, [1000])
    assert set(found["methods"]) == set(METHODS)
    for name, tuned in found["methods"].items():
        given = METHODS[name](**({"head_epochs": 1} if "head_epochs" in METHODS[name]().config() else {}))
        space, defaults = space_of(given, epochs=2)
        assert len(tuned["trials"]) == 2
        assert found["drawn"][name] == drawn_names(given) == list(space)
        assert tuned["trials"][0]["settings"] == json.loads(json.dumps(defaults))
        for trial in tuned["trials"][1:]:
            assert list(trial["settings"]) == list(space)
            assert all(space[key].drawn(value) is not None for key, value in trial["settings"].items())
            assert 0 <= trial["score"] <= 1
        best = max(trial["score"] for trial in tuned["trials"])
        assert tuned["score"] == tuned["trials"][tuned["chosen"]]["score"] == best
        assert tuned["settings"] == tuned["trials"][tuned["chosen"]]["settings"]


def test_runs_have_the_settings_that_were_chosen(npz, done, tmp_path):
    found = results(done[0])
    for entry in found["runs"]:
        settings = found["configuration"]["tuning"]["methods"][entry["method"]]["settings"]
        told = entry["optimization"] | entry["config"]
        assert {name: told[name] for name in settings} == settings
        assert entry["seed"] == 0
    # The same settings by hand give the same figures.
    chosen = found["configuration"]["tuning"]["methods"]["mla"]["settings"]
    words = [f"--lr={chosen['lr']}", f"--weight-decay={chosen['weight_decay']}"]
    assert (
        invoke(npz, tmp_path, "--methods", "mla", *words, f"--set=mla.alpha={chosen['alpha']}").exit_code == 0
    )
    assert metrics(tmp_path)["mla", 0] == metrics(done[0])["mla", 0]
    assert "tuning" not in results(tmp_path)["configuration"]
    assert "optimization" not in results(tmp_path)["runs"][0]


def test_it_prints_a_line_a_trial_and_what_was_chosen(done):
    text = " ".join(done[1].split())
    assert " 1/20 joint trial 1: val/accuracy" in text
    assert "20/20 mla trial 2: val/accuracy" in text
    assert "lr=0.001, weight_decay=0.0001" in text
    assert "Settings: tuned, 2 trials each." in text
    assert "By val/accuracy in %, seed 1000; 2 trials each, the first with the settings as given." in text
    assert "Tuned As given Chosen Trial Settings" in text


def test_what_is_there_is_not_made_again(npz, done, monkeypatch):
    monkeypatch.setattr(compare_module, "make_run", None)
    monkeypatch.setattr(trial_runs.TrialRuns, "make", None)
    result = invoke(npz, done[0], "--trials", "2", *SHORT_HEADS)
    assert result.exit_code == 0, result.output
    assert "20 of 20 trials: already in" in result.stdout
    assert "10 of 10 runs: already in" in result.stdout
    fewer = invoke(npz, done[0], "--trials", "2", "--methods", "joint")
    assert fewer.exit_code == 0, fewer.output
    assert len(results(done[0])["configuration"]["tuning"]["methods"]) == 10


def test_damaged_results_are_rebuilt_with_their_trials(npz, done, monkeypatch):
    before = results(done[0])
    (done[0] / "results.json").write_text('{"runs": [')
    monkeypatch.setattr(compare_module, "make_run", None)
    monkeypatch.setattr(trial_runs.TrialRuns, "make", None)
    result = invoke(npz, done[0], "--trials", "2", *SHORT_HEADS)
    assert result.exit_code == 0, result.output
    assert results(done[0])["runs"] == before["runs"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trials", "4"], "trials is 2 there, 4 here"),
        (["--trials", "2", "--tune-seeds", "2"], "seeds of trials is [1000] there, [1000, 1001] here"),
        ([], "trials is 2 there, none here"),
        (["--trials", "2", "--lr", "0.001"], "drawn for joint is lr, weight_decay there, weight_decay here"),
    ],
)
def test_another_budget_is_another_comparison(npz, done, words, said):
    result = invoke(npz, done[0], *words, "--methods", "joint")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "--overwrite" in result.stderr


def test_it_is_interrupted_and_goes_on_to_the_same(npz, done, tmp_path, monkeypatch):
    make, made = trial_runs.TrialRuns.make, []

    def make_three(self, asked, stop):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(asked)
        return make(self, asked, stop)

    monkeypatch.setattr(trial_runs.TrialRuns, "make", make_three)
    words = ("--methods", "joint,mla", "--trials", "2")
    result = invoke(npz, tmp_path, *words)
    assert result.exit_code == 130
    assert (
        f"stopped with 3 of 4 trials in {tmp_path / 'tuning'}; the same command goes on there"
        in result.stderr
    )
    monkeypatch.setattr(trial_runs.TrialRuns, "make", make)
    result = invoke(npz, tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert f"3 of 4 trials: already in {tmp_path / 'tuning'}." in result.stdout
    assert metrics(tmp_path) == {key: metrics(done[0])[key] for key in (("joint", 0), ("mla", 0))}
    # Anew, the trials go with the rest; those of another number can be asked for then.
    result = invoke(npz, tmp_path, "--methods", "joint", "--trials", "1", "--overwrite")
    assert result.exit_code == 0, result.output
    assert "already" not in result.stdout
    assert len(json.loads((tmp_path / "tuning/joint.json").read_text())["trials"]) == 1
    assert not (tmp_path / "tuning/mla.json").exists()


def test_settings_of_the_command_stay(npz, tmp_path):
    result = invoke(
        npz, tmp_path, "--methods", "mla", "--trials", "2", "--set", "mla.alpha=0.5", "--weight-decay", "0"
    )
    assert result.exit_code == 0, result.output
    found = results(tmp_path)
    assert found["configuration"]["tuning"]["drawn"] == {"mla": ["lr"]}
    assert found["runs"][0]["config"]["alpha"] == 0.5
    assert found["runs"][0]["optimization"]["weight_decay"] == 0
    result = invoke(npz, tmp_path / "other", "--tune-seeds", "2")
    assert result.exit_code == 2
    assert "tune_seeds must be given with trials, got 2 without" in result.stderr


def test_runs_in_processes_of_their_own_are_told_the_settings(setup, tmp_path, monkeypatch):
    tuned = Tuned(
        MLA(alpha=0.3), replace(FAST, lr=0.004), [Trial({"lr": 0.004, "alpha": 0.3}, 0.5)], 0, "val/x"
    )
    told = []

    def run(setup, planned, folder):
        told.extend(train_arguments(setup, planned, folder))
        return {"method": "mla", "seed": 0, "config": planned.method.config(), "metrics": {}}

    monkeypatch.setattr(compare_module, "run_in_subprocess", run)
    two = setup.with_settings(devices=2)
    comparison = ComparisonRunner(two, [MLA()], 1, tmp_path, tuning=Tuning(1))
    comparison.note_tuned(tuned)
    comparison.make(comparison.settled(PlannedRun(MLA(), 0, 2)))
    assert {"--lr=0.004", "--set=alpha=0.3", "--devices=2", "--epochs=2"} <= set(told)

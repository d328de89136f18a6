"""Comparisons from Python with several jobs, and with trials: what one process finds, and the command."""

from __future__ import annotations

import json

import joblib
import pytest
import torch
from test_compare import invoke, npz
from test_compared import SETTINGS, WORDS, without
from test_objectives import raises
from test_python_compare import PARTS
from test_trainer import QUICK, SPLITS, without_times

import mmfast
from mmfast import methods
from mmfast.comparisons import makers
from mmfast.experiments import trial_runs
from mmfast.experiments.tuning import Tuning
from mmfast.models import build_model
from mmfast.training.optimization import Optimization

__all__ = ["npz"]

OWN = {"model": lambda: build_model(SPLITS.shapes, SPLITS.num_classes, dim=8), "seeds": 2} | QUICK


def runs(found):
    return [without(entry) for entry in found.runs]


def trials(tuned):
    """Return what trials are, but for their times."""
    return [trial.told() | {"seconds": 0, "steps": trial.steps} for trial in tuned.trials]


def test_jobs_find_what_one_process_does(tmp_path, capsys):
    one, seen = mmfast.compare(PARTS, "joint, mla", **OWN), []
    two = mmfast.compare(PARTS, "joint, mla", jobs=2, on_run=seen.append, progress=True, **OWN)
    assert runs(two) == runs(one)
    assert two.verdict == one.verdict
    assert sorted((entry["method"], entry["seed"]) for entry in seen) == sorted(
        (entry["method"], entry["seed"]) for entry in one.runs
    )
    told = capsys.readouterr().err.splitlines()
    # Whichever process is there first.
    assert told[0] in ("run 1 of 4: Joint, seed 0", "run 1 of 4: MLA, seed 0")
    assert any(line.startswith("runs ") and " of 4: " in line and "; " in line for line in told)
    kept = mmfast.compare(PARTS, "joint, mla", jobs="auto", out_dir=tmp_path, **OWN)
    assert runs(kept) == runs(one)
    learner = mmfast.load(tmp_path / "runs" / "mla-seed1", model=OWN["model"]())
    assert learner.predict(SPLITS.test).accuracy == pytest.approx(one.figures("accuracy")["mla"][1])
    assert not list(tmp_path.glob(".jobs-*"))


def test_a_run_that_diverges_elsewhere_is_one_without_figures():
    found = mmfast.compare(PARTS, "joint, mla", jobs=2, lr=1e30, **{**OWN, "max_epochs": 2})
    assert all("diverged" in entry for entry in found.runs)


def test_trials_are_those_of_the_command(npz, tmp_path):
    words = ["--methods", "joint,mla", "--seeds", "1", "--trials", "3", "--tune-seeds", "2", "--no-probe"]
    result = invoke(npz, tmp_path / "command", *WORDS, *words, "--jobs", "2", "--set", "mla.alpha=0.3")
    assert result.exit_code == 0, result.output
    theirs = json.loads((tmp_path / "command" / "results.json").read_text())
    chosen = ["joint", methods.MLA(alpha=0.3)]
    given = {"seeds": 1, "trials": 3, "tune_seeds": 2, "probe": False} | SETTINGS
    ours = mmfast.compare(npz, chosen, **given)
    assert runs(ours) == [without(entry) for entry in theirs["runs"]]
    tuning = theirs["configuration"]["tuning"]
    assert tuning["drawn"] == {"joint": ["lr", "weight_decay"], "mla": ["lr", "weight_decay"]}
    for name, tuned in ours.tuned.items():
        assert tuned.settings == tuning["methods"][name]["settings"]
        assert len(tuned.trials) == 3
        assert ours.runs[0]["optimization"].items() >= ours.tuned["joint"].settings.items()
    text = str(ours)
    assert text.startswith("Tuned")
    assert "Settings: tuned, 3 trials each." in " ".join(text.split())
    assert "mean over seeds 1000 to 1001; 3 trials each" in " ".join(ours._repr_html_().split())
    # The folder of the command goes on from here, and one of ours there.
    again = mmfast.compare(
        npz, chosen, out_dir=tmp_path / "command", resume=True, on_run=pytest.fail, **given
    )
    assert runs(again) == runs(ours)
    mmfast.compare(npz, chosen, out_dir=tmp_path / "own", **given)
    written = [
        json.loads((tmp_path / place / "tuning" / "mla.json").read_text()) for place in ("own", "command")
    ]
    assert written[0]["facts"] == written[1]["facts"]


def test_trials_of_a_program_with_jobs_and_in_a_folder_are_the_same(tmp_path, monkeypatch):
    given = OWN | {"seeds": 1, "trials": 3, "max_epochs": 2}
    one = mmfast.compare(PARTS, "joint, ensemble", **given)
    two = mmfast.compare(PARTS, "joint, ensemble", jobs=2, **given)
    kept = mmfast.compare(PARTS, "joint, ensemble", out_dir=tmp_path, **given)
    assert runs(one) == runs(two) == runs(kept)
    for name in ("joint", "ensemble"):
        assert trials(one.tuned[name]) == trials(two.tuned[name]) == trials(kept.tuned[name])
    monkeypatch.setattr(trial_runs.TrialRuns, "make", None)
    again = mmfast.compare(PARTS, "joint, ensemble", out_dir=tmp_path, resume=True, **given)
    # Results tell all of a trial but the course of its score.
    assert [trial.scores for trial in again.tuned["joint"].trials] == [
        trial.scores for trial in one.tuned["joint"].trials
    ]
    assert again.tuned["joint"].settings == one.tuned["joint"].settings
    with pytest.raises(ValueError, match="trials is 3 there, 2 here"):
        mmfast.compare(PARTS, "joint", out_dir=tmp_path, resume=True, **given | {"trials": 2})


def test_what_is_set_is_not_drawn():
    optimization = Optimization(max_epochs=1, weight_decay=0.0)
    own = {key: value for key, value in OWN.items() if key != "max_epochs"} | {"seeds": 1, "trials": 2}
    found = mmfast.compare(PARTS, ["joint", methods.MLA(alpha=0.4)], optimization=optimization, **own)
    assert set(found.tuned["joint"].settings) == {"lr"}
    assert set(found.tuned["mla"].settings) == {"lr"}
    assert found.about.told["configuration"]["tuning"]["drawn"]["mla"] == ["lr"]
    found = mmfast.compare(PARTS, "mla", lr=1e-3, max_epochs=1, **own)
    assert set(found.tuned["mla"].settings) == {"weight_decay", "alpha"}


def test_a_program_sees_its_epochs_and_its_trials_on_a_bar(capsys):
    seen, given = [], OWN | {"seeds": 1, "max_epochs": 2}
    found = mmfast.compare(PARTS, "joint", trials=2, on_epoch=seen.append, progress=True, **given)
    assert without_times(seen) == without_times(found.runs[0]["history"])
    assert capsys.readouterr().err.splitlines() == [
        "trial 1 of 2: Joint, trial 1",
        "trial 2 of 2: Joint, trial 2",
        "run 1 of 1: Joint, seed 0",
    ]


@pytest.mark.parametrize(
    ("options", "text", "kind"),
    [
        ({"jobs": 0}, "jobs must be at least 1, got 0", ValueError),
        ({"jobs": "all"}, "jobs must be an integer or \"auto\", got 'all'", TypeError),
        ({"jobs": True}, 'jobs must be an integer or "auto", got True', TypeError),
        ({"trials": 0}, "trials must be at least 1, got 0", ValueError),
        ({"trials": 2.0}, "trials must be an integer, got 2.0", TypeError),
        ({"tune_seeds": 2}, "tune_seeds must be given with trials, got 2 without", ValueError),
        ({"trials": 2, "tune_seeds": None}, "tune_seeds must be an integer, got None", TypeError),
        ({"trials": 2, "tune_seeds": 0}, "tune_seeds must be at least 1, got 0", ValueError),
        (
            {"trials": 2, "lr": 0.1, "weight_decay": 0.0},
            "trials must have something to draw for joint, got lr, weight_decay set",
            ValueError,
        ),
        (
            {"jobs": 2, "on_epoch": print},
            "on_epoch must be None with several jobs, as runs are made by processes of their own: on_run ",
            ValueError,
        ),
        ({"jobs": 2, "devices": "auto"}, "devices must be a number with several jobs, got", ValueError),
        (
            {"trials": 1, "devices": 2},
            "devices must be 1 with trials=1, where runs are made here",
            ValueError,
        ),
        ({"jobs": 2, "devices": 2}, "devices must be 1 with jobs=2, where runs are made here", ValueError),
        (
            {"data": (PARTS[0], None, PARTS[2]), "trials": 1},
            "trials must be scored on validation",
            ValueError,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_run(options, text, kind, monkeypatch, tmp_path):
    monkeypatch.setattr(makers, "side_by_side", None)
    given = {"data": PARTS, "methods": "joint", "accelerator": "cpu"} | OWN | options
    with raises(text, kind):
        mmfast.compare(**given)
    with raises(text, kind):
        mmfast.compare(**given, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes_of_a_launcher_make_no_trials_and_no_jobs(monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with raises("jobs and trials must be left out of a program that torchrun has started in several process"):
        makers.InMemory(None, [methods.Joint()], 1).check(2, None)
    with raises("jobs and trials must be left out of a program that torchrun has started in several process"):
        makers.InMemory(None, [methods.Joint()], 1, Tuning(2)).check(1, None)


def test_a_model_that_is_no_new_one_is_refused_before_processes_begin(monkeypatch):
    monkeypatch.setattr(makers, "side_by_side", None)
    one = OWN["model"]()
    with raises("model must return a new model each time, got one with weights of the one before"):
        mmfast.compare(PARTS, "joint", jobs=2, **{**OWN, "model": lambda: one})


def test_what_a_program_has_set_for_torch_holds_elsewhere():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        one, two = (mmfast.compare(PARTS, "joint, mla", jobs=jobs, **OWN) for jobs in (1, 2))
    finally:
        torch.set_default_dtype(before)
    assert runs(two) == runs(one)
    assert runs(one) != runs(mmfast.compare(PARTS, "joint, mla", **OWN))


def test_trials_in_a_folder_are_held_as_runs_are(tmp_path):
    given = OWN | {"seeds": 1, "trials": 1, "max_epochs": 1, "out_dir": tmp_path}
    mmfast.compare(PARTS, "joint", **given)
    for path in [tmp_path / "results.json", *tmp_path.glob("runs/*/*")]:
        path.unlink()
    with raises(f"{tmp_path} holds runs already: give resume=True, overwrite=True or another out_dir"):
        mmfast.compare(PARTS, "joint", **given)
    mmfast.compare(PARTS, "joint", resume=True, **given)


def test_tuned_methods_come_in_the_order_they_were_given():
    chosen = ["mla", "joint", "ensemble"]
    given = OWN | {"seeds": 1, "trials": 1, "max_epochs": 1}
    assert list(mmfast.compare(PARTS, chosen, jobs=2, **given).tuned) == chosen


class Unsendable(Exception):
    """Its class is none that another process finds by its name."""

    def __reduce__(self):
        raise TypeError("it stays here")


def test_errors_of_a_program_tell_their_kind_and_place(tmp_path):
    made = tmp_path / "made"

    def model():
        # The parent makes models first, to check them.
        if made.exists():
            raise Unsendable("no such file")
        return OWN["model"]()

    def begun(entry):
        made.touch()

    given = {**OWN, "model": model, "seeds": 3, "max_epochs": 1}
    with pytest.raises(RuntimeError, match="Unsendable: no such file") as caught:
        mmfast.compare(PARTS, "joint, mla", jobs=2, on_run=begun, **given)
    assert "in model" in "".join(caught.value.__notes__)


def test_what_cannot_be_sent_is_refused_and_threads_are(tmp_path):
    class Sent(mmfast.data.ArrayDataset):
        def __reduce__(self):
            raise TypeError("it stays here")

    train = Sent(SPLITS.train.arrays, SPLITS.train.labels)
    with raises("what runs share must be picklable for several jobs: it stays here"):
        mmfast.compare((train, *PARTS[1:]), "joint", jobs=2, **OWN)
    with joblib.parallel_config(backend="threading"), raises("joblib's backend must not be 'threading'"):
        mmfast.compare(PARTS, "joint", **OWN)

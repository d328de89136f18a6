"""Trials of settings: the same number for every method, on validation data alone, resumed to the same."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from dataclasses import asdict, replace

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("optuna")


from mmfast import data
from mmfast.experiments import trial_runs
from mmfast.experiments.journal import clear_journals
from mmfast.experiments.setup import Setup
from mmfast.experiments.tuning import Tuned, Tuning, tune
from mmfast.files import locked
from mmfast.methods import DIMML, METHODS, MLA, DiagnoseRelearn, Joint, MultiLoss
from mmfast.ranges import ranges_of
from mmfast.training.divergence import DivergedError
from mmfast.training.optimization import Optimization
from mmfast.training.stopping import Stopped

FAST = Optimization(max_epochs=2, batch_size=32)


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


def bare(trials):
    """Return trials without their times."""
    return [replace(trial, seconds=0.0) for trial in trials]


# Tuning


def test_a_score_is_that_of_the_selected_weights_on_validation_data(setup):
    found = tune(setup, Joint(), trials=2, seeds=(1000, 1001))
    for trial in found.trials:
        scores = []
        for seed in (1000, 1001):
            settings = replace(FAST, lr=trial.settings["lr"], weight_decay=trial.settings["weight_decay"])
            trainer = setup.with_settings(optimization=settings).trainer(Joint(), seed, None)
            trainer.fit(setup.model(seed), setup.splits.train, setup.splits.val)
            scores.append(max(entry["val"]["accuracy"] for entry in trainer.history))
        assert trial.scores == scores
        assert trial.score == sum(scores) / 2
        # Two seeds of two epochs; the best so far of the second joins the first's score.
        assert [step for step, _ in trial.steps] == [1, 2, 3, 4]
        assert trial.steps[-1][1] == pytest.approx(trial.score)
    assert found.select == "val/accuracy"
    best = max(trial.score for trial in found.trials)
    assert found.trials[found.chosen].score == best
    assert found.optimization == replace(FAST, **found.settings)


def test_the_figure_that_selects_scores_and_the_lowest_loss_is_the_best(setup):
    found = tune(setup.with_settings(select="val/loss"), MultiLoss(), trials=3)
    assert found.select == "val/loss"
    assert found.trials[found.chosen].score == min(trial.score for trial in found.trials)
    assert found.method.lam == found.settings["lam"]


def test_parts_that_are_selected_apart_are_scored_together(setup):
    """No epoch has the weights that are selected: they are asked themselves."""
    found = tune(setup, METHODS["unimodal"](), trials=1)
    trainer = setup.trainer(METHODS["unimodal"](), 1000, None)
    model = setup.model(1000)
    trainer.fit(model, setup.splits.train, setup.splits.val)
    assert found.trials[0].score == trainer.test(model, setup.splits.val).accuracy


def test_epochs_before_a_method_acts_are_not_scored(setup):
    long = setup.with_settings(optimization=replace(FAST, max_epochs=4))
    found = tune(long, DIMML(e0=2, head_epochs=1), trials=1, fixed=("e0",))
    # Two of the encoders', one of the head's.
    assert [step for step, _ in found.trials[0].steps] == [3, 4, 5]


class _Untouchable:
    def __getattribute__(self, name):
        raise AssertionError(f"test data were asked for {name}")


def test_no_test_data_are_read(setup):
    hidden = replace(setup, splits=replace(setup.splits))
    assert hidden.fingerprint
    object.__setattr__(hidden.splits, "test", _Untouchable())
    for method in (Joint(), METHODS["sample-valuation"](warmup=1), DiagnoseRelearn(epochs=(0,), num_init=1)):
        assert len(tune(hidden, method, trials=2).trials) == 2


def test_no_checkpoint_is_written(setup, tmp_path):
    tune(setup, Joint(), trials=2, folder=tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"joint.json", ".joint.json.lock"}


@pytest.mark.parametrize("where", ["after a trial", "in a trial"])
def test_a_search_that_is_interrupted_goes_on_to_the_same(setup, tmp_path, where):
    whole = tune(setup, MLA(), trials=4)
    seen = []

    def interrupt(*_):
        seen.append(0)
        if len(seen) == (2 if where == "after a trial" else 5):
            raise KeyboardInterrupt

    hooks = {"on_trial" if where == "after a trial" else "on_epoch": interrupt}
    with pytest.raises(KeyboardInterrupt):
        tune(setup, MLA(), trials=4, folder=tmp_path, **hooks)
    made = []
    found = tune(setup, MLA(), trials=4, folder=tmp_path, on_trial=lambda number, _: made.append(number))
    assert made == [2, 3]
    assert bare(found.trials) == bare(whole.trials)
    assert (found.method, found.optimization) == (whole.method, whole.optimization)
    # More trials begin with those that are there.
    more = tune(setup, MLA(), trials=5, folder=tmp_path)
    assert bare(more.trials[:4]) == bare(whole.trials)


def test_sigterm_ends_it_after_the_epoch(setup, tmp_path):
    seen = []

    def stop(entry):
        seen.append(entry)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        tune(setup, Joint(), trials=3, folder=tmp_path, on_epoch=stop)
    assert len(seen) == 3
    assert len(json.loads((tmp_path / "joint.json").read_text())["trials"]) == 1


def test_one_process_at_a_time_makes_the_trials_of_a_method(setup, tmp_path):
    held, free, said = threading.Event(), threading.Event(), []

    def hold():
        with locked(tmp_path / ".joint.json.lock"):
            held.set()
            free.wait()

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    # Another method is not waited for.
    tune(setup, MultiLoss(), trials=1, folder=tmp_path)
    with pytest.raises(BlockingIOError, match="another process tunes joint"):
        clear_journals(tmp_path)
    tune(setup, Joint(), trials=1, folder=tmp_path, wait=lambda text: (said.append(text), free.set()))
    other.join()
    assert said == [f"Waiting for another process, which tunes joint in {tmp_path}."]
    clear_journals(tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_trials_of_other_settings_are_refused_and_damaged_ones_made_anew(setup, tmp_path):
    tune(setup, Joint(), trials=1, folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"joint.json is of another configuration: max_epochs is 2 there, 3 here"
    ):
        tune(
            setup.with_settings(optimization=replace(FAST, max_epochs=3)), Joint(), trials=1, folder=tmp_path
        )
    with pytest.raises(ValueError, match=r"seeds is \[1000\] there, \[1000, 1001\] here"):
        tune(setup, Joint(), trials=1, seeds=(1000, 1001), folder=tmp_path)
    (tmp_path / "joint.json").write_text('{"facts": {')
    made = []
    tune(setup, Joint(), trials=1, folder=tmp_path, on_trial=lambda *_: made.append(0))
    assert made == [0]


def test_a_diverged_trial_counts_and_is_not_chosen(setup, monkeypatch):
    fit = trial_runs.TrialRuns._score

    def diverge(self, setup, *rest):
        if setup.optimization.lr != FAST.lr:
            raise DivergedError("the loss is NaN or infinite in epoch 1", epoch=0)
        return fit(self, setup, *rest)

    monkeypatch.setattr(trial_runs.TrialRuns, "_score", diverge)
    found = tune(setup, Joint(), trials=3)
    assert [bool(trial.diverged) for trial in found.trials] == [False, True, True]
    assert [trial.score is None for trial in found.trials] == [False, True, True]
    assert found.chosen == 0


def test_where_all_diverge_the_settings_stay_as_given(setup):
    lost = setup.with_settings(optimization=replace(FAST, lr=1e30))
    found = tune(lost, Joint(), trials=2, fixed=("lr",))
    assert all("NaN or infinite" in trial.diverged for trial in found.trials)
    assert found.optimization == lost.optimization


def test_what_is_fixed_is_not_drawn(setup):
    found = tune(setup, DIMML(e0=1, head_epochs=1), trials=3, fixed=("lr", "e0"))
    for trial in found.trials:
        assert list(trial.settings) == ["weight_decay", "lam", "temperature", "fusion_temperature"]
    assert (found.optimization.lr, found.method.e0, found.method.head_epochs) == (FAST.lr, 1, 1)


def test_what_results_tell_of_it_gives_it_back(setup):
    found = tune(setup, DiagnoseRelearn(), trials=2)
    told = json.loads(json.dumps(found.told()))
    again = Tuned.of(DiagnoseRelearn(), FAST, told)
    assert (again.method, again.optimization, again.chosen) == (
        found.method,
        found.optimization,
        found.chosen,
    )
    assert isinstance(again.method.epochs, tuple)
    # As it comes from another process.
    assert pickle.loads(pickle.dumps(found)).told() == found.told()
    assert again.told() == told


def test_a_plan_is_checked_before_any_training(setup, monkeypatch):
    Tuning(2).check(setup, [Joint(), MLA()], 5)
    fixed = {"joint": ["lr", "weight_decay"], "mla": ["lr", "weight_decay"]}
    Tuning(2, fixed=fixed).check(setup, [MLA()], 5)
    with pytest.raises(
        ValueError, match="trials must have something to draw for joint, got lr, weight_decay set"
    ):
        Tuning(2, fixed=fixed).check(setup, [MLA(), Joint()], 5)
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        Tuning(0).check(setup, [Joint()], 5)
    with pytest.raises(ValueError, match="tune_seeds must be at least 1, got 0"):
        Tuning(2, 0).check(setup, [Joint()], 5)
    with pytest.raises(ValueError, match="seeds must be at most 1000 with trials, got 1001"):
        Tuning(2).check(setup, [Joint()], 1001)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ImportError, match=r'tuning needs optuna, which is not installed: pip install "mmfast\[train'
    ):
        Tuning(2).check(setup, [Joint()], 5)

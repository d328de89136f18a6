"""Trials of settings: the same number for every method, on validation data alone, resumed to the same."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import sys
import threading
import typing
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("optuna")

import optuna
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.experiments import comparison as compare_module
from mmfast.experiments import pictures, trial_runs
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.journal import clear_journals
from mmfast.experiments.setup import PlannedRun, Setup
from mmfast.experiments.subprocesses import train_arguments
from mmfast.experiments.trials import _PRIMES, Search, Trial, best_of
from mmfast.experiments.tuning import Tuned, Tuning, drawn_names, tune
from mmfast.files import locked
from mmfast.methods import DIMML, METHODS, MLA, DiagnoseRelearn, Joint, MultiLoss
from mmfast.ranges import Choices, Epochs, Numbers, Spacing, ranges_of
from mmfast.training.divergence import DivergedError
from mmfast.training.optimization import Optimization
from mmfast.training.stopping import Stopped

FAST = Optimization(max_epochs=2, batch_size=32)
# Fields that hold numbers, and are never drawn: more of these costs time, or estimates better, and no more;
# fixed weights are the user's; and `bias` is of a loss that is not the paper's.
NOT_DRAWN = {
    "frozen-unimodal": {"head_epochs"},
    "sample-valuation": {"damping"},
    "modality-valuation": {"fraction"},
    "di-mml": {"head_epochs", "bias"},
    "diagnose-relearn": {"max_times", "num_init"},
    "mla": {"weights"},
}
# Of Optimization: the size of the work, the same for all, and what is off or has no effect by default.
NOT_DRAWN_OF_ALL = {
    "max_epochs",
    "batch_size",
    "momentum",
    "lr_step",
    "lr_gamma",
    "warmup_epochs",
    "warmup_steps",
    "gradient_clip_val",
    "accumulate_grad_batches",
    "lr_scale",
    "patience",
    "ema_decay",
}


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Pictures take longer than all else here, and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "plot_comparison", lambda *_: [])
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


def bare(trials):
    """Return trials without their times."""
    return [replace(trial, seconds=0.0) for trial in trials]


# Ranges


@pytest.mark.parametrize("kind", [*METHODS.values(), Optimization], ids=lambda kind: kind.__name__)
def test_defaults_lie_in_their_ranges(kind):
    for name, of in ranges_of(kind).items():
        assert of.within(Optimization().max_epochs).drawn(getattr(kind(), name)) is not None, name


def holds_numbers(hint):
    """Whether a field of this type is a number, or holds some."""
    return hint in (int, float) or any(holds_numbers(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("kind", [*METHODS.values(), Optimization], ids=lambda kind: kind.__name__)
def test_a_number_without_a_range_is_left_out_on_purpose(kind):
    hints = typing.get_type_hints(kind)
    numbers = {field.name for field in fields(kind) if holds_numbers(hints[field.name])}
    left_out = NOT_DRAWN_OF_ALL if kind is Optimization else NOT_DRAWN.get(kind.name, set())
    assert numbers - set(ranges_of(kind)) == left_out


@pytest.mark.parametrize("name", METHODS)
def test_what_is_drawn_is_of_the_type_of_its_field_and_has_one_name(name):
    method = METHODS[name]()
    space, defaults = space_of(method)
    assert not {field.name for field in fields(method)} & {field.name for field in fields(Optimization)}
    assert len(space) <= len(_PRIMES)
    for key, of in space.items():
        for part in (0.0, 0.5, 0.999):
            assert type(of.value(of.at(part))) is type(defaults[key])
            assert of.drawn(of.value(of.at(part))) is not None
    assert "released" not in space


def test_ranges_hold_what_they_say():
    tenfold = Numbers(0.1, 10.0, log=True)
    assert [tenfold.value(tenfold.at(part)) for part in (0, 0.25, 0.5, 1)] == [0.1, 0.316, 1.0, 10.0]
    assert (tenfold.drawn(0.05), tenfold.drawn(True), tenfold.drawn("1"), tenfold.drawn(2)) == (
        None,
        None,
        None,
        2,
    )
    assert tenfold.value(9.9999) == 10.0
    assert tenfold.value(0.123456) == 0.123
    whole = Numbers(1, 4)
    assert [whole.at(part) for part in (0, 0.2, 0.25, 0.5, 0.999)] == [1, 1, 2, 3, 4]
    assert [Choices(("a", "b", "c")).at(part) for part in (0, 0.34, 0.999)] == ["a", "b", "c"]
    assert Epochs(0.02, 0.5).within(50) == Numbers(1, 25)
    assert Epochs(0.02, 0.5).within(2) == Numbers(1, 1)
    spaced = Epochs(0.1, 0.5, 3).within(50)
    assert spaced == Spacing(5, 25, times=3)
    assert spaced.value(8) == (8, 16, 24)
    assert (spaced.drawn((8, 16, 24)), spaced.drawn((8, 16, 20)), spaced.drawn(())) == (8, None, None)


# Search


def searched(method, num_trials, score, past=()):
    """Return trials of a method that score as a function of their settings, read back from JSON each time."""
    space, defaults = space_of(method)
    past = list(past)
    while len(past) < num_trials:
        asked = Search(space, defaults, 1.0, 50).next(past)
        ends = False
        for epoch in range(1, 51):
            if ends := asked.note(epoch, score(asked.settings) - (50 - epoch) / 100):
                break
        past.append(asked.ended([score(asked.settings)], pruned=epoch if ends else None, seconds=0.0))
    return past


def near(settings):
    """Return how near a learning rate is to the best one, 0.004."""
    return -abs(math.log10(settings["lr"] / 0.004))


def test_the_first_trial_has_the_settings_as_given_and_others_lie_in_the_ranges():
    space, defaults = space_of(DIMML())
    found = searched(DIMML(), 16, near)
    assert found[0].settings == defaults
    assert len({trial.settings["lr"] for trial in found}) == 16
    for trial in found:
        assert list(trial.settings) == list(space)
        for name, value in trial.settings.items():
            assert space[name].drawn(value) is not None
        assert all(len(f"{v:e}".split("e")[0].rstrip("0")) <= 4 for v in trial.settings.values())


def test_a_search_that_goes_on_elsewhere_is_the_same():
    found = searched(MLA(), 14, near)
    for known in (1, 5, 10, 12):
        read = [Trial(**json.loads(json.dumps(asdict(trial)))) for trial in found[:known]]
        assert [trial.settings for trial in searched(MLA(), 14, near, read)] == [t.settings for t in found]


def test_methods_try_the_same_learning_rates_first():
    joint, dimml = searched(Joint(), 10, near), searched(DIMML(), 10, near)
    for name in ("lr", "weight_decay"):
        assert [trial.settings[name] for trial in joint] == [trial.settings[name] for trial in dimml]


def test_later_trials_lie_nearer_to_the_best():
    found = searched(Joint(), 30, near)
    first, last = ([near(trial.settings) for trial in part] for part in (found[1:10], found[20:]))
    assert sum(last) / len(last) > sum(first) / len(first) + 0.1


def test_the_median_ends_trials_but_no_early_ones():
    found = searched(Joint(), 20, near)
    ended = [number for number, trial in enumerate(found) if trial.pruned]
    assert ended
    assert min(ended) >= 4
    for number in ended:
        whole = [trial for trial in found[:number] if trial.is_whole]
        step, score = found[number].steps[-1]
        assert step == found[number].pruned >= 50 / 3
        assert score < np.median([dict(trial.steps)[step] for trial in whole])
    assert found[best_of(found, 1.0)].score == max(trial.score for trial in found if trial.is_whole)


def test_a_trial_without_score_is_the_worst():
    settings = {"lr": 1e-3, "weight_decay": 1e-4}
    lost = Trial(settings, None, diverged="the loss is NaN or infinite")
    pruned = Trial(settings, 0.9, pruned=20)
    assert best_of([lost, pruned, Trial(settings, 0.1), Trial(settings, 0.1)], 1.0) == 2
    assert best_of([Trial(settings, 0.3), Trial(settings, 0.1)], -1.0) == 1
    assert best_of([lost, pruned], 1.0) == 0
    space, defaults = space_of(Joint())
    # The sampler takes it, and goes on.
    past = [replace(lost, settings=trial.settings) for trial in searched(Joint(), 12, near)]
    assert set(Search(space, defaults, 1.0, 50).next(past).settings) == set(space)


def test_what_optuna_says_does_not_reach_users(setup, capfd, recwarn):
    before = optuna.logging.get_verbosity()
    searched(DIMML(), 13, near)
    said = capfd.readouterr()
    assert said.out + said.err == ""
    assert not [str(warning.message) for warning in recwarn if "ptuna" in str(warning.filename)]
    assert optuna.logging.get_verbosity() == before


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


# The command


@pytest.fixture(scope="module")
def npz(tmp_path_factory, setup):
    parts = [(name, getattr(setup.splits, name)) for name in ("train", "val", "test")]
    arrays = {
        key: np.concatenate([part.arrays[key].numpy() for _, part in parts]) for key in ("audio", "pose")
    }
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(
        path,
        label=np.concatenate([part.labels.numpy() for _, part in parts]),
        split=np.repeat([name for name, _ in parts], [len(part) for _, part in parts]),
        **arrays,
    )
    return path


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

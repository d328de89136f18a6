"""Ranges beside the fields of settings, and what a search draws from them."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("optuna")

import optuna

from mmfast import data
from mmfast.experiments.setup import Setup
from mmfast.experiments.trials import _PRIMES, Search, Trial, best_of
from mmfast.methods import DIMML, METHODS, MLA, Joint
from mmfast.ranges import Choices, Epochs, Numbers, Spacing, ranges_of
from mmfast.training.optimization import Optimization

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

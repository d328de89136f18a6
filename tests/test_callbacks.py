"""Objects that are told of a fit: when, of what, and how they end it."""

from __future__ import annotations

import os
import re
import signal

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_steps import PLAIN, fit
from test_trainer import SPLITS, assert_same_state, make_model, make_trainer, without_times

import mmfast
from mmfast.training import checkpoint
from mmfast.training.callbacks import Callback
from mmfast.training.stopping import Stopped


class Told(Callback):
    """Notes all it is told."""

    def __init__(self):
        self.said = []

    def on_fit_start(self, trainer, learner):
        self.said.append(("start", learner.training))

    def on_step_end(self, trainer, learner, entry):
        self.said.append(("step", entry["stage"], entry["epoch"], entry["batch"], entry["step"]))
        assert learner.training
        assert float(entry["loss"]) > 0

    def on_epoch_end(self, trainer, learner, entry):
        assert trainer.history[-1] is entry
        self.said.append(("epoch", entry["stage"], entry["epoch"]))

    def on_fit_end(self, trainer, learner, error):
        self.said.append(("end", error))


@pytest.mark.parametrize(("name", "steps", "epochs"), [("mla", 2, 2), ("di-mml", 1, 4)])
def test_a_callback_is_told_of_all_in_order(name, steps, epochs):
    told = Told()
    trainer = fit(name, callbacks=[told], batch_size=64)
    first, *middle, last = told.said
    assert (first, last) == (("start", True), ("end", None))
    expected = []
    for entry in trainer.history:
        place = entry["stage"], entry["epoch"]
        expected += [("step", *place, batch, step) for batch in range(3) for step in range(steps)]
        expected.append(("epoch", *place))
    assert len(trainer.history) == epochs
    assert middle == expected


def test_a_callback_changes_nothing_by_being_there():
    one, other = fit("joint", callbacks=[Told()]), fit("joint")
    assert without_times(one.history) == without_times(other.history)
    assert_same_state(one.learner, other.learner)


def test_the_end_is_told_whatever_ends_a_fit(tmp_path):
    class Failing:
        def __init__(self, error):
            self.error = error

        def on_step_end(self, trainer, learner, entry):
            raise self.error

    for error in (RuntimeError("enough"), KeyboardInterrupt()):
        told, after = Told(), []
        trainer = make_trainer("joint", callbacks=[told, Failing(error)], on_epoch=after.append)
        with pytest.raises(type(error)):
            trainer.fit(make_model(), SPLITS.train)
        assert told.said[-1] == ("end", error)
        assert not after

    told = Told()
    with pytest.raises(Stopped):
        fit(
            "joint",
            callbacks=[told],
            out_dir=tmp_path,
            on_epoch=lambda entry: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert isinstance(told.said[-1][1], Stopped)


def test_an_end_that_fails_hides_no_error_and_no_other_end():
    class BadEnd:
        def on_fit_end(self, trainer, learner, error):
            raise RuntimeError("bad end")

    told = Told()
    with pytest.raises(RuntimeError, match="bad end"):
        fit("joint", callbacks=[BadEnd(), told])
    assert told.said[-1] == ("end", None)

    class BadStart(BadEnd):
        def on_fit_start(self, trainer, learner):
            raise ValueError("bad start")

    told = Told()
    with pytest.raises(ValueError, match="bad start") as found:
        fit("joint", callbacks=[BadStart(), told])
    assert told.said == [("end", found.value)]
    assert found.value.__notes__ == ["Besides, on_fit_end of BadStart failed: bad end"]


def test_what_a_callback_adds_to_an_entry_is_in_history():
    class Adds:
        def on_epoch_end(self, trainer, learner, entry):
            entry["seen"] = entry["epoch"] + 0.5

    seen = []
    trainer = fit("joint", callbacks=[Adds()], on_epoch=lambda entry: seen.append(entry["seen"]))
    assert [entry["seen"] for entry in trainer.history] == seen == [0.5, 1.5]


# Ending early


class StopsAt:
    """Wants the end at a number of epochs of each stage, or at a step."""

    def __init__(self, epochs: int, stages=("train", "encoders", "head")):
        self.epochs, self.stages = epochs, stages

    def on_epoch_end(self, trainer, learner, entry):
        if entry["epoch"] + 1 == self.epochs and entry["stage"] in self.stages:
            trainer.should_stop = True


def test_a_callback_ends_a_run_and_the_best_weights_are_kept():
    trainer, model = make_trainer("mla", max_epochs=9, lr=0.03, callbacks=[StopsAt(6)]), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    found = [entry["val"]["accuracy"] for entry in trainer.history]
    assert len(found) == 6
    assert trainer.test(model, SPLITS.val).accuracy == pytest.approx(max(found))
    # The next fit is a new one.
    assert not trainer.should_stop
    trainer.callbacks.clear()
    trainer.fit(make_model(), SPLITS.train, SPLITS.val)
    assert len(trainer.history) == 9


def test_the_other_stages_follow_one_that_was_ended():
    trainer = fit("di-mml", max_epochs=5, callbacks=[StopsAt(2, ["encoders"])])
    assert [entry["stage"] for entry in trainer.history] == ["encoders"] * 2 + ["head"] * 2
    assert trainer.learner.in_head_stage
    everywhere = fit("di-mml", max_epochs=5, callbacks=[StopsAt(1)])
    assert [entry["stage"] for entry in everywhere.history] == ["encoders", "head"]


def test_an_end_that_is_wished_for_within_an_epoch_comes_after_it():
    class Stops:
        def on_step_end(self, trainer, learner, entry):
            if (entry["epoch"], entry["batch"]) == (1, 0):
                trainer.should_stop = True

    trainer = fit("joint", max_epochs=5, callbacks=[Stops()])
    assert len(trainer.history) == 2


@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_a_run_that_a_callback_ended_resumes_as_one_that_has_ended(name, tmp_path):
    class Ends(StopsAt):
        def on_epoch_end(self, trainer, learner, entry):
            super().on_epoch_end(trainer, learner, entry)
            if trainer.should_stop and trainer.out_dir is not None:
                os.kill(os.getpid(), signal.SIGTERM)

    stages = ("train", "encoders")
    whole = fit(name, max_epochs=5, callbacks=[Ends(3, stages)])
    with pytest.raises(Stopped, match="after epoch 3 of 3"):
        fit(name, max_epochs=5, callbacks=[Ends(3, stages)], out_dir=tmp_path)
    assert checkpoint.load(tmp_path / "last.ckpt")["ended"]
    resumed = make_trainer(name, max_epochs=5, out_dir=tmp_path, **PLAIN)
    resumed.fit(make_model(3), SPLITS.train, SPLITS.val, resume=True)
    assert without_times(resumed.history) == without_times(whole.history)
    assert_same_state(resumed.learner, whole.learner)


# What is no callback


class Misspelt:
    def on_train_epoch_end(self, trainer, learner):
        """Do nothing."""


class Almost:
    def on_epoch_ends(self, trainer, learner, entry):
        """Do nothing."""


@pytest.mark.parametrize(
    ("callbacks", "kind", "text"),
    [
        ([Misspelt()], ValueError, "got on_train_epoch_end of Misspelt; did you mean on_epoch_end?"),
        ([Told(), Almost()], ValueError, "callbacks[1] must have methods among on_fit_start, on_step_end, "),
        ([print], TypeError, "callbacks[0] must have one of the methods on_fit_start, "),
        ([Told], TypeError, "callbacks[0] must be an object, Told(), got the class"),
        (Told(), TypeError, "callbacks must be a list of objects, got Told"),
    ],
)
def test_what_is_no_callback_says_so(callbacks, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        mmfast.Trainer("joint", callbacks=callbacks)


def test_callbacks_that_are_added_later_are_looked_at_too():
    trainer = make_trainer("joint", accelerator="cpu")
    trainer.callbacks.append(Misspelt())
    with pytest.raises(ValueError, match="got on_train_epoch_end of Misspelt"):
        trainer.fit(make_model(), SPLITS.train)


def test_gradients_are_there_after_a_step():
    class Looks:
        def on_step_end(self, trainer, learner, entry):
            assert all(isinstance(p.grad, torch.Tensor) for p in learner.trainable_parameters())

    fit("joint", callbacks=[Looks()])


def test_other_data_may_lack_labels_while_a_learner_trains():
    data, found = SPLITS.test, []
    labels = data.labels.clone()
    labels[::3] = -100
    some = mmfast.data.ArrayDataset(data.arrays, labels, present=data.present, num_classes=data.num_classes)

    class Asks(Callback):
        def on_epoch_end(self, trainer, learner, entry):
            told = learner.predict(some, standardized=True)
            values = [
                mmfast.valuate(learner, some, utility=utility).contributions
                for utility in (None, "negative_loss")
            ]
            found[:] = [told.contributions, *values]
            assert not learner.objective.may_ignore

    trainer = make_trainer("joint", max_epochs=1, callbacks=[Asks()])
    learner = trainer.fit(make_model(), SPLITS.train)
    expected = [
        learner.predict(some, standardized=True).contributions,
        mmfast.valuate(learner, some).contributions,
        mmfast.valuate(learner, some, utility="negative_loss").contributions,
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.isnan().any(1), labels == -100)
        torch.testing.assert_close(one, other, equal_nan=True)

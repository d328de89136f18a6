"""What all methods share: coalitions, freezing, the baselines, and errors."""

from __future__ import annotations

import textwrap

import pytest
import torch
import torch.nn.functional as F
from test_trainer import QUICK, SPLITS, make_model
from torch.utils.data import DataLoader

import mmfast
from mmfast import methods
from mmfast.methods import base
from mmfast.models import build_model
from support.learners import NUM_CLASSES, bind, make_data


def test_separate_training_equals_training_each_alone():
    data = make_data()
    together = bind("unimodal", num_modalities=2)
    initial = {key: value.clone() for key, value in together.state_dict().items()}
    optimizer = torch.optim.SGD(together.trainable_parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        together(data[:]).backward()
        optimizer.step()
    alone = bind("unimodal")
    alone.load_state_dict(initial)
    parts = [*alone.model.encoders["m1"].parameters(), *alone.own_heads[1].parameters()]
    optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(
            alone.own_heads[1](alone.model.encoders["m1"](data.arrays["m1"])), data.labels
        ).backward()
        optimizer.step()
    for key, value in alone.state_dict().items():
        if key.startswith(("model.encoders.m1.", "own_heads.1.")):
            torch.testing.assert_close(together.state_dict()[key], value)


def test_unimodal_answers_by_the_best_modality_present():
    learner, data = bind("unimodal"), make_data(6)
    learner.note_unimodal_accuracy({"m0": 0.4, "m1": 0.9})
    features = learner.encode(data[:])
    own = learner.own_logits(features)
    torch.testing.assert_close(learner.fuse(features), own[1])
    torch.testing.assert_close(learner.fuse(features, coalition=1), own[0])
    assert learner.fuse(features, coalition=0).abs().max() == 0


def test_ensemble_averages_probabilities_over_the_present():
    learner, data = bind("ensemble"), make_data(6)
    features = learner.encode(data[:])
    probabilities = learner.own_logits(features).softmax(-1)
    torch.testing.assert_close(learner.fuse(features).exp(), probabilities.mean(0))
    torch.testing.assert_close(learner.fuse(features, coalition=2).exp(), probabilities[1])
    torch.testing.assert_close(learner.fuse(features, coalition=0).exp(), torch.full((6, 3), 1 / 3))


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_coalition_logits_are_predictions_without_the_absent(name, num_modalities):
    learner, data = bind(name, num_modalities), make_data(7, num_modalities)
    learner.eval()
    for stage in learner.stages(2):
        learner.start_stage(stage)
        features = learner.encode(data[:])
        every = torch.arange(2**num_modalities)
        logits = learner.coalition_logits(features, every)
        for s in every.tolist():
            torch.testing.assert_close(
                logits[:, s], learner.fuse(features, coalition=s), atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(logits[:, -1], learner.predict(data[:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_gradient_reaches_what_the_stage_freezes(name):
    learner, data = bind(name), make_data(12)
    for stage in learner.stages(2):
        learner.start_stage(stage)
        learner.start_epoch(0, data)
        learner.train()
        for step in range(learner.steps_per_batch):
            learner.zero_grad()
            learner(data[:], step).backward()
            learner.edit_gradients(step, 0.0)
            assert any(p.grad is not None for p in learner.trainable_parameters())
            assert all(p.grad is None for p in learner.parameters() if not p.requires_grad)


def test_frozen_stage_leaves_encoders_as_they_are():
    learner, data = bind(methods.FrozenUnimodal()), make_data(12)
    learner.start_stage(learner.stages(2)[1])
    learner.train()
    assert not learner.model.encoders.training
    assert learner.model.head.training
    before = [p.clone() for p in learner.model.encoders.parameters()]
    optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=0.1)
    learner(data[:]).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.encoders.parameters(), strict=True))


@pytest.mark.parametrize("name", ["di-mml", "mla"])
def test_equal_dimensions_are_demanded(name):
    encoders = {"a": torch.nn.Linear(5, 8), "b": torch.nn.Linear(5, 6)}
    from mmfast import MultimodalModel

    model = MultimodalModel(encoders, {"a": 8, "b": 6}, NUM_CLASSES)
    with pytest.raises(ValueError, match=rf"{name} needs features of equal dimension D .* got a 8, b 6"):
        methods.make(name).bind(model)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: methods.make("jiont"), r"method must be one of .*, got 'jiont'; did you mean joint"),
        (lambda: methods.make("mla", rest=1), r"method mla has no option 'rest'; did you mean reset"),
        (lambda: methods.make("joint", x=1), r"method joint has no option 'x'; it has none"),
        (lambda: methods.MLA(reset="daily"), r"reset must be one of never, epoch, step, got 'daily'"),
        (lambda: methods.ModalityValuation(shape="cubic"), r"shape must be one of linear, tanh, power"),
    ],
    ids=["method", "option", "no-options", "reset", "shape"],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: methods.DIMML(temperature=0), "temperature of di-mml must be positive, got 0"),
        (lambda: methods.DIMML(e0=-1), "e0 of di-mml must be at least 0, got -1"),
        (
            lambda: methods.FrozenUnimodal(head_epochs=0),
            "head_epochs of frozen-unimodal must be at least 1",
        ),
        (lambda: methods.SampleValuation(kappa=-2), "kappa of sample-valuation must be at least 0, got -2"),
        (
            lambda: methods.ModalityValuation(fraction=2),
            r"fraction of modality-valuation must be in \[0, 1\]",
        ),
        (lambda: methods.DiagnoseRelearn(lam=-1), "lam of diagnose-relearn must be at least 0, got -1"),
        (lambda: methods.MLA(alpha=0), "alpha of mla must be positive, got 0"),
    ],
    ids=["temperature", "e0", "head_epochs", "kappa", "fraction", "lam", "alpha"],
)
def test_options_out_of_range_are_named(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("name", methods.METHODS)
def test_the_loop_of_the_docstring_trains(name):
    loop = textwrap.dedent(base.__doc__.split("in this order:\n")[1])
    train, val = make_data(60), make_data(30)
    torch.manual_seed(0)
    scope = {
        "mmfast": mmfast,
        "torch": torch,
        "model": build_model(train.shapes, NUM_CLASSES, dim=8),
        "max_epochs": 30,
        "train": train,
        "val": val,
        "DataLoader": DataLoader,
        "accuracy_alone": {"m0": 0.4, "m1": 0.6},
    }
    exec(loop.replace("SampleValuation()", f"make({name!r})"), scope)
    accuracy = (scope["learner"].predict(train[:]).argmax(1) == train.labels).float().mean()
    assert accuracy > 0.7
    assert scope["learner"].stage.name in ("train", "head")


def test_names_that_hooks_had_before():
    learner = bind("unimodal")
    accuracy = dict.fromkeys(learner.modalities, 0.5)
    assert learner.note_own_accuracy(accuracy) == learner.note_unimodal_accuracy(accuracy)
    learner.release()
    assert all(parameter.requires_grad for parameter in learner.parameters())
    for old, new in (("release", "unfreeze"), ("note_own_accuracy", "note_unimodal_accuracy")):
        with pytest.raises(TypeError, match=f"Mine.{old} would never be called: name it {new}"):
            type("Mine", (base.Learner,), {old: lambda self: None})
        mixin = type("Mixin", (), {old: lambda self: None})
        with pytest.raises(TypeError, match=f"Mine.{old} would never be called"):
            type("Mine", (mixin, methods.Unimodal.learner), {})
        # For the versions before and after.
        type("Mine", (base.Learner,), {old: lambda self: None, new: lambda self: None})


@pytest.mark.parametrize("name", ["unimodal", "ensemble", "mla"])
def test_a_model_whose_head_is_not_trained_is_not_valuated(name):
    data, learner = make_data(30), bind(name)
    with pytest.raises(
        ValueError, match=r"model must have a trained fusion head, got one .* trainer\.learner"
    ):
        mmfast.valuate(learner.model, data)
    assert mmfast.valuate(learner, data).contributions.shape == (30, 2)
    methods.Joint().bind(learner.model).start_stage(base.Stage("train", 1))
    assert mmfast.valuate(learner.model, data).contributions.shape == (30, 2)


@pytest.mark.parametrize("name", ["sample-valuation", "modality-valuation", "diagnose-relearn"])
@pytest.mark.parametrize("later", [0, 1])
def test_methods_train_as_joint_does_until_they_act(name, later):
    """What results say of epochs before a method acts rests on `joint_epochs`."""
    fields = {"epochs": (later, 3)} if name == "diagnose-relearn" else {"warmup": 1 + later}
    method = methods.make(name, **fields)
    assert method.joint_epochs == later + 1
    losses = {}
    for each in (methods.Joint(), method):
        trainer = mmfast.Trainer(each, **QUICK)
        trainer.fit(make_model(), SPLITS.train, SPLITS.val)
        losses[each.name] = [(entry["loss"], entry["val"]["loss"]) for entry in trainer.history]
    one, other = losses["joint"], losses[name]
    assert other[: later + 1] == one[: later + 1]
    assert other[later + 1] != one[later + 1]
    assert methods.Joint().joint_epochs == 0

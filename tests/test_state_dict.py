"""A learner's state dict is all that a user's own loop goes on from, after an epoch and within one."""

from __future__ import annotations

import hashlib
import io

import pytest
import torch
from torch import Tensor, nn

from mmfast import methods
from mmfast.methods.base import Learner
from mmfast.models import build_model
from support.learners import NUM_CLASSES, make_data

TRAIN, VAL = make_data(60), make_data(30, seed=1)
EPOCHS = 3
# Settings under which every hook has done something by then.
OPTIONS = {
    "sample-valuation": {"warmup": 1},
    "modality-valuation": {"warmup": 1},
    "di-mml": {"e0": 1, "head_epochs": 2},
    "frozen-unimodal": {"head_epochs": 2},
    "diagnose-relearn": {"epochs": (0, 2)},
}
ALONE = {"joint", "unimodal", "ensemble", "multi-loss", "mla"}


def make(name: str, seed: int) -> Learner:
    torch.manual_seed(seed)
    model = build_model(TRAIN.shapes, NUM_CLASSES, dim=8)
    return methods.make(name, **OPTIONS.get(name, {})).bind(model, seed=3)


def saved(value):
    """Return what a file gives back that runs no code."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def optimizer_of(learner: Learner) -> torch.optim.Optimizer:
    return torch.optim.SGD(learner.trainable_parameters(), lr=0.1, momentum=0.9)


def train_on(learner: Learner, *, cut=None, state=None):
    """Drive a learner as mmfast.methods.base says, to the end or to a cut (stage, epoch, batches done).

    A loop's own state is where it was cut, and what its optimizer knows.
    """
    first = state["cut"] if state else (0, 0, 0)
    for index, stage in enumerate(learner.stages(EPOCHS)):
        if index < first[0]:
            continue
        learner.start_stage(stage)
        if state:
            learner.load_state_dict(state["learner"])
        optimizer = optimizer_of(learner)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        for epoch in range(first[1], stage.epochs):
            start = learner.resume_epoch if state else learner.start_epoch
            entries = start(epoch, TRAIN)
            indices = torch.randperm(len(entries), generator=torch.Generator().manual_seed(epoch))
            chosen = indices.split(16)
            rest = learner.reader.read(entries, chosen[first[2] :], learner.modalities, learner.device)
            for b, batch in enumerate(rest, first[2]):
                for step in range(learner.steps_per_batch):
                    optimizer.zero_grad()
                    learner(batch, step).backward()
                    learner.edit_gradients(step, progress=b / len(chosen))
                    optimizer.step()
                if (index, epoch, b + 1) == cut:
                    return saved(
                        {"cut": cut, "learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
                    )
            learner.end_epoch(epoch, TRAIN, VAL)
            if learner.optimizer_reset_due():
                optimizer.state.clear()
            state, first = None, (index, 0, 0)
        learner.note_unimodal_accuracy({"m0": 0.4, "m1": 0.9})
    return saved({"learner": learner.state_dict()})


def flat(value, prefix=""):
    """Return the tensors and plain values of nested dicts by their path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}/{key}").items()}
    if isinstance(value, Tensor):
        return {prefix: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()}
    return {prefix: value}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_loop_of_one_s_own_goes_on(name):
    whole = train_on(make(name, 0))
    last_stage = len(make(name, 0).stages(EPOCHS)) - 1
    for cut in {(0, 0, 2), (0, 1, 2), (last_stage, 1, 1)}:
        state = train_on(make(name, 0), cut=cut)
        assert flat(train_on(make(name, 5), state=state)) == flat(whole)


@pytest.mark.parametrize("name", methods.METHODS)
def test_predictions_are_those_of_the_state_dict(name):
    learner = make(name, 0)
    state = train_on(learner)["learner"]
    other = make(name, 5)
    other.load_state_dict(state)
    batch = VAL[:]
    assert torch.equal(other.eval().predict(batch), learner.eval().predict(batch))
    # What predictions need goes without the rest, and without a complaint.
    weights = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    assert state.keys() - weights.keys() == (set() if name in ALONE else {"_extra_state"})
    third = make(name, 6)
    third.start_stage(third.stages(EPOCHS)[-1])
    third.load_state_dict(weights)
    assert torch.equal(third.eval().predict(batch), learner.predict(batch))


def test_a_learner_within_a_user_s_module_is_part_of_its_state():
    class Wrapper(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.learner = make("sample-valuation", seed)

    one, other = Wrapper(0), Wrapper(1)
    train_on(one.learner)
    assert one.learner.copies.sum() > 0
    other.load_state_dict(saved(one.state_dict()))
    assert flat(one.state_dict()) == flat(other.state_dict())
    assert torch.equal(one.learner.copies, other.learner.copies)


def test_a_weight_that_is_missing_is_named_still():
    state = make("diagnose-relearn", 0).state_dict()
    del state["model.head.linear.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"model.head.linear.weight\""):
        make("diagnose-relearn", 1).load_state_dict(state)


def test_the_stage_of_a_state_is_entered_once():
    learner = make("di-mml", 0)
    state = train_on(make("di-mml", 0), cut=(1, 0, 2))["learner"]
    learner.eval()
    learner.load_state_dict(state)
    assert learner.in_head_stage
    assert not learner.training
    assert not any(p.requires_grad for p in learner.model.encoders.parameters())
    assert learner.model.head_is_trained
    # Where the loop has entered it before, its mode is not touched.
    learner.train()
    learner.model.head.eval()
    learner.load_state_dict(state)
    assert not learner.model.head.training

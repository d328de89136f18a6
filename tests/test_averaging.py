"""The moving average of weights: what is averaged, what sees it, and what it leaves alone."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_option_resume import make
from test_steps import fit
from test_trainer import SPLITS, make_model, without_times
from torch import nn

import mmfast
from mmfast.training.averaging import Average


class Weights:
    """Keeps what trains after each step, and the running statistics."""

    def __init__(self):
        self.kept, self.stages = [], []

    def on_step_end(self, trainer, learner, entry):
        trained = {id(p) for p in learner.trainable_parameters()}
        self.kept.append(
            {
                key: value.detach().clone()
                for key, value in learner.state_dict(keep_vars=True).items()
                if id(value) in trained or "running" in key
            }
        )
        self.stages.append(entry["stage"])

    def average(self, decay: float, stage: str) -> dict[str, torch.Tensor]:
        kept = [each for each, own in zip(self.kept, self.stages, strict=True) if own == stage]
        found = kept[0]
        for each in kept[1:]:
            found = {key: decay * value + (1 - decay) * each[key] for key, value in found.items()}
        return found


@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_the_average_is_kept_at_the_end_and_begins_the_next_stage(name):
    weights = Weights()
    trainer = fit(name, model=make(0), val=None, ema_decay=0.8, callbacks=[weights])
    state = trainer.learner.state_dict()
    stages = sorted(set(weights.stages))
    for key, value in weights.average(0.8, stages[0]).items():
        torch.testing.assert_close(state[key], value, msg=key)
    if name == "di-mml":
        head = weights.average(0.8, "head")
        assert any(key.startswith("model.head.") for key in head)
        for key, value in head.items():
            torch.testing.assert_close(state[key], value, msg=key)


@pytest.mark.parametrize("name", ["mla", "di-mml", "unimodal", "sample-valuation"])
def test_validation_and_selection_see_the_average(name, monkeypatch):
    whole = fit(name, model=(model := make(0)), ema_decay=0.9, max_epochs=4)
    plain = fit(name, model=make(0), max_epochs=4)
    figures = [[entry["val"]["loss"] for entry in each.history] for each in (whole, plain)]
    assert all(a != b for a, b in zip(*figures, strict=True))
    # What trains is what it is without an average, as long as no stage begins with it.
    stage = whole.history[0]["stage"]
    losses = [[e["loss"] for e in each.history if e["stage"] == stage] for each in (whole, plain)]
    assert losses[0] == losses[1]
    found = whole.test(model, SPLITS.val)
    if name == "unimodal":
        for m in ("a", "b"):
            best = max(entry["val"]["modality_accuracy"][m] for entry in whole.history)
            assert found.modality_accuracy[m] == pytest.approx(best)
    else:
        last = [entry for entry in whole.history if entry["stage"] == whole.history[-1]["stage"]]
        assert found.accuracy == pytest.approx(max(entry["val"]["accuracy"] for entry in last))


@pytest.mark.parametrize("name", ["diagnose-relearn", "modality-valuation"])
def test_passes_of_a_method_see_the_weights_that_train(name):
    # All that they find, and do to the weights, is what it is without an average.
    whole, plain = (
        fit(name, model=make(0), max_epochs=4, **options) for options in ({"ema_decay": 0.99}, {})
    )
    assert any(entry["method"] for entry in whole.history)
    for one, other in zip(whole.history, plain.history, strict=True):
        assert one["method"] == other["method"]
        assert one["loss"] == other["loss"]


def test_buffers_of_a_method_are_not_averaged():
    averaged, plain = (fit("mla", val=None, **options) for options in ({"ema_decay": 0.5}, {}))
    for name in ("projector", "previous"):
        assert torch.equal(averaged.learner.state_dict()[name], plain.learner.state_dict()[name])


class Masked(nn.Module):
    """An encoder with a constant that no average may touch."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x):
        h = self.inner(x)
        return (self.mask.softmax(1) @ h[:, :, None])[..., 0]


def test_constants_of_a_model_stay_as_they_are():
    torch.manual_seed(0)
    model = mmfast.MultimodalModel({name: Masked() for name in ("a", "b")}, 8, 3)
    trainer = fit("joint", model=model, ema_decay=0.9)
    assert all(entry["val"]["loss"] < 10 for entry in trainer.history)
    assert torch.equal(model.encoders["a"].mask, Masked().mask)


def test_weights_of_half_precision_are_averaged_in_single():
    trainer = fit("joint", val=None, precision="bf16-true", ema_decay=0.999, max_epochs=1)
    learner = trainer.learner
    learner.start_stage(learner.stages(1)[0])
    average = Average(learner, 0.999)
    weight = next(learner.model.parameters())
    assert weight.dtype == torch.bfloat16
    with torch.no_grad():
        weight.fill_(1.0)
        average.update()
        weight.fill_(2.0)
    for _ in range(100):
        average.update()
    average.put()
    # In bfloat16 no step of a thousandth would have moved it.
    assert weight.detach().flatten()[0].item() == pytest.approx(2 - 0.999**100, rel=0.01)


def test_without_steps_between_nothing_changes():
    one, other = (fit("joint", model=make_model(), ema_decay=0.9) for _ in range(2))
    assert without_times(one.history) == without_times(other.history)

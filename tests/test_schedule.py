"""Learning rates by epoch and by step, and stages that end when nothing improves."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_steps import Noted, fit, make_learner
from test_trainer import SPLITS, make_model, make_trainer, without_times
from torch import nn

from mmfast.training.optimization import Optimization
from mmfast.training.schedule import Schedule
from mmfast.training.standing import Standing


def rates(num_epochs: int, steps: int = 1, **settings) -> list[float]:
    """Return the rate of each step of a stage."""
    optimization = Optimization(lr=2.0, optimizer="sgd", **settings)
    optimizer = optimization.make_optimizer([nn.Parameter(torch.ones(1))])
    schedule, found = Schedule(optimization, optimizer, num_epochs), []
    for _ in range(num_epochs):
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.end_step()
        schedule.end_epoch()
    return found


def cosine(epoch: int, num_epochs: int) -> float:
    return 1 + math.cos(math.pi * epoch / num_epochs)


def test_rates_by_epoch():
    assert rates(5) == [2.0] * 5
    assert rates(5, schedule="none") == [2.0] * 5
    assert rates(5, lr_step=2) == pytest.approx([2, 2, 0.2, 0.2, 0.02])
    assert rates(5, schedule="cosine") == pytest.approx([cosine(e, 5) for e in range(5)])


@pytest.mark.parametrize("warmup", [1, 3])
def test_a_warm_up_by_epochs_comes_before_the_schedule(warmup):
    rising = [2 * (e + 1) / (warmup + 1) for e in range(warmup)]
    falling = [cosine(e, 8 - warmup) for e in range(8 - warmup)]
    assert rates(8, schedule="cosine", warmup_epochs=warmup) == pytest.approx(rising + falling)
    stepped = [2, 2, 0.2, 0.2, 0.02, 0.02, 0.002][: 8 - warmup]
    assert rates(8, lr_step=2, warmup_epochs=warmup) == pytest.approx(rising + stepped)


def test_a_warm_up_by_steps_multiplies_the_schedule():
    found = rates(4, steps=3, schedule="cosine", warmup_steps=5)
    expected = [cosine(i // 3, 4) * min(1, (i + 1) / 6) for i in range(12)]
    assert found == pytest.approx(expected)
    assert rates(2, steps=3, warmup_steps=2) == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 2])


@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_each_stage_warms_up_anew_by_its_optimizer_steps(name):
    noted = Noted()
    trainer = fit(name, warmup_steps=4, batch_size=32, accumulate_grad_batches=2, callbacks=[noted], lr=2.0)
    steps = 3 * trainer.learner.steps_per_batch
    for stage in {entry["stage"] for entry in noted.entries}:
        found = [entry["lr"][0] for entry in noted.entries if entry["stage"] == stage]
        assert len(found) == 2 * steps
        assert found == pytest.approx([2 * min(1, (i + 1) / 5) for i in range(2 * steps)])


# Patience


def accuracies(monkeypatch, values):
    """Let validation find these accuracies, one after the other, whatever the weights; return who asked."""
    left = iter(values)

    def validate(loop, standing, stage, epoch):
        accuracy = next(left)
        if epoch >= stage.first_selectable:
            standing.best.update(loop.learner, accuracy, [accuracy, accuracy], epoch)
        found = {"accuracy": accuracy, "modality_accuracy": {"a": accuracy, "b": accuracy}}
        return found | {"contribution": {"a": 0.0, "b": 0.0}}

    monkeypatch.setattr("mmfast.training.loop.TrainingLoop._validate", validate)


def epochs_of(trainer) -> dict[str, int]:
    stages = [entry["stage"] for entry in trainer.history]
    return {stage: stages.count(stage) for stage in stages}


@pytest.mark.parametrize(
    ("values", "patience", "epochs"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.9], 2, 4),
        ([0.1, 0.2, 0.2, 0.3, 0.1, 0.1, 0.9], 2, 6),
        ([0.5, 0.4, 0.9], 1, 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.4, 0.4], 3, 8),
        ([0.9] + [0.1] * 7, 8, 8),
    ],
)
def test_a_stage_ends_when_nothing_has_improved_for_so_long(values, patience, epochs, monkeypatch):
    accuracies(monkeypatch, values)
    trainer = fit("mla", max_epochs=8, patience=patience)
    assert len(trainer.history) == epochs
    assert trainer.learner.stage.epochs == epochs


def test_each_stage_waits_anew_and_from_its_first_selectable_epoch(monkeypatch):
    # di-mml selects from epoch 1 on: 0.9 does not count.
    accuracies(monkeypatch, [0.9, 0.1, 0.2, 0.2, 0.2, 0.9, 0.8, 0.7])
    trainer = make_trainer("di-mml", max_epochs=8, patience=2, accelerator="cpu")
    object.__setattr__(trainer.method, "head_epochs", 6)
    trainer.fit(make_model(), SPLITS.train, SPLITS.val)
    assert epochs_of(trainer) == {"encoders": 5, "head": 3}


def test_parts_that_are_selected_apart_wait_for_each_other():
    learner = make_learner("unimodal")
    standing = Standing.begin(learner, make_trainer("unimodal").fabric, Optimization(patience=2), 0, None)
    scores = [(0.5, 0.1), (0.4, 0.2), (0.4, 0.3), (0.4, 0.3)]
    for epoch, pair in enumerate(scores):
        standing.best.update(learner, 0.0, pair, epoch)
        assert not standing.has_waited(epoch)
    standing.best.update(learner, 0.0, (0.5, 0.3), 4)
    assert standing.has_waited(4)


def test_the_best_epoch_of_a_stage_that_ended_early_is_kept():
    # Unlike the first, the last of these epochs is not the best.
    trainer, model = (
        make_trainer("joint", max_epochs=30, lr=0.03, patience=3, accelerator="cpu"),
        make_model(),
    )
    trainer.fit(model, SPLITS.train, SPLITS.val)
    found = [entry["val"]["accuracy"] for entry in trainer.history]
    assert len(found) < 30
    assert found.index(max(found)) == len(found) - 4
    assert trainer.test(model, SPLITS.val).accuracy == pytest.approx(max(found))
    whole = make_trainer("joint", max_epochs=30, lr=0.03, accelerator="cpu")
    whole.fit(make_model(), SPLITS.train, SPLITS.val)
    assert without_times(trainer.history) == without_times(whole.history)[: len(found)]


def test_methods_are_told_that_an_epoch_has_become_the_last(monkeypatch):
    # A valuation serves the next epoch, of which there is none.
    accuracies(monkeypatch, [0.3, 0.2, 0.1])
    trainer = fit("sample-valuation", max_epochs=8, patience=2)
    told = ["copies" in entry["method"] for entry in trainer.history]
    assert told == [True, True, False]


def test_best_unimodal_accuracy_is_that_of_the_selected_epoch(monkeypatch):
    accuracies(monkeypatch, [0.3, 0.6, 0.5])
    known = []
    learner = type(make_learner("unimodal"))
    monkeypatch.setattr(learner, "note_unimodal_accuracy", lambda self, found: known.append(found) or False)
    fit("unimodal", max_epochs=8, patience=1)
    assert known == [{"a": 0.6, "b": 0.6}]


def test_patience_needs_validation():
    text = "patience needs validation data, on which it looks for improvement, got 3 and val=None"
    with pytest.raises(ValueError, match=re.escape(text)):
        fit("joint", patience=3, val=None)

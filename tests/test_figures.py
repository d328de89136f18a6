"""Figures hold where few digits are left, where there is nothing to measure, and bit for bit as torch's."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn import metrics as sk
from test_trainer import SPLITS, make_model, make_trainer
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC

from mmfast.objectives import Objective
from mmfast.training import figures as training_figures
from mmfast.training.figures import TALLIES


def tally(task, outputs, target, num_classes):
    """Return the sums of a pass in batches of 16."""
    kind = TALLIES[task]
    found = kind(Objective(task), num_classes, torch.device("cpu"), kind.names)
    for own, y in zip(outputs.split(16), target.split(16), strict=True):
        found.add(own, y, torch.ones(len(y), dtype=torch.bool))
    return found


def figures(task, outputs, target, num_classes):
    found = tally(task, outputs, target, num_classes)
    return found.figures(found.message().tolist())


class TestFigures:
    def test_map_tells_large_logits_apart(self):
        draw = torch.Generator().manual_seed(0)
        labels = (torch.rand(64, 3, generator=draw) < 0.4).long()
        logits = 10 * torch.randn(64, 3, generator=draw) + 15 * labels + 15
        for scale in (1, 1e-3, 1e4, -1):
            expected = sk.average_precision_score(labels, scale * logits)
            assert figures("multilabel", scale * logits, labels, 3)["map"] == pytest.approx(expected)

    def test_map_counts_nan_as_wrong(self):
        labels = torch.tensor([[1], [0], [1], [0]])
        logits = torch.tensor([[math.nan], [math.nan], [3.0], [-3.0]])
        worst = torch.tensor([[-9.0], [9.0], [3.0], [-3.0]])
        assert figures("multilabel", logits, labels, 1)["map"] == pytest.approx(
            sk.average_precision_score(labels, worst)
        )

    @pytest.mark.parametrize(("offset", "spread"), [(1e6, 0.9), (1.7e9, 1000.0), (-3e4, 1e-2)])
    def test_r2_of_numbers_that_differ_little(self, offset, spread):
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 100, 2, generator=draw)
        target = noise[0] * spread + offset
        outputs = target + noise[1] * spread / 2
        expected = sk.r2_score(target.double(), outputs.double())
        assert figures("regression", outputs, target, 2)["r2"] == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("value", [0.1, 3.3, 1e6 + 0.5])
    def test_r2_of_a_number_that_never_varies(self, value):
        target = torch.full((100,), value)
        assert figures("regression", target[:, None], target, 1)["r2"] == 1
        assert figures("regression", target[:, None] + 1, target, 1)["r2"] == 0

    def test_r2_over_processes(self, monkeypatch):
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 99, generator=draw)
        target = noise[0] + 1e6 + torch.arange(99)
        outputs = (target + noise[1])[:, None]
        parts = [tally("regression", outputs[rows], target[rows], 1) for rows in (slice(70), slice(70, 99))]
        parts.append(tally("regression", outputs[:0], target[:0], 1))
        sent = []
        monkeypatch.setattr(training_figures, "sum_over_processes", lambda v: sent.append(v) or v)
        for part in parts:
            part.message()
        monkeypatch.setattr(training_figures, "sum_over_processes", lambda v: sum(sent))
        message = torch.stack([part.message() for part in parts]).sum(0)
        expected = sk.r2_score(target.double(), outputs.double())
        assert parts[0].figures(message.tolist())["r2"] == pytest.approx(expected, rel=1e-9)

    def test_losses_have_the_digits_of_torchs_own_mean(self):
        draw = torch.Generator().manual_seed(0)
        logits, labels = torch.randn(57, 7, generator=draw), torch.randint(7, (57,), generator=draw)
        assert torch.equal(Objective().mean_loss(logits, labels), cross_entropy(logits, labels))
        counted = torch.ones(57, dtype=torch.bool)
        summed, weight = Objective().sums(logits, labels, counted)
        assert torch.equal(summed, cross_entropy(logits, labels, reduction="sum"))
        assert weight == 57


class Told(Metric):
    """A metric that is what the test says, epoch by epoch."""

    higher_is_better = True
    value = 0.0

    def update(self, prediction, target):
        pass

    def compute(self):
        return torch.tensor(Told.value)


@pytest.mark.parametrize("name", ["joint", "ensemble"])
def test_an_epoch_without_a_value_is_never_the_best(name):
    weights = []

    class Tell:
        def on_step_end(self, trainer, learner, entry):
            Told.value = [0.1, 0.9, math.nan, 0.5][entry["epoch"]]

        def on_epoch_end(self, trainer, learner, entry):
            weights.append(learner.model.encoders["a"].layers[0][0].weight.clone())

    options = {"metrics": {"told": Told()}, "select": "val/told", "callbacks": [Tell()]}
    trainer, model = make_trainer(name, max_epochs=4, **options), make_model()
    trainer.fit(model, SPLITS.train, SPLITS.val)
    found = model.encoders["a"].layers[0][0].weight
    assert [torch.equal(found, each) for each in weights] == [False, True, False, False]


@pytest.mark.parametrize("name", ["joint", "ensemble", "unimodal"])
def test_a_modality_that_no_sample_has_is_none_in_metrics_too(name):
    val = SPLITS.val.subset(range(len(SPLITS.val)))
    val.present["b"] = torch.zeros(len(val), dtype=torch.bool)
    options = {"metrics": {"auroc": MulticlassAUROC(3)}, "select": "val/auroc", "max_epochs": 2}
    trainer = make_trainer(name, **options)
    trainer.fit(make_model(), SPLITS.train, val)
    for entry in trainer.history:
        assert entry["val"]["modality_auroc"]["b"] is None
        assert entry["val"]["modality_auroc"]["a"] > 0

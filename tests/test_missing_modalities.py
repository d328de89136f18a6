"""Samples that lack a modality, and data in which one is missing altogether."""

from __future__ import annotations

import io
import json

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console

import mmfast
from mmfast import methods, valuation
from mmfast.data import ArrayDataset
from mmfast.models import build_model
from mmfast.reports import tables
from mmfast.training.evaluation import evaluate
from support.learners import NUM_CLASSES, bind, make_data


def with_gaps(num_samples: int, **present: torch.Tensor) -> ArrayDataset:
    full = make_data(num_samples)
    return ArrayDataset(full.arrays, full.labels, present=present)


def fit(method: methods.Method, train, val=None, **options) -> mmfast.Trainer:
    torch.manual_seed(0)
    model = build_model(train.shapes, NUM_CLASSES, dim=8)
    trainer = mmfast.Trainer(method, accelerator="cpu", max_epochs=3, **options)
    trainer.fit(model, train, val)
    return trainer


def test_means_are_over_the_samples_that_have_the_modality():
    present = torch.arange(30) < 12
    data, learner = with_gaps(30, m1=present), bind("joint").eval()
    found = mmfast.valuate(learner, data)
    assert torch.equal(found.present, torch.stack([torch.ones(30, dtype=torch.bool), present], dim=1))
    assert found.contributions[~present, 1].abs().max() == 0
    assert found.means["m0"] == pytest.approx(float(found.contributions[:, 0].mean()), abs=1e-6)
    assert found.means["m1"] == pytest.approx(float(found.contributions[present, 1].mean()), abs=1e-6)
    metrics = evaluate(learner, data, Fabric(accelerator="cpu"))
    assert metrics.contribution == pytest.approx(found.means, abs=1e-6)


def test_what_no_sample_has_is_not_measured():
    data, learner = with_gaps(30, m1=torch.zeros(30, dtype=torch.bool)), bind("joint").eval()
    metrics = evaluate(learner, data, Fabric(accelerator="cpu"))
    assert metrics.modality_accuracy["m1"] is None
    assert metrics.contribution["m1"] is None
    assert metrics.modality_accuracy["m0"] is not None
    means = mmfast.valuate(learner, data).means
    assert means["m1"] != means["m1"]


@pytest.mark.parametrize("name", methods.METHODS)
def test_training_takes_validation_data_without_a_modality(name):
    options = {"di-mml": {"e0": 1, "head_epochs": 1}, "frozen-unimodal": {"head_epochs": 1}}
    method = methods.make(name, **options.get(name, {}))
    trainer = fit(method, make_data(60), with_gaps(30, m1=torch.zeros(30, dtype=torch.bool)))
    assert all(entry["val"]["modality_accuracy"]["m1"] is None for entry in trainer.history)


def test_an_encoder_without_validation_data_keeps_its_last_epoch():
    train, val = make_data(60), with_gaps(30, m1=torch.zeros(30, dtype=torch.bool))
    one, whole = fit(methods.Unimodal(), train, val).learner, fit(methods.Unimodal(), train).learner
    for key, value in whole.state_dict().items():
        if key.startswith(("model.encoders.m1.", "own_heads.1.")):
            torch.testing.assert_close(one.state_dict()[key], value)


@pytest.mark.parametrize("name", methods.METHODS)
def test_training_needs_samples_with_every_modality(name):
    with pytest.raises(ValueError, match="train must hold samples with m1, got none of 30"):
        fit(methods.make(name), with_gaps(30, m1=torch.zeros(30, dtype=torch.bool)), make_data(30))


def test_di_mml_names_the_modality_it_cannot_compare():
    learner = bind("di-mml")
    with pytest.raises(ValueError, match="di-mml needs samples with m0 in training, got none"):
        learner.start_epoch(learner.method.e0, with_gaps(30, m0=torch.zeros(30, dtype=torch.bool)))


def test_modality_level_valuation_does_not_take_absence_for_weakness(monkeypatch):
    # Where it is present m1 contributes more than m0; counted over all samples it would seem the weaker one.
    phi = torch.tensor([[0.5, 0.9]] * 6 + [[0.6, 0.0]] * 54)
    present = phi != 0
    learner = bind(methods.ModalityValuation(warmup=0, alpha=3.0))
    monkeypatch.setattr(learner, "contributions", lambda data: (phi, present))
    figures = learner.end_epoch(0, make_data(60), None)
    assert figures["phi_m1"] == pytest.approx(0.9)
    copies = learner.copies.sum(0)
    assert copies[0] > 0
    assert copies[1] == 0


def test_mean_contributions():
    phi, present = torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[True, False], [True, True]])
    assert valuation.mean_contributions(phi, present).tolist() == [2.0, 4.0]
    assert valuation.mean_contributions(phi, None).tolist() == [2.0, 2.0]


def test_a_valuation_is_shown_and_written_without_a_modality(tmp_path):
    data, learner = with_gaps(30, m1=torch.zeros(30, dtype=torch.bool)), bind("joint").eval()
    found = mmfast.valuate(learner, data)
    console = Console(file=io.StringIO(), width=100)
    tables.show_valuation(console, found)
    assert "in no sample" in console.file.getvalue()
    for name in tables.save_valuation(found, tmp_path, {}):
        assert (tmp_path / name).stat().st_size > 0
    assert json.loads((tmp_path / "coalitions.json").read_text())["mean_contribution"]["m1"] is None


@pytest.mark.parametrize("name", ["joint", "multi-loss", "unimodal", "mla", "sample-valuation"])
def test_a_key_that_is_not_there_says_as_much_as_a_mark(name):
    """From the fifth sample on, which nobody looks at before; of a batch of the last ones none has it."""
    data = make_data(60)
    has = torch.arange(60) % 3 != 0
    has[:4], has[48:] = True, False
    marked = ArrayDataset(data.arrays, data.labels, present={"m1": has})
    silent = []
    for i in range(60):
        sample = dict(data[i])
        if not has[i]:
            del sample["m1"]
        silent.append(sample)
    found = []
    for part in (marked, silent):
        torch.manual_seed(0)
        model = build_model({"m0": (5,), "m1": (5,)}, NUM_CLASSES, dim=8)
        options = {"warmup": 1} if name == "sample-valuation" else {}
        trainer = mmfast.Trainer(methods.make(name, **options), max_epochs=3, batch_size=12)
        trainer.reader.batch_size = 12
        learner = trainer.fit(model, part, part)
        predicted = learner.predict(part)
        assert torch.equal(predicted.present[:, 1], has)
        found.append((trainer.test(model, part), predicted.logits))
    (one, logits), (other, logits_of_other) = found
    assert one.modality_accuracy == pytest.approx(other.modality_accuracy)
    assert one.contribution == pytest.approx(other.contribution, abs=1e-5)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    torch.testing.assert_close(logits, logits_of_other, rtol=1e-3, atol=1e-4)

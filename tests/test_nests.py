"""Modalities that are nests of tensors, of any length: from a data set of one's own to a result."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

import torch
from torch import nn

import mmfast
from mmfast import methods
from mmfast.data import pad
from mmfast.training.divergence import DivergedError
from support.reports import NAN, NUM_CLASSES, Alike, Reports, spoilt

ROOT = Path(__file__).resolve().parent.parent
DIM = 4


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, text):
        ids, weights, mask = text["ids"], text["weights"], text["mask"]
        assert mask.any(1).all()
        assert weights.dtype == self.words.weight.dtype
        weights = weights * mask
        return self.norm((self.words(ids) * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


def make_model() -> mmfast.MultimodalModel:
    torch.manual_seed(0)
    return mmfast.MultimodalModel({"text": Text(), "vector": nn.Linear(5, DIM)}, DIM, NUM_CLASSES)


def fit(name: str, train=None, collate_fn=pad, **options) -> mmfast.Trainer:
    few = {"di-mml": {"e0": 1, "head_epochs": 1}, "frozen-unimodal": {"head_epochs": 1}}
    few |= {"sample-valuation": {"warmup": 0}, "modality-valuation": {"warmup": 0}}
    trainer = mmfast.Trainer(
        methods.make(name, **few.get(name, {})),
        accelerator="cpu",
        max_epochs=2,
        batch_size=16,
        collate_fn=collate_fn,
        **options,
    )
    trainer.fit(make_model(), train or Reports(70), Reports(31))
    return trainer


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains_on_texts_of_any_length(name):
    trainer, test = fit(name), Reports(41)
    metrics = trainer.test(trainer.learner.model, test)
    assert 0 <= metrics.accuracy <= 1
    found = mmfast.valuate(trainer.learner, test)
    assert found.present[:, 0].tolist() == [index % 10 > 0 for index in range(41)]
    assert not found.contributions[~found.present[:, 0], 0].any()


@pytest.mark.parametrize("name", ["sample-valuation", "joint"])
def test_samples_read_in_part_train_as_whole_ones(name):
    # A function without `takes_parts` gets whole samples.
    parts, whole = fit(name), fit(name, collate_fn=lambda each: pad(each))
    for one, other in zip(parts.history, whole.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["method"] == pytest.approx(other["method"], rel=1e-5)
        assert one["val"]["accuracy"] == other["val"]["accuracy"]


def test_workers_change_nothing():
    alone, beside = fit("joint"), fit("joint", num_workers=1)
    assert [entry["loss"] for entry in alone.history] == [entry["loss"] for entry in beside.history]


def test_the_text_example(capsys):
    main = runpy.run_path(str(ROOT / "examples" / "train_text.py"))["main"]
    metrics, valuation = main(samples=240, epochs=8, method="joint", num_workers=0)
    assert metrics.accuracy > 0.6
    assert metrics.modality_accuracy["text"] > 1 / 4
    assert valuation.contributions.shape == (120, 2)
    printed = capsys.readouterr().out
    assert f"accuracy {metrics.accuracy:.2f}; alone: text " in printed
    assert f"mean contribution: text {valuation.means['text']:.2f}, sensors " in printed


class Masked(Text):
    """Takes texts of one length, whose mask is their own."""

    def forward(self, text):
        assert text["no"] is None
        return super().forward(text)


@pytest.mark.parametrize(
    "filler",
    [None, lambda text: text, lambda text: {"ids": torch.zeros(2)}],
    ids=["None", "a nest", "another nest"],
)
def test_nests_of_one_shape_need_no_collate(filler):
    trainer = mmfast.Trainer("sample-valuation", max_epochs=2, accelerator="cpu", batch_size=16)
    encoders = {"text": Masked(), "vector": nn.Linear(5, DIM)}
    # The encoder divides by the sum of its weights: what stands for absence does not get there.
    trainer.fit(mmfast.MultimodalModel(encoders, DIM, NUM_CLASSES), Alike(70, filler), Alike(31, filler))
    assert trainer.history[1]["loss"] > 0


# An encoder that makes NaN of zeros


def whole_batches(given):
    """Return batches as a collate of one's own makes them, with a filler for absent texts."""
    return torch.utils.data.default_collate(
        [{key: value for key, value in sample.items() if key != "path"} for sample in given]
    )


class Filled(Alike):
    """Absent texts hold what others do, which torch's own collate takes."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"text": {key: value for key, value in sample["text"].items() if key != "no"}}


class Divides(nn.Module):
    def __init__(self, least=0.0):
        super().__init__()
        self.words, self.least = nn.Embedding(8, DIM), least

    def forward(self, text):
        mask = text["mask"][..., None]
        return (self.words(text["ids"]) * mask).sum(1) / mask.sum(1).clamp(min=self.least)


def fit_filled(encoder, **options):
    trainer = mmfast.Trainer("joint", max_epochs=1, accelerator="cpu", batch_size=16, **options)
    model = mmfast.MultimodalModel({"text": encoder, "vector": nn.Linear(5, DIM)}, DIM, NUM_CLASSES)
    train, val = (Filled(size, filler=lambda text: text) for size in (70, 31))
    trainer.fit(model, train, val)
    return trainer


def test_nan_of_what_stands_for_absence_is_traced_to_its_encoder():
    with pytest.raises(
        DivergedError,
        match="the encoder of text makes NaN of the zeros that it sees in place of samples with",
    ):
        fit_filled(Divides(), collate_fn=whole_batches)


def test_the_advice_against_it_helps():
    assert fit_filled(Divides(least=1.0), collate_fn=whole_batches).history[0]["loss"] > 0
    assert fit_filled(Divides(), collate_fn=pad).history[0]["loss"] > 0
    assert fit_filled(Divides()).history[0]["loss"] > 0


def test_an_encoder_without_fault_is_not_blamed():
    with pytest.raises(DivergedError, match="training has diverged: try a lower learning rate"):
        fit_filled(Divides(least=1.0), collate_fn=whole_batches, optimizer="sgd", lr=1e30)
    with pytest.raises(DivergedError, match="training has diverged: try a lower learning rate"):
        fit_filled(Divides(), collate_fn=pad, optimizer="sgd", lr=1e30)


def test_a_sample_that_spoils_a_run_is_named():
    # Of the first samples only is it looked at beforehand.
    with pytest.raises(
        DivergedError, match="NaN or infinite numbers in the training data: text of sample 37"
    ):
        fit("joint", spoilt(text=NAN, at=37))

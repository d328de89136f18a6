"""What tests of the loops of others share: a model, short methods, and the trainer's result beside theirs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torchmetrics.classification import MulticlassAUROC

import mmfast
from mmfast import methods
from mmfast.data import ArrayDataset
from mmfast.methods.base import Learner
from support.learners import NUM_CLASSES, make_data

EPOCHS, SIZE = 4, 16
# Settings with which all that methods do between epochs happens within EPOCHS.
SHORT: dict[str, dict[str, Any]] = {
    "frozen-unimodal": {"head_epochs": 2},
    "sample-valuation": {"warmup": 1},
    "modality-valuation": {"warmup": 1},
    "di-mml": {"head_epochs": 2, "e0": 1},
    "diagnose-relearn": {"epochs": (1,), "num_init": 2, "reset_optimizer": True},
}
# Methods that differ in what a run goes on from.
RESUMED = ("unimodal", "sample-valuation", "di-mml", "diagnose-relearn", "mla")
TRAIN, VAL, TEST = make_data(70), make_data(40), make_data(33)


def method(name: str) -> methods.Method:
    return methods.make(name, **SHORT.get(name, {}))


def num_epochs(name: str) -> int:
    """Return the epochs of all stages."""
    return EPOCHS + SHORT.get(name, {}).get("head_epochs", 0)


def new_model(num_classes: int = NUM_CLASSES) -> mmfast.MultimodalModel:
    """Return a model whose encoders draw when they train, and have statistics."""
    torch.manual_seed(3)
    encoders = {
        name: nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8)
        )
        for name in ("m0", "m1")
    }
    return mmfast.MultimodalModel(encoders, 8, num_classes)


@functools.cache
def trained(name: str, has_val: bool = True, **settings: Any) -> mmfast.Trainer:
    """Return a trainer that has fitted a new model by a method."""
    settings = {"max_epochs": EPOCHS, "batch_size": SIZE, "lr": 1e-2} | settings
    trainer = mmfast.Trainer(method(name), accelerator="cpu", **settings)
    trainer.fit(new_model(), TRAIN, VAL if has_val else None)
    return trainer


# What is trained for, and what selects, otherwise than by accuracy.
AIMS: dict[str, dict[str, Any]] = {
    "weighted": {"class_weights": "balanced", "label_smoothing": 0.1, "select": "val/loss"},
    "own": {
        "loss": nn.MultiMarginLoss(reduction="none"),
        "metrics": {"auroc": MulticlassAUROC(NUM_CLASSES)},
        "select": "val/auroc",
    },
}


def numbers(data: ArrayDataset) -> ArrayDataset:
    """Return the same data with numbers to predict in place of classes."""
    return ArrayDataset(data.arrays, data.labels.float() - data.arrays["m0"][:, 0], task="regression")


def history_of(trainer: mmfast.Trainer) -> list[dict[str, Any]]:
    """Return the history without seconds."""
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in trainer.history]


def assert_same_weights(learner: Learner, expected: Learner) -> None:
    """Hold all parameters and buffers to those of another learner, bit for bit."""
    found, wanted = learner.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key


def spoilt(sample: int) -> list[dict[str, Any]]:
    """Return TRAIN as samples, of which one holds NaN in m1."""
    samples = [dict(TRAIN[index]) for index in range(len(TRAIN))]
    samples[sample]["m1"] = torch.full((5,), float("nan"))
    return samples


class Stop(Exception):
    """Ends a run within."""

"""Options of training, with a method of several steps a batch and one of two stages: stopped, they go on."""

from __future__ import annotations

import os
import signal

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_stopping import Steps
from test_trainer import SPLITS, Killed, assert_same_state, make_trainer, without_times
from torch import nn

import mmfast
from mmfast.training import checkpoint
from mmfast.training.stopping import Stopped

# Settings under which each option does something within four epochs of 6 batches, several at a time.
OPTIONS = {
    "one": {
        "gradient_clip_val": 0.2,
        "schedule": "cosine",
        "warmup_epochs": 1,
        "no_decay_norms_and_biases": True,
        "lr_scale": {"encoders.a": 0.1},
        "freeze": ("encoders.b.0",),
    },
    "two": {
        "gradient_clip_val": 0.01,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 4,
        "lr_step": 1,
        "warmup_steps": 3,
        "ema_decay": 0.7,
    },
    "patience": {"patience": 1, "lr": 1e-6},
}


def make(seed: int) -> mmfast.MultimodalModel:
    torch.manual_seed(seed)
    encoders = {}
    for name in ("a", "b"):
        encoders[name] = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU())
    # What is frozen is the same in all models, as it is of those that are loaded from somewhere.
    with torch.no_grad():
        encoders["b"][0].weight.copy_(torch.linspace(-1, 1, 48).view(8, 6))
    return mmfast.MultimodalModel(encoders, 8, 3)


def fit(name: str, options: dict, *, seed: int = 0, resume: bool = False, **more):
    trainer = make_trainer(name, **{"max_epochs": 4, "seed": 3, "accelerator": "cpu"} | options | more)
    trainer.fit(make(seed), SPLITS.train, SPLITS.val, resume=resume)
    return trainer


@pytest.fixture(scope="module")
def plain():
    return {name: without_times(fit(name, {}).history) for name in ("mla", "di-mml")}


@pytest.mark.parametrize("name", ["mla", "di-mml"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_stopped_run_ends_as_one_that_was_not(option, name, plain, tmp_path, monkeypatch):
    options, steps = OPTIONS[option], Steps(monkeypatch)
    whole = fit(name, options)
    assert without_times(whole.history) != plain[name]
    total = steps.count

    def assert_ends_as_whole(folder):
        resumed = fit(name, options, seed=8, resume=True, out_dir=folder)
        assert without_times(resumed.history) == without_times(whole.history)
        assert_same_state(resumed.learner, whole.learner)

    # Within an epoch, of the last stage where there are two.
    steps.stop_at(total - 1)
    with pytest.raises(Stopped):
        fit(name, options, out_dir=tmp_path / "within")
    steps.stop_at(None)
    assert_ends_as_whole(tmp_path / "within")

    # After the epoch that ends the first stage, where patience does before its time.
    last = sum(entry["stage"] == whole.history[0]["stage"] for entry in whole.history) - 1

    def stop(entry):
        if entry["epoch"] == last:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=f"after epoch {last + 1}"):
        fit(name, options, out_dir=tmp_path / "after", on_epoch=stop)
    is_early = option == "patience"
    assert (last < 3) == is_early
    assert checkpoint.load(tmp_path / "after" / "last.ckpt")["ended"] == is_early
    assert_ends_as_whole(tmp_path / "after")


def test_checkpoints_of_before_the_options_are_taken(tmp_path):
    whole, seen = fit("joint", {}), []

    def stop(entry):
        seen.append(entry)
        if len(seen) == 2:
            raise Killed

    with pytest.raises(Killed):
        fit("joint", {}, out_dir=tmp_path, on_epoch=stop)
    state = checkpoint.load(tmp_path / "last.ckpt")
    known = ["max_epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "lr_step", "lr_gamma"]
    state["optimization"] = {key: state["optimization"][key] for key in known}
    del state["ended"], state["format"]
    checkpoint.save(tmp_path / "last.ckpt", state)
    resumed = fit("joint", {}, seed=8, resume=True, out_dir=tmp_path)
    assert_same_state(resumed.learner, whole.learner)
    with pytest.raises(ValueError, match=r"run with optimization \{'patience': 2\}, got \{'patience': 0\}"):
        fit("joint", {"patience": 2}, resume=True, out_dir=tmp_path)

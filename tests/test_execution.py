"""Training steps that are compiled, and fits by deterministic algorithms alone."""

from __future__ import annotations

import copy
import os
import re
import shutil

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_steps import fit
from test_trainer import SPLITS, make_model, make_trainer, without_times
from torch import nn

import mmfast
from mmfast.training.execution import CompiledSteps


class Calls:
    """Stands in for torch.compile: notes the calls of each module in its place, and the mode they are in."""

    def __init__(self, monkeypatch):
        self.modes = {}

        def compiled(module):
            def call(*args):
                self.modes.setdefault(type(module).__name__, []).append(module.training)
                return module._call_impl(*args)

            module._compiled_call_impl = call

        monkeypatch.setattr(nn.Module, "compile", compiled)


@pytest.mark.parametrize("name", ["mla", "di-mml", "joint"])
def test_steps_run_compiled_and_passes_do_not(name, monkeypatch):
    plain, calls = fit(name), Calls(monkeypatch)
    trainer = fit(name, compile=True, model=(model := make_model()))
    assert without_times(trainer.history) == without_times(plain.history)
    (kind,) = {type(encoder).__name__ for encoder in model.encoders.values()}
    # Two modalities in each of 6 batches of two epochs.
    assert calls.modes.pop(kind) == [True] * (2 * 6 * 2)
    # The head trains with joint, and in di-mml's second stage; mla has another.
    assert [len(modes) for modes in calls.modes.values()] == ([] if name == "mla" else [6 * 2])
    # Afterwards it is a plain model.
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert not any("_orig_mod" in key for key in model.state_dict())


def test_a_fit_that_fails_leaves_a_plain_model(monkeypatch):
    Calls(monkeypatch)

    class Failing:
        def on_step_end(self, trainer, learner, entry):
            assert all(encoder._compiled_call_impl for encoder in learner.model.encoders.values())
            assert copy.deepcopy(learner.model.encoders["a"])._compiled_call_impl is None
            raise RuntimeError("enough")

    model = make_model()
    with pytest.raises(RuntimeError, match="enough"):
        fit("joint", compile=True, model=model, callbacks=[Failing()])
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_what_the_user_has_compiled_stays_so(monkeypatch):
    Calls(monkeypatch)
    model = make_model()
    model.head.compile()
    mine = model.head._compiled_call_impl
    with CompiledSteps(model)():
        assert model.head._compiled_call_impl is not mine
    assert model.head._compiled_call_impl is mine


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("name", ["di-mml"])
def test_compiled_steps_train_as_others_and_load_into_plain_models(name, tmp_path):
    options = {"batch_size": 56, "max_epochs": 2}
    plain = fit(name, **options)
    compiled = fit(name, **options, compile=True, out_dir=tmp_path)
    for one, other in zip(compiled.history, plain.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    trainer, model = make_trainer(name, accelerator="cpu"), make_model(5)
    trainer.restore(model, tmp_path / "model.ckpt")
    assert trainer.test(model, SPLITS.test) == compiled.test(compiled.learner.model, SPLITS.test)


# Deterministic algorithms


class Unsteady(nn.Module):
    """An encoder with an operation of which torch has no deterministic form."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)

    def forward(self, x):
        index = torch.arange(x.numel())
        return self.inner(torch.zeros_like(x).put_(index, x.flatten()))


def flags():
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize("name", ["mla", "di-mml"])
def test_a_fit_is_deterministic_and_only_it(name):
    found, before = [], flags()
    trainer = fit(name, deterministic=True, on_epoch=lambda entry: found.append(flags()))
    assert set(found) == {(True, False, True, False, os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))}
    assert flags() == before
    assert without_times(trainer.history) == without_times(fit(name).history)


def test_what_has_no_deterministic_form_is_an_error():
    encoders = {name: Unsteady() for name in ("a", "b")}
    before = flags()
    fit("joint", model=mmfast.MultimodalModel(encoders, 8, 3))
    with pytest.raises(RuntimeError, match=re.escape("does not have a deterministic implementation")):
        fit("joint", model=mmfast.MultimodalModel(encoders, 8, 3), deterministic=True)
    assert flags() == before

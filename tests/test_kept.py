"""Features that are encoded once: what passes over data give, and where they lie."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from lightning_fabric import Fabric
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import methods, valuation
from mmfast.coalitions import features_key
from mmfast.data import ArrayDataset, kept
from mmfast.data.batches import presence
from mmfast.models import multimodal
from mmfast.training import evaluation
from support.learners import bind, make_data


def with_gaps(num_samples):
    full = make_data(num_samples)
    present = {"m1": torch.arange(num_samples) % 3 != 0}
    return ArrayDataset(full.arrays, full.labels, present=present)


@pytest.fixture(params=["memory", "file"])
def place(request, monkeypatch, tmp_path):
    """Where features are kept."""
    if request.param == "file":
        monkeypatch.setattr(kept, "MAX_BYTES", 0)
        monkeypatch.setattr(kept.tempfile, "tempdir", str(tmp_path))
    return request.param


def test_kept_features_are_those_of_the_data(place, tmp_path):
    learner, data = bind("joint").eval(), with_gaps(700)
    plain = list(learner.batches(data, 64))
    found = learner.keep(data)
    assert len(found) == 700
    for one, other in zip(plain, learner.batches(data, 64), strict=True):
        assert {*map(features_key, learner.modalities), "m1__present", "label"} <= set(other)
        assert not {"m0", "m1"} & set(other)
        for h, expected in zip(learner.encode(other), learner.encode(one), strict=True):
            torch.testing.assert_close(h, expected)
        for batch in (one, other):
            assert torch.equal(presence(batch, learner.modalities)[1], one["m1__present"])
        assert torch.equal(one["label"], other["label"])
    # A file without a name in the folder: it goes with its last reader, however the process ends.
    assert os.listdir(tmp_path) == []


def test_figures_are_the_same(place):
    learner, data, fabric = bind("unimodal").eval(), with_gaps(300), Fabric(accelerator="cpu")
    plain = evaluation.evaluate(learner, data, fabric)
    learner.keep(data)
    again = evaluation.evaluate(learner, data, fabric)
    assert again.modality_accuracy == plain.modality_accuracy
    assert again.loss == pytest.approx(plain.loss, rel=1e-6)


def test_what_is_kept_is_forgotten():
    learner, data = bind("joint"), make_data(30)
    learner.keep(data)
    assert features_key("m0") in next(learner.batches(data))
    learner.forget()
    assert "m0" in next(learner.batches(data))
    learner.keep(data)
    learner.unfreeze()
    assert "m0" in next(learner.batches(data))


def test_a_head_stage_encodes_each_sample_once():
    learner, data = bind(methods.FrozenUnimodal(head_epochs=3)), make_data(60)
    learner.start_stage(learner.stages(1)[1])
    calls = []
    for encoder in learner.model.encoders.values():
        encoder.register_forward_hook(lambda module, x, y: calls.append(len(y)))
    first = learner.start_epoch(0, data)
    assert learner.start_epoch(1, data) is first
    learner(first[:10]).backward()
    assert sum(calls) == 120
    assert all(p.grad is None for p in learner.model.encoders.parameters())
    assert learner.model.head.linear.weight.grad is not None


def test_a_full_disk_says_so_before_it_is_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept, "MAX_BYTES", 0)
    monkeypatch.setattr(kept.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        bind("joint").keep(make_data(30))


class Reads(TorchDispatchMode):
    """Counts how often the host reads a number, for which it would wait for a GPU; coalitions lie here."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::bincount")
        self.count += func.name() in waiting and args[0].dtype != torch.int64
        return func(*args, **(kwargs or {}))


def reads_of(num_batches, name, fusion, gaps):
    data = (with_gaps if gaps else make_data)(10 * num_batches)
    learner = bind(name, fusion=fusion).eval()
    with Reads() as reads:
        evaluation.measure(learner, data, Fabric(accelerator="cpu"), batch_size=10)
    return reads.count


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("fusion", ["concat", "gated"])
@pytest.mark.parametrize("name", ["joint", "unimodal", "mla", "frozen-unimodal", "di-mml"])
def test_a_pass_waits_for_no_batch(name, fusion, gaps, monkeypatch):
    # As with tensors of a GPU.
    for module in (valuation, multimodal):
        monkeypatch.setattr(module, "nobody_waits_for", lambda value: False)
    assert reads_of(2, name, fusion, gaps) == reads_of(9, name, fusion, gaps)


def test_infinite_logits_are_noticed_at_the_end(monkeypatch):
    learner, data = bind("joint").eval(), make_data(60)
    with torch.no_grad():
        learner.model.head.linear.bias[0] = torch.inf
    expected = valuation.contributions(learner, data)[0]
    assert torch.equal(expected, valuation.valuate(learner, data).contributions)
    for module in (valuation, multimodal):
        monkeypatch.setattr(module, "nobody_waits_for", lambda value: False)
    assert torch.equal(valuation.contributions(learner, data)[0], expected)


def test_the_loss_is_the_mean_over_samples():
    """Not over batches, of which the last is smaller."""
    learner, data = bind("joint").eval(), make_data(25)
    found = evaluation.evaluate(learner, data, Fabric(accelerator="cpu"), batch_size=10)
    logits = learner.predict(data[:])
    loss = torch.nn.functional.cross_entropy(logits, data.labels)
    assert found.loss == pytest.approx(float(loss), rel=1e-6)
    assert found.accuracy == float((logits.argmax(1) == data.labels).double().mean())

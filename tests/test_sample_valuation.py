"""Sample-level valuation: the published table of copies, and what the copies do in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmfast import methods, ops
from mmfast.data import ArrayDataset
from mmfast.data.batches import Entries, presence
from mmfast.methods.sample_valuation import copy_counts
from mmfast.valuation import contributions
from support.learners import NUM_CLASSES, bind, make_data

# Correctness of (audio alone, video alone, both) -> copies that show (audio alone, video alone).
PUBLISHED_COPIES = {
    "000": (2, 2),
    "001": (0, 0),
    "010": (3, 1),
    "011": (1, 0),
    "100": (1, 3),
    "101": (0, 1),
    "110": (2, 2),
    "111": (0, 0),
}


@pytest.mark.parametrize(("right", "copies"), PUBLISHED_COPIES.items(), ids=PUBLISHED_COPIES)
def test_sample_valuation_reproduces_the_published_table(right, copies):
    audio, video, both = (int(bit) for bit in right)
    utilities = torch.tensor([[0.0, audio, video, 2 * both]])
    phi = ops.shapley_values(utilities)
    assert float(phi.sum()) == pytest.approx(2 * both)
    assert tuple(copy_counts(phi)[0].tolist()) == copies


def test_copies_are_unbiased_where_they_are_not_whole():
    phi = torch.full((20_000, 3), 0.9)
    counts = copy_counts(phi, kappa=2.0, generator=torch.Generator().manual_seed(0))
    assert set(counts.unique().tolist()) == {0, 1}
    assert counts.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert copy_counts(torch.tensor([[1.0, 1.5, 3.0]])).sum() == 0


def test_contributions_sum_to_modalities_times_correct():
    learner, data = bind("joint", num_modalities=3), make_data(num_modalities=3)
    right = (learner.predict(data[:]).argmax(1) == data.labels).float()
    torch.testing.assert_close(contributions(learner, data)[0].sum(1), 3 * right, atol=1e-5, rtol=0)


def test_sample_valuation_trains_on_copies_that_show_one_modality():
    learner, data = bind(methods.SampleValuation(warmup=2)), make_data()
    assert learner.end_epoch(0, data, None) == {}
    assert learner.start_epoch(1, data) is data
    figures = learner.end_epoch(1, data, None)
    entries = learner.start_epoch(2, data)
    assert isinstance(entries, Entries)
    assert figures["copies"] == len(entries) - len(data) > 0
    batch = entries[list(range(len(entries)))]
    present = presence(batch, learner.modalities)
    assert present[:, : len(data)].all()
    assert (present[:, len(data) :].sum(0) == 1).all()
    counts = copy_counts(contributions(learner, data)[0])
    for m in range(2):
        found = torch.bincount(entries.indices[len(data) :][present[m, len(data) :]], minlength=len(data))
        assert torch.equal(found, counts[:, m])


def test_a_hidden_modality_gives_its_encoder_no_gradient():
    learner, data = bind("sample-valuation"), make_data()
    only_first = Entries(data, torch.arange(10), torch.tensor([True, False]).expand(10, 2))
    learner(only_first[list(range(10))]).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in learner.model.encoders["m1"].parameters())
    assert any(p.grad.abs().max() > 0 for p in learner.model.encoders["m0"].parameters())


def test_no_copy_shows_a_modality_its_sample_lacks():
    full = make_data(90)
    data = ArrayDataset(full.arrays, full.labels, present={"m1": torch.arange(90) % 2 == 0})
    for method in (methods.SampleValuation(warmup=1), methods.ModalityValuation(warmup=1, alpha=5.0)):
        learner = bind(method)
        learner.end_epoch(0, data, None)
        entries = learner.start_epoch(1, data)
        if len(entries) > 90:
            assert presence(entries[list(range(len(entries)))], learner.modalities).any(0).all()
    assert bind(methods.SampleValuation(warmup=1)).end_epoch(0, data, None)["copies"] > 0


def test_valuation_in_training_is_taken_in_eval_mode():
    learner, data = bind(methods.SampleValuation(warmup=1)), make_data()
    encoders = learner.model.encoders
    encoders["m0"] = torch.nn.Sequential(encoders["m0"], torch.nn.Dropout(0.9))
    learner.train()
    assert torch.equal(contributions(learner, data)[0], contributions(learner, data)[0])
    assert encoders["m0"].training


def test_released_code_copies_samples_that_are_right_throughout(monkeypatch):
    data = make_data(12)
    for released in (False, True):
        learner = bind(methods.SampleValuation(warmup=0, released=released))
        # Logits by which each modality, and both, are right.
        right = F.one_hot(data.labels, NUM_CLASSES).float().repeat(2, 1, 1)
        monkeypatch.setattr(type(learner), "partial_logits", lambda self, features, right=right: right)
        learner.end_epoch(0, data, None)
        # phi is 1 each under |S| [correct], 1/2 each under [correct]: one copy per modality.
        assert learner.copies.sum() == (24 if released else 0)

"""Sample-level valuation: the published table of copies, and what the copies do in training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mmfast
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


def epoch_of(method, phi, monkeypatch):
    """Return the copies `[N, M]` that a valuation with these contributions adds."""
    learner, data = bind(method, num_modalities=phi.shape[1], seed=3), make_data(12)
    monkeypatch.setattr(learner, "contributions", lambda data: (phi, None))
    learner.end_epoch(0, data, None)
    return learner.copies


@pytest.mark.parametrize(
    ("kappa", "first", "second"),
    [
        (2.0, [3, 2, 0, 2, 0, 2, 1, 0, 2, 0, 3, 0], [3, 1, 0, 2, 0, 2, 0, 0, 1, 0, 3, 0]),
        (1.3, [2, 1, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0], [2, 0, 0, 1, 0, 1, 0, 0, 1, 0, 2, 0]),
    ],
)
def test_two_modalities_draw_what_they_drew_before_there_was_damping(kappa, first, second, monkeypatch):
    phi = torch.linspace(-0.5, 1.5, 24).view(12, 2)[torch.arange(12) * 5 % 12]
    copies = epoch_of(methods.SampleValuation(kappa=kappa, warmup=1), phi, monkeypatch)
    assert copies.T.tolist() == [first, second]


# Correctness of a, b, c, ab, ac, bc, abc -> contributions by hand, of v(S) = |S| [correct].
THREE = {
    "nothing is right": ((0, 0, 0, 0, 0, 0, 0), (0, 0, 0)),
    "everything is right": ((1, 1, 1, 1, 1, 1, 1), (1, 1, 1)),
    "c is noise": ((1, 1, 0, 1, 1, 1, 1), (7 / 6, 7 / 6, 2 / 3)),
    "all together alone": ((0, 0, 0, 0, 0, 0, 1), (1, 1, 1)),
    "a alone, which b and c spoil": ((1, 0, 0, 0, 0, 0, 0), (1 / 3, -1 / 6, -1 / 6)),
}


@pytest.mark.parametrize(("right", "phi"), THREE.values(), ids=THREE)
def test_with_three_modalities_a_quarter_of_the_published_copies_is_made(right, phi, monkeypatch):
    a, b, c, ab, ac, bc, abc = right
    # Coalition s holds modality m where its bit m is set.
    found = ops.shapley_values(torch.tensor([[0.0, a, b, 2 * ab, c, 2 * ac, 2 * bc, 3 * abc]]))
    torch.testing.assert_close(found, torch.tensor([phi]).float(), atol=1e-6, rtol=0)
    copies = epoch_of(methods.SampleValuation(warmup=1), found.expand(20_000, 3), monkeypatch)
    expected = [0.5 * max(0.0, 1 - value) for value in phi]
    assert copies.double().mean(0).tolist() == pytest.approx(expected, abs=0.015)
    # Of less than one copy a sample has none or one.
    assert set(copies.unique().tolist()) <= {0, 1}


def test_without_damping_and_in_the_released_code_three_have_the_published_copies(monkeypatch):
    phi = torch.tensor([[0.0, 0.5, 1.0], [-0.5, 1.5, 2.0]])
    for options in ({"damping": 0.0}, {"released": True}, {"kappa": 8.0}, {"kappa": 4.0, "damping": 1.0}):
        copies = epoch_of(methods.SampleValuation(warmup=1, **options), phi, monkeypatch)
        assert copies.tolist() == [[2, 1, 0], [3, 0, 0]]


def test_copies_are_divided_by_a_power_of_the_other_modalities():
    method = methods.SampleValuation()
    assert [method.kappa_for(count) for count in (1, 2, 3, 5)] == [2.0, 2.0, 0.5, 0.125]
    assert methods.SampleValuation(damping=1.0).kappa_for(5) == 0.5
    assert methods.SampleValuation(damping=1e4).kappa_for(3) == 0.0
    with pytest.raises(ValueError, match="damping of sample-valuation must be at least 0, got -1"):
        methods.SampleValuation(damping=-1)


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


@pytest.mark.parametrize(("num_modalities", "told"), [(2, 2.0), (3, 0.0)])
def test_runs_from_before_the_damping_went_on_without(num_modalities, told):
    from mmfast.experiments.results import _completed

    config = _completed("sample-valuation", {"kappa": 2.0, "warmup": 5, "released": False}, num_modalities)
    assert config["damping"] == told
    given = _completed("sample-valuation", config | {"damping": 1.0}, num_modalities)
    assert given["damping"] == 1.0


def test_a_checkpoint_from_before_the_damping_is_of_another_run(tmp_path):
    from mmfast.training import checkpoint

    data, model = make_data(30, 3), bind("joint", 3).model
    options = {"max_epochs": 2, "out_dir": tmp_path}
    mmfast.Trainer("sample-valuation", **options).fit(model, data, data)
    state = checkpoint.load(tmp_path / "last.ckpt")
    del state["config"]["damping"]
    checkpoint.save(tmp_path / "last.ckpt", state)
    with pytest.raises(ValueError, match=r"config \{'damping': 2.0\}, got \{'damping': 0.0\}"):
        mmfast.Trainer("sample-valuation", **options).fit(model, data, data, resume=True)
    undamped = methods.SampleValuation(damping=0.0)
    mmfast.Trainer(undamped, **options).fit(model, data, data, resume=True)
    # What is finished predicts the same whatever it was trained by.
    state = checkpoint.load(tmp_path / "model.ckpt")
    del state["config"]["damping"]
    checkpoint.save(tmp_path / "model.ckpt", state)
    mmfast.Trainer("sample-valuation", **options).restore(model)

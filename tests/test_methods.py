"""The methods against the papers: oracles worked out by hand, and the laws that each step must keep."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmfast import methods, ops
from mmfast.batches import Entries, presence
from mmfast.data import ArrayDataset
from mmfast.methods.diagnose_relearn import scale_to_unit
from mmfast.methods.sample_valuation import copy_counts
from mmfast.models import build_model

NUM_CLASSES = 3


def make_data(num_samples: int = 60, num_modalities: int = 2, seed: int = 0) -> ArrayDataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % NUM_CLASSES
    means = torch.randn(num_modalities, NUM_CLASSES, 5, generator=draw)
    arrays = {
        f"m{m}": means[m][labels] + torch.randn(num_samples, 5, generator=draw) for m in range(num_modalities)
    }
    return ArrayDataset(arrays, labels)


def bind(method: methods.Method | str, num_modalities: int = 2, seed: int = 0, fusion: str = "concat"):
    method = methods.make(method) if isinstance(method, str) else method
    torch.manual_seed(seed)
    model = build_model({f"m{m}": (5,) for m in range(num_modalities)}, NUM_CLASSES, dim=8, fusion=fusion)
    learner = method.bind(model, seed=seed)
    learner.start_stage(learner.stages(4)[0])
    return learner


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
    from mmfast.valuation import contributions

    right = (learner.predict(data[:]).argmax(1) == data.labels).float()
    torch.testing.assert_close(contributions(learner, data).sum(1), 3 * right, atol=1e-5, rtol=0)


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
    from mmfast.valuation import contributions

    counts = copy_counts(contributions(learner, data))
    for m in range(2):
        found = torch.bincount(entries.indices[len(data) :][present[m, len(data) :]], minlength=len(data))
        assert torch.equal(found, counts[:, m])


def test_a_hidden_modality_gives_its_encoder_no_gradient():
    learner, data = bind("sample-valuation"), make_data()
    only_first = Entries(data, torch.arange(10), torch.full((10,), 1))
    learner(only_first[list(range(10))]).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in learner.model.encoders["m1"].parameters())
    assert any(p.grad.abs().max() > 0 for p in learner.model.encoders["m0"].parameters())


@pytest.mark.parametrize(
    ("shape", "f"), [("linear", float), ("tanh", math.tanh), ("power", lambda x: x**1.5)]
)
def test_modality_valuation_shows_the_weaker_modality(shape, f):
    learner, data = bind(methods.ModalityValuation(alpha=0.5, shape=shape, warmup=1)), make_data(600)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        learner(data[:]).backward()
        optimizer.step()
    with torch.no_grad():
        # A head that listens to the first modality only.
        learner.model.head.linear.weight[:, 8:] = 0
    figures = learner.end_epoch(0, data, None)
    gap = figures["phi_m0"] - figures["phi_m1"]
    assert gap > 0
    assert figures["copies"] == int(2 / 3 * 0.5 * f(gap) * 600)
    assert (learner.coalitions == 2).all()


def test_separate_training_equals_training_each_alone():
    data = make_data()
    together = bind("unimodal", num_modalities=2)
    initial = {key: value.clone() for key, value in together.state_dict().items()}
    optimizer = torch.optim.SGD(together.trainable_parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        together(data[:]).backward()
        optimizer.step()
    alone = bind("unimodal")
    alone.load_state_dict(initial)
    parts = [*alone.model.encoders["m1"].parameters(), *alone.own_heads[1].parameters()]
    optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(
            alone.own_heads[1](alone.model.encoders["m1"](data.arrays["m1"])), data.labels
        ).backward()
        optimizer.step()
    for key, value in alone.state_dict().items():
        if key.startswith(("model.encoders.m1.", "own_heads.1.")):
            torch.testing.assert_close(together.state_dict()[key], value)


def test_unimodal_answers_by_the_best_modality_present():
    learner, data = bind("unimodal"), make_data(6)
    learner.note_own_accuracy({"m0": 0.4, "m1": 0.9})
    features = learner.encode(data[:])
    own = learner.own_logits(features)
    torch.testing.assert_close(learner.fuse(features), own[1])
    torch.testing.assert_close(learner.fuse(features, coalition=1), own[0])
    assert learner.fuse(features, coalition=0).abs().max() == 0


def test_ensemble_averages_probabilities_over_the_present():
    learner, data = bind("ensemble"), make_data(6)
    features = learner.encode(data[:])
    probabilities = learner.own_logits(features).softmax(-1)
    torch.testing.assert_close(learner.fuse(features).exp(), probabilities.mean(0))
    torch.testing.assert_close(learner.fuse(features, coalition=2).exp(), probabilities[1])
    torch.testing.assert_close(learner.fuse(features, coalition=0).exp(), torch.full((6, 3), 1 / 3))


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize("num_modalities", [1, 2, 3])
def test_coalition_logits_are_predictions_without_the_absent(name, num_modalities):
    learner, data = bind(name, num_modalities), make_data(7, num_modalities)
    learner.eval()
    for stage in learner.stages(2):
        learner.start_stage(stage)
        features = learner.encode(data[:])
        every = torch.arange(2**num_modalities)
        logits = learner.coalition_logits(features, every)
        for s in every.tolist():
            torch.testing.assert_close(
                logits[:, s], learner.fuse(features, coalition=s), atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(logits[:, -1], learner.predict(data[:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", methods.METHODS)
def test_no_gradient_reaches_what_the_stage_freezes(name):
    learner, data = bind(name), make_data(12)
    for stage in learner.stages(2):
        learner.start_stage(stage)
        learner.start_epoch(0, data)
        learner.train()
        for step in range(learner.steps_per_batch):
            learner.zero_grad()
            learner(data[:], step).backward()
            learner.edit_gradients(step, 0.0)
            assert any(p.grad is not None for p in learner.trainable_parameters())
            assert all(p.grad is None for p in learner.parameters() if not p.requires_grad)


def test_frozen_stage_leaves_encoders_as_they_are():
    learner, data = bind(methods.FrozenUnimodal()), make_data(12)
    learner.start_stage(learner.stages(2)[1])
    learner.train()
    assert not learner.model.encoders.training
    assert learner.model.head.training
    before = [p.clone() for p in learner.model.encoders.parameters()]
    optimizer = torch.optim.SGD(learner.trainable_parameters(), lr=0.1)
    learner(data[:]).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, learner.model.encoders.parameters(), strict=True))


# DI-MML


def test_di_mml_effective_dimensions_are_those_of_the_whole_set():
    learner, data = bind(methods.DIMML(e0=0)), make_data(300)
    learner.start_epoch(0, data)
    learner.eval()
    for m, h in enumerate(learner.encode(data[:])):
        expected = ops.effective_dimensions(h.detach(), data.labels, NUM_CLASSES)
        assert torch.equal(learner.effective[m], expected)
        assert 0 < expected.sum() < 8


def test_di_mml_loss_is_the_sum_of_its_terms():
    learner, data = bind(methods.DIMML(e0=1, lam=0.5, temperature=2.0)), make_data(12)
    learner.start_epoch(0, data)
    features = learner.encode(data[:])
    own = sum(
        F.cross_entropy(head(h), data.labels) for head, h in zip(learner.own_heads, features, strict=True)
    )
    shared = sum(F.cross_entropy(learner.shared_head(h), data.labels) for h in features)
    torch.testing.assert_close(learner(data[:]), own + 0.5 * shared)
    learner.start_epoch(1, data)
    duc = ops.duc_loss(features, learner.effective, temperature=2.0)
    assert duc > 0
    torch.testing.assert_close(learner(data[:]), own + 0.5 * shared + duc)


def test_di_mml_fuses_by_certainty():
    learner, data = bind(methods.DIMML(fusion_temperature=3.0)), make_data(5)
    learner.start_stage(learner.stages(2)[1])
    features = learner.encode(data[:])
    logits = torch.cat([learner.own_logits(features), learner.model.fuse(features)[None]])
    certainty = logits.softmax(-1).amax(-1)
    weights = (certainty / 3.0).softmax(0)
    torch.testing.assert_close(learner.fuse(features), (weights[..., None] * logits).sum(0))


# Diagnosing and re-learning


def test_scaling_to_unit_range():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]])
    assert torch.equal(scale_to_unit(x), torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


def test_diagnosis_pulls_encoders_by_their_gap_and_nothing_else():
    learner, train, val = (
        bind(methods.DiagnoseRelearn(epochs=(1,), lam=2.0)),
        make_data(90),
        make_data(30, seed=1),
    )
    start = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    with torch.no_grad():
        for p in learner.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    moved = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    assert learner.end_epoch(0, train, val) == {}
    figures = learner.end_epoch(1, train, val)
    for m in ("m0", "m1"):
        assert figures[f"alpha_{m}"] == pytest.approx(math.tanh(2.0 * figures[f"gap_{m}"]))
    assert max(figures["gap_m0"], figures["gap_m1"]) > 0
    for name, p in learner.model.named_parameters():
        alpha = figures[f"alpha_{name.split('.')[1]}"] if name.startswith("encoders.") else 0.0
        torch.testing.assert_close(p.detach(), (1 - alpha) * moved[name] + alpha * start[name])


def test_diagnoses_end_after_max_times_and_need_validation():
    learner, data = bind(methods.DiagnoseRelearn(epochs=(0, 1), max_times=1)), make_data()
    assert learner.end_epoch(0, data, data) != {}
    assert learner.end_epoch(1, data, data) == {}
    with pytest.raises(ValueError, match="diagnose-relearn needs a validation split"):
        learner.end_epoch(0, data, None)


def test_diagnosis_options_reset_head_and_optimizer():
    method = methods.DiagnoseRelearn(epochs=(0,), reset_head=True, reset_optimizer=True)
    learner, data = bind(method), make_data()
    start = learner.model.head.linear.weight.detach().clone()
    with torch.no_grad():
        learner.model.head.linear.weight.add_(1)
    learner.end_epoch(0, data, make_data(seed=2))
    assert torch.equal(learner.model.head.linear.weight, start)
    assert learner.optimizer_reset_due()
    assert not learner.optimizer_reset_due()


# MLA


def step_mla(learner, data, step, progress=0.0):
    learner.zero_grad()
    learner(data[:], step).backward()
    unmodified = learner.shared_head.weight.grad.clone()
    learner.edit_gradients(step, progress)
    return unmodified, learner.shared_head.weight.grad


def test_mla_first_step_is_unmodified_and_later_ones_spare_the_previous_modality():
    learner, data = bind(methods.MLA(reset="never", alpha=1e-3)), make_data()
    unmodified, modified = step_mla(learner, data, 0)
    assert torch.equal(unmodified, modified)
    first_mean = learner.encode(data[:])[0].mean(0)
    unmodified, modified = step_mla(learner, data, 1)
    before, after = (unmodified @ first_mean).norm(), (modified @ first_mean).norm()
    assert after < 0.01 * before
    torch.testing.assert_close(modified, unmodified @ learner.projector)


def test_mla_encoder_sees_its_own_loss_only():
    learner, data = bind("mla"), make_data()
    learner(data[:], 1).backward()
    assert all(p.grad is None for p in learner.model.encoders["m0"].parameters())
    expected = F.cross_entropy(learner.shared_head(learner.encode(data[:])[1]), data.labels)
    torch.testing.assert_close(learner(data[:], 1), expected)


@pytest.mark.parametrize("reset", ["never", "epoch", "step"])
def test_mla_resets(reset):
    learner, data = bind(methods.MLA(reset=reset)), make_data()
    for step in (0, 1, 0, 1):
        step_mla(learner, data, step)
    learner.start_epoch(1, data)
    fresh = torch.equal(learner.projector, torch.eye(8))
    assert fresh == (reset == "epoch")
    eigenvalues = torch.linalg.eigvalsh(learner.projector)
    # One removed direction per update since the last reset.
    assert int((eigenvalues < 0.9).sum()) == {"never": 3, "epoch": 0, "step": 1}[reset] or reset == "never"


def test_mla_released_code_never_projects():
    learner, data = bind(methods.MLA(released=True)), make_data()
    for step in (0, 1, 0):
        unmodified, modified = step_mla(learner, data, step)
        assert torch.equal(unmodified, modified)


def test_mla_predictions_do_not_depend_on_batch_companions():
    learner, data = bind("mla"), make_data(8)
    whole = learner.predict(data[:])
    for i in range(8):
        torch.testing.assert_close(learner.predict(data[[i]])[0], whole[i])


def test_mla_fixed_weights():
    learner, data = bind(methods.MLA(weights=(0.25, 0.75))), make_data(4)
    own = learner.own_logits(learner.encode(data[:]))
    torch.testing.assert_close(learner.predict(data[:]), 0.25 * own[0] + 0.75 * own[1])
    learner = bind(methods.MLA(weights=(1.0,)))
    with pytest.raises(ValueError, match="weights must hold one number per modality = 2, got 1"):
        learner.predict(data[:])


# Bad input


@pytest.mark.parametrize("name", ["di-mml", "mla"])
def test_equal_dimensions_are_demanded(name):
    encoders = {"a": torch.nn.Linear(5, 8), "b": torch.nn.Linear(5, 6)}
    from mmfast import MultimodalModel

    model = MultimodalModel(encoders, {"a": 8, "b": 6}, NUM_CLASSES)
    with pytest.raises(ValueError, match=rf"{name} needs features of equal dimension D .* got a 8, b 6"):
        methods.make(name).bind(model)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: methods.make("jiont"), r"method must be one of .*, got 'jiont'; did you mean joint"),
        (lambda: methods.make("mla", rest=1), r"method mla has no option 'rest'; did you mean reset"),
        (lambda: methods.make("joint", x=1), r"method joint has no option 'x'; it has none"),
        (lambda: methods.MLA(reset="daily"), r"reset must be one of never, epoch, step, got 'daily'"),
        (lambda: methods.ModalityValuation(shape="cubic"), r"shape must be one of linear, tanh, power"),
    ],
    ids=["method", "option", "no-options", "reset", "shape"],
)
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError, match=text):
        call()

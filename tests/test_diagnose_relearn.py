"""Diagnosing and re-learning: what a diagnosis measures, moves and leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast import methods
from mmfast.methods.diagnose_relearn import scale_to_unit
from support.learners import bind, make_data


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


def test_diagnoses_are_counted_in_the_order_of_epochs():
    learner, data = bind(methods.DiagnoseRelearn(epochs=(2, 0, 1), max_times=2)), make_data()
    assert [learner.end_epoch(epoch, data, data) != {} for epoch in range(3)] == [True, True, False]


def test_a_plan_for_each_encoder_is_kept_and_follows_its_weights():
    learner, data = bind(methods.DiagnoseRelearn(epochs=(0, 1, 2, 3), max_times=4)), make_data()
    saved = learner.extra_state()
    assert set(saved) == {"theta_0", "buffers_0"}

    def relearn(start):
        """Pull all back by half, and look that each weight goes halfway to where it is to."""
        weights = dict(learner.model.encoders["m0"].named_parameters())
        before = {name: p.detach().clone() for name, p in weights.items()}
        learner._relearn("encoders.m0.", 0.5)
        for name, p in weights.items():
            torch.testing.assert_close(p.detach(), (before[name] + start[f"encoders.m0.{name}"]) / 2)

    with torch.no_grad():
        for p in learner.model.parameters():
            p.add_(1.0)
    relearn(saved["theta_0"])
    plan = learner._plans["encoders.m0."][2]
    relearn(saved["theta_0"])
    assert learner._plans["encoders.m0."][2] is plan
    for p in learner.model.parameters():
        p.data = p.detach().clone() + 1
    relearn(saved["theta_0"])
    assert learner._plans["encoders.m0."][2] is plan
    learner.load_extra_state(
        {**saved, "theta_0": {name: theta_0 + 1 for name, theta_0 in saved["theta_0"].items()}}
    )
    relearn(learner.theta_0)
    learner.double()
    relearn({name: theta_0.double() for name, theta_0 in learner.theta_0.items()})
    frozen = next(learner.model.encoders["m0"].parameters())
    frozen.requires_grad_(False)
    kept = frozen.detach().clone()
    learner._relearn("encoders.m0.", 1.0)
    assert torch.equal(frozen, kept)
    assert set(learner.end_epoch(0, data, data)) >= {"alpha_m0", "alpha_m1"}

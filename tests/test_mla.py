"""MLA: whose gradients a step touches, what the projector spares, how predictions are fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmfast import methods
from support.learners import bind, make_data


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


def test_mla_fixed_weights_leave_out_what_is_absent():
    learner, data = bind(methods.MLA(weights=(0.25, 0.75))), make_data(4)
    features = learner.encode(data[:])
    own = learner.own_logits(features)
    present = torch.tensor([[True, True, False, False], [True, False, True, False]])
    expected = torch.stack(
        [0.25 * own[0, 0] + 0.75 * own[1, 0], 0.25 * own[0, 1], 0.75 * own[1, 2], 0 * own[0, 3]]
    )
    torch.testing.assert_close(learner.fuse(features, present=present), expected)


def test_mla_starts_an_epoch_afresh_where_it_resets():
    data = make_data()
    for reset, zero in (("epoch", True), ("never", False)):
        learner = bind(methods.MLA(reset=reset))
        learner.start_epoch(0, data)
        for step in (0, 1):
            learner(data[:], step).backward()
            learner.edit_gradients(step, 0.0)
            learner.zero_grad()
        learner.start_epoch(1, data)
        assert bool((learner.previous == 0).all()) == zero


def test_mla_takes_means_in_single_precision():
    learner = bind("mla")
    h = torch.full((4096, 8), 1.001, dtype=torch.bfloat16)
    learner._remember_mean(h, None)
    torch.testing.assert_close(learner.current, h[0].float(), rtol=1e-6, atol=0)

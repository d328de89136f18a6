"""DI-MML: effective dimensions, the terms of its loss, its fusion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmfast import methods, ops
from support.learners import NUM_CLASSES, bind, make_data


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


def plain_sigmoid(features, effective, method):
    """Return the sum over ordered pairs of sigmoid losses, written out."""
    total = torch.zeros(())
    for m, key in enumerate(features):
        for n, query in enumerate(features):
            d = effective[m] & ~effective[n]
            if m == n or not d.any():
                continue
            scores = query[:, d] @ key[:, d].detach().T / method.temperature + method.bias
            signs = 2 * torch.eye(len(query)) - 1
            total = total - F.logsigmoid(signs * scores).sum() / len(query)
    return total


def test_sigmoid_contrast_is_the_sum_over_ordered_pairs():
    method = methods.DIMML(e0=1, temperature=2.0, contrast="sigmoid", bias=-1.5)
    learner, data = bind(method, num_modalities=3), make_data(20, num_modalities=3)
    learner.start_epoch(0, data)
    features = learner.encode(data[:])
    without = learner(data[:])
    learner.start_epoch(1, data)
    expected = plain_sigmoid(features, learner.effective, method)
    assert expected > 0
    torch.testing.assert_close(learner(data[:]), without + expected)
    leaves = [h.detach().requires_grad_() for h in features]
    found = torch.autograd.grad(learner._contrast(leaves, None), leaves)
    torch.testing.assert_close(
        found, torch.autograd.grad(plain_sigmoid(leaves, learner.effective, method), leaves)
    )
    # No dimension separates a pair: nothing to teach, and a gradient of 0.
    learner._dims = ops.DucDims(torch.ones(3, 8, dtype=torch.bool))
    loss = learner._contrast(leaves, None)
    assert loss == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_sigmoid_contrast_takes_samples_with_all_modalities():
    method = methods.DIMML(contrast="sigmoid")
    learner, data = bind(method, num_modalities=3), make_data(20, num_modalities=3)
    effective = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    learner._dims = ops.DucDims(effective)
    features = learner.encode(data[:])
    present = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    whole = present.all(0)
    expected = plain_sigmoid([h[whole] for h in features], effective, method)
    torch.testing.assert_close(learner._contrast(features, present), expected)
    assert learner._contrast(features, torch.zeros_like(present)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contrast": "siglip"}, "contrast must be one of infonce, sigmoid, got 'siglip'"),
        ({"bias": float("nan")}, r"bias of di-mml must be in \[-1e\+30, 1e\+30\], got nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        methods.DIMML(**options)


def test_di_mml_fuses_by_certainty():
    learner, data = bind(methods.DIMML(fusion_temperature=3.0)), make_data(5)
    learner.start_stage(learner.stages(2)[1])
    features = learner.encode(data[:])
    logits = torch.cat([learner.own_logits(features), learner.model.fuse(features)[None]])
    certainty = logits.softmax(-1).amax(-1)
    weights = (certainty / 3.0).softmax(0)
    torch.testing.assert_close(learner.fuse(features), (weights[..., None] * logits).sum(0))


def test_contrastive_loss_takes_samples_with_all_modalities():
    learner, data = bind("di-mml", num_modalities=3), make_data(20, num_modalities=3)
    effective = torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    learner._dims = ops.DucDims(effective)
    features = learner.encode(data[:])
    present = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.8
    whole = present.all(0)
    assert 0 < int(whole.sum()) < int(present.any(0).sum())
    expected = ops.duc_loss([h[whole] for h in features], effective, temperature=learner.method.temperature)
    torch.testing.assert_close(learner._contrast(features, present), expected)
    nobody = torch.zeros_like(present)
    assert learner._contrast(features, nobody) == 0


def test_equal_dimensions_are_none_of_them_effective():
    # Three identical columns: equal accuracies are not above their mean, whatever rounding the mean has.
    full = make_data(70)
    learner = bind("di-mml")
    for encoder in learner.model.encoders.values():
        encoder.forward = lambda x: x[:, :1].expand(-1, 8)
    assert not learner._effective_dimensions(full).any()

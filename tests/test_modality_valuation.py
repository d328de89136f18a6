"""Modality-level valuation: how many copies, and of which modality."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast import methods
from support.learners import bind, make_data


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
    assert learner.copies.sum(0).tolist() == [0, figures["copies"]]

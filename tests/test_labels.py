"""Labels that name no class are refused on a CPU, in the same words whatever kernel reads them."""

from __future__ import annotations

import pytest
import torch

from mmfast import backend as _backend
from mmfast import ops


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("num_samples", [1, 7, 100_000])
@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_labels_on_the_cpu_are_refused_in_the_same_words(name, num_samples, wrong, restored_threads):
    """The C++ kernels look for themselves, on several threads where there are many."""
    if reason := _backend.why_not(name):
        pytest.skip(reason)
    torch.set_num_threads(3)
    features, labels = torch.randn(num_samples, 2), torch.zeros(num_samples, dtype=torch.int64)
    labels[-1] = wrong
    low, high = min(labels.tolist()), max(labels.tolist())
    text = rf"labels must lie in \[0, C\) = \[0, 3\), got values from {low} to {high}$"
    for call in (
        lambda: ops.class_moments(features, labels, 3, backend=name),
        lambda: ops.dimension_accuracy(features, labels, torch.randn(3, 2), backend=name),
        lambda: ops.effective_dimensions(features, labels, 3, backend=name),
        lambda: ops.coalition_utilities(torch.zeros(num_samples, 2, 3), labels, backend=name),
        lambda: ops.additive_shapley(torch.zeros(1, num_samples, 3), labels, backend=name),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    text = r"centroids must hold a class with samples, got none finite in \[3, 2\]$"
    for centroid in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=text):
            ops.dimension_accuracy(features, labels * 0, torch.full((3, 2), centroid), backend=name)


@pytest.mark.usefixtures("cpu_module")
def test_labels_that_change_before_backward_are_refused():
    """They would be read as addresses; autograd's own check of versions sees no change made through NumPy."""
    labels = torch.tensor([0, 1, 2])
    features, partials = (torch.randn(shape, requires_grad=True) for shape in ((3, 2), (2, 3, 3)))
    losses = [
        ops.class_moments(features, labels, 3).mean.sum(),
        ops.additive_shapley(partials, labels, utility="probability").sum(),
        ops.coalition_utilities(partials.transpose(0, 1), labels, utility="probability").sum(),
    ]
    labels.numpy()[1] = 1 << 40
    for loss in losses:
        with pytest.raises(ValueError, match="labels must lie in"):
            loss.backward()

"""Utilities and Shapley values of logits that are large, infinite or NaN."""

from __future__ import annotations

import math

import pytest
import torch

from mmfast import ops
from mmfast.ops.additive_shapley import SMOOTH_UTILITIES, UTILITIES
from mmfast.reference import additive_shapley as reference
from support.additive_shapley import all_logits, make
from support.cases import DTYPES, dtype_name, is_interpreted
from support.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_logits(dtype, utility, backend, device):
    partial_logits, labels, bias = make((3, 200, 7), device=device)
    partial_logits, bias = (100 * partial_logits).to(dtype), bias.to(dtype)
    arguments = {"labels": labels, "utility": utility}
    actual = ops.additive_shapley(partial_logits, bias=bias, backend=backend, **arguments)
    truth = reference.additive_shapley(partial_logits.double(), bias=bias.double(), **arguments)
    assert bool(actual.isfinite().all())
    assert_close_to_truth(actual, truth, reference.additive_shapley(partial_logits, bias=bias, **arguments))


@pytest.mark.parametrize("scale", [1.0, 1e-36, 1e33])
@pytest.mark.parametrize("shift", [0.0, 3.0, -6.0, 60.0, -60.0])
@pytest.mark.parametrize("opposed", [0.0, 70.0])
@pytest.mark.parametrize("utility", ["probability", "log_probability"])
def test_where_products_of_exponentials_are_no_use(utility, opposed, shift, scale, backend, device):
    """Modalities sure of different classes, logits far from 0, tiny and huge gradients coming in."""
    logits, labels, _ = make((3, 40, 7), device=device)
    logits += shift
    # Not in all samples: neighbours of such a sample are right, too.
    logits[0, ::3, 1] += opposed
    logits[1, ::3, 4] += opposed
    logits = logits.float()
    generator = torch.Generator().manual_seed(2)
    dphi = torch.randn(40, 3, generator=generator, dtype=torch.float64).float().to(device)

    def results(function, x, **options):
        leaf = x.detach().requires_grad_()
        phi = function(leaf, labels, utility=utility, **options)
        (gradient,) = torch.autograd.grad(phi, leaf, scale * dphi.to(phi.dtype))
        return phi, gradient / scale

    actual = results(ops.additive_shapley, logits, backend=backend)
    truth = results(reference.additive_shapley, logits.double())
    simple = results(reference.additive_shapley, logits)
    for each in zip(actual, truth, simple, strict=True):
        assert_close_to_truth(*each)


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 4], ids="M{}".format)
@pytest.mark.parametrize("utility", ["probability", "log_probability"])
def test_one_class_has_no_gradient(utility, num_modalities, backend, device):
    """Its probability is 1 whatever the logits are."""
    logits, labels, bias = make((num_modalities, 20, 1), device=device)
    leaves = [x.float().requires_grad_() for x in (logits, bias)]
    phi = ops.additive_shapley(leaves[0], labels, leaves[1], utility=utility, backend=backend)
    for gradient in torch.autograd.grad(phi.square().sum() + phi.sum(), leaves):
        assert not gradient.any()


def test_masked_classes_stay_masked(backend, device):
    partial_logits, labels, bias = make((2, 8, 4), device=device)
    partial_logits[:, :, 3] = -torch.inf
    for utility in UTILITIES:
        phi = ops.additive_shapley(partial_logits, labels % 3, bias, utility=utility, backend=backend)
        assert bool(phi.isfinite().all())


def test_margin_over_excluded_classes_is_infinite():
    logits = torch.tensor([[[3.0, -torch.inf], [3.0, 1.0]]])
    found = ops.coalition_utilities(logits, torch.tensor([0]), utility="margin")
    assert found.tolist() == [[float("inf"), 2.0]]


def special_logits(shape, dtype, seed):
    """Return logits whose rows hold NaN, infinities, zeros of both signs or huge numbers, some none of it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    inf, huge = float("inf"), min(1e30, 0.1 * torch.finfo(dtype).max)
    rows = logits.view(-1, shape[-1])
    for row in range(len(rows)):
        choice = [
            [],
            [float("nan")],
            [inf],
            [-inf],
            [inf, -inf],
            [float("nan"), inf],
            [0.0, -0.0],
            [huge, -huge],
        ]
        numbers = torch.tensor(choice[row % 8], dtype=torch.float64)
        rows[row, torch.randint(shape[-1], (len(numbers),), generator=generator)] = numbers
    rows[3::11] = -inf
    # The label alone, then all but the label.
    rows[4::11, 1:] = -inf
    rows[5::11, 0] = -inf
    return logits.to(dtype)


def formula(logits, labels, utility):
    """Return the utilities as the docstring has them; differentiable where they are smooth."""
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    if utility == "probability":
        return logits.softmax(-1).gather(-1, own)[..., 0]
    if utility == "log_probability":
        return logits.log_softmax(-1).gather(-1, own)[..., 0]
    if utility == "margin":
        # Of no index above the label's is the place in the other classes its own.
        is_other = torch.arange(logits.shape[-1], device=logits.device) != labels[:, None]
        others = logits.transpose(0, 1)[:, is_other].view(logits.shape[1], len(logits), -1).transpose(0, 1)
        return logits.gather(-1, own)[..., 0] - others.max(-1).values
    correct = (logits.argmax(-1) == labels[:, None]).to(logits.dtype)
    sizes = torch.tensor([s.bit_count() for s in range(logits.shape[1])], device=logits.device)
    return correct * sizes if utility == "cardinality" else correct


def assert_same_kind_and_close(actual, expected):
    """Assert NaN, +inf and -inf in the same places and the rest close, in the dtype of `actual`."""
    expected = expected.to(actual.dtype)
    tolerance = 64 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_classes", [2, 5, 140])
def test_utilities_of_nan_and_infinities(num_classes, dtype, utility, backend, device):
    if is_interpreted(backend) and dtype != torch.float32 and num_classes != 5:
        pytest.skip("the number of classes changes nothing but a mask")
    logits = special_logits((44, 2, num_classes), dtype, num_classes).to(device)
    labels = (torch.arange(44) // 2 % num_classes).to(device)
    wide = logits.double().requires_grad_()
    expected = formula(wide, labels, utility)
    logits.requires_grad_()
    actual = ops.coalition_utilities(logits, labels, utility=utility, backend=backend)
    assert_same_kind_and_close(actual, expected)
    if utility not in SMOOTH_UTILITIES:
        return
    for weight in (1.0, -0.5, float("inf"), float("nan")):
        dvalues = torch.full_like(expected, weight)
        (found,) = torch.autograd.grad(actual, logits, dvalues.to(dtype), retain_graph=True)
        (truth,) = torch.autograd.grad(expected, wide, dvalues, retain_graph=True)
        assert_same_kind_and_close(found, truth)


def test_a_nan_among_the_logits_shows(backend, device):
    logits = torch.tensor([[[0.0, 0.0], [0.0, float("nan")]]], device=device)
    for dtype in (torch.float32, torch.float64):
        values = ops.coalition_utilities(
            logits.to(dtype), torch.tensor([0], device=device), utility="log_probability", backend=backend
        )
        assert values.isnan().tolist() == [[False, True]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_modalities", [1, 2, 3, 5])
def test_values_of_nan_and_infinities(num_modalities, dtype, utility, backend, device):
    if is_interpreted(backend) and dtype != torch.float32 and num_modalities in (1, 3):
        pytest.skip("the same steps as with 2 and 5")
    num_samples, num_classes = 22, 4
    specials = special_logits((num_samples, num_modalities, num_classes), dtype, num_modalities)
    partial_logits = specials.transpose(0, 1).to(device)
    labels = (torch.arange(num_samples) // 2 % num_classes).to(device)
    bias = torch.tensor([0.5, 0.0, -1.0, 0.25], dtype=dtype, device=device)
    leaves = [partial_logits.double().requires_grad_(), bias.double().requires_grad_()]
    expected = formula(all_logits(*leaves), labels, utility)
    expected = torch.stack([sum_of_marginals(expected, m) for m in range(num_modalities)], dim=1)
    given = [partial_logits.requires_grad_(), bias.requires_grad_()]
    actual = ops.additive_shapley(given[0], labels, given[1], utility=utility, backend=backend)
    # Differences of huge utilities round where those of the others do not.
    is_huge = (partial_logits.abs() > 100).any(-1).any(0) & partial_logits.abs().lt(torch.inf).all(-1).all(0)
    assert_same_kind_and_close(actual[~is_huge], expected[~is_huge])
    assert torch.equal(actual[is_huge].isfinite(), expected[is_huge].to(dtype).isfinite())
    if utility not in SMOOTH_UTILITIES:
        return
    for weight in (1.0, float("inf")):
        dphi = torch.ones_like(expected)
        dphi[:, -1] = weight
        found = torch.autograd.grad(actual, given, dphi.to(dtype), retain_graph=True)
        truth = torch.autograd.grad(expected, leaves, dphi, retain_graph=True)
        for one, other in zip(found, truth, strict=True):
            assert_same_kind_and_close(one, other)


def sum_of_marginals(
    utilities,  # [N, S]
    player,
):
    """Return a player's Shapley value by its definition."""
    num_players = utilities.shape[1].bit_length() - 1
    total = torch.zeros_like(utilities[:, 0])
    for s in range(utilities.shape[1]):
        if not s >> player & 1:
            weight = 1 / (num_players * math.comb(num_players - 1, s.bit_count()))
            total = total + weight * (utilities[:, s | 1 << player] - utilities[:, s])
    return total


@pytest.mark.parametrize("num_modalities", [1, 3, 6])
def test_margins_do_not_overflow_in_sums(num_modalities, backend, device):
    generator = torch.Generator().manual_seed(num_modalities)
    signs = 1.0 - 2.0 * torch.randint(2, (num_modalities, 9, 2), generator=generator)
    partial_logits = (1.6e38 / num_modalities * signs).to(device)
    labels = torch.zeros(9, dtype=torch.int64, device=device)
    phi = ops.additive_shapley(partial_logits, labels, utility="margin", backend=backend)
    expected = (partial_logits[..., 0] - partial_logits[..., 1]).t()
    torch.testing.assert_close(phi, expected, rtol=1e-5, atol=1e-5 * 1.6e38)

"""duc_loss and unidirectional_info_nce where values are large, small, infinite or NaN."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import cross_entropy

from mmfast import ops
from mmfast.reference import duc_loss as reference
from support.cases import DTYPES, dtype_name
from support.duc_loss import make, masked_cross_entropy, value_and_gradient
from support.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_not_a_number_stays_in_its_row(backend, device):
    query, key = torch.randn(2, 40, 20, device=device)
    query[7, 3] = float("nan")
    query.requires_grad_()
    losses = ops.unidirectional_info_nce(query, key, reduction="none", backend=backend)
    losses.sum().backward()
    for values in (losses, query.grad.sum(1)):
        assert values.isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_logits_do_not_cancel(dtype, temperature, backend, device):
    features, effective = make((2, 33, 40), torch.float64, device=device)
    features = (100 * features).to(dtype)
    options = {"effective": effective, "temperature": temperature}
    op = functools.partial(ops.duc_loss, backend=backend)
    loss, gradients = value_and_gradient(op, features, dtype, **options)
    truth, true_gradients = value_and_gradient(reference.duc_loss, features, torch.float64, **options)
    assert bool(loss.isfinite())
    wide = torch.promote_types(dtype, torch.float32)
    rtol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(loss, truth.to(loss.dtype), rtol=rtol, atol=1e-5)
    plain_gradients = value_and_gradient(masked_cross_entropy, features, wide, **options)[1]
    for mine, true, simple in zip(gradients, true_gradients, plain_gradients, strict=True):
        if dtype == torch.float16 and temperature == 1e-3:
            # The gradient itself reaches 1e5 here, beyond what float16 holds.
            continue
        assert_close_to_truth(mine, true, simple.to(dtype))


def test_equal_large_scores(backend, device):
    # All scores are 1e8: the loss is log N exactly, which their float32 logarithm of a sum cannot show.
    query = torch.full((16, 1), 1e4, device=device)
    loss = ops.unidirectional_info_nce(query, query, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(16.0, device=device).log())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_gradient_in_range_is_not_out_of_range_before_its_factors(dtype, reduction, backend, device):
    # Temperature times the gradient is 120,000 a teacher, float16's largest number 65,504.
    key = torch.tensor([[60000.0], [-60000.0]], dtype=dtype, device=device)
    query = (-key).requires_grad_()
    # What GradScaler hands over is large; its divisor comes after the gradient.
    options = {"temperature": 1000.0, "reduction": reduction, "backend": backend}
    loss = ops.unidirectional_info_nce(query, key, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    size = key[0].double().item() / 1000 * (1 if reduction == "mean" else 2)
    expected = torch.tensor([[-size], [size]], device=device).to(dtype)
    torch.testing.assert_close(gradient, expected)
    effective = torch.tensor([[False], [True], [True]], device=device)
    leaves = [feature.clone().requires_grad_() for feature in (query.detach(), key, key)]
    loss = ops.duc_loss(leaves, effective, **options)
    gradients = torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(gradients[0], 2 * expected)
    assert not gradients[1].any()


def test_a_small_float16_gradient_is_not_lost_before_its_factors(backend, device):
    # Temperature times the gradient is 1e-8, below float16's least number; a scaler brings it back.
    key = torch.tensor([[6e-8], [0.0]], dtype=torch.float16, device=device)
    query = torch.tensor([[1.0], [1.0]], dtype=torch.float16, device=device, requires_grad=True)
    loss = ops.unidirectional_info_nce(query, key, temperature=1e-2, reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(loss * 2.0**16, query)
    half = key[0].double().item() / 2 / 1e-2 * 2**16
    torch.testing.assert_close(
        gradient.double(), torch.tensor([[-half], [half]], device=device).double(), rtol=1e-3, atol=0
    )


def plain_info_nce(query, key, temperature):
    """Return each row's loss and gradient in float64, by the formula."""
    query = query.double().requires_grad_()
    scores = query @ key.double().T / temperature
    losses = cross_entropy(scores, torch.arange(len(query), device=query.device), reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), query)[0]


def assert_same_class(actual, expected):
    """Assert that what is not finite is so in the same places, in the same way."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    actual, expected = (x.masked_fill(x.isfinite(), 0) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_samples", [3, 200, 600])
def test_infinities_are_as_in_the_formula(num_samples, dtype, backend, device):
    generator = torch.Generator().manual_seed(6)
    query, key = torch.randn(2, num_samples, 5, generator=generator).to(device, dtype)
    # Far more than a tile of keys: scores of -inf with each query above 0 in the first column, NaN at 0.
    key[: num_samples * 3 // 4, 0] = -torch.inf
    key[-1, 1] = torch.inf
    query[0, 2], query[1, 2] = torch.nan, torch.inf
    query[:, 0] = query[:, 0].abs()
    query[2, 0] = 0
    losses, expected = plain_info_nce(query, key, 2.0)
    # An own key of infinity and weight 0: the formula has (0 - 1) inf, the kernels 0 inf - inf.
    expected[key.isinf() & ~expected.isfinite()] = torch.nan
    leaf = query.requires_grad_()
    actual = ops.unidirectional_info_nce(leaf, key, temperature=2.0, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    assert_same_class(actual, losses)
    assert_same_class(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_keys_out_of_range_at_first_are_left_out(dtype, backend, device):
    # The first tiles hold scores of -inf alone; the own keys, in the last one, are finite.
    query = torch.ones(10, 2, dtype=dtype, device=device)
    key = torch.zeros(400, 2, dtype=dtype, device=device)
    key[:385, 0] = -torch.inf
    key[390:, 1] = torch.arange(10, device=device)
    loss, residual = torch.ops.mmfast.info_nce_fwd(query, key, 1.0, 390, "none", True, backend)
    finite = key[385:].double()
    scores = query.double() @ finite.T
    truth = scores.logsumexp(1) - scores.diagonal(5)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert bool(residual[:, 0].isnan().all())
    expected = scores.softmax(1) @ finite - finite[5:]
    torch.testing.assert_close(residual[:, 1].double(), expected[:, 1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_samples", [2, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_difference_of_scores_may_be_out_of_range(dtype, num_samples, backend, device):
    # Scores of +-3e38 differ by 6 once they are divided.
    sign = 1 - 2 * (torch.arange(num_samples, device=device) % 2)
    query = (sign * 1.5e19)[:, None].to(dtype)
    key = -(sign * 2e19)[:, None].to(dtype)
    losses, expected = plain_info_nce(query, key, 1e38)
    leaf = query.requires_grad_()
    actual = ops.unidirectional_info_nce(leaf, key, temperature=1e38, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(actual.sum(), leaf)
    torch.testing.assert_close(actual.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=0)
    # The temperature times N is out of range, too.
    mean = ops.unidirectional_info_nce(leaf, key, temperature=1e38, backend=backend)
    (gradient,) = torch.autograd.grad(mean * 1e6, leaf)
    torch.testing.assert_close(gradient.double(), expected * (1e6 / num_samples), rtol=1e-2, atol=0)


def test_whatever_bits_a_nan_has_it_stays_one(backend, device):
    query, key = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(7)).to(device)
    query.view(torch.int32)[4:8, 1] = torch.tensor([0x7FC00001, -1, 0x7FFFFFFF, 0x7F800001]).int().to(device)
    leaf = query.requires_grad_()
    losses = ops.unidirectional_info_nce(leaf, key, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    for values in (losses, gradient[:, 0], gradient[:, 2]):
        assert values.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_a_float16_gradient_keeps_what_loss_scaling_saves(backend, device):
    features, effective = make((2, 64, 16), torch.float16, device=device)
    op = functools.partial(ops.duc_loss, effective=effective, temperature=1e4, backend=backend)
    leaves = [feature.clone().requires_grad_() for feature in features]
    scaled = torch.autograd.grad(op(leaves) * 2.0**16, leaves)
    truth = value_and_gradient(
        functools.partial(reference.duc_loss, effective=effective, temperature=1e4), features, torch.float64
    )[1]
    for mine, true in zip(scaled, truth, strict=True):
        torch.testing.assert_close(mine.double() / 2**16, true, rtol=3e-3, atol=1e-10)


@pytest.mark.parametrize("temperature", [1e-3, 7e-3, 0.0123, 0.03])
def test_float64_scores_are_divided_by_the_whole_temperature(temperature, backend, device):
    """A kernel that is handed a float32, or two, has 24 or 48 of its 53 bits."""
    query = torch.ones(2, 1, dtype=torch.float64, device=device)
    key = torch.tensor([[1.0], [3.0]], dtype=torch.float64, device=device)
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    loss = ops.unidirectional_info_nce(query, key, **options).cpu()
    # log(exp(1 / T) + exp(3 / T)) - 1 / T, where exp(-2 / T) counts for nothing.
    assert abs(loss[0].item() - 2 / temperature) <= 4 * 2.0**-53 * (2 / temperature)

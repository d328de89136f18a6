"""unidirectional_sigmoid_loss of large, infinite and tiny numbers, and in half precision."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import logsigmoid

from mmfast import ops
from mmfast.reference import sigmoid_loss as reference
from support.cases import DTYPES, HALF, dtype_name, is_interpreted
from support.numerics import assert_rounded_once
from support.sigmoid_loss import make, results

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize("bias", [-10.0, 0.0])
def test_half_precision_is_computed_in_float32(dtype, bias, backend, device):
    # Summed over samples at a temperature that is a power of two, the residual is rounded and nothing else.
    query, key = make(40, 90, dtype, device=device, size=0.25)
    options = {"temperature": 2.0, "bias": bias, "reduction": "sum", "learns": False}
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend=backend)
    loss, gradient = results(op, query, key, dtype, **options)
    oracle = reference.unidirectional_sigmoid_loss
    truth, true_gradient = results(oracle, query, key, torch.float64, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    # Tensor cores, and the C++ kernel where the processor has pairs of bfloat16, take the weights of other
    # keys rounded; the own key's, at first by far the largest, in float32.
    on_units = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
    rounded = {"triton": on_units, "cuda": on_units, "cpu": {torch.bfloat16: 4e-3}}
    slack = rounded.get(backend, {}).get(dtype, 1e-6)
    if bias == -10 and dtype != torch.float16:
        slack /= 100
    assert_rounded_once(gradient, true_gradient, max(slack, 1e-6))


def test_small_weights_of_float16_are_not_lost(backend, device):
    # Each weight is e^-17 = 4e-8, below float16's least number; their sum with keys of 200 is none.
    query = torch.zeros(256, 8, dtype=torch.float16, device=device)
    key = torch.full((256, 8), 200.0, dtype=torch.float16, device=device)
    leaf = query.clone().requires_grad_()
    loss = ops.unidirectional_sigmoid_loss(
        leaf, key, temperature=1.0, bias=-17.0, reduction="sum", backend=backend
    )
    (gradient,) = torch.autograd.grad(loss, leaf)
    one = 1 / (1 + torch.tensor(17.0, dtype=torch.float64).exp()).item()
    expected = torch.full_like(gradient, 200 * (255 * one + one - 1))
    torch.testing.assert_close(gradient, expected)
    raw = torch.ops.mmfast.sigmoid_loss_fwd(query, key, None, 1.0, -17.0, 0, "none", True, backend)
    # Without the own key, which is by far the largest.
    others = torch.ops.mmfast.sigmoid_loss_fwd(
        query[:128], torch.cat([0 * key[:128], key[128:]]), None, 1.0, -17.0, 0, "none", True, backend
    )
    torch.testing.assert_close(
        others[1].double(),
        torch.full_like(others[1], 128 * 200 * one, dtype=torch.float64),
        rtol=1e-3,
        atol=0,
    )
    assert raw[1].dtype == torch.float32


# Infinite scores have infinite losses, on the side where they are wrong.
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_scores(dtype, backend, device):
    sizes = torch.tensor([-1e4, -300.0, -90.0, -30.0, -17.0, -1.0, 0.0, 1.0, 17.0, 30.0, 90.0, 300.0, 1e4])
    query = sizes.to(device, dtype)[:, None]
    key = torch.ones_like(query)
    for bias in (0.0, 5.0):
        options = {"temperature": 1.0, "bias": bias, "reduction": "none"}
        losses = ops.unidirectional_sigmoid_loss(query, key, **options, backend=backend)
        truth = reference.unidirectional_sigmoid_loss(query.double(), key.double(), **options)
        # Relative, where plain torch with its exponent of a rounded score is as far off.
        rtol = 1e-14 if dtype == torch.float64 else 5e-6
        torch.testing.assert_close(losses.double(), truth, rtol=rtol, atol=1e-36)


def plain(query, key, temperature, bias):
    """Return each row's loss, gradient and sum of weights in float64, by the formula in torch."""
    query = query.detach().clone().double().requires_grad_()
    shift = torch.full((len(query),), bias, dtype=torch.float64, device=query.device, requires_grad=True)
    scores = query @ key.double().T / temperature + shift[:, None]
    signs = 2 * torch.eye(len(query), dtype=torch.float64, device=query.device) - 1
    losses = -logsigmoid(signs * scores).sum(1)
    return losses.detach(), *torch.autograd.grad(losses.sum(), [query, shift])


def assert_same_class(actual, expected):
    """Assert that what is not finite is so in the same places, in the same way."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    actual, expected = (x.masked_fill(x.isfinite(), 0) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("num_samples", [3, 200, 600])
def test_infinities_are_as_in_the_formula(num_samples, dtype, backend, device):
    query, key = make(num_samples, 5, dtype, seed=6, device=device)
    key[: num_samples * 3 // 4, 0] = -torch.inf
    key[-1, 1] = torch.inf
    query[0, 2], query[1, 2] = torch.nan, torch.inf
    query[:, 0] = query[:, 0].abs()
    query[2, 0] = 0
    losses, gradient, shift = plain(query, key, 2.0, -1.0)
    found = torch.ops.mmfast.sigmoid_loss_fwd(query, key, None, 2.0, -1.0, 0, "none", True, backend)
    assert_same_class(found[0], losses)
    assert_same_class(found[1], gradient)
    assert_same_class(found[2][0], shift)


def test_whatever_bits_a_nan_has_it_stays_one(backend, device):
    for dtype in (torch.float32, torch.bfloat16):
        query, key = make(20, 3, torch.float32, seed=7, device=device)
        bits = torch.tensor([0x7FC00001, -1, 0x7FFFFFFF, 0x7F800001], dtype=torch.int64).int().to(device)
        query.view(torch.int32)[4:8, 1] = bits
        query = query.to(dtype).requires_grad_()
        if dtype == torch.bfloat16:
            if backend == "triton" and is_interpreted(backend):
                continue
            with torch.no_grad():
                query.view(torch.int16)[4:8, 1] = (bits >> 16).short()
                query[7, 1] = torch.nan
        losses = ops.unidirectional_sigmoid_loss(query, key.to(dtype), reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(losses.sum(), query)
        for values in (losses, gradient[:, 0], gradient[:, 2]):
            assert values.isnan().nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_gradient_in_range_is_not_out_of_range_before_its_factors(dtype, reduction, backend, device):
    # Temperature times the gradient is 120,000, float16's largest number 65,504.
    key = torch.tensor([[60000.0], [-60000.0]], dtype=dtype, device=device)
    query = (-key).requires_grad_()
    options = {"temperature": 1000.0, "bias": 0.0, "reduction": reduction, "backend": backend}
    loss = ops.unidirectional_sigmoid_loss(query, key, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    size = key[0].double().item() / 1000 * (1 if reduction == "mean" else 2)
    torch.testing.assert_close(gradient, torch.tensor([[-size], [size]], device=device).to(dtype))


@pytest.mark.parametrize("temperature", [1e-3, 7e-3, 0.0123, 0.03])
def test_float64_scores_are_divided_by_the_whole_temperature(temperature, backend, device):
    """A kernel that is handed a float32, or two, has 24 or 48 of its 53 bits."""
    query = torch.ones(1, 1, dtype=torch.float64, device=device)
    for as_tensor in (False, True):
        heat = torch.tensor(temperature, dtype=torch.float64, device=device) if as_tensor else temperature
        options = {"temperature": heat, "bias": 0.1, "backend": backend}
        loss = ops.unidirectional_sigmoid_loss(-query, query, **options).cpu()
        # A wrong score of 1 / T costs all of it, less the bias.
        truth = 1 / temperature - 0.1
        assert abs(loss.item() - truth) <= 4 * 2.0**-53 * truth + 1e-13 * (truth < 35)

"""Queries and keys for the tests of unidirectional_sigmoid_loss, and what holds its results."""

from __future__ import annotations

import functools

import torch

from mmfast import ops
from mmfast.reference import sigmoid_loss as reference
from support.numerics import assert_close_to_truth


def make(num_samples, num_dims, dtype=torch.float64, seed=0, device="cpu", size=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_samples, num_dims, generator=generator, dtype=torch.float64)
    return (size * x).to(device, dtype).unbind()


def results(function, query, key, dtype, temperature=2.0, bias=-1.0, learns=True, **options):
    """Return loss and gradients for query, temperature and bias, which are tensors where they learn."""
    query = query.detach().to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [
        torch.tensor(x, dtype=wide, device=query.device, requires_grad=learns) for x in (temperature, bias)
    ]
    given = numbers if learns else (temperature, bias)
    loss = function(query, key.to(dtype), temperature=given[0], bias=given[1], **options)
    seeds = torch.linspace(1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view_as(loss)
    return loss.detach(), *torch.autograd.grad(loss, [query, *numbers] if learns else [query], seeds)


def check(query, key, dtype, backend, **options):
    """Hold loss and gradients against float64, by the error of plain torch in float32 at least."""
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend=backend)
    mine = results(op, query, key, dtype, **options)
    oracle = reference.unidirectional_sigmoid_loss
    truth = results(oracle, query, key, torch.float64, **options)
    plain = results(oracle, query, key, torch.promote_types(dtype, torch.float32), **options)
    for own, true, simple in zip(mine, truth, plain, strict=True):
        hold(own, true, simple.to(own.dtype))


def hold(mine, truth, plain):
    """Hold one result; the order of a long sum shows in float64, which has no wider truth."""
    if mine.dtype == torch.float64:
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-14 * truth.abs().amax().item())
    else:
        assert_close_to_truth(mine, truth, plain)

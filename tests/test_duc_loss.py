"""duc_loss and unidirectional_info_nce: values, one-pass gradients, rounding, laws."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import ops
from mmfast.reference import duc_loss as reference
from support.cases import DTYPES, HALF, dtype_name, is_interpreted, laws
from support.duc_loss import make, masked_cross_entropy, value_and_gradient
from support.numerics import assert_close_to_truth, assert_rounded_once

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(2, 1, 1), (2, 64, 64), (3, 33, 17), (4, 7, 130)]

LAWS = laws(25)


# Every shape once, one shape with all reductions.
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [*((shape, "mean") for shape in SHAPES), ((3, 33, 17), "sum"), ((3, 33, 17), "none")],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_close_to_truth(shape, dtype, reduction, backend, device):
    features, effective = make(shape, dtype, device=device)
    options = {"effective": effective, "temperature": 2.0, "reduction": reduction}
    op = functools.partial(ops.duc_loss, backend=backend)
    loss, gradients = value_and_gradient(op, features, dtype, **options)
    truth, true_gradients = value_and_gradient(reference.duc_loss, features, torch.float64, **options)
    wide = torch.promote_types(dtype, torch.float32)
    plain, plain_gradients = value_and_gradient(reference.duc_loss, features, wide, **options)
    assert_close_to_truth(loss, truth, plain)
    for mine, true, simple in zip(gradients, true_gradients, plain_gradients, strict=True):
        assert_close_to_truth(mine, true, simple.to(dtype))


# Around the tiles of the kernels: lanes, panels of keys, tiles of keys, blocks of queries, slices of
# dimensions.
EDGES = [(2, 16, 24), (2, 17, 513), (2, 32, 2), (2, 95, 12), (2, 97, 13), (3, 193, 70), (2, 300, 600)]


def check_edges(shape, dtype, backend, device="cpu"):
    """Loss and gradient of one shape against float64, with logits of moderate size."""
    features, effective = make(shape, torch.float64, seed=3, device=device)
    features = (features * 2 / shape[2] ** 0.5).to(dtype)
    for with_gradient in (True, False):
        results = []
        wide = torch.promote_types(dtype, torch.float32)
        for kind, name in ((dtype, backend), (torch.float64, "reference"), (wide, "reference")):
            leaves = [feature.to(kind).requires_grad_(with_gradient) for feature in features]
            loss = ops.duc_loss(leaves, effective, reduction="none", backend=name)
            results.append(
                [loss.detach(), *(torch.autograd.grad(loss.sum(), leaves) if with_gradient else ())]
            )
        for mine, true, simple in zip(*results, strict=True):
            assert_close_to_truth(mine, true, simple.to(mine.dtype))


def check_all(backend):
    """Every dtype and edge, for a process that was started for one instruction set."""
    for dtype in DTYPES:
        for shape in EDGES:
            check_edges(shape, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_tiles(shape, dtype, backend, device):
    check_edges(shape, dtype, backend, device)


@LAWS
@given(
    num_samples=st.integers(2, 40),
    num_dims=st.integers(1, 30),
    padding=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_law_order_of_the_batch_and_idle_dimensions(backend, device, num_samples, num_dims, padding, seed):
    features, effective = make((2, num_samples, num_dims), torch.float64, seed, device=device)
    # Without a dimension to teach a pair adds 0, with one that is zero throughout log N.
    effective[:, 0] = torch.tensor([True, False], device=device)
    duc_loss = functools.partial(ops.duc_loss, reduction="none", backend=backend)
    losses = duc_loss(features, effective)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(duc_loss(features[:, order], effective), losses[order])
    # Dimensions that are zero, and any that are effective in neither modality or in both.
    zeros, mask = (
        torch.nn.functional.pad(features, (0, padding)),
        torch.nn.functional.pad(effective, (0, padding)),
    )
    mask[0, num_dims:] = True
    torch.testing.assert_close(duc_loss(zeros, mask), losses)
    idle = torch.cat([features, 100 * make((2, num_samples, padding), seed=seed + 1, device=device)[0]], 2)
    for shared in (False, True):
        mask[:, num_dims:] = shared
        torch.testing.assert_close(duc_loss(idle, mask), losses)


@LAWS
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    temperature=st.floats(0.1, 10),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_law_equals_cross_entropy_of_masked_logits(shape, temperature, reduction, seed):
    features, effective = make(shape, seed=seed)
    options = {"effective": effective, "temperature": temperature, "reduction": reduction}
    loss, gradients = value_and_gradient(ops.duc_loss, features, torch.float64, **options)
    expected, expected_gradients = value_and_gradient(
        masked_cross_entropy, features, torch.float64, **options
    )
    torch.testing.assert_close(loss, expected.expand_as(loss))
    torch.testing.assert_close(gradients, expected_gradients)
    for student, gradient in enumerate(gradients):
        others = torch.stack([*effective[:student], *effective[student + 1 :]]) if shape[0] > 1 else None
        taught = torch.zeros_like(effective[0]) if others is None else others.any(0) & ~effective[student]
        assert bool((gradient[:, ~taught] == 0).all())


def test_teacher_gets_no_gradient(backend, device):
    features = torch.randn(2, 8, 6, dtype=torch.float64, requires_grad=True, device=device)
    effective = torch.tensor([[True] * 6, [False] * 6], device=device)
    ops.duc_loss(features, effective, backend=backend).backward()
    assert bool((features.grad[0] == 0).all())
    assert bool((features.grad[1] != 0).any())


def test_by_hand(backend, device):
    # One shared dimension less: d = {0} from 0 to 1. Scores q k^T = [[1, 2], [2, 4]].
    first = torch.tensor([[1.0, 5.0], [2.0, 5.0]], device=device)
    second = torch.tensor([[1.0, 7.0], [2.0, 7.0]], device=device)
    effective = torch.tensor([[True, True], [False, True]], device=device)
    losses = ops.duc_loss([first, second], effective, reduction="none", backend=backend)
    expected = torch.tensor([1 + torch.e, 1 + torch.e**-2], device=device).log()
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, backend, device):
    features, effective = make((3, 5, 6), device=device)
    query, key = make((2, 4, 5), device=device)[0]

    def loss_of(query):
        return ops.unidirectional_info_nce(query, key, temperature=2.0, reduction=reduction, backend=backend)

    # Of the whole Jacobian one product from each side, where each of its columns takes two calls.
    fast = is_interpreted(backend)
    assert torch.autograd.gradcheck(loss_of, query.requires_grad_(), fast_mode=fast)

    def losses(*queries):
        return sum(
            ops.unidirectional_info_nce(
                queries[n][:, d], features[m][:, d], temperature=2.0, reduction=reduction, backend=backend
            )
            for m in range(3)
            for n in range(3)
            if (d := effective[m] & ~effective[n]).any()
        )

    leaves = [feature.clone().requires_grad_() for feature in features]
    loss = ops.duc_loss(leaves, effective, temperature=2.0, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, losses(*leaves))
    actual = torch.autograd.grad(loss.square().sum(), leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(losses(*leaves).square().sum(), leaves))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_info_nce_close_to_truth(dtype, backend, device):
    query, key = make((2, 33, 17), dtype, device=device)[0]

    def loss(leaves, function, dtype):
        return function(leaves[0], key.to(dtype), temperature=3.0)

    op = functools.partial(ops.unidirectional_info_nce, backend=backend)
    wide = torch.promote_types(dtype, torch.float32)
    oracle = reference.unidirectional_info_nce
    results = [
        value_and_gradient(functools.partial(loss, function=function, dtype=kind), [query], kind)
        for function, kind in ((op, dtype), (oracle, torch.float64), (oracle, wide))
    ]
    assert_close_to_truth(*(loss for loss, _ in results))
    mine, true, simple = (gradient for _, (gradient,) in results)
    assert_close_to_truth(mine, true, simple.to(dtype))


def test_half_precision_gradient_is_rounded_once(backend, device):
    # The incoming gradient over N = 3 is no float16, and at 2^18 beyond its range.
    query, key = make((2, 3, 40), torch.float16, device=device)[0] / 8
    query.requires_grad_()
    effective = torch.tensor([[False], [True]], device=device).expand(2, 40)
    for scale in (1.0, 2.0**18):
        loss = ops.unidirectional_info_nce(query, key, temperature=2.0**12, backend=backend)
        (gradient,) = torch.autograd.grad(loss * scale, query)
        raw = torch.ops.mmfast.info_nce_fwd(query.detach(), key, 2.0**12, 0, "mean", True, backend)
        assert torch.equal(gradient, (raw[1].float() * (scale / (2.0**12 * 3))).half())
        loss = ops.duc_loss([query, key], effective, temperature=2.0**12, backend=backend)
        assert torch.equal(torch.autograd.grad(loss * scale, query)[0], gradient)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_half_precision_is_computed_in_float32(dtype, backend, device):
    # Summed over samples at a temperature that is a power of two, the residual is rounded and nothing else.
    features, effective = make((2, 40, 90), dtype, device=device)
    features /= 4
    options = {"effective": effective, "temperature": 2.0, "reduction": "sum"}
    op = functools.partial(ops.duc_loss, backend=backend)
    loss, gradients = value_and_gradient(op, features, dtype, **options)
    truth, true_gradients = value_and_gradient(reference.duc_loss, features, torch.float64, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    # Tensor cores, and the C++ kernel where the processor has pairs of bfloat16, take the softmax rounded.
    on_units = {torch.bfloat16: 5e-4, torch.float16: 6e-5}
    rounded = {"triton": on_units, "cuda": on_units, "cpu": {torch.bfloat16: 5e-4}}
    slack = rounded.get(backend, {}).get(dtype, 1e-6)
    for mine, true in zip(gradients, true_gradients, strict=True):
        assert_rounded_once(mine, true, slack)

"""duc_loss and unidirectional_info_nce: values, one-pass gradients, large logits, laws, bad input."""

from __future__ import annotations

import copy
import functools
import importlib
import io

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import duc_loss as reference
from support import emulation
from support.numerics import assert_close_to_truth, assert_rounded_once

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(2, 1, 1), (2, 64, 64), (3, 33, 17), (4, 7, 130)]
LAWS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(shape, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    effective = torch.rand(shape[0], shape[2], generator=generator) > 0.5
    return features.to(device), effective.to(device)


def masked_cross_entropy(features, effective, temperature=1.0, reduction="mean"):
    """Return the loss as cross-entropy of logits from features with all other dimensions set to zero."""
    target = torch.arange(features[0].shape[0], device=features[0].device)
    loss = sum(0 * feature.sum() for feature in features)
    for m, key in enumerate(features):
        for n, query in enumerate(features):
            d = effective[m] & ~effective[n]
            if d.any():
                scores = (query * d) @ (key.detach() * d).T / temperature
                loss = loss + cross_entropy(scores, target, reduction=reduction)
    return loss


def value_and_gradient(function, features, dtype, **options):
    leaves = [feature.detach().to(dtype).requires_grad_() for feature in features]
    loss = function(leaves, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_tiles(shape, dtype, backend, device):
    check_edges(shape, dtype, backend, device)


def check_part_of_keys(dtype, backend, num_queries, num_keys, num_dims, offset, device="cpu"):
    """Loss and residual of queries whose own keys are in the midst of all keys, and the same in float64."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(num_queries, num_dims, generator=generator) * 2 / num_dims**0.5
    key = torch.randn(num_keys, num_dims, generator=generator) * 2 / num_dims**0.5
    arguments = (2.0, offset, "none", True)
    results = []
    wide = torch.promote_types(dtype, torch.float32)
    for kind, name in ((dtype, backend), (torch.float64, "reference"), (wide, "reference")):
        inputs = (query.to(device, dtype).to(kind), key.to(device, dtype).to(kind))
        loss, residual = torch.ops.mmfast.info_nce_fwd(*inputs, *arguments, name)
        # That of float16 is in float32 until it has its factors: it is rounded here as the gradient is there.
        results.append((loss, residual.to(kind)))
    for mine, true, simple in zip(*results, strict=True):
        assert_close_to_truth(mine, true, simple.to(mine.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "sizes", [(37, 200, 20, 0), (37, 200, 48, 101), (65, 129, 300, 64), (3, 130, 64, 127)], ids=str
)
def test_queries_are_a_part_of_the_keys(sizes, dtype, backend, device):
    check_part_of_keys(dtype, backend, *sizes, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_many_keys_of_few_queries(dtype, backend, device):
    if dtype != torch.float64:
        check_part_of_keys(dtype, backend, 20, 1100, 70, 1000, device)
        return
    # The order of so long a sum shows in float64, which has no wider truth.
    features, effective = make((3, 1100, 12), dtype, device=device)
    keys, queries = list(features), list(features[:, 1000:1020])
    arguments = (keys, effective, None, [], 2.0, 1000, "none", True)
    expected = torch.ops.mmfast.duc_loss_fwd(queries, *arguments, "reference")
    torch.testing.assert_close(torch.ops.mmfast.duc_loss_fwd(queries, *arguments, backend), expected)


@pytest.mark.parametrize("num_dims", [40, 100, 200, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_every_tile_of_the_triton_kernel(dtype, num_dims, monkeypatch):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    if not _backend.interpreting():
        pytest.skip("tiles made for other devices need not fit this one")
    module = _backend.kernels("duc_loss")
    tried = []
    for target in (80, 86, 90, 100, "gfx942"):
        common, tiles = module._choices(target, dtype, "ieee", num_dims)
        for tile in tiles:
            sizes = (common, tile.queries, tile.keys)
            if sizes not in tried:
                tried.append(sizes)
                monkeypatch.setattr(module, "_choices", lambda *_, only=(common, [tile]): only)
                num_queries = tile.queries + 7
                check_part_of_keys(dtype, "triton", num_queries, num_queries + 2 * tile.keys, num_dims, 30)
                monkeypatch.undo()
    assert tried


@pytest.mark.parametrize("num_dims", [40, 100, 200, 300, 520])
@pytest.mark.parametrize("compute_capability", [8, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_path_of_the_cuda_kernel(dtype, compute_capability, num_dims):
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    with emulation.emulated() as module:
        module.compute_capability = compute_capability
        # Several tiles of every kernel, so that stages are filled again; more than 512 keys are split.
        check_part_of_keys(dtype, "cuda", 70, 330 if dtype == torch.float16 else 600, num_dims, 101)


@pytest.mark.parametrize("is_prepared", [False, True], ids=["mask", "prepared"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["loss", "residual"])
@pytest.mark.parametrize("sizes", [(40, 100, 60), (200, 300, 100), (0, 520, 520)], ids=str)
@pytest.mark.parametrize("compute_capability", [8, 9])
def test_pairs_of_different_widths_in_the_cuda_kernel(compute_capability, sizes, with_residual, is_prepared):
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    first, second, third = sizes
    effective = torch.zeros(3, 530, dtype=torch.bool)
    # The first teaches what the second and the third lack, the second what the third lacks.
    effective[0, : max(first, second)] = True
    effective[1, first : first + third] = True
    effective[2, second : max(first, second)] = True
    generator = torch.Generator().manual_seed(5)
    features = (torch.randn(3, 150, 530, generator=generator) / 10).bfloat16()
    dims = ops.DucDims(effective)
    columns, numbers = (dims.columns, list(dims.sizes)) if is_prepared else (None, [])
    arguments = ([], effective, columns, numbers, 2.0, 0, "none", with_residual)
    results = []
    with emulation.emulated() as module:
        module.compute_capability = compute_capability
        for kind, name in (
            (torch.bfloat16, "cuda"),
            (torch.float64, "reference"),
            (torch.float32, "reference"),
        ):
            inputs = [feature.to(kind) for feature in features]
            results.append(torch.ops.mmfast.duc_loss_fwd(inputs, *arguments, name))
    for mine, true, simple in zip(*results, strict=True):
        assert_close_to_truth(mine, true, simple.to(mine.dtype))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 201, 40), (2, 515, 130)], ids=str)
def test_number_of_threads_changes_no_bit(shape, dtype):
    if reason := _backend.why_not("cpu"):
        pytest.skip(reason)
    features, effective = make(shape, dtype)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        options = ([], effective, None, [], 2.0, 0, "mean", True, "cpu")
        results.append(torch.ops.mmfast.duc_loss_fwd(list(features), *options))
    for loss, residuals in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(residuals, results[0][1])


def test_not_a_number_stays_in_its_row(backend, device):
    query, key = torch.randn(2, 40, 20, device=device)
    query[7, 3] = float("nan")
    query.requires_grad_()
    losses = ops.unidirectional_info_nce(query, key, reduction="none", backend=backend)
    losses.sum().backward()
    for values in (losses, query.grad.sum(1)):
        assert values.isnan().nonzero().flatten().tolist() == [7]


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


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, backend, device):
    features, effective = make((3, 5, 6), device=device)
    query, key = make((2, 4, 5), device=device)[0]

    def loss_of(query):
        return ops.unidirectional_info_nce(query, key, temperature=2.0, reduction=reduction, backend=backend)

    assert torch.autograd.gradcheck(loss_of, query.requires_grad_())

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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
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
    # Matrix units, and the C++ kernel where the processor has pairs of bfloat16, take the softmax rounded.
    on_units = {torch.bfloat16: 5e-4, torch.float16: 6e-5}
    rounded = {"triton": on_units, "cuda": on_units, "cpu": {torch.bfloat16: 5e-4}}
    slack = rounded.get(backend, {}).get(dtype, 1e-6)
    for mine, true in zip(gradients, true_gradients, strict=True):
        assert_rounded_once(mine, true, slack)


def test_one_modality_may_be_a_constant(backend, device):
    features, effective = make((2, 5, 4), device=device)
    expected = value_and_gradient(ops.duc_loss, features, torch.float64, effective=effective)[1]
    for learner in range(2):
        leaves = [feature.clone() for feature in features]
        leaves[learner].requires_grad_()
        ops.duc_loss(leaves, effective, backend=backend).backward()
        torch.testing.assert_close(leaves[learner].grad, expected[learner])


def test_key_of_info_nce_gets_no_gradient(backend, device):
    query, key = torch.randn(2, 8, 4, requires_grad=True, device=device).unbind()
    loss = ops.unidirectional_info_nce(query.detach(), key, backend=backend)
    assert not loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_samples", [0, 1, 64, 65])
def test_one_small_pair_on_the_cpu_is_plain_torch(num_samples, reduction, monkeypatch):
    module = importlib.import_module("mmfast.ops.duc_loss")
    raw, taken = module.info_nce_op, []
    monkeypatch.setattr(module, "info_nce_op", lambda *args: taken.append(1) or raw(*args))
    query, key = make((2, num_samples, 6), torch.float32)[0]
    results = []
    for backend in ("auto", "cpu"):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        loss = ops.unidirectional_info_nce(*leaves, temperature=2.0, reduction=reduction, backend=backend)
        loss.sum().backward()
        assert leaves[1].grad is None
        results.append((loss.detach(), leaves[0].grad))
    torch.testing.assert_close(*results, equal_nan=True)
    # Once by name, and by "auto" where the kernel is the faster.
    assert len(taken) == (2 if num_samples > 64 else 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = ops.unidirectional_info_nce(query, key, temperature=2.0, reduction=reduction)
    torch.testing.assert_close(exact, results[1][0], rtol=0, atol=0, equal_nan=True)
    assert len(taken) == (3 if num_samples > 64 else 2)


def test_prepared_dims_and_stacked_features_agree(backend, device):
    features, effective = make((3, 9, 11), device=device)
    expected = ops.duc_loss(features, effective, backend=backend)
    dims = ops.DucDims(effective)
    for same in (features, list(features), tuple(features)):
        torch.testing.assert_close(ops.duc_loss(same, dims, backend=backend), expected, rtol=0, atol=0)
    assert dims.dims(0, 2).tolist() == (effective[0] & ~effective[2]).nonzero().squeeze(1).tolist()
    assert dims.dims(1, 1).tolist() == []
    assert sum(dims.sizes) == len(dims.columns)
    assert "M=3, D=11" in repr(dims)
    effective.fill_(False)
    assert bool(dims.to("cpu").effective.any())


def test_prepared_dims_are_saved_and_loaded():
    dims = ops.DucDims(make((3, 9, 11))[1])
    file = io.BytesIO()
    torch.save({"dims": dims}, file)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=True)["dims"], copy.deepcopy(dims)):
        assert torch.equal(loaded.effective, dims.effective)
        assert torch.equal(loaded.columns, dims.columns)
        assert loaded.sizes == dims.sizes


@pytest.mark.parametrize(("teacher", "student"), [(2, 0), (0, 2), (-1, 0), (0, -1), (1, 5)])
def test_prepared_dims_of_no_such_pair(teacher, student):
    dims = ops.DucDims(make((2, 4, 5))[1])
    name, got = ("student", student) if 0 <= teacher < 2 else ("teacher", teacher)
    with pytest.raises(IndexError) as caught:
        dims.dims(teacher, student)
    assert f"{name} must lie in [0, M) = [0, 2), got {got}" in str(caught.value)
    with pytest.raises(TypeError, match="teacher must be an integer"):
        dims.dims(True, 0)


@pytest.mark.parametrize("is_inference", [False, True], ids=["", "inference"])
def test_a_change_of_prepared_dims_is_refused(is_inference, backend, device):
    features, effective = make((2, 4, 5), torch.float32, device=device)
    with torch.inference_mode(is_inference):
        dims = ops.DucDims(effective)
        expected = ops.duc_loss(features, dims, backend=backend)
        # The mask itself is free to be changed.
        effective.logical_not_()
        assert torch.equal(ops.duc_loss(features, dims, backend=backend), expected)
        with pytest.raises(AttributeError):
            dims.effective = effective
        for part in (dims, dims.to(device)):
            part.effective.logical_not_()
        for use in (
            lambda: ops.duc_loss(features, dims, backend=backend),
            lambda: dims.dims(0, 1),
            lambda: dims.to("cpu"),
            lambda: copy.deepcopy(dims),
        ):
            with pytest.raises(ValueError, match="changed in place"):
                use()


def test_layouts(backend, device):
    features, effective = make((2, 9, 11), device=device)
    expected = value_and_gradient(
        functools.partial(ops.duc_loss, backend=backend), features, torch.float64, effective=effective
    )
    strided = [feature.T.contiguous().T.requires_grad_() for feature in features]
    loss = ops.duc_loss(strided, effective.T.contiguous().T, backend=backend)
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, strided)), expected)


@pytest.mark.parametrize("taught", [(70, 0), (40, 30), (1, 0, 33)], ids=str)
def test_triton_takes_memory_for_the_columns_there_are(taught):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    kernels, device = _backend.kernels("duc_loss"), "cpu" if _backend.interpreting() else "cuda"
    num_modalities, num_samples, num_dims = len(taught), 100, 70
    # A modality alone is effective in its columns, which it teaches all others.
    effective = torch.zeros(num_modalities, num_dims, dtype=torch.bool, device=device)
    for modality, number in enumerate(taught):
        effective[modality, sum(taught[:modality]) :][:number] = True
    features = list(torch.randn(num_modalities, num_samples, num_dims, device=device))
    fitted = (num_modalities - 1) * sum(-(-number // 16) * 16 for number in taught)
    whole = num_modalities * (num_modalities - 1) * 80
    found = []
    for sizes, columns in ((ops.DucDims(effective).sizes, fitted), ((), whole)):
        allocated = []

        class Spy(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, allocated=allocated):
                out = function(*args, **(kwargs or {}))
                if "empty" in str(function) or "zeros" in str(function):
                    allocated.append(out.numel())
                return out

        with Spy():
            results = kernels.duc_loss_fwd(features, features, effective, sizes, 1.0, 0, "none", True)
        found.append(results)
        # Queries, keys and their residuals; besides, a few numbers of each pair's samples and dimensions.
        least = 3 * num_samples * columns + results[1].numel()
        pairs = num_modalities * (num_modalities - 1)
        assert least <= sum(allocated) <= least + pairs * (num_samples + num_dims + 2)
    # Not bit by bit: tiles of another width sum in another order.
    options = (effective, None, [], 1.0, 0, "none", True, "reference")
    truth, plain = (
        torch.ops.mmfast.duc_loss_fwd([x.to(dtype) for x in features], [], *options)
        for dtype in (torch.float64, torch.float32)
    )
    for results in found:
        for mine, right, usual in zip(results, truth, plain, strict=True):
            assert_close_to_truth(mine, right, usual)


def test_chunks_of_queries_give_the_whole(monkeypatch, backend, device):
    features, effective = make((2, 33, 12), device=device)
    op = functools.partial(ops.duc_loss, effective=effective, backend=backend)
    expected = value_and_gradient(op, features, torch.float64)
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 33 * 5)
    torch.testing.assert_close(value_and_gradient(op, features, torch.float64), expected)


def test_nothing_to_teach_is_zero_with_zero_gradient(backend, device):
    for num_modalities, effective in ((1, torch.ones(1, 4)), (3, torch.ones(3, 4)), (2, torch.zeros(2, 4))):
        features = torch.randn(num_modalities, 5, 4, requires_grad=True, device=device)
        loss = ops.duc_loss(features, effective.to(device, torch.bool), backend=backend)
        assert loss.item() == 0
        loss.backward()
        assert bool((features.grad == 0).all())


def test_empty_batch_is_as_in_cross_entropy(backend, device):
    features = torch.randn(2, 0, 4, requires_grad=True, device=device)
    effective = torch.eye(2, 4, device=device).bool()
    loss = functools.partial(ops.duc_loss, features, effective, backend=backend)
    assert bool(loss(reduction="mean").isnan())
    assert loss(reduction="sum").item() == 0
    assert loss(reduction="none").shape == (0,)
    loss(reduction="sum").backward()
    assert features.grad.shape == (2, 0, 4)


def test_mixed_dtypes_are_promoted(backend, device):
    features, effective = make((2, 9, 11), torch.float32, device=device)
    mixed = [features[0].bfloat16().requires_grad_(), features[1].clone().requires_grad_()]
    loss = ops.duc_loss(mixed, effective, backend=backend)
    expected = ops.duc_loss([mixed[0].float(), mixed[1]], effective, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert [leaf.grad.dtype for leaf in mixed] == [torch.bfloat16, torch.float32]


def test_autocast_does_not_lower_precision(backend, device):
    features, effective = make((2, 33, 20), torch.float32, device=device)
    expected = value_and_gradient(
        functools.partial(ops.duc_loss, backend=backend), features, torch.float32, effective=effective
    )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradient(
            functools.partial(ops.duc_loss, backend=backend), features, torch.float32, effective=effective
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_info_nce_under_autocast(backend, device):
    query, key = make((2, 33, 20), torch.float32, device=device)[0]
    loss = functools.partial(ops.unidirectional_info_nce, backend=backend)

    def value(queries, keys):
        return loss(queries[0], keys)

    expected = value_and_gradient(functools.partial(value, keys=key), [query], torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradient(functools.partial(value, keys=key), [query], torch.float32)
        # What autocast hands over is a mixture.
        mixed = loss(query.bfloat16(), key)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(mixed, loss(query.bfloat16().float(), key), rtol=0, atol=0)


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


@pytest.mark.parametrize("prepared", [False, True], ids=["mask", "prepared"])
def test_compiles(prepared, backend, device):
    # The other cases compiled the same code: dynamo gives up after eight.
    torch.compiler.reset()
    features, effective = make((2, 16, 8), device=device)
    dims = ops.DucDims(effective) if prepared else effective

    def loss(first, second):
        value = ops.duc_loss([2 * first, second], dims, temperature=3.0, backend=backend)
        return value + ops.unidirectional_info_nce(first, second, backend=backend)

    leaves = [feature.clone().requires_grad_() for feature in features]
    expected, actual = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))
    without_gradient = torch.compile(loss, fullgraph=True, backend="aot_eager")(*features)
    torch.testing.assert_close(without_gradient, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["loss", "loss-and-gradient"])
def test_opcheck(with_residual, dtype, backend, device):
    features, effective = make((2, 5, 6), dtype, device=device)
    dims = ops.DucDims(effective)
    raw, rest = torch.ops.mmfast, (2.0, 0, "mean", with_residual, backend)
    torch.library.opcheck(raw.duc_loss_fwd, (list(features), [], effective, None, [], *rest))
    keys = [torch.cat([feature, feature]) for feature in features]
    prepared = (effective, dims.columns, list(dims.sizes), 2.0, 5, "none", with_residual, backend)
    torch.library.opcheck(raw.duc_loss_fwd, (list(features), keys, *prepared))
    torch.library.opcheck(raw.info_nce_fwd, (features[0], features[1], *rest))


BAD = {
    "no features": (ValueError, lambda x, e: ([], e), {}, "M >= 1 tensors [N, D], got none"),
    "unequal D": (ValueError, lambda x, e: ([x[0], x[1][:, :3]], e), {}, "[N, D] = [4, 5], got [4, 3]"),
    "unequal N": (ValueError, lambda x, e: ([x[0], x[1][:2]], e), {}, "features[1] must have shape"),
    "stack rank": (ValueError, lambda x, e: (x[0], e), {}, "features must have shape [M, N, D], got [4, 5]"),
    "integers": (TypeError, lambda x, e: (x.long(), e), {}, "features[0] must have dtype float32"),
    "effective shape": (ValueError, lambda x, e: (x, e.T), {}, "effective must have shape [M, D] = [2, 5]"),
    "effective dtype": (TypeError, lambda x, e: (x, e.float()), {}, "effective must have dtype bool"),
    "prepared shape": (ValueError, lambda x, e: (x, ops.DucDims(e[:1])), {}, "got [1, 5]"),
    "temperature": (ValueError, lambda x, e: (x, e), {"temperature": 0.0}, "temperature must be positive"),
    "reduction": (ValueError, lambda x, e: (x, e), {"reduction": "max"}, "reduction must be one of 'mean'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, change, options, message = BAD[case]
    with pytest.raises(error) as raised:
        ops.duc_loss(*change(*make((2, 4, 5))), **options)
    assert message in str(raised.value)


def test_bad_pair():
    with pytest.raises(ValueError, match=r"key must have shape \[N, D\] = \[4, 5\], got \[4, 6\]"):
        ops.unidirectional_info_nce(torch.randn(4, 5), torch.randn(4, 6))


@pytest.mark.parametrize("temperature", [1e-3, 7e-3, 0.0123, 0.03])
def test_float64_scores_are_divided_by_the_whole_temperature(temperature, backend, device):
    """A kernel that is handed a float32, or two, has 24 or 48 of its 53 bits."""
    query = torch.ones(2, 1, dtype=torch.float64, device=device)
    key = torch.tensor([[1.0], [3.0]], dtype=torch.float64, device=device)
    options = {"temperature": temperature, "reduction": "none", "backend": backend}
    loss = ops.unidirectional_info_nce(query, key, **options).cpu()
    # log(exp(1 / T) + exp(3 / T)) - 1 / T, where exp(-2 / T) counts for nothing.
    assert abs(loss[0].item() - 2 / temperature) <= 4 * 2.0**-53 * (2 / temperature)

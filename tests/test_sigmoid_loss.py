"""unidirectional_sigmoid_loss: values, one-pass gradients, numbers that learn, rounding, laws, bad input."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import sigmoid_loss as reference
from support import emulation
from support.cases import DTYPES, HALF, dtype_name, is_interpreted, laws
from support.sigmoid_loss import check, hold, make, results

pytestmark = pytest.mark.usefixtures("poisoned_memory")


LAWS = laws(25)


SHAPES = [(1, 1), (64, 64), (33, 17), (7, 130)]


@pytest.mark.parametrize(
    ("shape", "reduction"),
    [*((shape, "mean") for shape in SHAPES), ((33, 17), "sum"), ((33, 17), "none")],
    ids=str,
)
@pytest.mark.parametrize("learns", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_close_to_truth(shape, dtype, learns, reduction, backend, device):
    query, key = make(*shape, dtype, device=device)
    check(query, key, dtype, backend, learns=learns, reduction=reduction)


# Around the tiles of the kernels: lanes, panels of keys, tiles of keys, blocks of queries, slices of
# dimensions.
EDGES = [(16, 24), (17, 513), (32, 2), (95, 12), (97, 13), (193, 70), (300, 600)]


def check_all(backend):
    """Every dtype and edge, for a process that was started for one instruction set."""
    for dtype in DTYPES:
        for shape in EDGES:
            check_edges(shape, dtype, backend)


def check_edges(shape, dtype, backend, device="cpu"):
    """Loss and gradients of one shape against float64, with scores of moderate size."""
    query, key = make(*shape, dtype, seed=3, device=device, size=shape[1] ** -0.25)
    check(query, key, dtype, backend, temperature=0.5, bias=-3.0, reduction="none")
    with torch.no_grad():
        losses = ops.unidirectional_sigmoid_loss(query, key, reduction="none", backend=backend)
    truth, plain = (
        reference.unidirectional_sigmoid_loss(query.to(kind), key.to(kind), reduction="none")
        for kind in (torch.float64, torch.promote_types(dtype, torch.float32))
    )
    hold(losses, truth, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_tiles(shape, dtype, backend, device):
    check_edges(shape, dtype, backend, device)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_that_are_not_asked_for(asked, backend, device):
    query, key = make(20, 9, device=device)
    options = {"dtype": torch.float64, "device": device}
    leaves = [query, torch.tensor([0.7], **options), torch.tensor(-1.0, **options)]
    for number in asked:
        leaves[number] = leaves[number].clone().requires_grad_()

    def loss(function, **options):
        return function(leaves[0], key, temperature=leaves[1], bias=leaves[2], **options)

    wanted = [leaves[number] for number in asked]
    found = torch.autograd.grad(loss(ops.unidirectional_sigmoid_loss, backend=backend), wanted)
    expected = torch.autograd.grad(loss(reference.unidirectional_sigmoid_loss), wanted)
    torch.testing.assert_close(found, expected)


def test_key_gets_no_gradient(backend, device):
    query, key = torch.randn(2, 8, 4, requires_grad=True, device=device).unbind()
    assert not ops.unidirectional_sigmoid_loss(query.detach(), key, backend=backend).requires_grad


def test_by_hand(backend, device):
    # Scores q k^T - 1 = [[0, 1], [1, 3]].
    query = torch.tensor([[1.0], [2.0]], device=device)
    losses = ops.unidirectional_sigmoid_loss(
        query, query, temperature=1.0, bias=-1.0, reduction="none", backend=backend
    )
    e = torch.e
    expected = torch.tensor([2 * (1 + e), (1 + e) * (1 + e**-3)], device=device).log()
    torch.testing.assert_close(losses, expected)


def test_defaults_are_those_of_the_paper(backend, device):
    query, key = make(12, 5, torch.float32, device=device)
    query, key = (torch.nn.functional.normalize(x) for x in (query, key))
    scores = 10 * query.double() @ key.double().T - 10
    signs = 2 * torch.eye(12, dtype=torch.float64, device=device) - 1
    expected = -logsigmoid(signs * scores).sum() / 12
    found = ops.unidirectional_sigmoid_loss(query, key, backend=backend)
    torch.testing.assert_close(found, expected.float())


@LAWS
@given(
    num_samples=st.integers(1, 40),
    num_dims=st.integers(1, 30),
    padding=st.integers(0, 9),
    shift=st.floats(-20, 20),
    seed=st.integers(0, 1000),
)
def test_laws(backend, device, num_samples, num_dims, padding, shift, seed):
    query, key = make(num_samples, num_dims, seed=seed, device=device)
    op = functools.partial(
        ops.unidirectional_sigmoid_loss, temperature=0.5, reduction="none", backend=backend
    )
    losses = op(query, key, bias=shift)
    # Samples in another order, and dimensions that are zero.
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(op(query[order], key[order], bias=shift), losses[order])
    pad = functools.partial(torch.nn.functional.pad, pad=(0, padding))
    torch.testing.assert_close(op(pad(query), pad(key), bias=shift), losses)
    # A bias is one dimension more, in which all queries hold it and all keys the temperature.
    more = [
        torch.cat([x, torch.full((num_samples, 1), value, dtype=x.dtype, device=device)], 1)
        for x, value in ((query, shift), (key, 0.5))
    ]
    torch.testing.assert_close(op(*more, bias=0.0), losses)
    # Temperature scales products alone.
    torch.testing.assert_close(op(2 * query, key / 2, bias=shift), losses)


def test_one_sample_is_a_logistic_regression(backend, device):
    query, key = make(1, 5, device=device)
    loss = ops.unidirectional_sigmoid_loss(query, key, temperature=2.0, bias=0.3, backend=backend)
    torch.testing.assert_close(loss, -logsigmoid((query * key).sum() / 2 + 0.3))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction, backend, device):
    query, key = make(4, 5, device=device)
    temperature, bias = (
        torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (0.7, -1.0)
    )

    def loss_of(query, temperature, bias):
        return ops.unidirectional_sigmoid_loss(
            query, key, temperature=temperature, bias=bias, reduction=reduction, backend=backend
        )

    # Of the whole Jacobian one product from each side, where each of its columns takes two calls.
    fast = is_interpreted(backend)
    inputs = (query.requires_grad_(), temperature, bias)
    assert torch.autograd.gradcheck(loss_of, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(loss_of, inputs, fast_mode=True)


def test_opcheck(backend, device):
    query, key = make(6, 5, torch.float32, device=device)
    numbers = torch.tensor([0.5, -1.0], dtype=torch.float64, device=device)
    for pair, with_residual in ((None, True), (numbers, False)):
        arguments = (query, key, pair, 0.5, -1.0, 0, "none", with_residual, backend)
        torch.library.opcheck(torch.ops.mmfast.sigmoid_loss_fwd.default, arguments)


def check_part_of_keys(dtype, backend, num_queries, num_keys, num_dims, offset, device="cpu"):
    """Results for queries whose own keys are in the midst of all keys, and the same in float64."""
    query, _ = make(num_queries, num_dims, seed=4, size=2 / num_dims**0.5)
    _, key = make(num_keys, num_dims, seed=5, size=2 / num_dims**0.5)
    arguments = (None, 0.5, -2.0, offset, "none", True)
    found = []
    wide = torch.promote_types(dtype, torch.float32)
    for kind, name in ((dtype, backend), (torch.float64, "reference"), (wide, "reference")):
        inputs = (query.to(device, dtype).to(kind), key.to(device, dtype).to(kind))
        loss, residual, sums = torch.ops.mmfast.sigmoid_loss_fwd(*inputs, *arguments, name)
        # That of float16 is in float32 until it has its factors: it is rounded here as the gradient is there.
        found.append((loss, residual.to(kind), sums))
    for mine, true, simple in zip(*found, strict=True):
        hold(mine, true, simple.to(mine.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize(
    "sizes",
    [(37, 200, 20, 0), (37, 200, 48, 101), (65, 129, 300, 64), (3, 130, 64, 127), (20, 1100, 70, 1000)],
    ids=str,
)
def test_queries_are_a_part_of_the_keys(sizes, dtype, backend, device):
    check_part_of_keys(dtype, backend, *sizes, device)


def test_parts_sum_to_the_whole(backend, device):
    """Processes that each hold some of the queries and all of the keys."""
    query, key = make(30, 7, device=device)
    whole = torch.ops.mmfast.sigmoid_loss_fwd(query, key, None, 0.5, -2.0, 0, "sum", True, backend)
    parts = [
        torch.ops.mmfast.sigmoid_loss_fwd(
            query[first:last], key, None, 0.5, -2.0, first, "sum", True, backend
        )
        for first, last in ((0, 11), (11, 12), (12, 30))
    ]
    loss, residual, sums = zip(*parts, strict=True)
    joined = (sum(loss), torch.cat(residual), torch.cat(sums, 1))
    torch.testing.assert_close(joined, whole)


@pytest.mark.parametrize("num_dims", [40, 100, 200, 300, 520])
@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
def test_every_path_of_the_cuda_kernel(dtype, num_dims):
    if not emulation.compiler():
        pytest.skip("no C++ compiler for the emulation of CUDA")
    with emulation.emulated():
        # Several tiles of every kernel, so that stages are filled again; more than 512 keys are split.
        check_part_of_keys(dtype, "cuda", 70, 330 if dtype == torch.float16 else 600, num_dims, 101)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_factors_are_multiplied_as_compiled_kernels_do(dtype, monkeypatch):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    if not _backend.interpreting():
        pytest.skip("elsewhere nothing else is done")
    module = _backend.kernels("sigmoid_loss")
    monkeypatch.setattr(module, "_joins", lambda target: True)
    common, tiles = module._sigmoid_choices("interpreter", dtype, "ieee", 8)
    for num_keys in (16, 128):
        tile = [tiles[0]._replace(queries=16, keys=num_keys)]
        monkeypatch.setattr(module, "_sigmoid_choices", lambda *_, only=(common, tile): only)
        check_part_of_keys(dtype, "triton", 5, 2 * num_keys + 3, 8, num_keys - 2)
        # As many factors of 2 as there are keys of a tile.
        zero = torch.zeros(num_keys, 8, dtype=dtype)
        loss = ops.unidirectional_sigmoid_loss(zero, zero, bias=0.0, backend="triton")
        torch.testing.assert_close(loss, torch.tensor(2.0).log() * num_keys)


def test_layouts(backend, device):
    query, key = make(9, 11, device=device)
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend=backend)
    expected = results(op, query, key, torch.float64)
    strided = torch.stack([query, query], 2)[..., 0], key.T.contiguous().T
    torch.testing.assert_close(results(op, *strided, torch.float64), expected)
    rows = key[:1].expand(9, 11)
    torch.testing.assert_close(
        results(op, query, rows, torch.float64), results(op, query, rows.contiguous(), torch.float64)
    )


def test_empty(backend, device):
    query = torch.randn(0, 4, requires_grad=True, device=device)
    op = functools.partial(ops.unidirectional_sigmoid_loss, query, query, backend=backend)
    assert bool(op(reduction="mean").isnan())
    assert op(reduction="sum").item() == 0
    assert op(reduction="none").shape == (0,)
    op(reduction="sum").backward()
    assert query.grad.shape == (0, 4)


def test_without_dimensions_scores_are_the_bias(backend, device):
    query = torch.randn(3, 0, requires_grad=True, device=device)
    bias = torch.tensor(-1.0, device=device, requires_grad=True)
    loss = ops.unidirectional_sigmoid_loss(query, query, bias=bias, backend=backend)
    e = torch.e
    expected = torch.tensor([1 + e, 1 + 1 / e, 1 + 1 / e], device=device).log().sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert query.grad.shape == (3, 0)
    assert bias.grad.isfinite()


def test_mixed_dtypes_are_promoted(backend, device):
    query, key = make(9, 11, torch.float32, device=device)
    mixed = query.bfloat16().requires_grad_()
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend=backend)
    loss = op(mixed, key)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, op(mixed.float(), key))
    loss.backward()
    assert mixed.grad.dtype == torch.bfloat16


def test_autocast_does_not_lower_precision(backend, device):
    query, key = make(33, 20, torch.float32, device=device)
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend=backend)
    expected = results(op, query, key, torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = results(op, query, key, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("learns", [False, True], ids=["numbers", "tensors"])
def test_compiles(learns, backend, device):
    torch.compiler.reset()
    query, key = make(16, 8, device=device)
    numbers = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=learns) for x in (0.7, -1.0)]
    given = numbers if learns else (0.7, -1.0)

    def loss(query):
        return ops.unidirectional_sigmoid_loss(
            2 * query, key, temperature=given[0], bias=given[1], backend=backend
        )

    leaves = [query.requires_grad_(), *(numbers if learns else ())]
    expected, actual = loss(query), torch.compile(loss, fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("size", [16, 64, 65, 129, 300])
def test_one_behaviour_at_every_size(size):
    query, key = make(size, 4)
    query.requires_grad_()
    loss = ops.unidirectional_sigmoid_loss(query, key)
    torch.testing.assert_close(loss, reference.unidirectional_sigmoid_loss(query, key))
    key.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_of_queries_give_the_whole(monkeypatch):
    query, key = make(33, 12)
    op = functools.partial(ops.unidirectional_sigmoid_loss, backend="reference")
    expected = results(op, query, key, torch.float64)
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 33 * 5)
    torch.testing.assert_close(results(op, query, key, torch.float64), expected)


BAD = {
    "unequal N": (
        ValueError,
        lambda x: (x[0], x[1][:3]),
        {},
        "key must have shape [N, D] = [4, 5], got [3, 5]",
    ),
    "rank": (ValueError, lambda x: (x[0][0], x[1]), {}, "query must have shape [N, D], got [5]"),
    "integers": (TypeError, lambda x: (x[0].long(), x[1]), {}, "query must have dtype float32"),
    "temperature": (
        ValueError,
        tuple,
        {"temperature": 0.0},
        "temperature must be positive and finite, got 0.0",
    ),
    "two temperatures": (ValueError, tuple, {"temperature": torch.ones(2)}, "temperature must be one number"),
    "bias": (ValueError, tuple, {"bias": float("nan")}, "bias must lie between -1e+30 and 1e+30, got nan"),
    "large bias": (
        ValueError,
        tuple,
        {"bias": torch.tensor(1e300).double()},
        "bias must lie between -1e+30 and 1e+30",
    ),
    "no bias": (TypeError, tuple, {"bias": None}, "bias must be a number, got None"),
    "integer bias": (
        TypeError,
        tuple,
        {"bias": torch.tensor(1)},
        "bias must have a floating dtype, got int64",
    ),
    "two biases": (ValueError, tuple, {"bias": torch.ones(1, 2)}, "bias must be one number, got a tensor of"),
    "reduction": (ValueError, tuple, {"reduction": "max"}, "reduction must be one of 'mean'"),
    "backend": (ValueError, tuple, {"backend": "gpu"}, 'backend must be "auto" or one of'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, change, options, message = BAD[case]
    with pytest.raises(error) as raised:
        ops.unidirectional_sigmoid_loss(*change(make(4, 5)), **options)
    assert message in str(raised.value)

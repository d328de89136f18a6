"""Utilities of coalitions and Shapley values of additive heads: values, gradients, laws."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import backend as _backend
from mmfast import ops
from mmfast.ops.additive_shapley import SMOOTH_UTILITIES, UTILITIES
from mmfast.reference import additive_shapley as reference
from support.additive_shapley import all_logits, make
from support.cases import DTYPES, dtype_name, is_interpreted, laws
from support.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1, 1, 2), (2, 64, 8), (3, 33, 7), (5, 3, 11), (2, 0, 5)]

LAWS = laws(30)


def test_coalition_utilities_by_hand(backend, device):
    # Coalitions none, a, b, both; the label is 1. The third row ties classes 0 and 1, the fourth 1 and 2.
    logits = torch.tensor(
        [[[0.0, -1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [0.0, 4.0, 4.0]]], device=device
    )
    labels = torch.tensor([1], device=device)
    expected = {
        "correct": [0.0, 1.0, 0.0, 1.0],
        "cardinality": [0.0, 1.0, 0.0, 2.0],
        "margin": [-1.0, 1, 0, 0],
    }
    for utility, values in expected.items():
        actual = ops.coalition_utilities(logits, labels, utility=utility, backend=backend)
        assert actual.tolist() == [values]
    probability = ops.coalition_utilities(logits, labels, utility="probability", backend=backend)
    torch.testing.assert_close(probability, logits.softmax(-1)[..., 1])
    log_probability = ops.coalition_utilities(logits, labels, utility="log_probability", backend=backend)
    torch.testing.assert_close(log_probability, logits.log_softmax(-1)[..., 1])


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_coalition_utilities_close_to_truth(dtype, utility, backend, device):
    logits, labels, _ = make((33, 4, 7), dtype, device=device)
    logits, labels = logits.requires_grad_(), labels[:1].expand(33)

    def results(logits, backend):
        values = ops.coalition_utilities(logits, labels, utility=utility, backend=backend)
        if utility not in SMOOTH_UTILITIES:
            return [values]
        return [values, *torch.autograd.grad(values.sum(), logits)]

    for actual, truth, plain in zip(
        results(logits, backend),
        results(logits.double(), "reference"),
        results(logits, "reference"),
        strict=True,
    ):
        assert_close_to_truth(actual, truth, plain)


# Correctness of (first, second, both) and the published number of copies 2 (1 - phi)_+ per modality.
COPIES = [("000", 2, 2), ("001", 0, 0), ("010", 3, 1), ("011", 1, 0)]

COPIES += [("100", 1, 3), ("101", 0, 1), ("110", 2, 2), ("111", 0, 0)]


@pytest.mark.parametrize(("correct", "first", "second"), COPIES, ids=[row[0] for row in COPIES])
def test_cardinality_gives_the_published_copies(correct, first, second, backend, device):
    logits = torch.zeros(1, 4, 2, device=device)
    logits[0, 1:, 0] = torch.tensor([1.0 - 2 * int(flag) for flag in correct], device=device)
    values = ops.coalition_utilities(logits, torch.tensor([1], device=device), backend=backend)
    phi = ops.shapley_values(values)
    assert (2 * (1 - phi)).clamp_min(0).tolist() == [[first, second]]


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_additive_shapley_close_to_truth(shape, dtype, utility, backend, device):
    partial_logits, labels, bias = make(shape, dtype, device=device)
    actual = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend=backend)
    assert actual.shape == (shape[1], shape[0])
    assert actual.dtype == dtype
    logits = all_logits(partial_logits.double(), bias.double())
    truth = ops.shapley_values(ops.coalition_utilities(logits, labels, utility=utility, backend="reference"))
    logits = all_logits(partial_logits, bias)
    if utility in ("correct", "cardinality"):
        # Sums in half precision can change the argmax; the op's do not.
        logits = logits.double()
    plain = ops.shapley_values(ops.coalition_utilities(logits, labels, utility=utility, backend="reference"))
    assert_close_to_truth(actual, truth, plain.to(dtype))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("utility", SMOOTH_UTILITIES)
def test_gradients(utility, with_bias, backend, device):
    partial_logits, labels, bias = make((3, 4, 5), device=device)
    inputs = [partial_logits.requires_grad_(), *([bias.requires_grad_()] if with_bias else [])]

    def values(partial_logits, bias=None):
        return ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend=backend)

    def utilities(logits):
        return ops.coalition_utilities(logits, labels, utility=utility, backend=backend)

    check = functools.partial(torch.autograd.gradcheck, fast_mode=is_interpreted(backend))
    assert check(values, inputs)
    assert check(utilities, torch.randn(4, 8, 5, dtype=torch.float64, requires_grad=True, device=device))


@pytest.mark.parametrize("utility", SMOOTH_UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradient_close_to_truth(dtype, utility, backend, device):
    partial_logits, labels, bias = make((3, 33, 7), dtype, device=device)
    weights = torch.randn(33, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(function, dtype):
        leaves = [
            partial_logits.detach().to(dtype).requires_grad_(),
            bias.detach().to(dtype).requires_grad_(),
        ]
        values = function(leaves[0], labels, leaves[1], utility=utility)
        return torch.autograd.grad(values, leaves, weights.to(values.dtype))

    def op(*args, **options):
        return ops.additive_shapley(*args, **options, backend=backend)

    for actual, truth, plain in zip(
        gradients(op, dtype),
        gradients(reference.additive_shapley, torch.float64),
        gradients(reference.additive_shapley, dtype),
        strict=True,
    ):
        assert actual.dtype == dtype
        assert_close_to_truth(actual, truth, plain)


def check_all(backend):
    """Every dtype, shape and utility, for a process that was started for one instruction set."""
    for dtype in DTYPES:
        for utility in UTILITIES:
            for shape in SHAPES:
                test_additive_shapley_close_to_truth(shape, dtype, utility, backend, "cpu")
            if utility in SMOOTH_UTILITIES:
                test_gradient_close_to_truth(dtype, utility, backend, "cpu")


# What a block of the CUDA kernel keeps of a sample in shared memory is most with these.
@pytest.mark.parametrize(
    ("num_modalities", "dtype"),
    [(8, torch.bfloat16), (13, torch.float16), (12, torch.float32), (11, torch.float64)],
    ids=str,
)
def test_gradient_of_many_modalities(num_modalities, dtype, backend, device):
    if backend == "triton" and num_modalities > 8:
        pytest.skip("the interpreter takes 4 ms for a coalition")
    partial_logits, labels, _ = make((num_modalities, 66, 3), dtype, device=device)
    partial_logits = partial_logits.requires_grad_()

    def gradient(logits, backend):
        phi = ops.additive_shapley(logits, labels, utility="probability", backend=backend)
        return torch.autograd.grad(phi[:, 1:].sum(), logits)[0]

    truth, plain = gradient(partial_logits.double(), "reference"), gradient(partial_logits, "reference")
    assert_close_to_truth(gradient(partial_logits, backend), truth, plain)


def test_margin_gradient_goes_to_the_lowest_runner_up(backend, device):
    logits = torch.tensor([[[5.0, 2.0, 2.0], [1.0, 2.0, 2.0]]], requires_grad=True, device=device)
    ops.coalition_utilities(
        logits, torch.tensor([0], device=device), utility="margin", backend=backend
    ).sum().backward()
    assert logits.grad.tolist() == [[[1, -1, 0], [1, -1, 0]]]


@pytest.mark.parametrize("utility", ["cardinality", "correct"])
def test_counting_utilities_carry_no_gradient(utility, backend, device):
    partial_logits, labels, bias = make((2, 4, 3), device=device)
    phi = ops.additive_shapley(
        partial_logits.requires_grad_(), labels, bias, utility=utility, backend=backend
    )
    assert not phi.requires_grad


@LAWS
@given(
    num_modalities=st.integers(1, 6),
    num_samples=st.integers(0, 9),
    num_classes=st.integers(2, 6),
    seed=st.integers(0, 1000),
)
def test_laws(backend, device, num_modalities, num_samples, num_classes, seed):
    partial_logits, labels, bias = make((num_modalities, num_samples, num_classes), seed=seed, device=device)
    phi = ops.additive_shapley(partial_logits, labels, bias, backend=backend)
    correct = (partial_logits.sum(0) + bias).argmax(-1) == labels
    torch.testing.assert_close(phi.sum(1), num_modalities * correct.double())
    low, high = -(num_modalities - 1) / 2, (num_modalities + 1) / 2
    assert bool(((phi >= low - 1e-9) & (phi <= high + 1e-9)).all())
    for utility in SMOOTH_UTILITIES:
        partial_logits[0] = 0
        phi = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend=backend)
        torch.testing.assert_close(phi[:, 0], torch.zeros(num_samples, dtype=phi.dtype, device=device))


@LAWS
@given(
    utility=st.sampled_from(UTILITIES),
    num_modalities=st.integers(1, 6),
    num_classes=st.integers(2, 6),
    data=st.data(),
    seed=st.integers(0, 1000),
)
def test_laws_of_the_whole_and_of_exchange(backend, device, utility, num_modalities, num_classes, data, seed):
    partial_logits, labels, bias = make((num_modalities, 5, num_classes), seed=seed, device=device)
    values = functools.partial(ops.additive_shapley, utility=utility, backend=backend)
    phi = values(partial_logits, labels, bias)
    logits = all_logits(partial_logits, bias)[:, [0, -1]]
    if utility == "cardinality":
        whole = num_modalities * (logits[:, 1].argmax(-1) == labels).double()
    else:
        whole = ops.coalition_utilities(logits, labels, utility=utility, backend=backend).diff(dim=1)[:, 0]
    torch.testing.assert_close(phi.sum(1), whole)
    order = data.draw(st.permutations(range(num_modalities)))
    torch.testing.assert_close(values(partial_logits[order], labels, bias), phi[:, order])


@LAWS
@given(num_modalities=st.integers(1, 6), scale=st.floats(-10, 10), seed=st.integers(0, 1000))
def test_law_of_linearity(backend, device, num_modalities, scale, seed):
    # The margin between two classes is a linear function of the logits, so its values are.
    first, labels, _ = make((num_modalities, 5, 2), seed=seed, device=device)
    second = make((num_modalities, 5, 2), seed=seed + 1, device=device)[0]
    values = functools.partial(ops.additive_shapley, labels=labels, utility="margin", backend=backend)
    expected = values(first) + scale * values(second)
    torch.testing.assert_close(values(first + scale * second), expected, rtol=1e-12, atol=1e-12)


def test_chunks_of_samples_give_the_whole(monkeypatch):
    partial_logits, labels, bias = make((3, 33, 7))
    leaves = [partial_logits.requires_grad_(), bias.requires_grad_()]

    def value_and_gradients():
        phi = ops.additive_shapley(partial_logits, labels, bias, utility="margin", backend="reference")
        return phi, *torch.autograd.grad(phi.square().sum(), leaves)

    expected = value_and_gradients()
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 100)
    torch.testing.assert_close(value_and_gradients(), expected)


def test_many_modalities_in_bounded_memory(backend, device):
    # Triton's interpreter takes 4 ms for a coalition.
    num_modalities = 9 if backend == "triton" else 12
    partial_logits, labels, _ = make((num_modalities, 20, 6), torch.float32, device=device)
    phi = ops.additive_shapley(partial_logits, labels, backend=backend)
    correct = partial_logits.sum(0).argmax(-1) == labels
    torch.testing.assert_close(phi.sum(1), num_modalities * correct.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
@pytest.mark.parametrize("shape", [(4, 3, 300), (2, 5, 1100), (4, 1, 2000)], ids=str)
def test_many_classes(shape, dtype, utility, backend, device):
    partial_logits, labels, bias = make(shape, dtype, device=device)
    # Values as large as the utilities they are differences of, whose rounding would show otherwise.
    partial_logits *= 4
    results = []
    for name, kind in ((backend, dtype), ("reference", torch.float64), ("reference", dtype)):
        leaves = [partial_logits.to(kind).requires_grad_(), bias.to(kind).requires_grad_()]
        phi = ops.additive_shapley(leaves[0], labels, leaves[1], utility=utility, backend=name)
        is_smooth = utility in SMOOTH_UTILITIES
        # The same seeds for all: those made of phi would differ by its rounding, times the terms' size.
        seeds = torch.linspace(1, 2, phi.numel(), device=device, dtype=kind).view_as(phi)
        results.append((phi, *(torch.autograd.grad(phi, leaves, seeds) if is_smooth else ())))
    for actual, truth, plain in zip(*results, strict=True):
        assert_close_to_truth(actual, truth, plain)


@pytest.mark.parametrize("utility", ["cardinality", "margin"])
@pytest.mark.parametrize("num_modalities", [4, 6])
def test_blocks_may_share_coalitions_or_not(num_modalities, utility, monkeypatch, backend, device):
    if backend == "triton":
        module, name, values = _backend.kernels("additive_shapley"), "_ENOUGH_BLOCKS", (1, 2, 1024)
    elif backend == "cuda":
        # Where no block shares them, sums of more than a thousand coalitions begin anew.
        num_modalities += 5
        module, name = _backend.extension("cuda"), "additive_shapley_fwd_plan"
        values = tuple(lambda *_, count=count: count for count in (1, 4, 8))
    else:
        pytest.skip("no coalitions are shared")
    partial_logits, labels, bias = make((num_modalities, 5, 3), device=device)
    expected = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend="reference")
    for value in values:
        monkeypatch.setattr(module, name, value)
        actual = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend=backend)
        torch.testing.assert_close(actual, expected)

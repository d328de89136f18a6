"""Utilities of coalitions and Shapley values of additive heads: values, gradients, laws, bad input."""

from __future__ import annotations

import functools
import importlib
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfast import backend as _backend
from mmfast import ops
from mmfast.ops.additive_shapley import SMOOTH_UTILITIES, UTILITIES
from mmfast.reference import additive_shapley as reference
from support.numerics import assert_close_to_truth

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2), (2, 64, 8), (3, 33, 7), (5, 3, 11), (2, 0, 5)]
LAWS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(shape, dtype=torch.float64, seed=0, device="cpu"):
    _, num_samples, num_classes = shape
    generator = torch.Generator().manual_seed(seed)
    partial_logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64).to(dtype)
    return partial_logits.to(device), labels.to(device), bias.to(device)


def all_logits(partial_logits, bias):
    """Return the logits of every coalition, added up one by one."""
    num_modalities = len(partial_logits)
    tables = []
    for coalition in range(2**num_modalities):
        members = [partial_logits[m] for m in range(num_modalities) if coalition >> m & 1]
        tables.append(sum(members, torch.zeros_like(partial_logits[0])) + bias)
    return torch.stack(tables, dim=1)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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

    # Triton's interpreter takes 10 ms for a launch.
    check = functools.partial(torch.autograd.gradcheck, fast_mode=backend == "triton")
    assert check(values, inputs)
    assert check(utilities, torch.randn(4, 8, 5, dtype=torch.float64, requires_grad=True, device=device))


@pytest.mark.parametrize("utility", SMOOTH_UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
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


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_logits(dtype, utility, backend, device):
    partial_logits, labels, bias = make((3, 200, 7), device=device)
    partial_logits, bias = (100 * partial_logits).to(dtype), bias.to(dtype)
    arguments = {"labels": labels, "utility": utility}
    actual = ops.additive_shapley(partial_logits, bias=bias, backend=backend, **arguments)
    truth = reference.additive_shapley(partial_logits.double(), bias=bias.double(), **arguments)
    assert bool(actual.isfinite().all())
    assert_close_to_truth(actual, truth, reference.additive_shapley(partial_logits, bias=bias, **arguments))


def test_chunks_of_samples_give_the_whole(monkeypatch, backend, device):
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 100)
    partial_logits, labels, bias = make((3, 33, 7), device=device)
    leaves = [partial_logits.requires_grad_(), bias.requires_grad_()]
    phi = ops.additive_shapley(partial_logits, labels, bias, utility="margin", backend=backend)
    expected = reference.additive_shapley(partial_logits, labels, bias, utility="margin")
    torch.testing.assert_close(phi, expected)
    actual = torch.autograd.grad(phi.square().sum(), leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(expected.square().sum(), leaves))


def test_layouts_and_label_dtypes(backend, device):
    partial_logits, labels, bias = make((3, 33, 7), device=device)
    expected = ops.additive_shapley(partial_logits, labels, bias, backend=backend)
    strided = partial_logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    spread = torch.stack([bias, bias], dim=1)[:, 0]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        actual = ops.additive_shapley(strided, labels.to(dtype), spread, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_masked_classes_stay_masked(backend, device):
    partial_logits, labels, bias = make((2, 8, 4), device=device)
    partial_logits[:, :, 3] = -torch.inf
    for utility in UTILITIES:
        phi = ops.additive_shapley(partial_logits, labels % 3, bias, utility=utility, backend=backend)
        assert bool(phi.isfinite().all())


def test_many_modalities_in_bounded_memory(backend, device):
    # Triton's interpreter takes 4 ms for a coalition.
    num_modalities = 9 if backend == "triton" else 12
    partial_logits, labels, _ = make((num_modalities, 20, 6), torch.float32, device=device)
    phi = ops.additive_shapley(partial_logits, labels, backend=backend)
    correct = partial_logits.sum(0).argmax(-1) == labels
    torch.testing.assert_close(phi.sum(1), num_modalities * correct.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
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
        module = importlib.import_module("mmfast.ops._additive_shapley_launch")
        name, values = "_CUDA_ENOUGH_THREADS", (1, 50, 2**17)
    else:
        pytest.skip("no coalitions are shared")
    partial_logits, labels, bias = make((num_modalities, 5, 3), device=device)
    expected = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend="reference")
    for value in values:
        monkeypatch.setattr(module, name, value)
        actual = ops.additive_shapley(partial_logits, labels, bias, utility=utility, backend=backend)
        torch.testing.assert_close(actual, expected)


def test_more_classes_than_a_block_holds():
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    most = _backend.kernels("additive_shapley").MAX_CLASSES
    device = "cpu" if _backend.interpreting() else "cuda"
    partial_logits = torch.zeros(2, 1, most + 1, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(_backend.BackendUnavailableError, match=f"up to {most} classes, got {most + 1}"):
        ops.additive_shapley(partial_logits, labels, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda dtype: str(dtype)[6:])
def test_autocast_and_mixed_bias(dtype, backend, device):
    partial_logits, labels, bias = make((2, 16, 5), dtype, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        phi = ops.additive_shapley(partial_logits, labels, bias.float(), backend=backend)
    expected = ops.additive_shapley(partial_logits.double(), labels, bias.double(), backend=backend)
    assert phi.dtype == dtype
    torch.testing.assert_close(phi.double(), expected)


def test_compiles(backend, device):
    partial_logits, labels, bias = make((3, 16, 5), device=device)

    def loss(partial_logits, bias):
        phi = ops.additive_shapley(2 * partial_logits, labels, bias, utility="margin", backend=backend)
        return phi.square().sum() + ops.additive_shapley(partial_logits, labels, bias, backend=backend).sum()

    leaves = [partial_logits.requires_grad_(), bias.requires_grad_()]
    expected, actual = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_opcheck(with_bias, dtype, backend, device):
    partial_logits, labels, bias = make((2, 3, 4), device=device)
    partial_logits, bias = partial_logits.to(dtype), bias if with_bias else None
    logits, dphi = torch.randn(3, 4, 5, device=device).to(dtype), torch.randn(3, 2, device=device).to(dtype)
    raw = torch.ops.mmfast
    torch.library.opcheck(raw.coalition_utilities_fwd, (logits, labels, "cardinality", backend))
    torch.library.opcheck(raw.coalition_utilities_bwd, (logits[..., 0], logits, labels, "margin", backend))
    torch.library.opcheck(raw.additive_shapley_fwd, (partial_logits, labels, bias, "correct", backend))
    torch.library.opcheck(raw.additive_shapley_bwd, (dphi, partial_logits, labels, bias, "margin", backend))


BAD = {
    "rank": (lambda p, y, b: (p[0], y, b), {}, "partial_logits must have shape [M, N, C], got [4, 3]"),
    "no modality": (lambda p, y, b: (p[:0], y, b), {}, "must hold M modalities, from 1 to 20, got 0"),
    "labels": (lambda p, y, b: (p, y[:, None], b), {}, "labels must have shape [N] = [4], got [4, 1]"),
    "label range": (lambda p, y, b: (p, y + 3, b), {}, "labels must lie in [0, C) = [0, 3)"),
    "bias": (lambda p, y, b: (p, y, b[:2]), {}, "bias must have shape [C] = [3], got [2]"),
    "utility": (lambda p, y, b: (p, y, b), {"utility": "loss"}, "utility must be one of 'cardinality'"),
    "one class": (
        lambda p, y, b: (p[..., :1], y * 0, b[:1]),
        {"utility": "margin"},
        "must have C >= 2 classes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, message = BAD[case]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ops.additive_shapley(*change(*make((2, 4, 3))), **options)
    assert message in str(error.value)


def test_bad_types_and_tables():
    partial_logits, labels, _ = make((2, 4, 3))
    with pytest.raises(TypeError, match="labels must have an integer dtype, got float64"):
        ops.additive_shapley(partial_logits, labels.double())
    with pytest.raises(TypeError, match="logits must have dtype float32"):
        ops.coalition_utilities(torch.zeros(4, 4, 3, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match="a power of two from 2 on, got 3"):
        ops.coalition_utilities(torch.zeros(4, 3, 3), labels)
    with pytest.raises(ValueError, match="a power of two from 2 on, got 0"):
        ops.coalition_utilities(torch.zeros(4, 0, 3), labels)


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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_classes", [2, 5, 140])
def test_utilities_of_nan_and_infinities(num_classes, dtype, utility, backend, device):
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
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("num_modalities", [1, 2, 3, 5])
def test_values_of_nan_and_infinities(num_modalities, dtype, utility, backend, device):
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

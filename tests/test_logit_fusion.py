"""Entropy and certainty fusion: values, gradients, absent modalities, laws, bad input."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import ops
from mmfast.reference import logit_fusion as reference
from support.cases import DTYPES, HALF, dtype_name, is_interpreted, laws
from support.numerics import assert_close_to_truth, error_against

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1, 1, 1), (2, 64, 8), (3, 33, 7), (4, 5, 101), (2, 9, 5000), (2, 0, 5)]
RULES = {
    "entropy": (ops.entropy_fusion, reference.entropy_fusion),
    "certainty": (
        functools.partial(ops.certainty_fusion, temperature=0.3),
        functools.partial(reference.certainty_fusion, temperature=0.3),
    ),
}
LAWS = laws(30)


def make(shape, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    present = torch.rand(shape[:2], generator=generator) > 0.4
    return logits.to(device, dtype), present.to(device)


def plain(rule, logits, present):
    """Return fused logits and weights by a loop over samples."""
    num_modalities, num_samples, num_classes = logits.shape
    fused, weights = logits.new_zeros(num_samples, num_classes), logits.new_zeros(num_modalities, num_samples)
    for i in range(num_samples):
        here = [m for m in range(num_modalities) if present is None or bool(present[m, i])]
        if not here:
            continue
        p = logits[here, i].softmax(-1)
        score = (p * p.log()).sum(-1) if rule == "entropy" else p.amax(-1) / 0.3
        weights[here, i] = score.softmax(0)
        fused[i] = (weights[here, i, None] * logits[here, i]).sum(0)
    return fused, weights


def exact(rule, logits, present):
    """Return what `plain` does, in extended precision where the machine has it, rounded to float64."""
    x = logits.double().cpu().numpy().astype(np.longdouble)
    here = np.ones(x.shape[:2], bool) if present is None else present.cpu().numpy()
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    score = (p * np.log(p)).sum(-1) if rule == "entropy" else p.max(-1) / np.longdouble(0.3)
    weights = np.where(here, np.exp(score), 0)
    total = weights.sum(0)
    weights = weights / np.where(total == 0, 1, total)
    fused = (weights[..., None] * x).sum(0)
    return torch.from_numpy(fused.astype(np.float64)), torch.from_numpy(weights.astype(np.float64))


def sums_of(results):
    """Return the factors of fixed random sums of both results."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in results]


def gradient(fuse, logits, present, dtype):
    """Return the gradient of those sums."""
    leaf = logits.detach().to(dtype).requires_grad_()
    results = fuse(leaf, present=present)
    return torch.autograd.grad(results, leaf, sums_of(results))[0]


def exact_gradient(rule, logits, present):
    """Return the gradient in extended precision, where no logit is infinite."""
    results = exact(rule, logits, present)
    dfused, dweights = (x.numpy().astype(np.longdouble) for x in sums_of(results))
    x = logits.double().cpu().numpy().astype(np.longdouble)
    w, e = results[1].numpy().astype(np.longdouble), np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    dw = dweights + (dfused * x).sum(-1)
    dscore = (w * (dw - (w * dw).sum(0)))[..., None]
    if rule == "entropy":
        slope = p * (np.log(p) - (p * np.log(p)).sum(-1, keepdims=True))
    else:
        is_top = np.arange(x.shape[-1]) == x.argmax(-1)[..., None]
        slope = p.max(-1, keepdims=True) * (is_top - p) / np.longdouble(0.3)
    return torch.from_numpy((w[..., None] * dfused + dscore * slope).astype(np.float64))


def check_all(backend):
    """Every dtype, size and number of threads, for a process started for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for shape in [*SHAPES, (2, 2000, 17)]:
            for dtype in DTYPES:
                logits, present = make(shape, dtype)
                if dtype != torch.float64:
                    # Float64 is its own truth: sums of large numbers would differ by their order alone.
                    logits[:, : shape[1] // 2] *= 100
                for rule, (fuse, _) in RULES.items():
                    mine = functools.partial(fuse, backend=backend)
                    # Autograd through the formula has NaN where a probability is 0.
                    oracle = functools.partial(fuse, backend="reference")
                    truths = (
                        *oracle(logits.double(), present=present),
                        gradient(oracle, logits, present, torch.float64),
                    )
                    if dtype == torch.float64 and 0 not in shape:
                        # Its own truth it is not: the sums of 5,000 classes differ by their order.
                        z = logits.detach()
                        truths = (*exact(rule, z, present), exact_gradient(rule, z, present))
                    for actual, truth, simple in zip(
                        (*mine(logits, present=present), gradient(mine, logits, present, dtype)),
                        truths,
                        (*oracle(logits, present=present), gradient(oracle, logits, present, dtype)),
                        strict=True,
                    ):
                        assert_close_to_truth(actual, truth, simple)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_close_to_truth(rule, shape, dtype, masked, backend, device):
    logits, present = make(shape, dtype, device=device)
    present = present if masked else None
    actual = RULES[rule][0](logits, present=present, backend=backend)
    for mine, truth, simple in zip(
        actual, exact(rule, logits, present), plain(rule, logits, present), strict=True
    ):
        assert mine.dtype == dtype
        assert_close_to_truth(mine, truth, simple)


def test_by_hand(backend, device):
    # Uniform over two classes: entropy log 2, certainty 1/2; the sure modality: entropy 0, certainty 1.
    logits = torch.tensor([[[0.0, 0.0]], [[1000.0, 0.0]]], device=device)
    fused, weights = ops.entropy_fusion(logits, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([[1 / 3], [2 / 3]], device=device))
    torch.testing.assert_close(fused, torch.tensor([[2000 / 3, 0.0]], device=device))
    _, weights = ops.certainty_fusion(logits, temperature=0.5, backend=backend)
    torch.testing.assert_close(weights[1], torch.tensor([1.0], device=device).sigmoid())


@pytest.mark.parametrize("num_classes", [3, 40, 300])
@pytest.mark.parametrize("rule", RULES)
def test_a_class_that_is_certain_keeps_the_digits_of_its_gradient(rule, num_classes, backend, device):
    """Where no probability moves the weights stand still, however much the fused logits want them to."""
    logits, _ = make((2, 6, num_classes), torch.float32, device=device)
    logits = 1000 * logits.abs()
    logits[..., 1] = 20_000
    logits.requires_grad_()
    fused, weights = RULES[rule][0](logits, backend=backend)
    dfused = sums_of([fused])[0]
    torch.autograd.backward(fused, dfused)
    expected = weights.detach().double()[..., None] * dfused.double()
    torch.testing.assert_close(logits.grad, expected.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients(rule, masked, backend, device):
    logits, present = make((3, 6, 4), device=device)
    fuse = functools.partial(RULES[rule][0], present=present if masked else None, backend=backend)
    # Triton's interpreter takes 10 ms for a launch.
    assert torch.autograd.gradcheck(fuse, logits.requires_grad_(), fast_mode=is_interpreted(backend))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_close_to_truth(rule, dtype, backend, device):
    logits, present = make((3, 33, 7), dtype, device=device)
    mine, oracle = RULES[rule]
    actual = gradient(functools.partial(mine, backend=backend), logits, present, dtype)
    truth, simple = (gradient(oracle, logits, present, precision) for precision in (torch.float64, dtype))
    assert_close_to_truth(actual, truth, simple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("shape", [(2, 5, 1025), (3, 2, 4100), (40, 3, 130)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_many_classes(rule, shape, dtype, backend, device):
    """More classes than one tile of a kernel holds, some excluded, the largest logit in every tile."""
    logits, present = make(shape, dtype, device=device)
    logits[:, 0, : shape[2] // 2] = -torch.inf
    logits[0, 1] += torch.linspace(0, 9, shape[2], dtype=dtype, device=device)
    logits[1, 1, :] = logits[1, 1, 0]
    fuse = RULES[rule][0]
    results = []
    for kind, name in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
        leaf = logits.to(kind).requires_grad_()
        fused, weights = fuse(leaf, present=present, backend=name)
        loss = fused.logsumexp(1).sum() + weights.square().sum()
        # A sample without modalities has 0 in place of what its classes exclude.
        results.append((fused, weights, *torch.autograd.grad(loss, leaf)))
    for actual, truth, plain_result in zip(*results, strict=True):
        finite = truth.isfinite()
        assert torch.equal(actual.isfinite(), finite)
        assert_close_to_truth(*(x.where(finite, x.new_zeros(())) for x in (actual, truth, plain_result)))


@pytest.mark.parametrize("rule", RULES)
def test_absent_modalities_have_no_influence(rule, backend, device):
    logits, present = make((3, 20, 4), device=device)
    present[:, 0] = False
    fuse = RULES[rule][0]
    expected = fuse(logits, present=present, backend=backend)
    garbage = logits.masked_fill(~present[..., None], torch.nan).requires_grad_()
    fused, weights = fuse(garbage, present=present, backend=backend)
    torch.testing.assert_close((fused, weights), expected, rtol=0, atol=0)
    assert bool((weights[~present] == 0).all())
    assert bool((fused[0] == 0).all())
    torch.testing.assert_close(weights.sum(0)[1:], present.any(0)[1:].double())
    (dlogits,) = torch.autograd.grad(fused.square().sum() + weights.square().sum(), garbage)
    assert bool((dlogits[~present] == 0).all())
    assert bool(dlogits.isfinite().all())


@LAWS
@given(
    rule=st.sampled_from(sorted(RULES)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6)),
    seed=st.integers(0, 1000),
)
def test_laws(rule, shape, seed):
    logits, _ = make(shape, seed=seed)
    fuse = RULES[rule][0]
    fused, weights = fuse(logits)
    torch.testing.assert_close(weights.sum(0), torch.ones(shape[1], dtype=weights.dtype))
    # A sample's result depends neither on its batch companions nor on the order of the modalities.
    alone, alone_weights = fuse(logits[:, :1])
    torch.testing.assert_close((alone, alone_weights), (fused[:1], weights[:, :1]), rtol=0, atol=1e-15)
    flipped, flipped_weights = fuse(logits.flip(0))
    torch.testing.assert_close((flipped, flipped_weights.flip(0)), (fused, weights))
    # Weights do not change when a modality's logits move together.
    torch.testing.assert_close(fuse(logits + 3)[1], weights)


@pytest.mark.parametrize("rule", RULES)
def test_excluded_classes(rule, backend, device):
    logits, _ = make((2, 8, 4), device=device)
    expected = RULES[rule][0](logits[..., :3].contiguous(), backend=backend)
    logits[..., 3] = -torch.inf
    logits.requires_grad_()
    fused, weights = RULES[rule][0](logits, backend=backend)
    torch.testing.assert_close((fused[:, :3], weights), expected)
    assert bool((fused[:, 3] == -torch.inf).all())
    torch.nn.functional.cross_entropy(fused, torch.arange(8, device=device) % 3).backward()
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[..., 3] == 0).all())


def test_a_low_temperature_picks_the_surest(backend, device):
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 1.0, -5.0]]], device=device)
    fused, weights = ops.certainty_fusion(logits, temperature=1e-4, backend=backend)
    assert weights.tolist() == [[1], [0]]
    assert fused.tolist() == [[9, 0, 0]]


@pytest.mark.parametrize("temperature", [1.0, 1e-2, 1e-3, 1e-30, 2.938737e-39], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_class_is_excluded_at_every_temperature(dtype, temperature, backend, device):
    """Even by a modality whose weight is too small for the dtype; and the weights hear nothing of it."""
    logits = torch.tensor([[[9.0, 0, 0]], [[0, 1, -torch.inf]], [[2, 0, 0]]], dtype=dtype, device=device)
    logits = logits.expand(3, 20, 3).clone().requires_grad_()
    present = torch.ones(3, 20, dtype=torch.bool, device=device)
    present[1, 0] = False
    fuse = functools.partial(ops.certainty_fusion, temperature=temperature, present=present, backend=backend)
    # As unlikely a class, which no logit excludes.
    likely = logits.detach().clamp_min(-1e4).requires_grad_()
    (fused, weights), (expected, same) = fuse(logits), fuse(likely)
    assert bool((fused[1:, 2] == -torch.inf).all())
    # Without the modality that excludes it the class is there.
    assert torch.equal(fused[0], expected[0])
    assert torch.equal(fused[:, :2], expected[:, :2])
    assert torch.equal(weights, same)
    dfused = torch.tensor([0.5, -2.0, 3.0], dtype=dtype, device=device).expand_as(fused)
    heard = dfused.clone()
    heard[1:, 2] = 0
    gradient = torch.autograd.grad(fused, logits, dfused)[0]
    assert torch.equal(gradient[..., :2], torch.autograd.grad(expected, likely, heard)[0][..., :2])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_a_logit_just_below_the_largest_is_not_the_largest(dtype, backend, device):
    # Its exponential, about the largest, rounds to 1.
    least = torch.finfo(dtype).eps / 16
    logits = torch.tensor([[[0.0, least, 0.0]], [[0.0, 3.0, 1.0]]], dtype=dtype, device=device)
    logits.requires_grad_()
    ops.certainty_fusion(logits, backend=backend)[1][0].sum().backward()
    assert (logits.grad[0, 0] > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_neighbour_without_a_score_gives_the_absent_nothing(rule, value, backend, device):
    logits, present = make((3, 20, 5), torch.float32, device=device)
    logits[0] = value
    present[:] = torch.tensor([True, True, False], device=device)[:, None]
    fused, weights = RULES[rule][0](logits.requires_grad_(), present=present, backend=backend)
    assert bool(weights[:2].isnan().all())
    assert bool((weights[2] == 0).all())
    assert bool(fused.isnan().all())
    gradient = torch.autograd.grad(fused.sum(), logits)[0]
    assert bool(gradient[:2].isnan().all())
    assert bool((gradient[2] == 0).all())


def test_equal_logits_give_the_gradient_to_the_lowest_class(backend, device):
    logits = torch.tensor([[[1.0, 1.0]], [[0.0, 3.0]]], requires_grad=True, device=device)
    ops.certainty_fusion(logits, backend=backend)[1][0].sum().backward()
    assert logits.grad[0, 0, 0] > 0
    assert logits.grad[0, 0, 1] < 0


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_large_logits_at_extreme_temperatures(dtype, temperature, backend, device):
    logits, present = make((3, 200, 7), device=device)
    logits = (50 * logits).to(dtype)
    fuse = functools.partial(ops.certainty_fusion, temperature=temperature)
    for op in (fuse, ops.entropy_fusion):
        results = []
        for kind, name in ((dtype, backend), (torch.float64, "reference"), (dtype, "reference")):
            run = functools.partial(op, backend=name)
            results.append([*run(logits.to(kind), present=present), gradient(run, logits, present, kind)])
        for actual, truth, simple in zip(*results, strict=True):
            assert bool(actual.isfinite().all())
            if dtype == torch.float64:
                # Nothing here is truer: rounding a score moves its weight by eps / temperature in both.
                slack = 8 * torch.finfo(dtype).eps / min(temperature, 1)
                assert error_against(truth, actual) <= slack
            else:
                assert_close_to_truth(actual, truth, simple)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_no_number_shows_in_its_own_sample(rule, value, backend, device):
    logits, _ = make((2, 20, 5), torch.float32, device=device)
    logits[1, 3, 2] = value
    logits[0, 4] = -torch.inf
    fused, weights = RULES[rule][0](logits, backend=backend)
    bad = (torch.arange(20) == 3) | (torch.arange(20) == 4)
    assert torch.equal(fused.isnan().any(1).cpu(), bad)
    assert torch.equal(weights.isnan().all(0).cpu(), bad)
    assert torch.equal(weights.isnan().any(0).cpu(), bad)


@pytest.mark.parametrize("num_classes", [5, 33, 70], ids="C{}".format)
@pytest.mark.parametrize("rule", RULES)
def test_an_excluded_class_beside_a_sample_of_nan(rule, num_classes, backend, device):
    logits, _ = make((2, 8, num_classes), device=device)
    logits[0, 0, 3] = -torch.inf
    logits[:, 1, 3] = torch.nan
    gradients = [
        gradient(functools.partial(RULES[rule][0], backend=name), logits, None, torch.float32)[:, 0]
        for name in (backend, "reference")
    ]
    assert bool(gradients[0].isfinite().all())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rule", RULES)
def test_layouts(rule, backend, device):
    logits, present = make((3, 33, 7), device=device)
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    fuse = functools.partial(RULES[rule][0], present=present.T.contiguous().T, backend=backend)
    torch.testing.assert_close(fuse(strided), fuse(logits), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_name)
@pytest.mark.parametrize("rule", RULES)
def test_autocast(rule, dtype, backend, device):
    logits, present = make((2, 16, 5), dtype, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = RULES[rule][0](logits, present=present, backend=backend)
    torch.testing.assert_close(
        inside, RULES[rule][0](logits, present=present, backend=backend), rtol=0, atol=0
    )


@pytest.mark.parametrize("rule", RULES)
def test_compiles(rule, backend, device):
    logits, present = make((3, 16, 5), device=device)

    def loss(logits):
        fused, weights = RULES[rule][0](2 * logits, present=present, backend=backend)
        return fused.square().sum() + weights.square().sum()

    logits.requires_grad_()
    expected, actual = loss(logits), torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits))


def test_bad_input():
    logits, present = make((2, 4, 3))
    with pytest.raises(ValueError, match=r"logits must have shape \[M, N, C\], got \[4, 3\]"):
        ops.entropy_fusion(logits[0])
    with pytest.raises(ValueError, match=r"M >= 1 modalities and C >= 1 classes, got \[0, 4, 3\]"):
        ops.entropy_fusion(logits[:0])
    with pytest.raises(ValueError, match=r"present must have shape \[M, N\] = \[2, 4\], got \[4, 2\]"):
        ops.entropy_fusion(logits, present=present.T)
    with pytest.raises(TypeError, match="present must have dtype bool, got int64"):
        ops.certainty_fusion(logits, present=present.long())
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        ops.certainty_fusion(logits, temperature=0)
    for value in ("abc", None, 1j, True):
        with pytest.raises(TypeError, match=f"temperature must be a number, got {value!r}"):
            ops.certainty_fusion(logits, temperature=value)


@pytest.mark.parametrize("value", [5e-324, 1e-39, 2.9387e-39, 3.4029e38, 1e300, 10**400], ids=str)
def test_temperatures_that_float32_does_not_divide_by(value):
    with pytest.raises(ValueError, match=r"between 2.938737e-39 and 3.4028235e\+38, .* got"):
        ops.certainty_fusion(make((2, 4, 3))[0], temperature=value)


@pytest.mark.filterwarnings("error::RuntimeWarning:mmfast.ops")
@pytest.mark.parametrize("kind", [float, np.float64, np.float32, np.array], ids=lambda kind: kind.__name__)
def test_temperatures_of_other_kinds_of_number(kind, backend, device):
    logits, _ = make((2, 4, 3), device=device)
    for value in (2.938737e-39, 0.5, 3.4028235e38):
        _, weights = ops.certainty_fusion(logits, temperature=kind(value), backend=backend)
        assert bool(weights.isfinite().all())

"""Class moments, accuracy per dimension and effective dimensions: values, ties, laws, bad input."""

from __future__ import annotations

import importlib
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmfast import backend as _backend
from mmfast import ops
from mmfast.ops import class_separability
from mmfast.reference import class_separability as reference
from support.numerics import assert_close_to_truth, assert_rounded_once

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (64, 16, 8), (333, 33, 7), (5, 130, 31)]
LAWS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(shape, dtype=torch.float64, seed=0, label_dtype=torch.int64, device="cpu"):
    num_samples, num_dims, num_classes = shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    centres = torch.randn(num_classes, num_dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, num_dims, generator=generator, dtype=torch.float64)
    features = (centres[labels] + noise).to(device, dtype)
    return features, labels.to(device, label_dtype), num_classes


def plain_moments(features, labels, num_classes):
    rows = [features[labels == k] for k in range(num_classes)]
    empty = features.new_full(features.shape[1:], torch.nan)
    mean = torch.stack([row.mean(0) if len(row) else empty for row in rows])
    var = torch.stack([row.var(0, correction=0) if len(row) else empty for row in rows])
    return labels.new_tensor([len(row) for row in rows], dtype=torch.int64), mean, var


def brute_force(features, labels, centroids):
    """Return the accuracy from all N C D distances, in float64."""
    distance = (features.double()[:, None] - centroids.double()).abs()
    nearest = distance.nan_to_num(nan=torch.inf).argmin(1)
    return (nearest == labels[:, None]).double().mean(0)


def check_moments(features, labels, num_classes, backend):
    actual = ops.class_moments(features, labels, num_classes, backend=backend)
    wide = torch.promote_types(features.dtype, torch.float32)
    count, *truths = plain_moments(features.double(), labels, num_classes)
    assert torch.equal(actual.count, count)
    for mine, truth, plain in zip(
        actual[1:], truths, plain_moments(features.to(wide), labels, num_classes)[1:], strict=True
    ):
        assert_close_to_truth(mine, truth, plain)


def check_gradient(features, labels, num_classes, backend):
    """Half precision is rounded once, from float32."""
    wide = torch.promote_types(features.dtype, torch.float32)
    count, mean, _ = reference.class_moments(features, labels, num_classes)
    generator = torch.Generator().manual_seed(2)
    dmean, dvar = torch.randn(2, *mean.shape, generator=generator, dtype=torch.float64).to(mean.device)
    results = [
        raw(dmean.to(dtype), dvar.to(dtype), features.to(kept), labels, count, mean.to(dtype))
        for raw, dtype, kept in (
            (lambda *args: torch.ops.mmfast.class_moments_bwd(*args, backend), wide, features.dtype),
            (reference.class_moments_bwd, torch.float64, torch.float64),
            (reference.class_moments_bwd, wide, features.dtype),
        )
    ]
    assert_close_to_truth(*results)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda dtype: str(dtype)[6:])
def test_half_precision_gradient_is_rounded_once(dtype, backend, device):
    features, labels, num_classes = make((64, 16, 8), dtype, device=device)
    moments = ops.class_moments(features.double(), labels, num_classes)
    dmean, dvar = torch.randn(2, *moments.mean.shape, generator=torch.Generator().manual_seed(2)).to(device)
    arguments = (dmean, dvar, features, labels, moments.count, moments.mean.float())
    actual = torch.ops.mmfast.class_moments_bwd(*arguments, backend)
    truth = reference.class_moments_bwd(*(x.double() if x.is_floating_point() else x for x in arguments))
    assert_rounded_once(actual, truth)


def test_of_equal_distances_the_lowest_class_wins(backend, device):
    # Midway between two centroids on either side of 0, in either order, and between equal ones.
    centroids = torch.tensor(
        [[1.0, -1.0, 2.0, 7.0], [-1.0, 1.0, 2.0, -3.0], [9.0, 9.0, 9.0, 3.0]], device=device
    )
    samples = torch.zeros(3, 4, device=device)
    labels = torch.arange(3, device=device)
    hits = [
        torch.ops.mmfast.dimension_hits(samples[k : k + 1], labels[k : k + 1], centroids, backend).tolist()
        for k in range(3)
    ]
    assert hits == [[1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def check_all(backend):
    """Every dtype, layout, width of a tile and number of threads, for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for dtype in DTYPES:
            for shape in ((0, 5, 3), (1, 1, 1), (37, 16, 50), (1100, 131, 7)):
                features, labels, num_classes = make(shape, dtype)
                wider = torch.cat([features, features, features.new_zeros(len(features), 1)], 1)
                for x in (features, features.T.contiguous().T, wider[:, shape[1] : -1]):
                    check_moments(x, labels, num_classes, backend)
                    check_gradient(x, labels, num_classes, backend)
                    for centroids in (features[:num_classes], make((num_classes, shape[1], 2))[0]):
                        if len(centroids) == num_classes:
                            hits = torch.ops.mmfast.dimension_hits(x, labels, centroids, backend)
                            assert torch.equal(hits, reference.dimension_hits(x, labels, centroids))


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("shape", [(20_001, 40, 3), (4_001, 65, 200), (100_003, 3, 2)], ids=str)
def test_number_of_threads_changes_no_bit(shape):
    if reason := _backend.why_not("cpu"):
        pytest.skip(reason)
    features, labels, num_classes = make(shape, torch.float32)
    raw, results = torch.ops.mmfast, []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        count, mean, var = raw.class_moments_fwd(features, labels, num_classes, "cpu")
        dfeatures = raw.class_moments_bwd(mean, var, features, labels, count, mean, "cpu")
        results.append((count, mean, var, dfeatures, raw.dimension_hits(features, labels, mean, "cpu")))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 3)], ids=str)
def test_moments_close_to_truth(shape, dtype, backend, device):
    features, labels, num_classes = make(shape, dtype, device=device)
    check_moments(features, labels, num_classes, backend)
    check_gradient(features, labels, num_classes, backend)


# Of the CUDA kernel a block takes 64 samples, or 16 of each of up to 128 classes, a warp 512 bytes of a row.
@pytest.mark.parametrize(
    ("dtype", "layout", "shape"),
    [
        (torch.float32, "contiguous", (600, 9, 40)),
        (torch.float32, "unaligned", (100, 9, 130)),
        (torch.float32, "contiguous", (200, 260, 3)),
        (torch.float32, "unaligned", (200, 260, 3)),
        (torch.float16, "rows apart", (200, 260, 3)),
        (torch.float32, "rows apart", (70, 1030, 2)),
        (torch.float64, "contiguous", (70, 520, 2)),
        (torch.bfloat16, "contiguous", (70, 520, 9)),
    ],
    ids=str,
)
def test_many_classes_and_wide_rows(dtype, shape, layout, backend, device):
    features, labels, num_classes = make(shape, dtype, device=device)
    if layout != "contiguous":
        wider = torch.cat([features, features.new_full((len(features), 8), torch.nan)], 1)
        wider = wider.roll(1, 1) if layout == "unaligned" else wider
        features = wider[:, 1:-7] if layout == "unaligned" else wider[:, :-8]
    check_moments(features, labels, num_classes, backend)
    check_gradient(features, labels, num_classes, backend)
    centroids = make((num_classes, shape[1], 2), torch.float32, device=device)[0]
    hits = torch.ops.mmfast.dimension_hits(features, labels, centroids, backend)
    assert torch.equal(hits, reference.dimension_hits(features, labels, centroids))


@pytest.mark.parametrize("num_classes", [5, 130], ids="C={}".format)
def test_labels_that_name_no_class_are_left_out(num_classes, backend, device, monkeypatch):
    if backend in ("reference", "cpu"):
        pytest.skip("labels on a CPU are checked")
    monkeypatch.setattr(class_separability, "check_label_range", lambda *_: None)
    features, labels, _ = make((100, 9, num_classes), torch.float32)
    outside = torch.arange(100) % 7 == 3
    wrong = labels.masked_fill(outside, -1).masked_fill(torch.arange(100) % 14 == 3, num_classes).to(device)
    features = features.to(device)
    raw, known = torch.ops.mmfast, ~outside.to(device)
    expected = reference.class_moments(features[known], wrong[known], num_classes)
    count, mean, var = raw.class_moments_fwd(features, wrong, num_classes, backend)
    torch.testing.assert_close((count, mean, var), expected, equal_nan=True)
    hits = raw.dimension_hits(features, wrong, mean, backend)
    assert torch.equal(hits, reference.dimension_hits(features[known], wrong[known], mean))
    dfeatures = raw.class_moments_bwd(mean, var, features, wrong, count, mean, backend)
    assert not dfeatures[~known].any()


@pytest.mark.parametrize("order", ["drift", "outlier first", "outlier last"])
def test_moments_do_not_cancel(order, backend, device):
    """The first samples, or those before, are far from the mean of all."""
    x = 1e4 + torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)).to(device)
    if order == "drift":
        x += torch.arange(3000, device=device)[:, None]
    else:
        x[0 if order == "outlier first" else -1] = -1e6
    labels = torch.zeros(3000, dtype=torch.int64, device=device)
    _, mean, var = ops.class_moments(x, labels, 1, backend=backend)
    torch.testing.assert_close(mean[0].double(), x.double().mean(0), rtol=4e-6, atol=0)
    torch.testing.assert_close(var[0].double(), x.double().var(0, correction=0), rtol=1e-4, atol=0)


def test_infinite_samples(backend, device):
    x = torch.zeros(200, 2, device=device)
    x[150, 0] = torch.inf
    _, mean, var = ops.class_moments(
        x, torch.zeros(200, dtype=torch.int64, device=device), 1, backend=backend
    )
    assert mean.tolist() == [[torch.inf, 0]]
    assert bool(var[0, 0].isnan())


def test_moments_by_hand(backend, device):
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [7.0, 2.0]], device=device)
    count, mean, var = ops.class_moments(features, torch.tensor([0, 0, 2], device=device), 3, backend=backend)
    assert count.tolist() == [2, 0, 1]
    assert mean[[0, 2]].tolist() == [[2, 0], [7, 2]]
    assert var[[0, 2]].tolist() == [[1, 0], [0, 0]]
    assert bool(mean[1].isnan().all())
    assert bool(var[1].isnan().all())


@LAWS
@given(
    first=st.integers(0, 20),
    second=st.integers(0, 20),
    num_classes=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_merged_moments_are_those_of_all_samples(first, second, num_classes, seed):
    features, labels, _ = make((first + second, 3, num_classes), seed=seed)
    parts = [
        ops.class_moments(features[rows], labels[rows], num_classes)
        for rows in (slice(first), slice(first, None))
    ]
    merged, whole = parts[0].merge(parts[1]), ops.class_moments(features, labels, num_classes)
    torch.testing.assert_close(tuple(merged), tuple(whole), equal_nan=True)


def test_merged_moments_pass_gradients_around_empty_classes():
    # Class 0 has samples in the first set only, class 1 in the second only, class 2 in both, class 3 nowhere.
    features = make((8, 2, 2))[0].requires_grad_()
    labels = torch.tensor([0, 0, 2, 2, 1, 2, 1, 2])

    def moments(features):
        first, second = (
            ops.class_moments(features[rows], labels[rows], 4) for rows in (slice(4), slice(4, 8))
        )
        return [moment[:3] for moment in first.merge(second)[1:]]

    assert torch.autograd.gradcheck(moments, features)
    parts = [
        ops.ClassMoments(torch.tensor(count), *torch.tensor(moment).repeat(2, 1, 1).requires_grad_().unbind())
        for count, moment in (([2, 0, 0], [[1.0], [torch.nan], [torch.nan]]),) * 2
    ]
    merged = parts[0].merge(parts[1])
    gradients = torch.autograd.grad((merged.mean + merged.var).nansum(), [*parts[0][1:], *parts[1][1:]])
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_moments_survive_a_large_mean(backend, device):
    features, labels, num_classes = make((333, 4, 3), torch.float32, device=device)
    _, _, var = ops.class_moments(features + 1e4, labels, num_classes, backend=backend)
    truth = plain_moments((features + 1e4).double(), labels, num_classes)[2]
    torch.testing.assert_close(var.double(), truth, rtol=1e-4, atol=0)


def test_moments_of_half_precision_survive_a_large_mean(backend, device):
    features, labels, num_classes = make((333, 4, 3), device=device)
    features = (features + 1e3).half()
    _, _, var = ops.class_moments(features, labels, num_classes, backend=backend)
    truth = plain_moments(features.double(), labels, num_classes)[2]
    torch.testing.assert_close(var.double(), truth, rtol=4e-6, atol=0)


def check_moments_in_range(x, backend, device, labels=None, num_classes=1, rtol=1e-5):
    """Hold the moments of one column against those of the same numbers times a power of two.

    A mean may be rounded to float64, and the variance be off by the square of that.
    """
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    # Many rows of many columns are several chunks of every kernel.
    rows = x[:, None].repeat(1, 64 if len(x) > 100 else 1).to(device)
    _, mean, var = ops.class_moments(rows, labels.to(device), num_classes, backend=backend)
    scale = 2.0**-600 if x.dtype == torch.float64 else 1.0
    for k in range(num_classes):
        own = x[labels == k].double() * scale
        true_mean = own[0] + (own - own[0]).mean()
        true_var = (own - true_mean).square().mean() / scale / scale
        rounding = (4 * 2.0**-53 * true_mean / scale).square().nan_to_num(posinf=0).item()
        for actual, true, atol in ((mean[k], true_mean / scale, 0), (var[k], true_var, rounding)):
            assert actual.dtype == torch.promote_types(x.dtype, torch.float32)
            expected = true.to(actual.dtype).expand_as(actual)
            torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("number", [1, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_moments_out_of_range_on_the_way(dtype, number, backend, device):
    power, largest = (135, torch.finfo(dtype).max) if dtype == torch.float64 else (0, torch.finfo(dtype).max)
    unit = 10.0**power
    # Variances in range, whose sums of squares are not.
    check_moments_in_range(
        (torch.tensor([1e19, -1e19, 1.2e19, -1.1e19], dtype=torch.float64) * unit).to(dtype).repeat(number),
        backend,
        device,
    )
    # Equal numbers: their sum is out of range, or the square of what a mean of them is rounded by.
    for value in (2.786e26, 2.786e24, 1e38, largest, -largest, largest / 3, 0.1, 1e-38):
        x = torch.full((number + 2,), value, dtype=torch.float64).to(dtype)
        check_moments_in_range(x, backend, device, rtol=0 if dtype != torch.float64 else 1e-15)
        labels = torch.arange(2 * number + 4) % 2
        both = torch.stack((x, torch.zeros_like(x)), 1).flatten()
        check_moments_in_range(both, backend, device, labels, 2, rtol=0 if dtype != torch.float64 else 1e-15)
    # The largest numbers of both signs: the variance is out of range, the mean is not.
    x = torch.tensor([largest, -largest, largest], dtype=torch.float64).to(dtype).repeat(number)
    check_moments_in_range(x, backend, device)


@pytest.mark.parametrize("num_classes", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_moments_of_what_is_no_number(dtype, num_classes, backend, device):
    x = torch.randn(700, 8, generator=torch.Generator().manual_seed(3)).to(dtype)
    labels = torch.arange(700) % 3 % num_classes
    infinite = torch.inf
    for row, column, value in ((0, 0, torch.nan), (600, 1, infinite), (3, 2, -infinite), (9, 3, infinite)):
        x[row, column] = value
    x[12, 3], x[labels == 0, 4], x[0, 5] = -infinite, infinite, -0.0
    _, mean, var = ops.class_moments(x.to(device), labels.to(device), num_classes, backend=backend)
    own = x[labels == 0].double()
    for actual, true in ((mean[0], own.mean(0)), (var[0], own.var(0, correction=0))):
        true = torch.where(true.isfinite(), 0, true)
        actual = torch.where(actual.isfinite(), 0, actual).cpu().double()
        torch.testing.assert_close(actual, true, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_a_gradient_of_moments_in_range_is_so_on_the_way(dtype, backend, device):
    # A deviation of 1e20 times 2 dvar is 4e38 before it is divided by the number of samples.
    features = torch.tensor([[1e20], [-1e20], [1e20], [-1e20]], dtype=dtype, device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    count = torch.tensor([4], device=device)
    dmean, dvar, mean = (torch.full((1, 1), value, device=device) for value in (0.0, 2e18, 0.0))
    arguments = (dmean, dvar, features, labels, count, mean, backend)
    actual = torch.ops.mmfast.class_moments_bwd(*arguments)
    torch.testing.assert_close(actual.double(), features.double() * 1e18, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_centroids_near_the_end_of_range(dtype, backend, device):
    largest = torch.finfo(dtype).max
    shares = torch.tensor([1.0, 0.75, 0.5, -0.5, -1.0, 1e-300], dtype=torch.float64)
    centroids = (largest * shares)[:, None].to(dtype)
    x = (largest * torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.4, 0.1, -0.6, -0.8, -1.0, 0.0]).double()).to(
        dtype
    )
    nearest = [0, 0, 1, 1, 2, 2, 5, 3, 4, 4, 5]
    labels = torch.tensor(nearest, device=device)
    options = {"labels": labels, "centroids": centroids.to(device), "backend": backend}
    assert ops.dimension_accuracy(x[:, None].to(device), **options).item() == 1
    # None of them is any other's.
    others = (labels + 1) % 6
    options["labels"] = others
    assert ops.dimension_accuracy(x[:, None].to(device), **options).item() == 0


def test_merged_moments_stay_in_range():
    for largest in (torch.tensor([[3e38]]), torch.tensor([[1.7e308]], dtype=torch.float64)):
        count, zero = torch.tensor([1]), torch.zeros_like(largest)
        merged = ops.ClassMoments(count, largest, zero).merge(ops.ClassMoments(count, -largest, zero))
        assert merged.mean.item() == 0
        assert merged.var.item() == torch.inf
        # Means 2e19 apart: the square is out of range, a quarter of it is not.
        size = largest.sqrt() * 0.9
        merged = ops.ClassMoments(count, size, zero).merge(ops.ClassMoments(count, -size, zero))
        torch.testing.assert_close(merged.var, size * size, rtol=1e-6, atol=0)
        infinite = torch.full_like(largest, torch.inf)
        for mean in (infinite, -infinite):
            moments = ops.ClassMoments(count, mean, infinite * 0)
            assert moments.merge(moments).mean.item() == mean.item()
            assert moments.merge(ops.ClassMoments(count, zero, zero)).mean.item() == mean.item()
        assert moments.merge(ops.ClassMoments(count, infinite, zero)).mean.isnan().all()


def test_merged_moments_of_very_unequal_numbers():
    one, many = torch.tensor([1]), torch.tensor([2**40 + 1])
    mean, zero = torch.tensor([[1e12]]), torch.tensor([[0.0]])
    for first, second in ((one, many), (many, one)):
        means = (mean, zero) if first is one else (zero, mean)
        merged = ops.ClassMoments(first, means[0], zero).merge(ops.ClassMoments(second, means[1], zero))
        torch.testing.assert_close(merged.var, torch.tensor([[1e24 / 2**40]]), rtol=1e-6, atol=0)


def test_moments_are_saved_and_loaded():
    moments = ops.class_moments(*make((12, 3, 3))[:2], 3)
    file = io.BytesIO()
    torch.save({"moments": moments}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["moments"]
    assert type(loaded) is ops.ClassMoments
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(loaded, moments, strict=True))


def test_moments_gradient(backend, device):
    features, labels, num_classes = make((12, 3, 3), device=device)
    features[3:5] *= 2

    def moments(features):
        return ops.class_moments(features, labels, num_classes, backend=backend)[1:]

    assert torch.autograd.gradcheck(moments, features.requires_grad_())


def test_gradients_of_moments_may_begin_anywhere(backend, device):
    features = torch.randn(40, 8, device=device, requires_grad=True)
    labels = torch.arange(40, device=device) % 3
    moments = ops.class_moments(features, labels, 3, backend=backend)
    gradients = torch.randn(1 + 2 * 24, device=device)
    views = [gradients[1 + 24 * i : 25 + 24 * i].view(3, 8) for i in range(2)]
    results = [
        torch.autograd.grad((moments.mean, moments.var), features, grads, retain_graph=True)[0]
        for grads in (views, [view.clone() for view in views])
    ]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def test_accuracy_is_the_nearest_quotient(dtype, backend, device):
    """On a GPU, too, which takes a number to divide by for a factor."""
    num_samples = 15
    # In dimension d the first d samples lie at their class's centroid, the others at the other one's.
    is_right = torch.arange(num_samples)[:, None] < torch.arange(num_samples + 1)
    features = torch.where(is_right, 1.0, 0.0).to(device, dtype)
    labels = torch.ones(num_samples, dtype=torch.int64, device=device)
    centroids = torch.tensor([[0.0], [1.0]]).expand(2, num_samples + 1).to(device, dtype)
    accuracy = ops.dimension_accuracy(features, labels, centroids, backend=backend)
    expected = [hits / num_samples for hits in range(num_samples + 1)]
    assert accuracy.tolist() == torch.tensor(expected, dtype=dtype).tolist()


@pytest.mark.parametrize("centroid_dtype", DTYPES, ids=lambda dtype: "centroids-" + str(dtype)[6:])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_equals_brute_force(shape, dtype, centroid_dtype, backend, device):
    features, labels, num_classes = make(shape, dtype, device=device)
    # Half the centroids are samples themselves: equal and midway distances come up in half precision.
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(num_classes, shape[1], generator=generator).to(device, centroid_dtype)
    rows = torch.arange(0, num_classes, 2, device=device)
    centroids[rows] = features[rows % len(features)].to(centroid_dtype)
    actual = ops.dimension_accuracy(features, labels, centroids, backend=backend)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(actual.double(), brute_force(features, labels, centroids), rtol=1e-6, atol=0)


@LAWS
@given(
    samples=st.lists(st.integers(-6, 6), min_size=1, max_size=20),
    centroids=st.lists(st.none() | st.integers(-6, 6), min_size=1, max_size=6),
    scale=st.sampled_from([1.0, 0.25, 1e-3, 3e5]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_ties_go_to_the_lowest_class(backend, device, samples, centroids, scale, dtype, data):
    """Small whole numbers tie often; None is a class without samples."""
    assume(_backend.supports(backend, "class_separability", dtype))
    if all(c is None for c in centroids):
        centroids[0] = 0
    labels = data.draw(
        st.lists(st.integers(0, len(centroids) - 1), min_size=len(samples), max_size=len(samples))
    )
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    x = (scale * torch.tensor(samples, dtype=torch.float64)).to(dtype)
    c = (scale * torch.tensor([torch.nan if c is None else c for c in centroids])).to(dtype)
    inputs = (x[:, None], torch.tensor(labels), c[:, None])
    actual = ops.dimension_accuracy(*(tensor.to(device) for tensor in inputs), backend=backend)
    exact = [(k, Fraction(float(value))) for k, value in enumerate(c) if not value.isnan()]
    hits = 0
    for value, label in zip(x, labels, strict=True):
        nearest = min(exact, key=lambda pair: (abs(Fraction(float(value)) - pair[1]), pair[0]))[0]
        hits += nearest == label
    assert round(float(actual) * len(samples)) == hits


@LAWS
@given(
    a=st.floats(-(2.0**99), 2.0**99, width=32),
    gap=st.integers(1, 9),
    nudge=st.integers(-2, 2),
    swap=st.booleans(),
)
def test_midpoints_that_round_are_decided_exactly(backend, device, a, gap, nudge, swap):
    """Floats next to each other have a midpoint between them, which rounds to either."""
    for dtype in (torch.float32, torch.float64):
        up = torch.tensor(torch.inf, dtype=dtype)
        low = torch.tensor(a, dtype=dtype)
        high = low
        for _ in range(gap):
            high = high.nextafter(up)
        x = ((low.double() + high.double()) / 2).to(dtype)
        for _ in range(abs(nudge)):
            x = x.nextafter(up if nudge > 0 else -up)
        centroids = [high, low] if swap else [low, high]
        distance = [abs(Fraction(float(x)) - Fraction(float(c))) for c in centroids]
        label = distance.index(min(distance))
        inputs = (x.view(1, 1), torch.tensor([label]), torch.stack(centroids)[:, None])
        accuracy = ops.dimension_accuracy(*(tensor.to(device) for tensor in inputs), backend=backend)
        assert accuracy.item() == 1


@LAWS
@given(
    base=st.floats(allow_nan=False, allow_infinity=False, width=32),
    steps=st.lists(st.integers(-3, 3), min_size=1, max_size=7),
    sample_steps=st.lists(st.integers(-3, 3), min_size=1, max_size=9),
    dtype=st.sampled_from(DTYPES[:2]),
    data=st.data(),
)
def test_near_tied_centroids(backend, device, base, steps, sample_steps, dtype, data):
    """Centroids equal or a few floats apart, and samples among them."""

    def neighbours(counts):
        values = torch.full((len(counts),), base, dtype=dtype)
        for step in range(3):
            up = [torch.inf if count > 0 else -torch.inf for count in counts]
            moved = values.nextafter(torch.tensor(up, dtype=dtype))
            is_moving = torch.tensor([abs(count) > step for count in counts]) & moved.isfinite()
            values = torch.where(is_moving, moved, values)
        return values

    centroids, samples = neighbours(steps), neighbours(sample_steps)
    label = st.integers(0, len(steps) - 1)
    labels = data.draw(st.lists(label, min_size=len(samples), max_size=len(samples)))
    exact = [Fraction(float(c)) for c in centroids]
    hits = 0
    for x, k in zip(samples, labels, strict=True):
        distance = [abs(Fraction(float(x)) - c) for c in exact]
        hits += distance.index(min(distance)) == k
    inputs = (samples[:, None], torch.tensor(labels), centroids[:, None])
    found = ops.dimension_accuracy(*(tensor.to(device) for tensor in inputs), backend=backend)
    assert round(float(found) * len(samples)) == hits


def test_far_apart_centroids_are_decided_exactly(backend, device):
    # 1 + 2^-60 is no float64: x = 1/2 lies nearer to 2^-60 only in exact arithmetic.
    x, centroids = torch.tensor([[0.5]], device=device), torch.tensor([[1.0], [2.0**-60]], device=device)
    accuracy = ops.dimension_accuracy(x, torch.tensor([1], device=device), centroids, backend=backend)
    assert accuracy.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_triton_intervals_are_those_of_the_reference(dtype):
    if reason := _backend.why_not("triton"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    # Equal centroids, neighbouring floats, zeros of both signs, classes without samples, tiles not full.
    c = torch.randint(-3, 4, (19, 70), generator=generator).to(dtype)
    c += torch.randint(-2, 3, c.shape, generator=generator) * torch.finfo(dtype).eps * (c != 0)
    c[torch.rand(c.shape, generator=generator) < 0.2] = torch.nan
    c[0, :9], c[1, 5:12], c[2, 7:] = torch.inf, -torch.inf, -0.0
    device = "cpu" if _backend.interpreting() else "cuda"
    kernels = _backend.kernels("class_separability")
    for end_dtype in (torch.float32, torch.float64):
        actual = kernels.class_intervals(c.to(device), end_dtype)
        assert all(
            map(torch.equal, actual, [end.to(device) for end in reference.class_intervals(c, end_dtype)])
        )


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("most_blocks", [1, 3, 1024], ids="blocks={}".format)
@pytest.mark.parametrize(
    ("num_samples", "num_classes"), [(1, 1), (128, 1), (129, 2), (700, 16), (1500, 17), (900, 250)], ids=str
)
def test_triton_orders_as_a_stable_sort(num_samples, num_classes, most_blocks, label_dtype, monkeypatch):
    if _backend.why_not("triton") is not None:
        pytest.skip("triton cannot run here")
    common = importlib.import_module("mmfast.kernels._class_order")
    monkeypatch.setattr(common, "_MOST_OWN_TILES", 1)
    monkeypatch.setattr(common, "_MOST_BLOCKS", most_blocks)
    # Several steps of the scan, too.
    monkeypatch.setattr(common, "_SCAN_BLOCKS", {"BLOCK_B": 4, "BLOCK_C": 16})
    device = "cpu" if _backend.interpreting() else "cuda"
    generator = torch.Generator().manual_seed(0)
    # Some name no class: beyond the last one, and below 0 where the type has such numbers.
    low = 0 if label_dtype == torch.uint8 else -2
    labels = torch.randint(low, num_classes + 3, (2 * num_samples,), generator=generator)
    labels = labels.to(device, label_dtype)[::2]
    found = common._by_class(labels, num_classes, 8)
    again = common._by_class(labels, num_classes, 8)
    known = ((labels >= 0) & (labels < num_classes)).nonzero().squeeze(1)
    expected = known[labels[known].long().sort(stable=True).indices]
    count = labels[known].long().bincount(minlength=num_classes)
    assert torch.equal(found.order[: len(known)], expected)
    assert torch.equal(again.order[: len(known)], expected)
    assert torch.equal(found.count, count)
    for edges, sizes in zip(found.edges, (count, (count + 7) // 8), strict=True):
        assert edges[0] == 0
        assert torch.equal(edges[1:], sizes.cumsum(0))


def test_a_table_of_many_classes_stays_small():
    share = pytest.importorskip("mmfast.kernels._class_order")._share
    for num_samples in (1, 512, 513, 20_000, 10**7, 2**31):
        for num_classes in (1, 10, 1000, 10**6, 10**8):
            num_blocks, tiles = share(num_samples, num_classes)
            assert num_blocks * tiles * 128 >= num_samples > (num_blocks - 1) * tiles * 128
            assert num_blocks == 1 or num_blocks * num_classes <= max(2**22, 4 * num_samples)


# Of the Triton kernels a block takes 64 samples of one class, 32 of all classes, 64 dimensions.
@pytest.mark.parametrize("sizes", [(63, 64), (65, 0, 128), (129, 1, 2)], ids=str)
@pytest.mark.parametrize("num_dims", [64, 65], ids="D={}".format)
def test_classes_around_a_block(num_dims, sizes, backend, device):
    labels = torch.repeat_interleave(torch.tensor(sizes, device=device))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    features = make((len(labels), num_dims, 1), torch.float32, device=device)[0]
    check_moments(features, labels, len(sizes), backend)
    check_gradient(features, labels, len(sizes), backend)
    centroids = reference.class_moments(features, labels, len(sizes))[1]
    hits = torch.ops.mmfast.dimension_hits(features, labels, centroids, backend)
    assert torch.equal(hits, reference.dimension_hits(features, labels, centroids))


def test_not_finite(backend, device):
    features = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]], device=device)
    centroids = torch.tensor([[0.0], [torch.inf], [torch.nan]], device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    assert ops.dimension_accuracy(features, labels, centroids, backend=backend).item() == 0.25
    assert ops.dimension_accuracy(features, labels + 1, centroids, backend=backend).item() == 0


def test_chunks_of_samples_give_the_whole(monkeypatch, backend, device):
    features, labels, num_classes = make((333, 8, 5), device=device)
    moments = ops.class_moments(features, labels, num_classes, backend=backend)
    accuracy = ops.dimension_accuracy(features, labels, moments.mean, backend=backend)
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 100)
    again = ops.class_moments(features, labels, num_classes, backend=backend)
    torch.testing.assert_close(tuple(again), tuple(moments))
    again = ops.dimension_accuracy(features, labels, moments.mean, backend=backend)
    assert torch.equal(again, accuracy)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_effective_dimensions(dtype, backend, device):
    features, labels, num_classes = make((400, 12, 4), dtype, device=device)
    features[:, :6] = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    features[:, 6:] += 2 * labels[:, None].to(dtype)
    effective = ops.effective_dimensions(features, labels, num_classes, backend=backend)
    assert effective.tolist() == [False] * 6 + [True] * 6
    mean = reference.class_moments(features, labels, num_classes)[1]
    accuracy = brute_force(features, labels, mean)
    assert torch.equal(effective, accuracy > accuracy.mean())


def test_equal_dimensions_are_not_above_their_mean(backend, device):
    # 1/3 of the samples are right in each of 7 dimensions, a mean that float32 rounds.
    features = torch.zeros(3, 7, device=device)
    effective = ops.effective_dimensions(features, torch.tensor([0, 1, 2], device=device), 3, backend=backend)
    assert not effective.any()


@pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8], ids=lambda d: str(d)[6:])
def test_layouts_and_label_dtypes(label_dtype, backend, device):
    features, labels, num_classes = make((64, 9, 5), label_dtype=label_dtype, device=device)
    strided = features.T.contiguous().T
    spread = torch.stack([labels, labels], 1)[:, 0]
    expected = ops.class_moments(features, labels.long(), num_classes, backend=backend)
    actual = ops.class_moments(strided, spread, num_classes, backend=backend)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    centroids = expected.mean.T.contiguous().T
    accuracy = ops.dimension_accuracy(strided, spread, centroids, backend=backend)
    assert torch.equal(accuracy, ops.dimension_accuracy(features, labels, expected.mean, backend=backend))


def test_autocast(backend, device):
    features, labels, num_classes = make((64, 9, 5), torch.float32, device=device)
    expected = ops.class_moments(features, labels, num_classes, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = ops.class_moments(features, labels, num_classes, backend=backend)
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


def test_compiles(backend, device):
    features, labels, num_classes = make((64, 9, 5), device=device)

    def everything(features):
        moments = ops.class_moments(2 * features, labels, num_classes, backend=backend)
        accuracy = ops.dimension_accuracy(features, labels, moments.mean, backend=backend)
        effective = ops.effective_dimensions(features, labels, num_classes, backend=backend)
        return moments.mean.square().sum() + moments.var.sum(), accuracy, effective

    features.requires_grad_()
    expected = everything(features)
    actual = torch.compile(everything, fullgraph=True, backend="aot_eager")(features)
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(result[0], features) for result in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_empty_batch(backend, device):
    features, labels = torch.randn(0, 3, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    accuracy = ops.dimension_accuracy(features, labels, torch.randn(2, 3, device=device), backend=backend)
    assert bool(accuracy.isnan().all())
    with pytest.raises(ValueError, match=r"features must hold at least one sample, got \[0, 3\]"):
        ops.effective_dimensions(features, labels, 2, backend=backend)


def test_bad_input():
    features, labels, num_classes = make((6, 3, 2))
    with pytest.raises(ValueError, match=r"features must have shape \[N, D\], got \[3\]"):
        ops.class_moments(features[0], labels, num_classes)
    with pytest.raises(ValueError, match=r"labels must have shape \[N\] = \[6\], got \[5\]"):
        ops.class_moments(features, labels[:5], num_classes)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, C\) = \[0, 2\), got values from 2"):
        ops.effective_dimensions(features, labels * 0 + 2, num_classes)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        ops.class_moments(features, labels, 0)
    with pytest.raises(TypeError, match=r"num_classes must be an integer, got 2\.0"):
        ops.class_moments(features, labels, 2.0)
    with pytest.raises(ValueError, match=r"centroids must have shape \[C, D\] = \[C, 3\], got \[2, 4\]"):
        ops.dimension_accuracy(features, labels, torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"centroids must hold a class with samples, got none finite"):
        ops.dimension_accuracy(features, labels, torch.full((2, 3), torch.nan))
    moments = ops.class_moments(features, labels, num_classes)
    with pytest.raises(
        ValueError, match=r"other must have moments of shape \[C, D\] = \[2, 3\], got \[4, 3\]"
    ):
        moments.merge(ops.class_moments(features, labels, 4))


@pytest.mark.parametrize("scale", [1.0, 1e297])
def test_an_outlier_near_the_end_of_range_leaves_the_digits_of_the_mean(scale, backend, device):
    generator = torch.Generator().manual_seed(0)
    features = 1e-5 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    features[0] = -5.962577177
    features *= scale
    labels = torch.zeros(1000, dtype=torch.int64, device=device)
    mean = ops.class_moments(features.to(device), labels, 1, backend=backend).mean[0].cpu()
    truth = features.numpy().astype(np.longdouble).mean(0)
    # 4,000 to 12,000 units where the sum of deviations from the outlier is not corrected.
    assert np.abs((mean.numpy() - truth) / truth).max() < 250 * 2.0**-53


def test_a_million_samples_far_from_zero_keep_their_moments(backend, device):
    # Triton's interpreter takes minutes for a million; sums that lose digits do so with these, too.
    num_samples = 50_000 if backend == "triton" and device.type == "cpu" else 1_000_000
    features = 1000 + torch.randn(num_samples, 1, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.zeros(num_samples, dtype=torch.int64, device=device)
    moments = ops.class_moments(features, labels, 1, backend=backend)
    truth = features.double()
    assert abs(moments.mean.item() - truth.mean().item()) < 1e-4
    assert abs(moments.var.item() - truth.var(unbiased=False).item()) < 1e-5

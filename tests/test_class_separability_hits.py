"""Accuracy per dimension and effective dimensions: brute force, ties, exact midpoints."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mmfast import backend as _backend
from mmfast import ops
from mmfast.reference import class_separability as reference
from support.cases import DTYPES, dtype_name
from support.class_separability import LAWS, SHAPES, make

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def brute_force(features, labels, centroids):
    """Return the accuracy from all N C D distances, in float64."""
    distance = (features.double()[:, None] - centroids.double()).abs()
    nearest = distance.nan_to_num(nan=torch.inf).argmin(1)
    return (nearest == labels[:, None]).double().mean(0)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
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


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
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


# Every shape with features and centroids of one dtype, one shape with all pairs of dtypes.
ACCURACIES = [(shape, dtype, dtype) for shape in SHAPES for dtype in DTYPES]
ACCURACIES += [(SHAPES[1], *pair) for pair in itertools.permutations(DTYPES, 2)]


@pytest.mark.parametrize(("shape", "dtype", "centroid_dtype"), ACCURACIES, ids=str)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
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


def test_not_finite(backend, device):
    features = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]], device=device)
    centroids = torch.tensor([[0.0], [torch.inf], [torch.nan]], device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    assert ops.dimension_accuracy(features, labels, centroids, backend=backend).item() == 0.25
    assert ops.dimension_accuracy(features, labels + 1, centroids, backend=backend).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
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

"""K-means and cluster purity: against scikit-learn, restarts, empty clusters, determinism, bad input."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import ops
from mmfast.reference import kmeans as reference
from support.cases import DTYPES, dtype_name, is_interpreted, laws

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAWS = laws(25)


def make(num_samples, num_dims, num_clusters, dtype=torch.float32, spread=1.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(num_clusters, num_dims, generator=generator)
    labels = torch.randint(num_clusters, (num_samples,), generator=generator)
    noise = spread * torch.randn(num_samples, num_dims, generator=generator)
    return (centres[labels] + noise).to(device, dtype), labels.to(device)


def inertia_of(features, result):
    return (features.double() - result.centroids.double()[result.assignments]).square().sum()


def check_lloyd(features, num_clusters, backend, max_iter=7):
    """Assignments may differ where two centroids are as near as rounding lets tell."""
    start = features[:num_clusters].clone()
    actual = torch.ops.mmfast.kmeans_lloyd(features, start, max_iter, 0.0, backend)
    centroids, assignments, inertia, num_iter = reference.lloyd(
        features.double(), start.double(), max_iter, 0.0
    )
    wide = torch.promote_types(features.dtype, torch.float32)
    rtol = 1e-11 if wide == torch.float64 else 1e-4
    assert actual[0].dtype == actual[2].dtype == wide
    torch.testing.assert_close(actual[2].double(), inertia, rtol=rtol, atol=1e-9)
    torch.testing.assert_close(actual[0].double(), centroids, rtol=rtol, atol=100 * rtol)
    assert (actual[1] == assignments).double().mean() > 0.99
    assert actual[3] == num_iter or wide != torch.float64


def check_all(backend):
    """Every dtype, layout, number of threads, and counts around a tile's, for one instruction set."""
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        for dtype in DTYPES:
            for num_samples, num_dims, num_clusters in ((1, 1, 1), (49, 3, 9), (1100, 17, 10), (640, 150, 4)):
                features, _ = make(num_samples, num_dims, max(1, num_clusters - 1), dtype, spread=0.5)
                wider = torch.cat([features, features, features.new_zeros(num_samples, 1)], 1)
                for x in (features, features.T.contiguous().T, wider[:, num_dims:-1]):
                    check_lloyd(x, num_clusters, backend)
                    check_lloyd(torch.cat([x[:1], x]), min(num_clusters + 1, num_samples), backend, 1)


@pytest.mark.usefixtures("restored_threads", "cpu_module")
@pytest.mark.parametrize("shape", [(5001, 20, 13), (30_000, 3, 2), (700, 300, 40)], ids=str)
def test_number_of_threads_changes_no_bit(shape):
    features, _ = make(*shape, spread=3.0)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        start = features[: shape[2]].clone()
        results.append(torch.ops.mmfast.kmeans_lloyd(features, start, 9, 0.0, "cpu"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# To the end with every shape, cut off with one. Triton's tiles have 16 dimensions in float64, 32 in float32.
@pytest.mark.parametrize(
    ("shape", "max_iter"),
    [((50, 1, 3), 300), ((500, 16, 8), 300), ((20, 5, 20), 300)]
    + [((333, 37, 20), max_iter) for max_iter in (1, 5, 300)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_name)
def test_same_as_scikit_learn_from_the_same_start(shape, dtype, max_iter, backend, device):
    cluster = pytest.importorskip("sklearn.cluster")
    features, _ = make(*shape, dtype, spread=2.0, device=device)
    start = features[torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))[: shape[2]]].clone()
    actual = ops.kmeans(features, shape[2], init=start, max_iter=max_iter, backend=backend)
    theirs = cluster.KMeans(
        shape[2], init=start.cpu().numpy(), n_init=1, max_iter=max_iter, algorithm="lloyd"
    )
    theirs.fit(features.cpu().numpy())
    np.testing.assert_allclose(actual.inertia.item(), theirs.inertia_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual.centroids.cpu().numpy(), theirs.cluster_centers_, rtol=1e-3, atol=1e-4)
    assert actual.num_iter == theirs.n_iter_
    assert np.array_equal(actual.assignments.cpu().numpy(), theirs.labels_)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_finds_separate_clusters(dtype, backend, device):
    features, labels = make(400, 8, 5, dtype, spread=0.1, device=device)
    result = ops.kmeans(features, 5, num_init=3, backend=backend)
    assert result.centroids.dtype == torch.promote_types(dtype, torch.float32)
    assert result.assignments.dtype == torch.int64
    assert result.inertia.shape == ()
    assert type(result.num_iter) is int
    assert ops.cluster_purity(result.assignments, labels) == 1
    torch.testing.assert_close(result.inertia.double(), inertia_of(features, result), rtol=1e-5, atol=0)


@LAWS
@given(
    num_samples=st.integers(1, 40),
    num_dims=st.integers(1, 5),
    fraction=st.floats(0, 1),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 999),
)
def test_laws(num_samples, num_dims, fraction, levels, seed):
    """Few levels make samples coincide, up to fewer different samples than clusters."""
    num_clusters = 1 + int(fraction * (num_samples - 1))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(levels, (num_samples, num_dims), generator=generator).double()
    result = ops.kmeans(features, num_clusters, seed=seed)
    assert bool(result.centroids.isfinite().all())
    assert result.num_iter <= 300
    torch.testing.assert_close(result.inertia, inertia_of(features, result))
    distance = torch.cdist(features, result.centroids)
    chosen = distance.gather(1, result.assignments[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.amin(1))
    assert result.inertia <= (features - features.mean(0)).square().sum() + 1e-9
    if len(features.unique(dim=0)) >= num_clusters:
        assert len(result.assignments.unique()) == num_clusters


def test_empty_clusters_take_the_farthest_samples(backend, device):
    features = torch.tensor([[0.0], [0.1], [10.0], [10.1], [50.0]], device=device)
    start = torch.tensor([[5.0], [1000.0], [2000.0]], device=device)
    result = ops.kmeans(features, 3, init=start, backend=backend)
    assert sorted(result.centroids.flatten().tolist()) == pytest.approx([0.05, 10.05, 50], rel=1e-4)


def tight_clusters(device):
    """Return 20 clusters of 10 samples on a grid, of which seeds can easily miss one."""
    labels = torch.arange(20, device=device).repeat_interleave(10)
    centres = torch.stack([labels % 5, labels // 5], 1)
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).to(device)
    return centres + 0.05 * noise, labels


def test_restarts_keep_the_lowest_inertia(backend, device):
    if is_interpreted(backend):
        pytest.skip("restarts are no backend's own, and take the interpreter a second each")
    features, _ = make(300, 2, 12, spread=0.5, device=device)
    kmeans = functools.partial(ops.kmeans, features, 12, backend=backend)
    one = torch.stack([kmeans(seed=seed).inertia for seed in range(8)])
    many = torch.stack([kmeans(seed=seed, num_init=8).inertia for seed in range(8)])
    # The first of the eight starts is the one there is alone.
    assert bool((many <= one).all())
    assert one.max() > 1.1 * one.min()
    assert many.max() < 1.01 * one.min()


def test_seeds_spread_as_greedy_k_means_plus_plus_does(backend, device):
    # All 200 seeds find every cluster by the best of 2 + floor(ln 20) = 4 points each time. The best of two
    # would 193 times, single points 124 times, by plain distance 164 times, uniform draws 6 times.
    if is_interpreted(backend):
        pytest.skip("seeds are no backend's own, and take the interpreter half a second each")
    features, labels = tight_clusters(device)
    num_seeds = 200
    found = sum(
        ops.cluster_purity(
            ops.kmeans(features, 20, max_iter=1, seed=seed, backend=backend).assignments, labels
        )
        == 1
        for seed in range(num_seeds)
    )
    assert found >= 0.99 * num_seeds


def test_a_seed_decides(backend, device):
    features, _ = make(300, 6, 12, spread=2.0, device=device)
    torch.manual_seed(0)
    first = ops.kmeans(features, 12, seed=3, max_iter=2, backend=backend)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = ops.kmeans(features, 12, seed=3, max_iter=2, backend=backend)
    assert torch.equal(first.centroids, again.centroids)
    assert torch.equal(first.assignments, again.assignments)
    other = ops.kmeans(features, 12, seed=4, max_iter=2, backend=backend)
    assert not torch.equal(first.assignments, other.assignments)
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


def test_far_from_the_origin(backend, device):
    features, labels = make(400, 4, 5, spread=0.1, device=device)
    result = ops.kmeans(features + 1000, 5, num_init=3, backend=backend)
    assert ops.cluster_purity(result.assignments, labels) == 1


def test_products_are_taken_of_centred_features(backend, device):
    # |x|^2 is 2e8 here, of which float32 keeps steps of 16; squared distances between clusters are about 1.
    features, labels = tight_clusters(device)
    start = features[::10] + 1e4
    result = ops.kmeans(features + 1e4, 20, init=start, backend=backend)
    assert ops.cluster_purity(result.assignments, labels) == 1


@pytest.mark.parametrize("init", ["k-means++", "given"])
@pytest.mark.parametrize("exponent", [-115, -70, -41, 41, 63, 120])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_name)
def test_features_whose_squares_float32_does_not_hold(dtype, exponent, init, backend, device):
    """A power of two changes nothing but the units."""
    if is_interpreted(backend) and (dtype == torch.float64 or exponent in (-41, 41)):
        # Units are chosen before any backend runs: the ends are enough, and float64 holds these squares.
        pytest.skip("two runs of Lloyd's iterations, each a second and more")
    features, _ = make(60, 3, 4, dtype, spread=0.5, device=device)
    factor = 2.0**exponent
    options = {"num_init": 2, "backend": backend}
    start = features[:4].clone()
    large, small = (
        {"init": x} if init == "given" else {} for x in ((start.double() * factor).to(dtype), start)
    )
    scaled = ops.kmeans((features.double() * factor).to(dtype), 4, **large, **options)
    expected = ops.kmeans(features, 4, **small, **options)
    assert torch.equal(scaled.assignments, expected.assignments)
    wide = expected.centroids.double() * factor
    torch.testing.assert_close(scaled.centroids.double(), wide, rtol=1e-5, atol=1e-5 * factor)
    inertia = (expected.inertia.double() * factor**2).to(expected.inertia.dtype)
    torch.testing.assert_close(scaled.inertia, inertia, rtol=1e-5, atol=0)


def test_chunks_of_samples_give_the_whole(monkeypatch):
    features, _ = make(333, 5, 7, torch.float64, spread=2.0)
    expected = ops.kmeans(features, 7, backend="reference")
    monkeypatch.setattr("mmfast.reference._common._CHUNK_NUMEL_CPU", 100)
    actual = ops.kmeans(features, 7, backend="reference")
    torch.testing.assert_close(tuple(actual), tuple(expected))


def test_layouts_autocast_and_gradients(backend, device):
    features, _ = make(100, 5, 4, device=device)
    expected = ops.kmeans(features, 4, backend=backend)
    strided = features.T.contiguous().T.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = ops.kmeans(strided, 4, backend=backend)
    torch.testing.assert_close(tuple(actual), tuple(expected))
    assert not actual.centroids.requires_grad


def test_purity_by_hand(backend, device):
    # Cluster 0 holds classes 2, 2, 0; cluster 3 holds 1; clusters 1 and 2 hold nothing.
    assignments, labels = torch.tensor([0, 0, 0, 3], device=device), torch.tensor([2, 2, 0, 1], device=device)
    purity = ops.cluster_purity(assignments, labels.int(), backend=backend)
    assert type(purity) is float
    assert purity == 0.75


@LAWS
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_purity_by_the_contingency_matrix(backend, device, pairs):
    metrics = pytest.importorskip("sklearn.metrics.cluster")
    assignments, labels = torch.tensor(pairs, device=device).unbind(1)
    table = metrics.contingency_matrix(labels.cpu().numpy(), assignments.cpu().numpy())
    purity = ops.cluster_purity(assignments, labels, backend=backend)
    assert math.isclose(purity, table.max(0).sum() / len(pairs))


@LAWS
@given(
    num_samples=st.integers(2, 60),
    num_dims=st.integers(1, 6),
    fraction=st.floats(0, 1),
    max_iter=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 999),
)
def test_inertia_of_scikit_learn(backend, device, num_samples, num_dims, fraction, max_iter, dtype, seed):
    cluster = pytest.importorskip("sklearn.cluster")
    if is_interpreted(backend):
        max_iter = min(max_iter, 3)
    num_clusters = 1 + int(fraction * (num_samples - 1))
    features, _ = make(num_samples, num_dims, 3, dtype, spread=2.0, seed=seed, device=device)
    start = features[:num_clusters].clone()
    options = {"init": start.cpu().numpy(), "n_init": 1, "max_iter": max_iter, "tol": 0, "algorithm": "lloyd"}
    theirs = cluster.KMeans(num_clusters, **options).fit(features.cpu().numpy())
    mine = ops.kmeans(features, num_clusters, init=start, max_iter=max_iter, tol=0, backend=backend)
    np.testing.assert_allclose(mine.inertia.item(), theirs.inertia_, rtol=1e-5, atol=1e-6)


def test_purity_of_numbers_far_apart(backend, device):
    # A table of all numbers up to the largest would have 10^24 entries.
    assignments = torch.tensor([7, 7, 7, 10**12, 10**12, 2**62], device=device)
    labels = torch.tensor([10**12, 3, 10**12, 3, 2**62, 2**62], device=device)
    assert ops.cluster_purity(assignments, labels, backend=backend) == 4 / 6


BAD = {
    "K above N": (lambda x: (x, 11), {}, "num_clusters must lie in [1, N] = [1, 10], got 11"),
    "K of 0": (lambda x: (x, 0), {}, "num_clusters must lie in [1, N] = [1, 10], got 0"),
    "no samples": (lambda x: (x[:0], 1), {}, "got 1 for features [0, 3]"),
    "rank": (lambda x: (x[0], 1), {}, "features must have shape [N, D], got [3]"),
    "not finite": (lambda x: (x / 0, 2), {}, "features must be finite, got 30 NaN or infinite values"),
    "init": (lambda x: (x, 2), {"init": "random"}, "init must be one of 'k-means++', got 'random'"),
    "init shape": (lambda x: (x, 2), {"init": torch.zeros(3, 3)}, "init must have shape [K, D] = [2, 3]"),
    "init value": (lambda x: (x, 1), {"init": torch.full((1, 3), torch.nan)}, "init must be finite, got 3"),
    "restarts": (lambda x: (x, 2), {"num_init": 0}, "num_init must be at least 1, got 0"),
    "iterations": (lambda x: (x, 2), {"max_iter": 0}, "max_iter must be at least 1, got 0"),
    "tolerance": (lambda x: (x, 2), {"tol": -1}, "tol must be finite and not negative, got -1"),
    "seed": (lambda x: (x, 2), {"seed": 2**64}, "seed must lie in [-2^63, 2^64), got 18446744073709551616"),
}


@pytest.mark.parametrize("value", [2.0, True, "2", None], ids=repr)
@pytest.mark.parametrize("name", ["num_clusters", "num_init", "max_iter", "tol", "seed"])
def test_options_of_another_type(name, value):
    if name == "tol" and value == 2.0 and value is not True:
        value = 2j
    kind = "a number" if name == "tol" else "an integer"
    with pytest.raises(TypeError, match=re.escape(f"{name} must be {kind}, got {value!r}")):
        ops.kmeans(torch.rand(5, 2), **{"num_clusters": 2, name: value})


def test_options_may_be_numbers_of_numpy():
    options = {"num_clusters": np.int64(2), "num_init": np.int32(2), "max_iter": np.int64(5)}
    assert ops.kmeans(torch.rand(5, 2), **options, tol=np.float32(0), seed=np.int64(1)).num_iter <= 5


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, options, message = BAD[case]
    features, _ = make(10, 3, 2)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ops.kmeans(*change(features), **options)
    assert message in str(error.value)


def test_bad_purity():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"labels must have shape \[N\] = \[2\], got \[1\]"):
        ops.cluster_purity(labels, labels[:1])
    with pytest.raises(ValueError, match="labels must hold at least one sample"):
        ops.cluster_purity(labels[:0], labels[:0])
    with pytest.raises(ValueError, match="assignments must not be negative, got -1"):
        ops.cluster_purity(labels - 1, labels)
    with pytest.raises(TypeError, match="assignments must have an integer dtype, got float32"):
        ops.cluster_purity(labels.float(), labels)

"""Cases of kmeans, by what holds for every clustering, and of cluster_purity."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from fuzzing.draw import Draw
from fuzzing.judge import gamma, unit, wide
from fuzzing.tensors import INTEGERS, assert_unchanged, exact, float_dtype, float_dtypes, floats, laid_out
from mmfast import ops

_KINDS = ("normal", "ties", "offset", "equal", "tiny", "huge", "wide")


def kmeans(draw: Draw, backend: str, small: bool) -> None:
    """One call of kmeans.

    Distances are compared as |c|^2 / 2 - x c about the features' mean: with R the largest distance from it,
    D terms err by 4 (D + 8) u R^2. Subtracting the mean, and giving it back to the centroids, moves a
    coordinate by e = 4 u (|x| + |c|), and a squared distance r^2 by 2 r e sqrt(D) + D e^2.
    """
    dtype = float_dtype(draw, backend)
    shape = (draw.size(33 if small else 200, zero=0), draw.size(9 if small else 33))
    num_clusters = min(draw.choice((3, 1, 2, 5, 9, 17, 33)), shape[0])
    features = floats(draw, shape, dtype, _KINDS)
    options: dict = {
        "max_iter": draw.choice((4, 1, 2) if small else (20, 1, 2, 3)),
        "tol": draw.choice((1e-4, 0.0, 0.1)),
        "seed": draw.integer(0, 9),
    }
    init = None
    if draw.chance(0.4):
        init = floats(
            draw, (num_clusters, shape[1]), draw.choice((dtype, *float_dtypes(backend))), _KINDS[:4]
        )
        options["init"] = init.tensor
    else:
        options["num_init"] = draw.choice((1, 2))
    result = ops.kmeans(features.tensor, num_clusters, backend=backend, **options)
    acc = wide(dtype)
    u, info = unit(acc), torch.finfo(acc)
    assert (result.centroids.dtype, result.inertia.dtype) == (acc, acc)
    assert tuple(result.centroids.shape) == (num_clusters, shape[1])
    assert result.assignments.dtype == torch.int64
    assert tuple(result.assignments.shape) == shape[:1]
    assigned = result.assignments.numpy()
    assert assigned.min() >= 0, f"assignment {assigned.min()}"
    assert assigned.max() < num_clusters, f"assignment {assigned.max()} of {num_clusters} clusters"
    assert 1 <= result.num_iter <= options["max_iter"], f"num_iter {result.num_iter}"
    assert_unchanged(features=features, init=init)
    x, c = exact(features.tensor), exact(result.centroids)
    start = np.zeros(0) if init is None else exact(init.tensor)
    reach = max(np.abs(x).max(initial=0), np.abs(start).max(initial=0))
    if reach * reach * 16 * x.size > np.longdouble(info.max):
        return
    assert np.isfinite(c).all(), "a centroid is not finite"
    distance = ((x[:, None] - c) ** 2).sum(-1)
    mine = distance[np.arange(shape[0]), assigned]
    middle = x.mean(0)
    radius = np.sqrt(max(((x - middle) ** 2).sum(-1).max(), ((c - middle) ** 2).sum(-1).max()))
    moved = 4 * u * (np.abs(x).max(initial=0) + np.abs(c).max(initial=0))
    num_dims = shape[1]
    moving = 2 * radius * moved * np.sqrt(np.longdouble(num_dims)) + num_dims * moved**2
    slack = 4 * gamma(num_dims + 8, u) * radius**2 + 2 * moving + np.longdouble(info.tiny)
    worst = (mine - distance.min(1)).max()
    assert worst <= slack, (
        f"a sample is {float(worst):.3g} farther from its centroid, allowed {float(slack):.3g}"
    )
    inertia, bound = (
        exact(result.inertia),
        gamma(shape[0] * max(num_dims, 1) + 8, u) * mine.sum() + shape[0] * slack,
    )
    error = abs(float(inertia - mine.sum()))
    assert error <= bound, (
        f"inertia {float(inertia):.9g}, right is {float(mine.sum()):.9g}, bound {float(bound):.3g}"
    )
    if init is not None:
        before = ((x[:, None] - start) ** 2).sum(-1).min(1).sum()
        reach_slack = shape[0] * (slack + 4 * gamma(num_dims + 8, u) * reach**2 * max(num_dims, 1))
        assert mine.sum() <= before + reach_slack, "iterations made the clustering worse"
    # Where centroids lie closer than rounding tells, samples go to one or the other, or clusters run empty.
    gaps = ((c[:, None] - c) ** 2).sum(-1) + np.where(np.eye(num_clusters) > 0, np.inf, 0)
    is_clear = gaps.min() > 100 * slack and len(np.unique(assigned)) == num_clusters
    if result.num_iter < options["max_iter"] and options["tol"] == 0.0 and is_clear:
        for cluster in range(num_clusters):
            members = x[assigned == cluster]
            if len(members):
                off = np.abs(members.mean(0) - c[cluster]).max(initial=0)
                limit = gamma(len(members) + 4, u) * (radius + np.abs(x).max(initial=0)) + moved
                assert off <= limit, f"centroid {cluster} is {float(off):.3g} off its samples' mean"


def cluster_purity(draw: Draw, backend: str, small: bool) -> None:
    """One call of cluster_purity."""
    size = draw.size(129 if small else 300, zero=0)
    made, random = [], draw.generator()
    for _ in range(2):
        dtype = draw.choice(INTEGERS)
        most = draw.choice((3, 1, 7, 100, torch.iinfo(dtype).max))
        made.append(laid_out(draw, torch.from_numpy(random.integers(0, most, size, endpoint=True)).to(dtype)))
    clusters, classes = made
    purity = ops.cluster_purity(clusters.tensor, classes.tensor, backend=backend)
    pairs = Counter(zip(clusters.tensor.tolist(), classes.tensor.tolist(), strict=True))
    commonest: dict[int, int] = {}
    for (cluster, _), count in pairs.items():
        commonest[cluster] = max(commonest.get(cluster, 0), count)
    truth = sum(commonest.values()) / size
    assert isinstance(purity, float)
    assert purity == truth, f"purity {purity!r}, right is {truth!r}"
    assert_unchanged(assignments=clusters, labels=classes)

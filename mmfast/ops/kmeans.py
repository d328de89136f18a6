"""K-means clustering of features, and how pure its clusters are in class."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.errors import describe
from mmfast.ops._checks import (
    check_choice,
    check_float,
    check_integer,
    check_labels,
    check_same_device,
    check_shape,
    check_tensor,
    shape_text,
)
from mmfast.ops._launch import DTYPE_CODE, as_int64, outside_autocast, strided, with_contiguous_rows
from mmfast.ops._registration import define
from mmfast.reference import kmeans as _reference
from mmfast.reference._common import accumulation_dtype, row_chunks

# Entries of a table of clusters and classes, of 8 bytes each.
_MAX_TABLE_NUMEL = 2**22


class KMeans(NamedTuple):
    """A clustering: centroids, each sample's cluster, sum of squared distances, number of iterations."""

    centroids: Tensor  # [K, D]
    assignments: Tensor  # int64 [N]
    inertia: Tensor  # []
    num_iter: int


@torch.no_grad()
def kmeans(
    features: Tensor,  # [N, D]
    num_clusters: int,
    *,
    init: str | Tensor = "k-means++",  # or [K, D]
    num_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
    backend: str = "auto",
) -> KMeans:
    """Return the clustering of samples around K centroids by Lloyd's iterations, the best of several starts.

    Equivalent to:

        sklearn.cluster.KMeans(K, init=init, n_init=num_init, max_iter=max_iter, tol=tol, random_state=seed)

    up to the random draws. Reads the device once an iteration, to know when to stop.

    Args:
        features: [N, D] float32, float64, bfloat16 or float16, any strides, finite.
        num_clusters: K, from 1 to N.
        init: "k-means++" (each seed the best of 2 + floor(ln K) points drawn by squared distance to the seeds
            before it), or centroids [K, D] to start from.
        num_init: starts, of which the one with the lowest inertia is returned; given centroids are started
            from once.
        max_iter: most iterations of a start.
        tol: a start ends when the centroids' summed squared movement falls to `tol` times the mean variance
            of a dimension, or when no assignment changes.
        seed: of the draws, which are the same on every device.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        KMeans(centroids [K, D], assignments int64 [N], inertia [], num_iter), floats in float32 for half
        precision, else in the dtype of `features`. A cluster that loses its last sample takes the one
        farthest from its centroid.

    Raises:
        TypeError: `features` or `init` is no tensor of a floating dtype, or an option no number of its kind.
        ValueError: a shape is wrong, K lies outside [1, N], a feature or centroid is not finite, or an option
            is out of range.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the
    advantages of careful seeding", 2007.
    """
    exponent = _exponent(_check(features, num_clusters, init), features.dtype)
    _check_options(num_init, max_iter, tol, seed)
    _backend.check_name(backend)
    generator = torch.Generator("cpu").manual_seed(int(seed))
    if exponent:
        features = _scaled(features, -exponent)
        init = _scaled(init, -exponent) if isinstance(init, Tensor) else init
    best = None
    for _ in range(1 if isinstance(init, Tensor) else num_init):
        start = (
            init if isinstance(init, Tensor) else _reference.seed_centroids(features, num_clusters, generator)
        )
        result = torch.ops.mmfast.kmeans_lloyd(features, start, int(max_iter), float(tol), backend)
        if best is None or bool(result[2] < best[2]):
            best = result
    assert best is not None
    centroids, assignments, inertia, num_iter = best
    if exponent:
        centroids, inertia = _scaled(centroids, exponent), _scaled(inertia, 2 * exponent)
    return KMeans(centroids, assignments, inertia, int(num_iter))


def cluster_purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    *,
    backend: str = "auto",
) -> float:
    """Return the share of samples that belong to the commonest class of their cluster.

    Equivalent to:

        table = torch.zeros(K, C).index_put((assignments, labels), torch.ones(N), accumulate=True)
        purity = float(table.amax(1).sum() / N)

    Args:
        assignments: [N] of an integer dtype, each sample's cluster, from 0.
        labels: [N] of an integer dtype, each sample's class, from 0.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A Python float in (0, 1]; reading it waits for the device.

    Raises:
        TypeError: `assignments` or `labels` is no tensor of an integer dtype.
        ValueError: shapes differ, there is no sample, or a number is negative.

    Source: Wei et al., "Diagnosing and re-learning for balanced multimodal learning", ECCV 2024 (purity).
    """
    check_tensor("assignments", assignments)
    check_shape("assignments", assignments, "N", (None,))
    check_labels("assignments", assignments, assignments.shape[0])
    check_labels("labels", labels, assignments.shape[0])
    check_same_device(assignments=assignments, labels=labels)
    if labels.shape[0] == 0:
        raise ValueError("labels must hold at least one sample, got shape [0]")
    for name, value in (("assignments", assignments), ("labels", labels)):
        if int(value.min()) < 0:
            raise ValueError(f"{name} must not be negative, got {int(value.min())}")
    _backend.check_name(backend)
    return float(torch.ops.mmfast.cluster_purity(assignments, labels, backend))


def _check(features: Tensor, num_clusters: int, init: str | Tensor) -> float:
    """Raise unless all is as it should be; return the largest magnitude of a feature or given centroid."""
    check_float("features", features)
    check_shape("features", features, "N, D", (None, None))
    check_integer("num_clusters", num_clusters)
    if not 1 <= num_clusters <= features.shape[0]:
        raise ValueError(
            f"num_clusters must lie in [1, N] = [1, {features.shape[0]}], got {num_clusters} "
            f"for features {shape_text(features.shape)}"
        )
    if isinstance(init, Tensor):
        check_float("init", init)
        check_shape("init", init, "K, D", (num_clusters, features.shape[1]))
        check_same_device(features=features, init=init)
    else:
        check_choice("init", init, ("k-means++",))
    largest = 0.0
    for name, value in (("features", features), ("init", init)):
        if isinstance(value, Tensor) and value.numel() > 0:
            # The extremes tell in one read; a mask of all elements costs as much as several iterations.
            low, high = _extremes(value)
            if not (math.isfinite(low) and math.isfinite(high)):
                num_bad = sum(int((~part.isfinite()).sum()) for part in _parts(value))
                raise ValueError(f"{name} must be finite, got {num_bad} NaN or infinite values")
            largest = max(largest, -low, high)
    return largest


def _extremes(
    x: Tensor,  # [N, D] or [K, D], not empty
) -> tuple[float, float]:
    """Return the least and the largest element; NaN where one is."""
    lows, highs = zip(*[part.aminmax() for part in _parts(x)], strict=True)
    low, high = torch.stack([torch.stack(lows).amin(), torch.stack(highs).amax()]).tolist()
    return low, high


def _parts(
    x: Tensor,  # [N, D] or [K, D], not empty
) -> list[Tensor]:
    """Return `x`, some rows at a time where it does not lie in one piece: torch copies that."""
    return [x] if x.is_contiguous() else [x[rows] for rows in row_chunks(x, *x.shape)]


def _exponent(largest: float, dtype: torch.dtype) -> int:
    """Return the power of two to divide by, so that squared distances stay in range; mostly 0."""
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > (400 if dtype == torch.float64 else 40) else 0


def _scaled(
    x: Tensor,  # any shape
    exponent: int,
) -> Tensor:  # like `x`, of the dtype of accumulation
    """Return x * 2^exponent, rounded nowhere but where it has no such number."""
    x = x.to(accumulation_dtype(x.dtype))
    # Step by step: the whole power may have no number either.
    while exponent != 0:
        step = max(-100, min(100, exponent))
        x, exponent = x * 2.0**step, exponent - step
    return x


def _check_options(num_init: int, max_iter: int, tol: float, seed: int) -> None:
    for name, value in (("num_init", num_init), ("max_iter", max_iter)):
        check_integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(tol, bool) or not isinstance(tol, Real):
        raise TypeError(f"tol must be a number, got {describe(tol)}")
    if not 0 <= tol < float("inf"):
        raise ValueError(f"tol must be finite and not negative, got {tol}")
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2^63, 2^64), got {seed}")


def _lloyd_cpu(
    features: Tensor,  # [N, D]
    start: Tensor,  # [K, D]
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [K, D], int64 [N], [], int64 []
    centroids, assignments, inertia, num_iter = _lloyd_fake(features, start, max_iter, tol, "cpu")
    features = with_contiguous_rows(features)
    start = start.to(centroids.dtype).contiguous()
    _backend.extension("cpu").kmeans_lloyd(
        *strided(features),
        start.data_ptr(),
        start.shape[0],
        centroids.data_ptr(),
        assignments.data_ptr(),
        inertia.data_ptr(),
        num_iter.data_ptr(),
        max_iter,
        tol,
        DTYPE_CODE[features.dtype],
        torch.get_num_threads(),
    )
    return centroids, assignments, inertia, num_iter


def _lloyd_triton(
    features: Tensor,  # [N, D]
    start: Tensor,  # [K, D]
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [K, D], int64 [N], [], int64 []
    run = _backend.kernels("kmeans").kmeans_lloyd if features.shape[1] > 0 else _reference.lloyd
    return run(features, start, max_iter, tol)


def _has_table(run: Callable) -> Callable:
    """Return `run`, which counts pairs of cluster and class in a table, but for labels too far apart for one.

    Labels are names: those of few samples may be so.
    """

    def run_or_sort(
        assignments: Tensor,  # [N]
        labels: Tensor,  # [N]
    ) -> Tensor:  # float64 []
        num_clusters, num_classes = int(assignments.max()) + 1, int(labels.max()) + 1
        if num_clusters * num_classes > max(labels.shape[0], _MAX_TABLE_NUMEL):
            return _reference.purity(assignments, labels)
        return run(assignments, labels, num_clusters, num_classes)

    return run_or_sort


@_has_table
def _purity_cpu(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    num_clusters: int,
    num_classes: int,
) -> Tensor:  # float64 []
    assignments, labels = as_int64(assignments), as_int64(labels)
    purity = labels.new_empty((), dtype=torch.float64)
    _backend.extension("cpu").kmeans_purity(
        assignments.data_ptr(),
        labels.data_ptr(),
        purity.data_ptr(),
        labels.shape[0],
        num_clusters,
        num_classes,
    )
    return purity


@_has_table
def _purity_triton(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    num_clusters: int,
    num_classes: int,
) -> Tensor:  # float64 []
    table = _backend.kernels("kmeans").pair_counts(assignments, labels, num_clusters, num_classes)
    return table.amax(1).sum().double() / len(labels)


def _lloyd_fake(features, start, max_iter, tol, backend):
    dtype = accumulation_dtype(features.dtype)
    return (
        features.new_empty(start.shape, dtype=dtype),
        features.new_empty(features.shape[0], dtype=torch.int64),
        features.new_empty((), dtype=dtype),
        torch.empty((), dtype=torch.int64, device="cpu"),
    )


def _purity_fake(assignments, labels, backend):
    return labels.new_empty((), dtype=torch.float64)


define(
    "kmeans",
    "kmeans_lloyd(Tensor features, Tensor start, int max_iter, float tol, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_lloyd_fake,
    reference=outside_autocast(_reference.lloyd),
    cpu=outside_autocast(_lloyd_cpu),
    triton=outside_autocast(_lloyd_triton),
)
define(
    "kmeans",
    "cluster_purity(Tensor assignments, Tensor labels, str backend) -> Tensor",
    fake=_purity_fake,
    reference=_reference.purity,
    cpu=_purity_cpu,
    triton=_purity_triton,
)

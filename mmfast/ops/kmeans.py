"""K-means clustering of features, and how pure its clusters are in class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast import backend as _backend
from mmfast.errors import shown
from mmfast.ops._kmeans_checks import check_clustering, check_purity, exponent_of, is_shared, scaled
from mmfast.ops._launch import DTYPE_CODE, as_int64, outside_autocast, strided, with_contiguous_rows
from mmfast.ops._registration import define
from mmfast.reference import kmeans as _reference
from mmfast.reference._common import accumulation_dtype, row_chunks
from mmfast.reference._kmeans_group import Shares
from mmfast.reference._kmeans_steps import assign_about

# Entries of a table of clusters and classes, of 8 bytes each.
_MAX_TABLE_NUMEL = 2**22


class KMeans(NamedTuple):
    """A clustering: centroids, each sample's cluster, sum of squared distances, number of iterations."""

    centroids: Tensor  # [K, D]
    assignments: Tensor  # int64 [N]
    inertia: Tensor  # []
    num_iter: int

    def __repr__(self) -> str:
        return f"KMeans({shown(self._asdict())})"


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
    group: dist.ProcessGroup | None = None,
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
        group: a torch.distributed process group: the samples are those of all its processes, in order of
            rank, of which each passes its own (N may differ, and be 0). All pass the same options; centroids
            to start from are those of the group's first process. Iterations exchange sums and sizes of the
            clusters, no samples but seeds and what empty clusters take. None: this process alone.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        KMeans(centroids [K, D], assignments int64 [N], inertia [], num_iter), floats in float32 for half
        precision, else in the dtype of `features`. A cluster that loses its last sample takes the one
        farthest from its centroid. Over a group assignments are those of this process's samples, and all
        else is the same in every process, bit for bit: what one process with all samples finds, up to
        rounding.

    Raises:
        TypeError: `features` or `init` is no tensor of a floating dtype, or an option no number of its kind.
        ValueError: a shape is wrong, K lies outside [1, N], a feature or centroid is not finite, or an option
            is out of range. Over a group, where K exceeds the samples of all or processes pass different
            options, too; what is wrong in one process raises in each.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the
    advantages of careful seeding", 2007.
    """
    options = {"num_init": num_init, "max_iter": max_iter, "tol": tol, "seed": seed}
    facts = check_clustering(features, num_clusters, init, options, backend, group)
    exponent = exponent_of(max(fact.largest for fact in facts), features.dtype)
    if exponent:
        features = scaled(features, -exponent)
        init = scaled(init, -exponent) if isinstance(init, Tensor) else init
    seeds: Callable = functools.partial(_reference.seed_centroids, features)
    iterate: Callable = functools.partial(_lloyd, features, backend)
    if group is not None and is_shared(group):
        shares = Shares(
            features, [fact.num_samples for fact in facts], group, functools.partial(_assign, backend)
        )
        seeds, iterate = shares.seed_centroids, shares.lloyd
    generator = torch.Generator("cpu").manual_seed(int(seed))
    best = None
    for _ in range(1 if isinstance(init, Tensor) else num_init):
        start = init if isinstance(init, Tensor) else seeds(num_clusters, generator)
        result = iterate(start, int(max_iter), float(tol))
        if best is None or bool(result[2] < best[2]):
            best = result
    assert best is not None
    centroids, assignments, inertia, num_iter = best
    if exponent:
        centroids, inertia = scaled(centroids, exponent), scaled(inertia, 2 * exponent)
    return KMeans(centroids, assignments, inertia, int(num_iter))


def cluster_purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> float:
    """Return the share of samples that belong to the commonest class of their cluster.

    Equivalent to:

        table = torch.zeros(K, C).index_put((assignments, labels), torch.ones(N), accumulate=True)
        purity = float(table.amax(1).sum() / N)

    Args:
        assignments: [N] of an integer dtype, each sample's cluster, from 0.
        labels: [N] of an integer dtype, each sample's class, from 0.
        group: a torch.distributed process group: the samples are those of all its processes, of which each
            passes its own (N may differ, and be 0), and the purity is that of all. None: this process alone.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A Python float in (0, 1]; reading it waits for the device.

    Raises:
        TypeError: `assignments` or `labels` is no tensor of an integer dtype.
        ValueError: shapes differ, there is no sample, or a number is negative; over a group in every process.

    Source: Wei et al., "Diagnosing and re-learning for balanced multimodal learning", ECCV 2024 (purity).
    """
    check_purity(assignments, labels, backend, group)
    if group is not None and is_shared(group):
        cells = _cells(assignments.long(), labels.long())
        return _reference.purity_of_cells(_reference.gathered_cells(cells, group))
    return float(torch.ops.mmfast.cluster_purity(assignments, labels, backend))


def _lloyd(features: Tensor, backend: str, start: Tensor, max_iter: int, tol: float) -> tuple[Tensor, ...]:
    return torch.ops.mmfast.kmeans_lloyd(features, start, max_iter, tol, backend)


def _assign(
    backend: str, features: Tensor, offset: Tensor, centroids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.mmfast.kmeans_assign(features, offset, centroids, backend)


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


def _assign_cpu(
    features: Tensor,  # [N, D]
    offset: Tensor,  # [D]
    centroids: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], float64 [K, D], int64 [K]
    """Assign by torch's product of matrices, add in C++: the module has no function for one assignment.

    Samples are taken less the offset, some rows at a time, as products and sums of those lose less.
    """
    assignments, total, count = _assign_fake(features, offset, centroids, "cpu")
    total.zero_(), count.zero_()
    half_norms = centroids.square().sum(1) / 2
    chunks = list(row_chunks(features, len(features), max(centroids.shape)))
    # The same memory for every chunk: new pages would take longer than the product.
    most = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    centred, scores = offset.new_empty(most, features.shape[1]), offset.new_empty(most, len(centroids))
    for rows in chunks:
        size = rows.stop - rows.start
        x = torch.sub(features[rows], offset, out=centred[:size])
        # |x - c|^2 / 2 less |x|^2 / 2, which is the same for every centroid.
        nearest = torch.addmm(half_norms, x, centroids.T, alpha=-1, out=scores[:size]).min(1).indices
        num_members, mean, _ = torch.ops.mmfast.class_moments_fwd(x, nearest, len(centroids), "cpu")
        # The mean of no samples is NaN.
        total += (mean.double() * num_members[:, None]).nan_to_num_(0.0)
        count += num_members
        assignments[rows] = nearest
    return assignments, total, count


def _assign_triton(
    features: Tensor,  # [N, D]
    offset: Tensor,  # [D]
    centroids: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], float64 [K, D], int64 [K]
    run = _backend.kernels("kmeans").kmeans_assign if features.numel() > 0 else assign_about
    return run(features, offset, centroids)


def _cells(
    assignments: Tensor,  # int64 [N]
    labels: Tensor,  # int64 [N]
) -> Tensor:  # int64 [cells, 3]: cluster, class, number of samples
    """Return how many samples each pair of cluster and class has, by a table where it is not too large."""
    if len(labels) == 0:
        return labels.new_empty(0, 3)
    num_clusters, num_classes = int(assignments.max()) + 1, int(labels.max()) + 1
    if num_clusters * num_classes > max(len(labels), _MAX_TABLE_NUMEL):
        return _reference.cells_of(assignments, labels)
    counts = torch.bincount(assignments * num_classes + labels)
    place = counts.nonzero().squeeze(1)
    return torch.stack([place // num_classes, place % num_classes, counts[place]], 1)


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


def _assign_fake(features, offset, centroids, backend):
    return (
        features.new_empty(features.shape[0], dtype=torch.int64),
        features.new_empty(centroids.shape, dtype=torch.float64),
        features.new_empty(centroids.shape[0], dtype=torch.int64),
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
    "kmeans_assign(Tensor features, Tensor offset, Tensor centroids, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_assign_fake,
    reference=outside_autocast(assign_about),
    cpu=outside_autocast(_assign_cpu),
    triton=outside_autocast(_assign_triton),
)
define(
    "kmeans",
    "cluster_purity(Tensor assignments, Tensor labels, str backend) -> Tensor",
    fake=_purity_fake,
    reference=_reference.purity,
    cpu=_purity_cpu,
    triton=_purity_triton,
)

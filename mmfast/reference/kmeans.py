"""K-means by Lloyd's iterations from k-means++ seeds, and the purity of a clustering, in plain torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.distributed import gather_objects, gather_parts
from mmfast.reference._common import accumulation_dtype, row_chunks
from mmfast.reference._kmeans_group import Shares
from mmfast.reference._kmeans_steps import assign, assign_about, squared_distances


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
) -> tuple[Tensor, Tensor, Tensor, int]:  # [K, D], int64 [N], [], number of iterations
    """Return centroids, assignments, inertia and iterations of the restart with the lowest inertia."""
    generator = torch.Generator("cpu").manual_seed(seed)
    seeds: Callable = functools.partial(seed_centroids, features)
    iterate: Callable = functools.partial(lloyd, features)
    if group is not None:
        sizes = gather_objects(len(features), group)
        shares = Shares(features, sizes, group, assign_about)
        seeds, iterate = shares.seed_centroids, shares.lloyd
    best = None
    for _ in range(1 if isinstance(init, Tensor) else num_init):
        start = init if isinstance(init, Tensor) else seeds(num_clusters, generator)
        result = iterate(start, max_iter, tol)
        if best is None or result[2] < best[2]:
            best = result
    assert best is not None
    return *best[:3], int(best[3])


def seed_centroids(
    features: Tensor,  # [N, D]
    num_clusters: int,
    generator: torch.Generator,  # on the CPU, so that a seed draws the same on every device
) -> Tensor:  # [K, D]
    """Return k-means++ seeds: each the best of 2 + floor(ln K) points drawn by squared distance."""
    x = features.to(accumulation_dtype(features.dtype))
    num_samples, num_trials = len(x), 2 + int(math.log(num_clusters))
    draws = torch.rand(num_clusters, num_trials, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(x.device)
    chosen = [(draws[0, :1] * num_samples).long()]
    nearest = squared_distances(x, x[chosen[0]])[0]
    for step in range(1, num_clusters):
        cumulative = nearest.double().cumsum(0)
        # Where all points coincide with seeds the sum is 0 and the first point is drawn again.
        trials = torch.searchsorted(cumulative, draws[step] * cumulative[-1], right=True)
        trials = trials.clamp_max(num_samples - 1)
        candidates = torch.minimum(squared_distances(x, x[trials]), nearest)
        best = candidates.sum(1).argmin()
        nearest = candidates[best]
        chosen.append(trials[best][None])
    return x[torch.cat(chosen)]


def _fill_empty(
    x: Tensor,  # [N, D]
    centroids: Tensor,  # [K, D] the assignments were made with
    assignments: Tensor,  # [N]
    total: Tensor,  # [K, D] changed in place
    count: Tensor,  # int64 [K] changed in place
) -> None:
    """Move the samples farthest from their centroids, one each, to the clusters without samples."""
    empty = (count == 0).nonzero().squeeze(1)
    far = (x - centroids[assignments]).square().sum(1).topk(len(empty)).indices
    total.index_add_(0, assignments[far], x[far], alpha=-1)
    count.index_add_(0, assignments[far], torch.ones_like(count[empty]), alpha=-1)
    total[empty], count[empty] = x[far], torch.ones_like(count[empty])


def lloyd(
    features: Tensor,  # [N, D]
    start: Tensor,  # [K, D]
    max_iter: int,
    tol: float,  # in units of the mean variance of a dimension
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [K, D], int64 [N], [], int64 []
    """Return centroids, assignments, inertia and number of iterations; reads the device once an iteration."""
    dtype = accumulation_dtype(features.dtype)
    # Products of centred features lose less to rounding.
    offset = features.to(dtype).mean(0)
    x, centroids = features.to(dtype) - offset, start.to(dtype) - offset
    # Without dimensions nothing moves.
    threshold = tol * float(x.var(0, correction=0).mean()) if x.shape[1] else 0.0
    previous, settled, num_iter = None, False, 0
    while num_iter < max_iter and not settled:
        num_iter += 1
        assignments, total, count = assign(x, centroids)
        all_used = bool((count > 0).all())
        if not all_used:
            _fill_empty(x, centroids, assignments, total, count)
        moved = torch.where(count[:, None] > 0, total / count[:, None], centroids)
        shift = float((moved - centroids).square().sum())
        centroids = moved
        settled = all_used and previous is not None and torch.equal(assignments, previous)
        previous = assignments
        if shift <= threshold:
            break
    assignments = previous if settled and previous is not None else assign(x, centroids)[0]
    inertia = x.new_zeros(())
    for rows in row_chunks(x, *x.shape):
        inertia += (x[rows] - centroids.index_select(0, assignments[rows])).square().sum()
    return (centroids + offset).contiguous(), assignments, inertia, torch.tensor(num_iter, device="cpu")


def cluster_purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    *,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Return the share of samples that belong to the commonest class of their cluster."""
    if group is None:
        return float(purity(assignments, labels))
    return purity_of_cells(gathered_cells(cells_of(assignments, labels), group))


def cells_of(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
) -> Tensor:  # int64 [cells, 3]: cluster, class, number of samples
    """Return how many samples each pair of cluster and class has, of those that occur."""
    # Clusters and classes are counted where they occur: their numbers may be as large as int64 holds.
    pairs, counts = torch.stack([assignments.long(), labels.long()]).unique(dim=1, return_counts=True)
    return torch.cat([pairs, counts[None]]).T


def gathered_cells(
    own: Tensor,  # int64 [cells, 3], of this process's samples
    group: dist.ProcessGroup,
) -> Tensor:  # int64 [all processes' cells, 3], on the CPU
    """Return the cells of all processes of a group, one after the other."""
    sizes = gather_objects(len(own), group)
    parts = gather_parts(own, sizes, group).cpu()
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def purity_of_cells(
    cells: Tensor,  # int64 [cells, 3], on the CPU
) -> float:
    """Return the purity of samples that are counted by cluster and class, some cells more than once."""
    pairs, place = cells[:, :2].unique(dim=0, return_inverse=True)
    counts = cells.new_zeros(len(pairs)).index_add_(0, place, cells[:, 2])
    return int(_largest(pairs[:, 0], counts).sum()) / int(counts.sum())


def purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
) -> Tensor:  # float64 []
    """Return the purity as a tensor."""
    clusters, _, counts = cells_of(assignments, labels).unbind(1)
    return _largest(clusters, counts).sum().double() / len(labels)


def _largest(
    clusters: Tensor,  # int64 [cells]
    counts: Tensor,  # int64 [cells]
) -> Tensor:  # int64 [cells]; 0 beyond the clusters there are
    """Return the number of samples of each cluster's commonest class."""
    clusters = clusters.unique(return_inverse=True)[1]
    return torch.zeros_like(counts).scatter_reduce_(0, clusters, counts, "amax")

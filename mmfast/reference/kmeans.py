"""K-means by Lloyd's iterations from k-means++ seeds, and the purity of a clustering, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype, row_chunks


def kmeans(
    features: Tensor,  # [N, D]
    num_clusters: int,
    *,
    init: str | Tensor = "k-means++",  # or [K, D]
    num_init: int = 1,
    max_iter: int = 300,
    tol: float = 1e-4,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, int]:  # [K, D], int64 [N], [], number of iterations
    """Return centroids, assignments, inertia and iterations of the restart with the lowest inertia."""
    generator = torch.Generator("cpu").manual_seed(seed)
    best = None
    for _ in range(1 if isinstance(init, Tensor) else num_init):
        start = init if isinstance(init, Tensor) else seed_centroids(features, num_clusters, generator)
        result = lloyd(features, start, max_iter, tol)
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
    nearest = _squared_distances(x, x[chosen[0]])[0]
    for step in range(1, num_clusters):
        cumulative = nearest.double().cumsum(0)
        # Where all points coincide with seeds the sum is 0 and the first point is drawn again.
        trials = torch.searchsorted(cumulative, draws[step] * cumulative[-1], right=True)
        trials = trials.clamp_max(num_samples - 1)
        candidates = torch.minimum(_squared_distances(x, x[trials]), nearest)
        best = candidates.sum(1).argmin()
        nearest = candidates[best]
        chosen.append(trials[best][None])
    return x[torch.cat(chosen)]


def _squared_distances(
    x: Tensor,  # [N, D]
    points: Tensor,  # [T, D]
) -> Tensor:  # [T, N]
    return torch.stack([(x - point).square().sum(1) for point in points])


def _assign(
    x: Tensor,  # [N, D]
    centroids: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], [K, D], int64 [K]
    """Return the nearest centroid of each sample, and the sum and number of each cluster's samples."""
    assignments = torch.empty(len(x), dtype=torch.int64, device=x.device)
    total = torch.zeros_like(centroids)
    count = assignments.new_zeros(len(centroids))
    half_norms = centroids.square().sum(1, keepdim=True) / 2
    for rows in row_chunks(x, len(x), len(centroids)):
        # |x - c|^2 / 2 less |x|^2 / 2, which is the same for every centroid; clusters first is faster.
        scores = torch.addmm(half_norms, centroids, x[rows].T, alpha=-1)
        assignments[rows] = scores.min(0).indices
        # A product with the one-hot matrix adds in a fixed order; adding by index does not on a GPU.
        member = scores.zero_().scatter_(0, assignments[None, rows], 1)
        total.addmm_(member, x[rows])
        count += member.sum(1).long()
    return assignments, total, count


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
        assignments, total, count = _assign(x, centroids)
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
    assignments = previous if settled and previous is not None else _assign(x, centroids)[0]
    inertia = x.new_zeros(())
    for rows in row_chunks(x, *x.shape):
        inertia += (x[rows] - centroids.index_select(0, assignments[rows])).square().sum()
    return (centroids + offset).contiguous(), assignments, inertia, torch.tensor(num_iter, device="cpu")


def cluster_purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
) -> float:
    """Return the share of samples that belong to the commonest class of their cluster."""
    return float(purity(assignments, labels))


def purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
) -> Tensor:  # float64 []
    """Return the purity as a tensor."""
    # Clusters and classes are counted where they occur: their numbers may be as large as int64 holds.
    cells = torch.stack([assignments.long(), labels.long()])
    (clusters, _), counts = cells.unique(dim=1, return_counts=True)
    clusters = clusters.unique(return_inverse=True)[1]
    largest = torch.zeros_like(counts).scatter_reduce_(0, clusters, counts, "amax")
    return largest.sum().double() / len(labels)

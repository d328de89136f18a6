"""Steps of k-means that are the same alone and over processes: distances, and who belongs where."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype, row_chunks

# Samples that are added together before their sum is added to the others': of all at once a product, which
# some CPUs add one by one, errs by more than what is held against it may.
_FEW = 128


def squared_distances(
    x: Tensor,  # [N, D]
    points: Tensor,  # [T, D]
) -> Tensor:  # [T, N]
    """Return how far every sample is from every point, squared."""
    return torch.stack([(x - point).square().sum(1) for point in points])


def assign(
    x: Tensor,  # [N, D]
    centroids: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], [K, D], int64 [K]
    """Return the nearest centroid of each sample, and the sum and number of each cluster's samples."""
    assignments = torch.empty(len(x), dtype=torch.int64, device=x.device)
    total = torch.zeros_like(centroids)
    count = assignments.new_zeros(len(centroids))
    half_norms = centroids.square().sum(1, keepdim=True) / 2
    # Of a sample's scores, or of its part of the sums of `_FEW`.
    num_temporary = max(len(centroids), centroids.numel() // _FEW)
    for rows in row_chunks(x, len(x), num_temporary):
        # |x - c|^2 / 2 less |x|^2 / 2, which is the same for every centroid; clusters first is faster.
        own = x[rows]
        scores = torch.addmm(half_norms, centroids, own.T, alpha=-1)
        assignments[rows] = scores.min(0).indices
        # A product with the one-hot matrix adds in a fixed order; adding by index does not on a GPU.
        member = scores.zero_().scatter_(0, assignments[None, rows], 1)
        end = len(own) - len(own) % _FEW
        sums = member[:, :end].unflatten(1, (-1, _FEW)).transpose(0, 1) @ own[:end].unflatten(0, (-1, _FEW))
        total += sums.sum(0).addmm_(member[:, end:], own[end:])
        count += member.sum(1).long()
    return assignments, total, count


def assign_about(
    features: Tensor,  # [N, D]
    offset: Tensor,  # [D] in the dtype of accumulation
    centroids: Tensor,  # [K, D] less the offset
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], float64 [K, D], int64 [K]
    """Return `assign` of the samples less an offset, with sums that other processes' may be added to."""
    assignments, total, count = assign(features.to(offset.dtype) - offset, centroids)
    return assignments, features.new_empty(total.shape, dtype=torch.float64).copy_(total), count


def distances_to_own(
    features: Tensor,  # [N, D]
    offset: Tensor,  # [D] in the dtype of accumulation
    centroids: Tensor,  # [K, D] less the offset
    assignments: Tensor,  # int64 [N]
) -> Tensor:  # [N]
    """Return how far every sample is from the centroid of its cluster, squared."""
    found = features.new_empty(len(features), dtype=accumulation_dtype(features.dtype))
    for rows in row_chunks(features, *features.shape):
        x = features[rows].to(offset.dtype) - offset
        found[rows] = x.sub_(centroids.index_select(0, assignments[rows])).square_().sum(1)
    return found

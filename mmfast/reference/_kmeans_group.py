"""K-means over the processes of a group, each with rows of its own, by sums that are added over processes.

What steers the iterations (seeds, centroids, when to stop) is decided by the group's first process, or on
the host from numbers all have alike: processors may differ in a last bit, and a process that stopped alone
would leave the others waiting.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.distributed import gather_equal, of_first_process, sum_over_processes
from mmfast.reference._common import accumulation_dtype, row_chunks
from mmfast.reference._kmeans_steps import distances_to_own, squared_distances

# Takes features [N, D], offset [D] and centroids [K, D] less the offset; returns assignments int64 [N], and
# the clusters' sums less the offset, float64 [K, D], and sizes, int64 [K].
Assign = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Shares:
    """Samples that lie in several processes: those of this one, and what the group knows of all.

    Args:
        features: this process's samples.
        sizes: numbers of samples by rank; their sum is N.
        group: the processes.
        assign: one assignment of this process's samples.
    """

    def __init__(
        self,
        features: Tensor,  # [N_p, D]
        sizes: list[int],
        group: dist.ProcessGroup,
        assign: Assign,
    ) -> None:
        self.features, self.group, self.assign = features, group, assign
        self.dtype = accumulation_dtype(features.dtype)
        self.rank = dist.get_rank(group)
        self.edges = list(itertools.accumulate(sizes, initial=0))
        self.num_samples = self.edges[-1]
        self.offset, self.variance = self._centre()

    def _centre(self) -> tuple[Tensor, float]:  # [D]
        """Return the mean of all samples, and the mean over dimensions of their variance."""
        num_own, num_dims = self.features.shape
        mean, square = self.features.new_zeros(num_dims, dtype=torch.float64), 0.0
        for rows in row_chunks(self.features, num_own, num_dims):
            mean += self.features[rows].to(self.dtype).sum(0) / num_own
        for rows in row_chunks(self.features, num_own, num_dims):
            x = self.features[rows].to(self.dtype) - mean.to(self.dtype)
            square += float(x.square_().sum(dtype=torch.float64))
        own = torch.cat([mean.new_tensor([num_own, square]), mean])
        table = gather_equal(own, self.group)
        count, squares, means = table[:, :1], table[:, 1], table[:, 2:]
        middle = (count * means).sum(0, keepdim=True) / self.num_samples
        # A process's squares are about its own mean.
        whole = squares.sum() + (count * (means - middle).square()).sum()
        # Without dimensions nothing moves.
        spread = whole / (self.num_samples * max(1, num_dims))
        decided = of_first_process(torch.cat([middle[0], spread[None]]), self.group)
        return decided[:-1].to(self.dtype), float(decided[-1])

    def seed_centroids(
        self,
        num_clusters: int,
        generator: torch.Generator,  # in the same state in every process
    ) -> Tensor:  # [K, D]
        """Return k-means++ seeds: those of one process with all samples in order of rank, up to rounding."""
        x, num_trials = self.features.to(self.dtype), 2 + int(math.log(num_clusters))
        # As alone, so that a seed draws the same.
        draws = torch.rand(num_clusters, num_trials, generator=generator, dtype=torch.float64, device="cpu")
        # The first is drawn evenly: by weights of 1.
        nearest = x.new_ones(len(x))
        chosen: list[Tensor] = []
        for of_step in draws.tolist():
            points = self._rows_drawn(x, nearest, of_step if chosen else of_step[:1])
            candidates = squared_distances(x, points)
            if chosen:
                candidates = torch.minimum(candidates, nearest)
            sums = gather_equal(candidates.sum(1, dtype=torch.float64), self.group).T.tolist()
            totals = [math.fsum(of_processes) for of_processes in sums]
            best = totals.index(min(totals))
            nearest = candidates[best]
            chosen.append(points[best])
        return torch.stack(chosen)

    def _rows_drawn(
        self,
        x: Tensor,  # [N_p, D]
        weights: Tensor,  # [N_p]
        draws: list[float],  # T in [0, 1)
    ) -> Tensor:  # [T, D]
        """Return the samples at which all weights, added up in order of rank, reach shares of their sum."""
        cumulative = weights.double().cumsum(0)
        own = cumulative[-1:] if len(x) else cumulative.new_zeros(1)
        edges = list(itertools.accumulate(gather_equal(own, self.group).flatten().tolist(), initial=0.0))
        last = max(rank for rank in range(len(edges) - 1) if self.edges[rank + 1] > self.edges[rank])
        rows = x.new_zeros(len(draws), x.shape[1])
        targets = [draw * edges[-1] for draw in draws]
        # Where all samples coincide with seeds the sum is 0, and the last is drawn again.
        owners = [min(bisect_right(edges, target) - 1, last) for target in targets]
        mine = [trial for trial, owner in enumerate(owners) if owner == self.rank]
        if mine:
            within = cumulative.new_tensor([targets[trial] - edges[self.rank] for trial in mine])
            places = torch.searchsorted(cumulative, within, right=True).clamp_max(len(x) - 1)
            rows[mine] = x[places]
        return sum_over_processes(rows, self.group)

    def lloyd(
        self,
        start: Tensor,  # [K, D]
        max_iter: int,
        tol: float,  # in units of the mean variance of a dimension
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [K, D], int64 [N_p], [], int64 []
        """Return centroids, this process's assignments, inertia of all and number of iterations."""
        centroids = of_first_process(start.to(self.dtype) - self.offset, self.group)
        assignments = self.features.new_full((len(self.features),), -1, dtype=torch.int64)
        is_settled, num_iter = False, 0
        while num_iter < max_iter and not is_settled:
            num_iter += 1
            previous = assignments
            assignments, total, count = self.assign(self.features, self.offset, centroids)
            num_changed = (assignments != previous).sum()
            total, count, num_changed = self._summed(total, count, num_changed)
            num_empty = int((count == 0).sum())
            if num_empty:
                self._fill_empty(num_empty, centroids, assignments, total, count)
            centroids, shift = self._moved(centroids, total, count)
            is_settled = num_empty == 0 and int(num_changed) == 0
            if shift <= tol * self.variance:
                break
        if not is_settled:
            assignments, *_ = self.assign(self.features, self.offset, centroids)
        distances = distances_to_own(self.features, self.offset, centroids, assignments)
        own = distances.sum(dtype=torch.float64)
        inertia = start.new_tensor(math.fsum(gather_equal(own, self.group).tolist()), dtype=self.dtype)
        num_iterations = torch.tensor(num_iter, device="cpu")
        return (centroids + self.offset).contiguous(), assignments, inertia, num_iterations

    def _summed(self, *parts: Tensor) -> list[Tensor]:
        """Return tensors of any shapes summed over processes, in one exchange, as float64."""
        flat = torch.cat([part.double().flatten() for part in parts])
        summed = sum_over_processes(flat, self.group).split([part.numel() for part in parts])
        return [values.view(part.shape) for values, part in zip(summed, parts, strict=True)]

    def _moved(
        self,
        centroids: Tensor,  # [K, D]
        total: Tensor,  # float64 [K, D]
        count: Tensor,  # float64 [K]
    ) -> tuple[Tensor, float]:  # [K, D]
        """Return the means of the clusters, and how far all moved together, squared."""
        moved = torch.where(count[:, None] > 0, (total / count[:, None]).to(self.dtype), centroids).double()
        shift = (moved - centroids).square().sum()
        decided = of_first_process(torch.cat([moved.flatten(), shift[None]]), self.group)
        return decided[:-1].view_as(centroids).to(self.dtype), float(decided[-1])

    def _fill_empty(
        self,
        num_empty: int,
        centroids: Tensor,  # [K, D] the assignments were made with
        assignments: Tensor,  # int64 [N_p]
        total: Tensor,  # float64 [K, D] changed in place
        count: Tensor,  # float64 [K] changed in place
    ) -> None:
        """Move the samples of all that are farthest from their centroids, one each, to the empty clusters."""
        distances = distances_to_own(self.features, self.offset, centroids, assignments)
        far = distances.sort(descending=True, stable=True).indices[:num_empty]
        # Distance, cluster, and coordinates; rows that a process has not lie nearer than any.
        own = total.new_full((num_empty, 2 + total.shape[1]), -1.0)
        own[: len(far), 0], own[: len(far), 1] = distances[far].double(), assignments[far].double()
        own[: len(far), 2:] = self.features[far].to(self.dtype) - self.offset
        found = gather_equal(own, self.group).flatten(0, 1)
        found = found[found[:, 0].sort(descending=True, stable=True).indices[:num_empty]]
        cluster, rows = found[:, 1].long(), found[:, 2:]
        empty = (count == 0).nonzero().squeeze(1)
        # A product with the one-hot matrix adds in a fixed order; adding by index does not on a GPU.
        member = torch.nn.functional.one_hot(cluster, len(count)).double()
        total -= member.T @ rows
        count -= member.sum(0)
        total[empty], count[empty] = rows, torch.ones_like(count[empty])

"""Triton kernels of Lloyd's iterations and of the purity of a clustering.

Assignment and update are in `_kmeans_assign.py` and `_kmeans_update.py`; no bit changes from run to run, only
integers are added by atomics. One transfer an iteration tells the host whether an assignment changed, a
cluster is empty, and how far the centroids moved. Samples are moved to empty clusters by their assignment,
and the update is made again.
Floor: N D elements twice an iteration, for the assignment and for the update; 2 N K D operations. N = 1M,
D = 512, float32 is 4.1 GB, 1.37 ms on an H100 at 3.0 TB/s; K = 64: 66 G operations, 1.1 ms at 60 TFLOP/s.
Predicted and measured: bench/results/kmeans.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._class_order import _by_class, _chunk_blocks, _most_chunks, _order_configurations
from ._common import (
    _ELEMENT,
    _OPTIONS,
    _acc,
    _cdiv,
    _configuration,
    _Configurations,
    _on,
    _row_blocks,
    _tuned_rows,
    _wide,
)
from ._kmeans_assign import _assign_blocks, _assign_kernel, _squared_distances_kernel
from ._kmeans_update import (
    _MOVE_BLOCKS,
    _STATE_BLOCKS,
    _cluster_sums_kernel,
    _move_kernel,
    _state_kernel,
)


@triton.jit(do_not_specialize=["N", "C"])
def _count_pairs_kernel(
    assignments_ptr,  # [N]
    labels_ptr,  # [N]
    table_ptr,  # int64 [K, C], zeros
    N,
    C,
    stride_an,
    stride_ln,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    k = tl.load(assignments_ptr + offs_n * stride_an, mask=mask_n, other=0).to(tl.int64)
    y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_n, other=0).to(tl.int64)
    one = tl.full((BLOCK_N,), 1, tl.int64)
    # Integers: the order of these additions changes nothing.
    tl.atomic_add(table_ptr + k * C + y, one, mask=mask_n)


class _Lloyd:
    """The samples about their mean, and the steps of an iteration on them."""

    def __init__(
        self,
        features: Tensor,  # [N, D]
        num_clusters: int,
        offset: Tensor | None = None,  # [D] in ACC, in place of the mean
    ):
        self.features, self.num_clusters = features, num_clusters
        self.dtype = _wide(features.dtype)
        if offset is None:
            variance, self.offset = torch.var_mean(features.to(self.dtype), 0, correction=0)
            self.variance = variance.mean(dtype=torch.float64)
        else:
            self.offset, self.variance = offset.contiguous(), offset.new_zeros((), dtype=torch.float64)
        self.acc = _acc(features.dtype)
        self.samples = (features.shape[0], features.shape[1], *features.stride())
        self.assignments = features.new_full((features.shape[0],), -1, dtype=torch.int32)
        self.changed = self.assignments.new_zeros(())

    def assign(
        self,
        centroids: Tensor,  # [K, D]
    ) -> None:
        """Assign every sample to the nearest centroid and add to `changed` how many that changed."""
        num_samples, num_dims, *strides = self.samples
        blocks = _assign_blocks(self.num_clusters, self.dtype, self.features.device.type)
        # Operands of matrix products have at least 16 rows.
        least = 16 if blocks["DOT"] else 1
        kernel = f"assign {blocks['PRECISION']} K<={triton.next_power_of_2(self.num_clusters)}"
        blocks = _tuned_rows("kmeans", kernel, self.features, blocks, "BLOCK_N", "BLOCK_K", least=least)
        _assign_kernel[(_cdiv(num_samples, blocks["BLOCK_N"]),)](
            self.features,
            self.offset,
            centroids,
            self.assignments,
            self.changed,
            num_samples,
            self.num_clusters,
            num_dims,
            *strides,
            ACC=self.acc,
            **blocks,
        )

    def move(
        self,
        centroids: Tensor,  # [K, D]
        assignments: Tensor,  # int32 [N]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [K, D], int64 [K], float64 [4]
        """Return the means of the clusters, their sizes, and what `_state_kernel` gathers of both."""
        num_samples, num_dims, *strides = self.samples
        blocks = _chunk_blocks(num_dims, self.features.dtype)
        blocks = _tuned_rows("kmeans", "sums", self.features, blocks, "BLOCK_R", "BLOCK_D")
        order, edges, count = _by_class(assignments, self.num_clusters, blocks["BLOCK_R"])
        most = _most_chunks(num_samples, self.num_clusters, blocks["BLOCK_R"])
        sums = centroids.new_empty(most, num_dims)
        _cluster_sums_kernel[(most, _cdiv(num_dims, blocks["BLOCK_D"]))](
            self.features,
            self.offset,
            order,
            edges,
            sums,
            self.num_clusters,
            num_dims,
            *strides,
            ACC=self.acc,
            **blocks,
        )
        grid = (self.num_clusters, _cdiv(num_dims, _MOVE_BLOCKS["BLOCK_D"]))
        moved, shift = torch.empty_like(centroids), centroids.new_empty(grid, dtype=torch.float64)
        _move_kernel[grid](
            sums,
            edges,
            count,
            centroids,
            moved,
            shift,
            self.num_clusters,
            num_dims,
            **_MOVE_BLOCKS,
            **_OPTIONS,
        )
        state = shift.new_empty(4)
        tensors = self.changed, count, shift, self.variance, state
        _state_kernel[(1,)](*tensors, self.num_clusters, shift.numel(), **_STATE_BLOCKS, **_OPTIONS)
        return moved, count, state

    def squared_distances(
        self,
        centroids: Tensor,  # [K, D]
    ) -> Tensor:  # [N]
        """Return how far every sample is from the centroid it is assigned to, squared."""
        num_samples, num_dims, *strides = self.samples
        distance = centroids.new_empty(num_samples)
        blocks = _row_blocks(num_dims, self.features.dtype)
        blocks = _tuned_rows("kmeans", "distances", self.features, blocks, "BLOCK_N", "BLOCK_D")
        _squared_distances_kernel[(_cdiv(num_samples, blocks["BLOCK_N"]),)](
            self.features,
            self.offset,
            centroids,
            self.assignments,
            distance,
            num_samples,
            num_dims,
            *strides,
            ACC=self.acc,
            **blocks,
        )
        return distance

    def filled(
        self,
        centroids: Tensor,  # [K, D]
        count: Tensor,  # int64 [K]
    ) -> Tensor:  # int32 [N]
        """Return the assignments with the samples farthest from their centroids moved to empty clusters."""
        empty = (count == 0).nonzero().squeeze(1)
        far = self.squared_distances(centroids).sort(descending=True, stable=True).indices[: len(empty)]
        return self.assignments.index_put((far,), empty.int())


def kmeans_lloyd(
    features: Tensor,  # [N, D], N and D at least 1
    start: Tensor,  # [K, D]
    max_iter: int,
    tol: float,  # in units of the mean variance of a dimension
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [K, D], int64 [N], [], int64 [] on the CPU
    """Return centroids, assignments, inertia and number of iterations; reads the device once an iteration."""
    with _on(features.device):
        lloyd = _Lloyd(features, start.shape[0])
        centroids = (start.to(lloyd.dtype) - lloyd.offset).contiguous()
        is_settled, num_iter = False, 0
        while num_iter < max_iter and not is_settled:
            num_iter += 1
            lloyd.assign(centroids)
            moved, count, state = lloyd.move(centroids, lloyd.assignments)
            num_changed, num_empty, movement, variance = state.tolist()
            if num_empty:
                moved, _, state = lloyd.move(centroids, lloyd.filled(centroids, count))
                movement = float(state[2])
            centroids = moved
            is_settled = not num_empty and not num_changed
            if movement <= tol * variance:
                break
        if not is_settled:
            lloyd.assign(centroids)
        inertia = lloyd.squared_distances(centroids).double().sum().to(lloyd.dtype)
    centroids += lloyd.offset
    return centroids, lloyd.assignments.long(), inertia, torch.tensor(num_iter, device="cpu")


def kmeans_assign(
    features: Tensor,  # [N, D], N and D at least 1
    offset: Tensor,  # [D] in ACC
    centroids: Tensor,  # [K, D] in ACC, less the offset
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [N], float64 [K, D], int64 [K]
    """Return the nearest centroid of each sample, the clusters' sums less the offset, and their sizes."""
    with _on(features.device):
        lloyd, centroids = _Lloyd(features, centroids.shape[0], offset), centroids.contiguous()
        lloyd.assign(centroids)
        # A cluster without samples stays where it is, and counts 0 times.
        mean, count, _ = lloyd.move(centroids, lloyd.assignments)
    return lloyd.assignments.long(), mean.double() * count[:, None], count


def pair_counts(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    num_clusters: int,
    num_classes: int,
) -> Tensor:  # int64 [K, C]
    """Return how many samples of each class each cluster holds."""
    table = labels.new_zeros(num_clusters, num_classes, dtype=torch.int64)
    with _on(labels.device):
        _count_pairs_kernel[(_cdiv(len(labels), 512),)](
            assignments,
            labels,
            table,
            len(labels),
            num_classes,
            assignments.stride(0),
            labels.stride(0),
            BLOCK_N=512,
            **_OPTIONS,
        )
    return table


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = _Configurations()
    add = configurations.add
    index, size, stride = "*i64", "i32", "i64"
    for dtype, element in _ELEMENT.items():
        wide = _wide(dtype)
        x, acc = f"*{element}", f"*{_acc(dtype)}"
        constants = {"stride_xd": 1, "ACC": _acc(dtype)}
        for num_clusters in (8, 64):
            blocks = _assign_blocks(num_clusters, dtype)
            types = [x, acc, acc, "*i32", "*i32", size, size, size, stride]
            if num_clusters == 64 or blocks["DOT"]:
                matrix = ("warp",) if blocks["DOT"] else ()
                configurations.append((*_configuration(_assign_kernel, types, constants | blocks), *matrix))
        for num_dims in (1, 512):
            types = [x, acc, index, index, acc, size, size, stride]
            add(_cluster_sums_kernel, types, constants | _chunk_blocks(num_dims, dtype))
            types = [x, acc, acc, "*i32", acc, size, size, stride]
            add(_squared_distances_kernel, types, constants | _row_blocks(num_dims, dtype))
        if dtype == wide:
            add(_move_kernel, [acc, index, index, acc, acc, "*fp64", size, size], _MOVE_BLOCKS)
    for label in ("*i64", "*i32"):
        add(_count_pairs_kernel, [index, label, index, size, size, stride, stride], {"BLOCK_N": 512})
    add(_state_kernel, ["*i32", index, "*fp64", "*fp64", "*fp64", size, size], _STATE_BLOCKS)
    return [*configurations, *_order_configurations("*i32")]

"""Triton kernels of Lloyd's iterations and of the purity of a clustering.

Assignment: a block of samples meets the centroids as a product of tiles, half the squared length of a
centroid less x . c, both about the mean of all samples, and keeps the lowest. Update: the samples are ordered
by cluster (`_by_class`); a block adds up to BLOCK_R samples of one cluster, a second kernel adds its blocks
in float64, moves the centroid and notes how far. Every block has one place to write to, so no bit changes
from run to run; only whole numbers are added by atomics. One transfer an iteration tells the host whether an
assignment changed, a cluster is empty, and how far the centroids moved. Samples are moved to empty clusters
by their assignment, and the update is made again.
Bytes that must move: N D numbers twice an iteration, for the assignment and for the update. N = 1M, D = 512,
float32 is 4.1 GB, 1.37 ms on an H100 at 3.0 TB/s. Operations: 2 N K D, 66 G at K = 64, 1.1 ms at 60 TFLOP/s
in float32, of which little hides behind the first read. Predicted 2.3 ms an iteration; at N = 20,000 seven
launches and a transfer, 60 us. Measured on an H100: N = 50,000, K = 64 0.78 ms an iteration.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    _ELEMENT,
    _OPTIONS,
    _acc,
    _by_class,
    _cdiv,
    _class_of_chunk,
    _configuration,
    _most_chunks,
    _on,
    _order_configurations,
    _rows_of_chunk,
    _wide,
)
from ._tuning import size_class, tuned

_NO_CLUSTER = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["N", "K"])
def _assign_kernel(
    x_ptr,  # [N, D]
    offset_ptr,  # [D] in ACC
    c_ptr,  # [K, D] in ACC, contiguous
    assignments_ptr,  # int32 [N], those of the last iteration, changed in place
    changed_ptr,  # int32 [], how many changed is added
    N,
    K,
    D,
    stride_xn,
    stride_xd,
    DOT: tl.constexpr,  # whether tiles are multiplied as such
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lowest = tl.full((BLOCK_N,), float("inf"), ACC)
    nearest = tl.zeros((BLOCK_N,), tl.int32)
    for first in range(0, K, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        products = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        # Summed after the loop. A product inside the sum is fused with its first addition: the lanes that
        # hold one sum would each round another of its two terms, and then overwrite each other's.
        squares = tl.zeros((BLOCK_K, BLOCK_D), ACC)
        for start in range(0, D, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < D
            x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd
            x = tl.load(x_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0).to(ACC)
            x -= tl.load(offset_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
            c_ptrs = c_ptr + offs_k.to(tl.int64)[:, None] * D + offs_d[None, :]
            c = tl.load(c_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
            squares += c * c
            if DOT:
                products = tl.dot(x, tl.trans(c), products, input_precision="ieee")
            else:
                products += tl.sum(x[:, None, :] * c[None, :, :], axis=2)
        # |x - c|^2 / 2 less |x|^2 / 2, which is the same for every centroid.
        half_squares = 0.5 * tl.sum(squares, axis=1)
        score = tl.where(mask_k[None, :], half_squares[None, :] - products, float("inf"))
        best = tl.min(score, axis=1)
        at = tl.min(tl.where(score == best[:, None], offs_k[None, :], _NO_CLUSTER), axis=1)
        # Of equal distances the lowest cluster's stays.
        nearest = tl.where(best < lowest, at, nearest)
        lowest = tl.where(best < lowest, best, lowest)
    previous = tl.load(assignments_ptr + offs_n, mask=mask_n, other=0)
    tl.store(assignments_ptr + offs_n, nearest, mask=mask_n)
    tl.atomic_add(changed_ptr, tl.sum((mask_n & (nearest != previous)).to(tl.int32)))


@triton.jit(do_not_specialize=["K"])
def _cluster_sums_kernel(
    x_ptr,  # [N, D]
    offset_ptr,  # [D] in ACC
    order_ptr,  # int64 [N]: samples by cluster
    edges_ptr,  # int64 [2, K + 1]: where each cluster begins in `order`, where its chunks begin
    sums_ptr,  # [chunks, D] in ACC, contiguous
    K,
    D,
    stride_xn,
    stride_xd,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    k = _class_of_chunk(chunk, edges_ptr, K, BLOCK_C)
    if k < K:
        rows, mask_r, _ = _rows_of_chunk(chunk, k, order_ptr, edges_ptr, K, BLOCK_R)
        offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        mask = mask_r[:, None] & mask_d[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xn + offs_d[None, :] * stride_xd
        offset = tl.load(offset_ptr + offs_d, mask=mask_d, other=0.0)
        x = tl.where(mask, tl.load(x_ptrs, mask=mask, other=0.0).to(ACC) - offset[None, :], 0.0)
        tl.store(sums_ptr + chunk * D + offs_d, tl.sum(x, axis=0), mask=mask_d)


@triton.jit(do_not_specialize=["K"])
def _move_kernel(
    sums_ptr,  # [chunks, D] in ACC, contiguous
    edges_ptr,  # int64 [2, K + 1]
    count_ptr,  # int64 [K]
    c_ptr,  # [K, D] in ACC, contiguous
    moved_ptr,  # [K, D] in ACC, contiguous
    shift_ptr,  # float64 [K, blocks of dimensions]: squared movement
    K,
    D,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    chunks_ptr = edges_ptr + K + 1
    last = tl.load(chunks_ptr + k + 1)
    total = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(tl.load(chunks_ptr + k), last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask = (offs_r < last)[:, None] & mask_d[None, :]
        sums = tl.load(sums_ptr + offs_r[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        total += tl.sum(sums.to(tl.float64), axis=0)
    count = tl.load(count_ptr + k)
    c = tl.load(c_ptr + k * D + offs_d, mask=mask_d, other=0.0)
    moved = tl.where(count > 0, (total / tl.maximum(count, 1).to(tl.float64)).to(c.dtype), c)
    tl.store(moved_ptr + k * D + offs_d, moved, mask=mask_d)
    movement = moved.to(tl.float64) - c.to(tl.float64)
    shift = tl.sum(tl.where(mask_d, movement * movement, 0.0), axis=0)
    tl.store(shift_ptr + k * tl.num_programs(1) + tl.program_id(1), shift)


@triton.jit(do_not_specialize=["K", "num_shifts"])
def _state_kernel(
    changed_ptr,  # int32 []: how many assignments changed; becomes 0
    count_ptr,  # int64 [K]
    shift_ptr,  # float64 [num_shifts]
    variance_ptr,  # float64 []
    state_ptr,  # float64 [4]: changed, clusters without samples, summed squared movement, variance
    K,
    num_shifts,
    BLOCK: tl.constexpr,
):
    """Gather what the host wants to know of an iteration, for one transfer."""
    empty = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        empty += (tl.load(count_ptr + offs, mask=offs < K, other=1) == 0).to(tl.int32)
    shift = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_shifts, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        shift += tl.load(shift_ptr + offs, mask=offs < num_shifts, other=0.0)
    changed = tl.load(changed_ptr)
    tl.debug_barrier()
    tl.store(changed_ptr, tl.zeros_like(changed))
    tl.store(state_ptr, changed.to(tl.float64))
    tl.store(state_ptr + 1, tl.sum(empty, 0).to(tl.float64))
    tl.store(state_ptr + 2, tl.sum(shift, 0))
    tl.store(state_ptr + 3, tl.load(variance_ptr))


@triton.jit(do_not_specialize=["N"])
def _squared_distances_kernel(
    x_ptr,  # [N, D]
    offset_ptr,  # [D] in ACC
    c_ptr,  # [K, D] in ACC, contiguous
    assignments_ptr,  # int32 [N]
    distance_ptr,  # [N] in ACC
    N,
    D,
    stride_xn,
    stride_xd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    own = tl.load(assignments_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    squares = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        offset = tl.load(offset_ptr + offs_d, mask=offs_d < D, other=0.0)
        c = tl.load(c_ptr + own[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        difference = tl.where(mask, x - offset[None, :] - c, 0.0)
        squares += difference * difference
    tl.store(distance_ptr + offs_n, tl.sum(squares, axis=1), mask=mask_n)


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
    # Whole numbers: the order of these additions changes nothing.
    tl.atomic_add(table_ptr + k * C + y, one, mask=mask_n)


_MOVE_BLOCKS = {"BLOCK_R": 128, "BLOCK_D": 16}
_STATE_BLOCKS = {"BLOCK": 256}


def _assign_blocks(num_clusters: int, dtype: torch.dtype) -> dict:
    """Return the tiles of the assignment: up to 64 centroids meet a sample that is read once."""
    if _wide(dtype) == torch.float64:
        return {"DOT": False, "BLOCK_N": 16, "BLOCK_K": 8, "BLOCK_D": 16, "num_warps": 8}
    if num_clusters <= 16:
        # Found by compiling: others of this size spill on one architecture or another.
        block_d = 16 if dtype == torch.float32 else 32
        return {"DOT": True, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_D": block_d, "num_warps": 8}
    return {"DOT": True, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 8}


def _sums_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    """Return the tile of a chunk of one cluster: 16 KiB where it is summed, at most 64 dimensions wide."""
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_R": 16384 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d, "BLOCK_C": 128}


def _distance_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_N": 8192 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d}


class _Lloyd:
    """The samples about their mean, and the steps of an iteration on them."""

    def __init__(self, features: Tensor, num_clusters: int):
        self.features, self.num_clusters = features, num_clusters
        self.dtype = _wide(features.dtype)
        variance, self.offset = torch.var_mean(features.to(self.dtype), 0, correction=0)
        self.variance = variance.mean(dtype=torch.float64)
        self.acc = _acc(features.dtype)
        self.samples = (features.shape[0], features.shape[1], *features.stride())
        self.assignments = features.new_full((features.shape[0],), -1, dtype=torch.int32)
        self.changed = self.assignments.new_zeros(())

    def chosen(self, kernel: str, blocks: dict, *names: str, least: int = 1) -> dict:
        """Return what to launch a kernel with: the table's tile, or that stored for this GPU."""
        num_samples, num_dims, *_ = self.samples
        width = triton.next_power_of_2(num_dims)
        key = f"{kernel} {self.features.dtype} D<={width} {size_class(num_samples)}"
        launch, device = _OPTIONS | blocks, self.features.device
        return tuned("kmeans", key, launch, device, *names, "num_warps", least=least)

    def assign(
        self,
        centroids: Tensor,  # [K, D]
    ) -> None:
        """Assign every sample to the nearest centroid and add to `changed` how many that changed."""
        num_samples, num_dims, *strides = self.samples
        blocks = _assign_blocks(self.num_clusters, self.dtype)
        # Operands of matrix products have at least 16 rows.
        least = 16 if blocks["DOT"] else 1
        kernel = f"assign K<={triton.next_power_of_2(self.num_clusters)}"
        blocks = self.chosen(kernel, blocks, "BLOCK_N", "BLOCK_K", least=least)
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
        blocks = self.chosen("sums", _sums_blocks(num_dims, self.features.dtype), "BLOCK_R", "BLOCK_D")
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

    def squared_distances(self, centroids: Tensor) -> Tensor:  # [K, D] -> [N]
        num_samples, num_dims, *strides = self.samples
        distance = centroids.new_empty(num_samples)
        blocks = _distance_blocks(num_dims, self.features.dtype)
        blocks = self.chosen("distances", blocks, "BLOCK_N", "BLOCK_D")
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
    configurations = []

    def add(*item) -> None:
        configurations.append(_configuration(*item))

    index, size, stride = "*i64", "i32", "i64"
    for dtype, element in _ELEMENT.items():
        wide = _wide(dtype)
        x, acc = f"*{element}", f"*{_acc(dtype)}"
        constants = {"stride_xd": 1, "ACC": _acc(dtype)}
        for num_clusters in (8, 64):
            blocks = _assign_blocks(num_clusters, dtype)
            types = [x, acc, acc, "*i32", "*i32", size, size, size, stride]
            if num_clusters == 64 or blocks["DOT"]:
                add(_assign_kernel, types, constants | blocks)
        for num_dims in (1, 512):
            types = [x, acc, index, index, acc, size, size, stride]
            add(_cluster_sums_kernel, types, constants | _sums_blocks(num_dims, dtype))
            types = [x, acc, acc, "*i32", acc, size, size, stride]
            add(_squared_distances_kernel, types, constants | _distance_blocks(num_dims, dtype))
        if dtype == wide:
            add(_move_kernel, [acc, index, index, acc, acc, "*fp64", size, size], _MOVE_BLOCKS)
    for label in ("*i64", "*i32"):
        add(_count_pairs_kernel, [index, label, index, size, size, stride, stride], {"BLOCK_N": 512})
    add(_state_kernel, ["*i32", index, "*fp64", "*fp64", "*fp64", size, size], _STATE_BLOCKS)
    return configurations + _order_configurations("*i32")

"""Triton kernels that move the centroids to the means of their samples.

The samples are ordered by cluster (`_by_class`); a block adds up to BLOCK_R samples of one cluster, a second
kernel adds its blocks in float64, moves the centroid and notes how far. Every block writes to a place of its
own, so no bit changes from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._class_order import _class_of_chunk, _rows_of_chunk

_MOVE_BLOCKS = {"BLOCK_R": 128, "BLOCK_D": 16}
_STATE_BLOCKS = {"BLOCK": 256}


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

"""Triton kernels that assign samples to the nearest centroid, and measure how far it is.

A block of samples meets the centroids as a product of tiles, half the squared length of a centroid less
x . c, both about the mean of all samples, and keeps the lowest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._common import _load_tile, _wide

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
    PRECISION: tl.constexpr,  # of that product
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
            mask = mask_n[:, None] & mask_d[None, :]
            x = _load_tile(x_ptr, offs_n, offs_d, mask, stride_xn, stride_xd, ACC)
            x -= tl.load(offset_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
            c_ptrs = c_ptr + offs_k.to(tl.int64)[:, None] * D + offs_d[None, :]
            c = tl.load(c_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
            squares += c * c
            if DOT:
                products = tl.dot(x, tl.trans(c), products, input_precision=PRECISION)
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
    k = tl.load(assignments_ptr + offs_n, mask=mask_n, other=0).to(tl.int64)
    squares = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        x = _load_tile(x_ptr, offs_n, offs_d, mask, stride_xn, stride_xd, ACC)
        offset = tl.load(offset_ptr + offs_d, mask=offs_d < D, other=0.0)
        c = tl.load(c_ptr + k[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        difference = tl.where(mask, x - offset[None, :] - c, 0.0)
        squares += difference * difference
    tl.store(distance_ptr + offs_n, tl.sum(squares, axis=1), mask=mask_n)


def _assign_blocks(num_clusters: int, dtype: torch.dtype, device: str = "cuda") -> dict:
    """Return the tiles of the assignment: up to 64 centroids meet a sample that is read once.

    Args:
        num_clusters: K.
        dtype: of the features.
        device: its type; on a CPU it is Triton's interpreter, which knows no products of pieces.
    """
    if _wide(dtype) == torch.float64:
        blocks = {"DOT": False, "BLOCK_N": 16, "BLOCK_K": 8, "BLOCK_D": 16, "num_warps": 8}
        return blocks | {"PRECISION": "ieee"}
    # Each factor in three pieces of bfloat16, of which six products are taken: of what float32 tells apart
    # nothing is lost but the last place. Samples and centroids are about the mean, which takes float32.
    precision = "bf16x6" if device == "cuda" else "ieee"
    block_k = 16 if num_clusters <= 16 else 64
    # Found by compiling: with more dimensions the pieces spill.
    return {
        "DOT": True,
        "PRECISION": precision,
        "BLOCK_N": 64,
        "BLOCK_K": block_k,
        "BLOCK_D": 16,
        "num_warps": 4,
    }

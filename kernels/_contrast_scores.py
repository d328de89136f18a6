"""What the contrastive losses' main kernels share: the tiles of keys there are, scores of long rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tiles_of(positive, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the tiles of keys that hold positive keys, from and to, all tiles, and those that need masks."""
    num_tiles = tl.cdiv(K, BLOCK_K)
    positive_from = positive // BLOCK_K
    positive_to = tl.minimum((positive + BLOCK_N - 1) // BLOCK_K + 1, num_tiles)
    num_masked = positive_to - positive_from
    if (K % BLOCK_K != 0) & (positive_to < num_tiles):
        num_masked += 1
    return positive_from, positive_to, num_tiles, num_masked


@triton.jit
def _scores_in_pieces(
    q_ptr,
    tile_ptr,
    offs_qn,  # [BLOCK_N, 1]
    offs_kn,  # [BLOCK_K, 1]
    mask_n,  # [BLOCK_N]
    mask_k,  # [BLOCK_K]
    count,  # of columns
    width,  # of a packed row
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return scores [BLOCK_N, BLOCK_K] of rows that are too long to be held whole."""
    s = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for start in range(0, count, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask_c = (offs_c < width)[None, :]
        q_mask = mask_n[:, None] & mask_c
        q = tl.load(q_ptr + (offs_qn + offs_c[None, :]), mask=q_mask, other=0.0)
        k_mask = mask_k[:, None] & mask_c if MASKED else mask_c
        k = tl.load(tile_ptr + (offs_kn + offs_c[None, :]), mask=k_mask, other=0.0)
        s = tl.dot(q, tl.trans(k), acc=s, input_precision=PRECISION, out_dtype=ACC)
    return s

"""Loads, running sums and weights that the kernels of fused logits, forward and backward, share.

A tile is [samples, modalities, classes]. More classes than fit into one come tile by tile with a running
maximum, whose sums move along with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# By their places, as in mmfast/ops/logit_fusion.py.
_ENTROPY = tl.constexpr(0)
_NO_CLASS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _load_present(present_ptr, offs_n, offs_m, N, M, stride_hm, stride_hn, HAS_PRESENT: tl.constexpr):
    """Return which of a block's samples have which modality, [BLOCK_N, BLOCK_M]."""
    here = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    if HAS_PRESENT:
        ptrs = present_ptr + offs_n[:, None] * stride_hn + offs_m[None, :] * stride_hm
        here &= tl.load(ptrs, mask=here, other=0) != 0
    return here


@triton.jit
def _load_logits(
    row_ptrs,  # [BLOCK_N, BLOCK_M]
    here,  # [BLOCK_N, BLOCK_M]
    offs_c,  # [BLOCK_C]
    C,
    stride_zc,
    ACC: tl.constexpr,
):
    """Return a tile of logits: 0 where a modality is absent, -inf beyond the last class."""
    is_class = (offs_c < C)[None, None, :]
    ptrs = row_ptrs[:, :, None] + offs_c.to(tl.int64)[None, None, :] * stride_zc
    z = tl.load(ptrs, mask=here[:, :, None] & is_class, other=0.0).to(ACC)
    return tl.where(is_class, z, float("-inf"))


@triton.jit
def _shifted(z, top):
    """Return z - top, [BLOCK_N, BLOCK_M, BLOCK_C]."""
    # Before the first finite logit the maximum is -inf, and -inf - -inf would be NaN.
    return z - tl.where(top == float("-inf"), 0.0, top)[:, :, None]


@triton.jit
def _no_classes(BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    """Return the sums and the maximum before the first class, as `_accumulate` takes them."""
    top = tl.full((BLOCK_N, BLOCK_M), float("-inf"), ACC)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    return top, zeros, zeros, tl.zeros((BLOCK_N, BLOCK_M), tl.int32)


@triton.jit
def _accumulate(
    z,  # [BLOCK_N, BLOCK_M, BLOCK_C]
    offs_c,  # [BLOCK_C]
    top,  # [BLOCK_N, BLOCK_M], as the three that follow: of the classes so far, the maximum,
    s,  # the sum of e,
    t,  # that of e (z - max), for the entropy,
    top_class,  # the lowest class with the maximum, for the certainty
    SCORE: tl.constexpr,
):
    """Return the sums and the maximum with the classes of a tile."""
    tile_top = tl.max(z, axis=2)
    if SCORE != _ENTROPY:
        tile_class = tl.min(tl.where(z == tile_top[:, :, None], offs_c[None, None, :], _NO_CLASS), axis=2)
        top_class = tl.where(tile_top > top, tile_class, top_class)
    new_top = tl.maximum(top, tile_top)
    shift = tl.where(top == float("-inf"), 0.0, top - new_top)
    scale = tl.exp(shift)
    x = _shifted(z, new_top)
    e = tl.exp(x)
    if SCORE == _ENTROPY:
        # An excluded class has e = 0 and z - max = -inf, whose product is to be 0.
        t = scale * (t + s * shift) + tl.sum(tl.where(x == float("-inf"), 0.0, e * x), axis=2)
    s = scale * s + tl.sum(e, axis=2)
    return new_top, s, t, top_class


@triton.jit
def _weights(s, t, here, temperature, SCORE: tl.constexpr):
    """Return the scores and their softmax over the modalities, 0 for those that are absent."""
    score = t / s - tl.log(s) if SCORE == _ENTROPY else 1 / s / temperature
    # An absent modality has zeros for logits, and a score that is finite.
    best = tl.max(tl.where(here, score, float("-inf")), axis=1)
    best = tl.where(best == float("-inf"), 0.0, best)
    w = tl.where(here, tl.exp(score - best[:, None]), 0.0)
    return score, tl.where(here, w / tl.sum(w, axis=1)[:, None], 0.0)

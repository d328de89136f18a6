"""Loads, sums over classes and weights that the kernels of fused logits, forward and backward, share.

A tile is [modalities, samples, lanes], and several are held at once, the parts of a tuple: lane l of part k
holds class k LANES + l. So a row lies in few neighbouring threads, each with several of its classes and with
all modalities: what is summed over classes or modalities is summed within a thread first, and few sums go
from thread to thread. Of a tuple with all classes only the last part asks where they end.
"""

from __future__ import annotations

import triton
import triton.language as tl

# By their places, as in mmfast/ops/logit_fusion.py.
_ENTROPY = tl.constexpr(0)
_NO_CLASS = tl.constexpr(0x7FFFFFFF)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Its exponential is 0 in every dtype, and it is finite: stands for -inf where 0 times that would be NaN.
_VANISHED = tl.constexpr(-1000.0)


@triton.jit
def _load_present(
    present_ptr,
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    M,
    N,
    stride_hm,
    stride_hn,
    HAS_PRESENT: tl.constexpr,
):
    """Return which of a block's samples have which modality, [BLOCK_M, BLOCK_N]."""
    here = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if HAS_PRESENT:
        ptrs = present_ptr + offs_m[:, None] * stride_hm + offs_n[None, :] * stride_hn
        here &= tl.load(ptrs, mask=here, other=0) != 0
    return here


@triton.jit
def _load_parts(
    ptrs,  # [..., LANES]: of part 0
    mask,  # [..., 1]: rows that are read
    offs_c,  # [..., LANES]: classes of part 0
    C,
    stride_c,
    beyond,  # or [..., 1]: what stands for a class that is none
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return a tuple of parts: 0 in rows that are not read, `beyond` where there is no class."""
    parts = ()
    for k in tl.static_range(PARTS):
        part_ptrs = ptrs + tl.cast(stride_c, tl.int64) * (k * LANES)
        if ONE_TILE and k < PARTS - 1:
            part = tl.load(part_ptrs, mask=mask, other=0.0)
        else:
            part = tl.load(part_ptrs, mask=mask & (offs_c < C - k * LANES), other=beyond)
        parts = parts + (part.to(ACC),)  # noqa: RUF005, Triton has no starred items
    return parts


@triton.jit
def _finite_top(top):
    """Return the maximum to subtract: 0 where there is none, as -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _maxima(parts, PARTS: tl.constexpr):
    """Return the maximum of each lane over a tuple of parts."""
    top = parts[0]
    for k in tl.static_range(1, PARTS):
        top = tl.maximum(top, parts[k])
    return top


@triton.jit
def _lowest_class(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]
    top,  # [BLOCK_M, BLOCK_N, LANES] or [BLOCK_M, BLOCK_N, 1]
    offs_c,  # [1, 1, LANES]
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return the lowest class of each lane that has the maximum, [BLOCK_M, BLOCK_N, LANES]."""
    found = tl.where(parts[PARTS - 1] == top, offs_c + (PARTS - 1) * LANES, _NO_CLASS)
    for i in tl.static_range(1, PARTS):
        found = tl.where(parts[PARTS - 1 - i] == top, offs_c + (PARTS - 1 - i) * LANES, found)
    return found


@triton.jit
def _lane_sums(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]
    top,  # [BLOCK_M, BLOCK_N, LANES] or [BLOCK_M, BLOCK_N, 1], finite
    SCORE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return each lane's sums of e = exp(z - top) and, for the entropy, of e (z - top), and all e."""
    s = tl.zeros_like(parts[0])
    t = tl.zeros_like(parts[0])
    exponentials = ()
    for k in tl.static_range(PARTS):
        x = parts[k] - top
        e = _exp(x)
        s += e
        if SCORE == _ENTROPY:
            t += e * tl.maximum(x, _VANISHED)
        exponentials = exponentials + (e,)  # noqa: RUF005
    return s, t, exponentials


@triton.jit
def _rescaled(s, t, shift, SCORE: tl.constexpr):
    """Return sums about a maximum that is by `-shift` larger."""
    shift = tl.maximum(shift, _VANISHED)
    scale = _exp(shift)
    if SCORE == _ENTROPY:
        t = scale * (t + s * shift)
    return scale * s, t


@triton.jit
def _accumulate(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]
    top,  # [BLOCK_M, BLOCK_N, LANES], as the two that follow: of each lane's classes so far, the maximum,
    s,  # the sum of e,
    t,  # that of e (z - max), for the entropy
    SCORE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the maxima and sums of lanes with the classes of some more parts."""
    new_top = tl.maximum(top, _maxima(parts, PARTS))
    finite = _finite_top(new_top)
    s, t = _rescaled(s, t, tl.where(top == float("-inf"), 0.0, top - finite), SCORE)
    more_s, more_t, _ = _lane_sums(parts, finite, SCORE, PARTS)
    return new_top, s + more_s, t + more_t


@triton.jit
def _joined(
    lane_top,  # [BLOCK_M, BLOCK_N, LANES], as those that follow
    s,
    t,
    SCORE: tl.constexpr,
):
    """Return a row's maximum and sums, each [BLOCK_M, BLOCK_N], from those of its lanes."""
    top = tl.max(lane_top, axis=2)
    shift = tl.where(lane_top == float("-inf"), 0.0, lane_top - _finite_top(top)[:, :, None])
    s, t = _rescaled(s, t, shift, SCORE)
    return top, tl.sum(s, axis=2), tl.sum(t, axis=2)


@triton.jit
def _weights(
    s,  # [BLOCK_M, BLOCK_N], as the two that follow
    t,
    here,
    temperature,
    SCORE: tl.constexpr,
):
    """Return 1 / s, t / s and the softmax of the scores over the modalities, 0 for those that are absent."""
    r = 1.0 / s
    mean = t * r
    score = mean - tl.log(s) if SCORE == _ENTROPY else r * (1.0 / temperature)
    # An absent modality has zeros for logits, and a score that is finite.
    best = tl.max(tl.where(here, score, float("-inf")), axis=0)
    w = tl.where(here, _exp(score - _finite_top(best)[None, :]), 0.0)
    return r, mean, tl.where(here, w * (1.0 / tl.sum(w, axis=0))[None, :], 0.0)

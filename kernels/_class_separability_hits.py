"""Triton kernels that count, per dimension, the samples whose own class's centroid is the nearest.

One kernel finds, for every centroid, the exact interval in which it is nearest, by comparison with all
others; one reads the features in their order, low <= x < high, and adds integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _acc, _cdiv, _Configurations, _load_tile, _on, _row_blocks, _tuned_rows, _wide


@triton.jit
def _finite_or_inf(c):
    return tl.where(c - c == 0, c, float("inf"))


@triton.jit
def _next_up(x, BITS: tl.constexpr):
    bits = tl.where(x == 0, 0.0, x).to(BITS, bitcast=True)
    bits = tl.where(x < 0, bits - 1, bits + 1)
    return tl.where(x == float("inf"), x, bits.to(x.dtype, bitcast=True))


@triton.jit
def _end(a, b, tie_to_b, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Return the smallest value of DTYPE nearer to b than to a < b, both float64: where 2x > a + b.

    The sum is kept with its rounding error, and x doubled, which is exact where halving the sum is not.
    """
    # A sum out of range is that of two values so large that their halves are exact.
    unit = tl.where((a + b) - (a + b) == 0, 1.0, 0.5).to(tl.float64)
    a = a * unit
    b = b * unit
    twice = a + b
    b_rounded = twice - a
    error = (a - (twice - b_rounded)) + (b - b_rounded)
    tie_to_b = (error < 0) | ((error == 0) & tie_to_b)
    end = (twice / (2 * unit)).to(DTYPE)
    doubled = 2 * unit * end.to(tl.float64)
    on_b_side = (doubled > twice) | ((doubled == twice) & tie_to_b)
    return tl.where(on_b_side, end, _next_up(end, BITS))


@triton.jit
def _neighbours(
    column_ptrs,  # [BLOCK_D], of the first centroid
    c,  # [BLOCK_C, BLOCK_D]
    k,  # [BLOCK_C, 1], its classes
    mask_d,  # [BLOCK_D]
    C,
    stride_cc,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the next centroids below and above, their lowest classes, and where a lower class is equal."""
    below = tl.full((BLOCK_C, BLOCK_D), float("-inf"), ACC)
    above = tl.full((BLOCK_C, BLOCK_D), float("inf"), ACC)
    below_class = tl.zeros((BLOCK_C, BLOCK_D), tl.int32)
    above_class = tl.zeros((BLOCK_C, BLOCK_D), tl.int32)
    is_beaten = tl.zeros((BLOCK_C, BLOCK_D), tl.int32)
    for j in range(C):
        other = _finite_or_inf(tl.load(column_ptrs, mask=mask_d, other=0.0).to(ACC))[None, :]
        column_ptrs += stride_cc
        # The first class of those that share a centroid is the one that can win.
        is_below = (other < c) & (other > below)
        below = tl.where(is_below, other, below)
        below_class = tl.where(is_below, j, below_class)
        is_above = (other > c) & (other < above)
        above = tl.where(is_above, other, above)
        above_class = tl.where(is_above, j, above_class)
        is_beaten |= ((other == c) & (j < k)).to(tl.int32)
    return below, below_class, above, above_class, is_beaten


@triton.jit(do_not_specialize=["C"])
def _class_intervals_kernel(
    c_ptr,  # [C, D]
    low_ptr,  # [C, D], contiguous
    high_ptr,  # [C, D], contiguous
    hits_ptr,  # int64 [D], to become zeros; None: there are none
    C,
    D,
    stride_cc,
    stride_cd,
    LOWEST: tl.constexpr,  # the least finite value of DTYPE
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,  # what centroids are compared in
    DTYPE: tl.constexpr,  # of the ends
    BITS: tl.constexpr,  # the integer type as wide
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    mask = (offs_c < C)[:, None] & mask_d[None, :]
    if hits_ptr is not None:
        zeros = tl.zeros((BLOCK_D,), tl.int64)
        if tl.program_id(0) == 0:
            tl.store(hits_ptr + offs_d, zeros, mask=mask_d)
    k = offs_c[:, None]
    column_ptrs = c_ptr + offs_d * stride_cd
    c_ptrs = column_ptrs[None, :] + offs_c.to(tl.int64)[:, None] * stride_cc
    c = _finite_or_inf(tl.load(c_ptrs, mask=mask, other=0.0).to(ACC))
    below, below_class, above, above_class, is_beaten = _neighbours(
        column_ptrs, c, k, mask_d, C, stride_cc, BLOCK_C, BLOCK_D, ACC
    )
    centre = c.to(tl.float64)
    low = _end(below.to(tl.float64), centre, k < below_class, DTYPE, BITS)
    low = tl.where(below == float("-inf"), LOWEST, low)
    high = _end(centre, above.to(tl.float64), above_class < k, DTYPE, BITS)
    high = tl.where(above == float("inf"), float("inf"), high)
    wins = (is_beaten == 0) & (c < float("inf"))
    out = offs_c.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(low_ptr + out, tl.where(wins, low, float("inf")), mask=mask)
    tl.store(high_ptr + out, tl.where(wins, high, float("-inf")), mask=mask)


@triton.jit(do_not_specialize=["N", "C"])
def _dimension_hits_kernel(
    x_ptr,  # [N, D]
    labels_ptr,  # [N]
    low_ptr,  # [C, D], contiguous
    high_ptr,  # [C, D], contiguous
    hits_ptr,  # int64 [D], zeros at first
    N,
    C,
    D,
    stride_xn,
    stride_xd,
    stride_ln,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_d = offs_d < D
    hits = tl.zeros((BLOCK_D,), dtype=tl.int32)
    first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK_N)
    for tile in range(TILES):
        offs_n = first + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_n, other=0).to(tl.int64)
        mask = (mask_n & (y >= 0) & (y < C))[:, None] & mask_d[None, :]
        x = _load_tile(x_ptr, offs_n, offs_d, mask, stride_xn, stride_xd, ACC)
        offs = y[:, None] * D + offs_d[None, :]
        low = tl.load(low_ptr + offs, mask=mask, other=float("inf"))
        high = tl.load(high_ptr + offs, mask=mask, other=float("-inf"))
        hits += tl.sum(((x >= low) & (x < high)).to(tl.int32), axis=0)
    # Integers: the order of these additions changes nothing.
    tl.atomic_add(hits_ptr + offs_d, hits.to(tl.int64), mask=mask_d)


_BITS = {torch.float32: tl.int32, torch.float64: tl.int64}
# Contraction to fused multiply-adds would spoil the exact sums of the interval ends.
_EXACT_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_INTERVAL_BLOCKS = {"BLOCK_C": 8, "BLOCK_D": 64}
# Tiles of samples that one block of the hits goes through with the same dimensions.
_HITS_TILES = 8


def class_intervals(
    centroids: Tensor,  # [C, D]
    dtype: torch.dtype,  # float32 or float64: what features are compared in
    hits: Tensor | None = None,  # int64 [D], zeroed along the way
) -> tuple[Tensor, Tensor]:  # [C, D], [C, D]
    """Return ends such that, for x of `dtype`, centroid k is nearest just when low[k] <= x < high[k]."""
    num_classes, num_dims = centroids.shape
    low = centroids.new_empty(num_classes, num_dims, dtype=dtype)
    high = torch.empty_like(low)
    blocks = _INTERVAL_BLOCKS
    grid = (_cdiv(num_classes, blocks["BLOCK_C"]), _cdiv(num_dims, blocks["BLOCK_D"]))
    with _on(centroids.device):
        _class_intervals_kernel[grid](
            centroids,
            low,
            high,
            hits,
            num_classes,
            num_dims,
            *centroids.stride(),
            LOWEST=torch.finfo(dtype).min,
            ACC=_acc(centroids.dtype),
            DTYPE=_ELEMENT[dtype],
            BITS=_BITS[dtype],
            **blocks,
            **_EXACT_OPTIONS,
        )
    return low, high


def dimension_hits(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    """Return in how many samples the own class's centroid is the nearest, dimension by dimension."""
    num_samples, num_dims = features.shape
    if features.numel() == 0:
        return features.new_zeros(num_dims, dtype=torch.int64)
    hits = features.new_empty(num_dims, dtype=torch.int64)
    low, high = class_intervals(centroids, _wide(features.dtype), hits)
    blocks = _row_blocks(num_dims, features.dtype)
    blocks = _tuned_rows("class_separability", "hits", features, blocks, "BLOCK_N", "BLOCK_D")
    rows = _HITS_TILES * blocks["BLOCK_N"]
    with _on(features.device):
        _dimension_hits_kernel[(_cdiv(num_samples, rows), _cdiv(num_dims, blocks["BLOCK_D"]))](
            features,
            labels,
            low,
            high,
            hits,
            num_samples,
            centroids.shape[0],
            num_dims,
            *features.stride(),
            labels.stride(0),
            TILES=_HITS_TILES,
            ACC=_acc(features.dtype),
            **blocks,
        )
    return hits


def _hits_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = _Configurations()
    index, size, stride = "*i64", "i32", "i64"
    for dtype, element in _ELEMENT.items():
        x, acc = f"*{element}", f"*{_acc(dtype)}"
        for num_dims in (1, 512):
            constants = {"TILES": _HITS_TILES, "ACC": _acc(dtype), **_row_blocks(num_dims, dtype)}
            types = [x, index, acc, acc, index, size, size, size, stride, stride, stride]
            configurations.add(_dimension_hits_kernel, types, constants)
        for end in (torch.float32, torch.float64):
            ends = f"*{_ELEMENT[end]}"
            constants = {"LOWEST": torch.finfo(end).min, "ACC": _acc(dtype), "DTYPE": _ELEMENT[end]}
            constants |= {"BITS": _BITS[end], **_INTERVAL_BLOCKS}
            types = [x, ends, ends, index, size, size, stride, stride]
            configurations.add(_class_intervals_kernel, types, constants, _EXACT_OPTIONS)
    return configurations

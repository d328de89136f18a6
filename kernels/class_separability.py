"""Triton kernels of class moments, their gradient, and hits: samples whose own class's centroid is nearest.

Moments: the samples are ordered by class (`_by_class`). A block takes up to BLOCK_R samples of one class
through registers, a tile of dimensions at a time: their mean, then the squares about it, so nothing cancels.
A second kernel merges the blocks of a class in float64. Every block has one place to write to: neither
atomics nor the number of classes enter, and no bit changes from run to run.
Hits: one kernel finds, for every centroid, the exact interval in which it is nearest, by comparison with all
others; one reads the features in their order, low <= x < high, and adds whole numbers.
Bytes that must move: N D numbers once, the gradient twice. N = 1M, D = 512, float32 is 2.05 GB, 0.68 ms on
an H100 at 3.0 TB/s; the blocks' moments add 6% to that, gathered rows perhaps 10%: predicted 0.80 ms for the
moments of 10 classes, 0.75 ms for the hits. At N = 20,000 the features take 14 us; the order, three launches,
10 us more, the intervals 5 us. Up to 512 samples the moments are three launches in all. Measured on an H100,
host included, N = 20,000: moments 0.26 ms, hits 0.21 ms.
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


@triton.jit(do_not_specialize=["C"])
def _class_moments_fwd_kernel(
    x_ptr,  # [N, D]
    order_ptr,  # int64 [N]: samples by class
    edges_ptr,  # int64 [2, C + 1]: where each class begins in `order`, where its chunks begin
    mean_ptr,  # [chunks, D], contiguous
    squares_ptr,  # [chunks, D], contiguous: sums of squares about the mean
    C,
    D,
    stride_xn,
    stride_xd,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    k = _class_of_chunk(chunk, edges_ptr, C, BLOCK_C)
    if k < C:
        rows, mask_r, count = _rows_of_chunk(chunk, k, order_ptr, edges_ptr, C, BLOCK_R)
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = mask_r[:, None] & (offs_d < D)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xn + offs_d.to(tl.int64)[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        count = count.to(ACC)
        mean = tl.sum(x, axis=0) / count
        deviation = tl.where(mask, x - mean[None, :], 0.0)
        # What the mean lost to rounding; an infinite mean lost nothing.
        rest = tl.sum(deviation, axis=0) / count
        rest = tl.where(mean - mean == 0, rest, 0.0)
        # Of equal numbers this is one of them: their deviations are 0, however large they are.
        best = mean + rest
        rest -= best - mean
        deviation = tl.where(mask, x - best[None, :], 0.0)
        squares = tl.sum(deviation * deviation, axis=0) - rest * rest * count
        out = chunk * D + offs_d
        tl.store(mean_ptr + out, best, mask=offs_d < D)
        tl.store(squares_ptr + out, squares, mask=offs_d < D)


@triton.jit
def _moments_in_range(
    x_ptrs, order_ptr, first, last, mask_d, stride_xn, LARGE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return mean and variance of columns of a class whose sums left the range of numbers on the way.

    Squares of float32 fit into float64; float64 is taken times a power of two, as only numbers near its ends
    come here.
    """
    scale = tl.full((), 2.0**-600 if LARGE else 1.0, tl.float64)
    number = (last - first).to(tl.float64)
    # Of equal numbers, which may be the largest there is, the mean is one of them.
    row = tl.load(order_ptr + first)
    origin = tl.load(x_ptrs + row * stride_xn, mask=mask_d, other=0.0).to(tl.float64) * scale
    origin = tl.where(origin - origin == 0, origin, 0.0)
    total = tl.zeros_like(origin)
    for start in range(first, last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask = (offs_r < last)[:, None] & mask_d[None, :]
        rows = tl.load(order_ptr + offs_r, mask=offs_r < last, other=0)
        x = tl.load(x_ptrs[None, :] + rows[:, None] * stride_xn, mask=mask, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(mask, x * scale - origin[None, :], 0.0), axis=0)
    centre = origin + total / number
    rest = tl.zeros_like(origin)
    squares = tl.zeros_like(origin)
    # Of an infinite sample the mean is infinite, and the deviation from it no number.
    for start in range(first, last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask = (offs_r < last)[:, None] & mask_d[None, :]
        rows = tl.load(order_ptr + offs_r, mask=offs_r < last, other=0)
        x = tl.load(x_ptrs[None, :] + rows[:, None] * stride_xn, mask=mask, other=0.0).to(tl.float64)
        deviation = tl.where(mask, x * scale - centre[None, :], 0.0)
        rest += tl.sum(deviation, axis=0)
        squares += tl.sum(deviation * deviation, axis=0)
    squares -= rest * (rest / number)
    squares = tl.where(squares < 0, 0.0, squares)
    # What rounding left of the deviations belongs to the mean.
    share = rest / number
    centre += tl.where(share - share == 0, share, 0.0)
    return centre / scale, squares / number / scale / scale


@triton.jit(do_not_specialize=["C"])
def _class_moments_merge_kernel(
    x_ptr,  # [N, D]
    order_ptr,  # int64 [N]: samples by class
    mean_ptr,  # [chunks, D], contiguous
    squares_ptr,  # [chunks, D], contiguous
    edges_ptr,  # int64 [2, C + 1]
    class_mean_ptr,  # [C, D], contiguous
    class_var_ptr,  # [C, D], contiguous
    C,
    D,
    stride_xn,
    stride_xd,
    CHUNK: tl.constexpr,  # BLOCK_R of the chunks
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    k = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    count = tl.load(edges_ptr + k + 1) - tl.load(edges_ptr + k)
    first = tl.load(edges_ptr + C + 1 + k)
    last = tl.load(edges_ptr + C + 2 + k)
    # A class without samples has no row; any other serves it.
    row = tl.minimum(first, tl.maximum(last - 1, 0))
    origin = tl.load(mean_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float64)
    total = tl.zeros((BLOCK_D,), dtype=tl.float64)
    shift = tl.zeros((BLOCK_D,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float64)
    for start in range(first, last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask = (offs_r < last)[:, None] & mask_d[None, :]
        offs = offs_r[:, None] * D + offs_d[None, :]
        size = tl.minimum(count - (offs_r - first) * CHUNK, CHUNK).to(tl.float64)[:, None]
        mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        inner = tl.load(squares_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        deviation = mean - origin[None, :]
        total += tl.sum(tl.where(mask, size * mean, 0.0), axis=0)
        shift += tl.sum(tl.where(mask, size * deviation, 0.0), axis=0)
        squares += tl.sum(tl.where(mask, inner + size * deviation * deviation, 0.0), axis=0)
    # Zero divided by zero: the NaN of a class without samples.
    number = count.to(tl.float64)
    var = (squares - shift * shift / number) / number
    # Less than infinity: squares left the range, and so did what is taken off.
    var = tl.where(var < 0, tl.where(var - var == 0, 0.0, -var), var)
    element = class_mean_ptr.dtype.element_ty
    class_mean = (total / number).to(element)
    class_var = var.to(element)
    is_lost = mask_d & ((class_mean - class_mean != 0) | (class_var - class_var != 0))
    if (count > 0) & (tl.sum(is_lost.to(tl.int32), axis=0) > 0):
        x_ptrs = x_ptr + offs_d.to(tl.int64) * stride_xd
        begin = tl.load(edges_ptr + k)
        better, better_var = _moments_in_range(
            x_ptrs, order_ptr, begin, begin + count, mask_d, stride_xn, element == tl.float64, BLOCK_R
        )
        class_mean = tl.where(is_lost, better.to(element), class_mean)
        class_var = tl.where(is_lost, better_var.to(element), class_var)
    tl.store(class_mean_ptr + k * D + offs_d, class_mean, mask=mask_d)
    tl.store(class_var_ptr + k * D + offs_d, class_var, mask=mask_d)


@triton.jit(do_not_specialize=["N", "C"])
def _class_moments_bwd_kernel(
    dmean_ptr,  # [C, D], contiguous
    dvar_ptr,  # [C, D], contiguous
    x_ptr,  # [N, D]
    labels_ptr,  # [N]
    count_ptr,  # int64 [C], contiguous
    mean_ptr,  # [C, D], contiguous
    dx_ptr,  # [N, D], contiguous
    N,
    C,
    D,
    stride_xn,
    stride_xd,
    stride_ln,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    mask_n = offs_n < N
    y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_n, other=0).to(tl.int64)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    # A label that names no class must not be looked up.
    known = mask & ((y >= 0) & (y < C))[:, None]
    x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
    own = y[:, None] * D + offs_d[None, :]
    dmean = tl.load(dmean_ptr + own, mask=known, other=0.0)
    dvar = tl.load(dvar_ptr + own, mask=known, other=0.0)
    mean = tl.load(mean_ptr + own, mask=known, other=0.0)
    count = tl.load(count_ptr + y, mask=mask_n & (y >= 0) & (y < C), other=1).to(ACC)
    # The factors of the class first: a deviation times dvar alone may be out of range.
    scale = (1 / count)[:, None]
    dx = dmean * scale + (x.to(ACC) - mean) * (dvar * (2 * scale))
    tl.store(dx_ptr + offs_n[:, None] * D + offs_d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    """Return the smallest number of DTYPE nearer to b than to a < b, both float64: where 2x > a + b.

    The sum is kept with its rounding error, and x doubled, which is exact where halving the sum is not.
    """
    # A sum out of range is that of two numbers so large that their halves are exact.
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
    LOWEST: tl.constexpr,  # the least finite number of DTYPE
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
        x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        own = y[:, None] * D + offs_d[None, :]
        low = tl.load(low_ptr + own, mask=mask, other=float("inf"))
        high = tl.load(high_ptr + own, mask=mask, other=float("-inf"))
        hits += tl.sum(((x >= low) & (x < high)).to(tl.int32), axis=0)
    # Whole numbers: the order of these additions changes nothing.
    tl.atomic_add(hits_ptr + offs_d, hits.to(tl.int64), mask=mask_d)


_BITS = {torch.float32: tl.int32, torch.float64: tl.int64}
# Contraction to fused multiply-adds would spoil the exact sums of the interval ends.
_EXACT_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_MERGE_BLOCKS = {"BLOCK_R": 128, "BLOCK_D": 16}
_INTERVAL_BLOCKS = {"BLOCK_C": 8, "BLOCK_D": 64}


def _moments_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    """Return the tile of a chunk of one class: 16 KiB where it is summed, at most 64 dimensions wide."""
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_R": 16384 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d, "BLOCK_C": 128}


def _row_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    """Return the tile of the kernels that read the samples in their order: 16 or 32 bytes a thread."""
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_N": 8192 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d}


def _chosen(kernel: str, features: Tensor, blocks: dict) -> dict:
    """Return what to launch a kernel over samples with: the table's tile, or that stored for this GPU."""
    num_samples, num_dims = features.shape
    key = f"{kernel} {features.dtype} D<={triton.next_power_of_2(num_dims)} {size_class(num_samples)}"
    names = [name for name in blocks if name != "BLOCK_C"]
    return tuned("class_separability", key, _OPTIONS | blocks, features.device, *names, "num_warps")


# Tiles of samples that one block of the hits goes through with the same dimensions.
_HITS_TILES = 8


def class_moments_fwd(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [C], [C, D], [C, D]
    """Return the number, mean and population variance of each class's samples."""
    num_samples, num_dims = features.shape
    wide = _wide(features.dtype)
    if num_samples == 0:
        mean = features.new_full((num_classes, num_dims), float("nan"), dtype=wide)
        return labels.new_zeros(num_classes, dtype=torch.int64), mean, mean.clone()
    mean = features.new_empty(num_classes, num_dims, dtype=wide)
    var = torch.empty_like(mean)
    if num_dims == 0:
        return _by_class(labels, num_classes, 1).count, mean, var
    blocks = _chosen("moments", features, _moments_blocks(num_dims, features.dtype))
    chunk = blocks["BLOCK_R"]
    order, edges, count = _by_class(labels, num_classes, chunk)
    max_chunks = _most_chunks(num_samples, num_classes, chunk)
    chunk_mean = features.new_empty(max_chunks, num_dims, dtype=wide)
    chunk_squares = torch.empty_like(chunk_mean)
    with _on(features.device):
        _class_moments_fwd_kernel[(max_chunks, _cdiv(num_dims, blocks["BLOCK_D"]))](
            features,
            order,
            edges,
            chunk_mean,
            chunk_squares,
            num_classes,
            num_dims,
            *features.stride(),
            ACC=_acc(features.dtype),
            **blocks,
        )
        _class_moments_merge_kernel[(num_classes, _cdiv(num_dims, _MERGE_BLOCKS["BLOCK_D"]))](
            features,
            order,
            chunk_mean,
            chunk_squares,
            edges,
            mean,
            var,
            num_classes,
            num_dims,
            *features.stride(),
            CHUNK=chunk,
            **_MERGE_BLOCKS,
            **_OPTIONS,
        )
    return count, mean, var


def class_moments_bwd(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    count: Tensor,  # [C]
    mean: Tensor,  # [C, D]
) -> Tensor:  # [N, D]
    """Return (dmean_y + 2 (x - mean_y) dvar_y) / count_y."""
    num_samples, num_dims = features.shape
    dfeatures = features.new_empty(num_samples, num_dims)
    if dfeatures.numel() == 0:
        return dfeatures
    dmean, dvar = (gradient.to(mean.dtype).contiguous() for gradient in (dmean, dvar))
    blocks = _chosen("moments bwd", features, _row_blocks(num_dims, features.dtype))
    grid = (_cdiv(num_samples, blocks["BLOCK_N"]), _cdiv(num_dims, blocks["BLOCK_D"]))
    with _on(features.device):
        _class_moments_bwd_kernel[grid](
            dmean,
            dvar,
            features,
            labels,
            count.contiguous(),
            mean.contiguous(),
            dfeatures,
            num_samples,
            mean.shape[0],
            num_dims,
            *features.stride(),
            labels.stride(0),
            ACC=_ELEMENT[mean.dtype],
            **blocks,
        )
    return dfeatures


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
    blocks = _chosen("hits", features, _row_blocks(num_dims, features.dtype))
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


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = []

    def add(*item) -> None:
        configurations.append(_configuration(*item))

    index, size, stride = "*i64", "i32", "i64"
    for dtype, element in _ELEMENT.items():
        x, acc = f"*{element}", f"*{_acc(dtype)}"
        for num_dims in (1, 512):
            constants = {"ACC": _acc(dtype), **_moments_blocks(num_dims, dtype)}
            types = [x, index, index, acc, acc, size, size, stride]
            add(_class_moments_fwd_kernel, types, {"stride_xd": 1, **constants})
            constants = {"ACC": _acc(dtype), **_row_blocks(num_dims, dtype)}
            types = [x, index, acc, acc, index, size, size, size, stride, stride, stride]
            add(_dimension_hits_kernel, types, {"TILES": _HITS_TILES, **constants})
        types = [acc, acc, x, index, index, acc, x, size, size, size, stride, stride, stride]
        add(_class_moments_bwd_kernel, types, {"ACC": _acc(dtype), **_row_blocks(512, dtype)})
        for end in (torch.float32, torch.float64):
            ends = f"*{_ELEMENT[end]}"
            constants = {"LOWEST": torch.finfo(end).min, "ACC": _acc(dtype), "DTYPE": _ELEMENT[end]}
            constants |= {"BITS": _BITS[end], **_INTERVAL_BLOCKS}
            types = [x, ends, ends, index, size, size, stride, stride]
            add(_class_intervals_kernel, types, constants, _EXACT_OPTIONS)
        constants = {"stride_xd": 1, "CHUNK": _moments_blocks(512, dtype)["BLOCK_R"], **_MERGE_BLOCKS}
        types = [x, index, acc, acc, index, acc, acc, size, size, stride]
        add(_class_moments_merge_kernel, types, constants)
    return configurations + _order_configurations("*i64")

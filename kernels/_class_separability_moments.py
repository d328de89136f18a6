"""Triton kernels of class moments and of their gradient.

A block takes a chunk of up to BLOCK_R samples of one class into registers, a tile of dimensions at a time:
their mean, then the squares about it, so nothing cancels. A second kernel merges the chunks of a class in
float64. Every block writes to a place of its own: no atomics, no bit changes from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._class_order import _by_class, _chunk_blocks, _class_of_chunk, _most_chunks, _rows_of_chunk
from ._common import (
    _ELEMENT,
    _OPTIONS,
    _acc,
    _cdiv,
    _Configurations,
    _load_tile,
    _on,
    _row_blocks,
    _tuned_rows,
    _wide,
)


@triton.jit
def _mean_and_squares(
    x,  # [BLOCK_R, BLOCK_D], 0 outside of the mask
    mask,  # [BLOCK_R, BLOCK_D]
    count,
):
    """Return the mean of the rows and the sum of squares about it, [BLOCK_D] each."""
    mean = tl.sum(x, axis=0) / count
    deviation = tl.where(mask, x - mean[None, :], 0.0)
    # What the mean lost to rounding; an infinite mean lost nothing.
    rest = tl.sum(deviation, axis=0) / count
    rest = tl.where(mean - mean == 0, rest, 0.0)
    # Of equal values this is one of them: their deviations are 0, however large they are.
    best = mean + rest
    rest -= best - mean
    deviation = tl.where(mask, x - best[None, :], 0.0)
    return best, tl.sum(deviation * deviation, axis=0) - rest * rest * count


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
        x = _load_tile(x_ptr, rows, offs_d, mask, stride_xn, stride_xd, ACC)
        mean, squares = _mean_and_squares(x, mask, count.to(ACC))
        out = chunk * D + offs_d
        tl.store(mean_ptr + out, mean, mask=offs_d < D)
        tl.store(squares_ptr + out, squares, mask=offs_d < D)


@triton.jit
def _moments_in_range(
    x_ptrs, order_ptr, first, last, mask_d, stride_xn, LARGE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return mean and variance of columns of a class whose sums were out of range on the way.

    Squares of float32 fit into float64; float64 is taken times a power of two, as only values near its limits
    come here.
    """
    scale = tl.full((), 2.0**-600 if LARGE else 1.0, tl.float64)
    count = (last - first).to(tl.float64)
    # Of equal values, which may be the largest there is, the mean is one of them.
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
    centre = origin + total / count
    rest = tl.zeros_like(origin)
    squares = tl.zeros_like(origin)
    # Of an infinite sample the mean is infinite, and the deviation from it NaN.
    for start in range(first, last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        mask = (offs_r < last)[:, None] & mask_d[None, :]
        rows = tl.load(order_ptr + offs_r, mask=offs_r < last, other=0)
        x = tl.load(x_ptrs[None, :] + rows[:, None] * stride_xn, mask=mask, other=0.0).to(tl.float64)
        deviation = tl.where(mask, x * scale - centre[None, :], 0.0)
        rest += tl.sum(deviation, axis=0)
        squares += tl.sum(deviation * deviation, axis=0)
    squares -= rest * (rest / count)
    squares = tl.where(squares < 0, 0.0, squares)
    # What rounding left of the deviations belongs to the mean.
    share = rest / count
    centre += tl.where(share - share == 0, share, 0.0)
    return centre / scale, squares / count / scale / scale


@triton.jit
def _merge_chunks(
    mean_ptr, squares_ptr, offs_d, D, count, first, last, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return mean and variance, float64 [BLOCK_D], of the chunks from `first` to `last` of one class."""
    mask_d = offs_d < D
    # A class without samples has no row; any other serves it.
    row = tl.minimum(first, tl.maximum(last - 1, 0))
    origin = tl.load(mean_ptr + row * D + offs_d, mask=mask_d, other=0.0).to(tl.float64)
    total = tl.zeros_like(origin)
    shift = tl.zeros_like(origin)
    squares = tl.zeros_like(origin)
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
    count = count.to(tl.float64)
    var = (squares - shift * shift / count) / count
    # Below 0 without a limit: the squares were out of range, and so was what is taken off.
    return total / count, tl.where(var < 0, tl.where(var - var == 0, 0.0, -var), var)


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
    mean, var = _merge_chunks(mean_ptr, squares_ptr, offs_d, D, count, first, last, CHUNK, BLOCK_R)
    element = class_mean_ptr.dtype.element_ty
    class_mean = mean.to(element)
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
    x = _load_tile(x_ptr, offs_n, offs_d, mask, stride_xn, stride_xd, ACC)
    offs = y[:, None] * D + offs_d[None, :]
    dmean = tl.load(dmean_ptr + offs, mask=known, other=0.0)
    dvar = tl.load(dvar_ptr + offs, mask=known, other=0.0)
    mean = tl.load(mean_ptr + offs, mask=known, other=0.0)
    count = tl.load(count_ptr + y, mask=mask_n & (y >= 0) & (y < C), other=1).to(ACC)
    # The factors of the class first: a deviation times dvar alone may be out of range.
    scale = (1 / count)[:, None]
    dx = dmean * scale + (x - mean) * (dvar * (2 * scale))
    tl.store(dx_ptr + offs_n[:, None] * D + offs_d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


_MERGE_BLOCKS = {"BLOCK_R": 128, "BLOCK_D": 16}


def class_moments_fwd(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [C], [C, D], [C, D]
    """Return the count, mean and population variance of each class's samples."""
    num_samples, num_dims = features.shape
    wide = _wide(features.dtype)
    if num_samples == 0:
        mean = features.new_full((num_classes, num_dims), float("nan"), dtype=wide)
        return labels.new_zeros(num_classes, dtype=torch.int64), mean, mean.clone()
    mean = features.new_empty(num_classes, num_dims, dtype=wide)
    var = torch.empty_like(mean)
    if num_dims == 0:
        return _by_class(labels, num_classes, 1).count, mean, var
    blocks = _chunk_blocks(num_dims, features.dtype)
    blocks = _tuned_rows("class_separability", "moments", features, blocks, "BLOCK_R", "BLOCK_D")
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
    blocks = _row_blocks(num_dims, features.dtype)
    blocks = _tuned_rows("class_separability", "moments bwd", features, blocks, "BLOCK_N", "BLOCK_D")
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


def _moments_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = _Configurations()
    index, size, stride = "*i64", "i32", "i64"
    for dtype, element in _ELEMENT.items():
        x, acc = f"*{element}", f"*{_acc(dtype)}"
        for num_dims in (1, 512):
            constants = {"ACC": _acc(dtype), **_chunk_blocks(num_dims, dtype)}
            types = [x, index, index, acc, acc, size, size, stride]
            configurations.add(_class_moments_fwd_kernel, types, {"stride_xd": 1, **constants})
        types = [acc, acc, x, index, index, acc, x, size, size, size, stride, stride, stride]
        configurations.add(_class_moments_bwd_kernel, types, {"ACC": _acc(dtype), **_row_blocks(512, dtype)})
        constants = {"stride_xd": 1, "CHUNK": _chunk_blocks(512, dtype)["BLOCK_R"], **_MERGE_BLOCKS}
        types = [x, index, acc, acc, index, acc, acc, size, size, stride]
        configurations.add(_class_moments_merge_kernel, types, constants)
    return configurations

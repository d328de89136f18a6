"""Columns of a pair of modalities closed up, so that rows are read 16 bytes at a time, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _OPTIONS, _acc, _cdiv, _Configurations, _on


@triton.jit
def _fitted(count):
    """Return the elements of a packed row: with a multiple of 16 rows are loaded 16 bytes at a time."""
    return tl.cdiv(count, 16) * 16


@triton.jit
def _members(pair, num_others):
    """Return teacher and student of a pair."""
    teacher = pair // num_others
    other = pair % num_others
    return teacher, other + (other >= teacher).to(tl.int32)


@triton.jit
def _is_taught(effective_ptr, teacher, student, taken, stride_em, stride_ed, offs_d):
    """Return which of some columns the teacher teaches the student."""
    effective_ptrs = effective_ptr + offs_d.to(tl.int64) * stride_ed
    taken &= tl.load(effective_ptrs + teacher * stride_em, mask=taken, other=0) != 0
    return taken & (tl.load(effective_ptrs + student * stride_em, mask=taken, other=1) == 0)


@triton.jit(do_not_specialize=["D", "num_others", "pieces", "stride_em"])
def _duc_loss_plan_kernel(
    effective_ptr,  # [M, D]
    counts_ptr,  # [P]
    starts_ptr,  # [P]
    positions_ptr,  # [P, D]
    D,
    num_others,  # M - 1
    pieces,  # of 16 columns there is room for in each pair, where TIGHT is false
    stride_em,
    stride_ed,
    TIGHT: tl.constexpr,  # whether a pair's columns follow on those of the pairs before it
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0)
    start = pair * pieces
    if TIGHT:
        start = pair * 0
        for first in range(0, pair, BLOCK_P):
            pairs = first + tl.arange(0, BLOCK_P)
            teacher, student = _members(pairs, num_others)
            count = tl.zeros((BLOCK_P,), tl.int32)
            for first_d in range(0, D, BLOCK_D):
                offs_d = first_d + tl.arange(0, BLOCK_D)
                taken = _is_taught(
                    effective_ptr, teacher[:, None], student[:, None],
                    (pairs < pair)[:, None] & (offs_d < D)[None, :], stride_em, stride_ed, offs_d[None, :],
                )  # fmt: skip
                count += tl.sum(taken.to(tl.int32), 1)
            start += tl.sum(tl.cdiv(count, 16), 0)
    teacher, student = _members(pair, num_others)
    filled = pair * 0
    for first_d in range(0, D, BLOCK_D):
        offs_d = first_d + tl.arange(0, BLOCK_D)
        taken = _is_taught(effective_ptr, teacher, student, offs_d < D, stride_em, stride_ed, offs_d)
        position = filled + tl.cumsum(taken.to(tl.int32), 0) - 1
        positions_ptrs = positions_ptr + pair.to(tl.int64) * D + offs_d
        tl.store(positions_ptrs, tl.where(taken, position, -1), mask=offs_d < D)
        filled += tl.sum(taken.to(tl.int32), 0)
    tl.store(counts_ptr + pair, filled)
    tl.store(starts_ptr + pair, start)


@triton.jit
def _one_of(xs, strides, index, ELEMENT: tl.constexpr):
    """Return address and strides of one of several matrices, chosen while the kernel runs."""
    address = xs[0].to(tl.int64)
    stride_n = tl.cast(strides[0], tl.int64)
    stride_d = tl.cast(strides[1], tl.int64)
    for i in tl.static_range(1, len(xs)):
        is_it = index == i
        address = tl.where(is_it, xs[i].to(tl.int64), address)
        stride_n = tl.where(is_it, tl.cast(strides[2 * i], tl.int64), stride_n)
        stride_d = tl.where(is_it, tl.cast(strides[2 * i + 1], tl.int64), stride_d)
    return address.to(tl.pointer_type(ELEMENT)), stride_n, stride_d


@triton.jit(do_not_specialize=["N", "K", "num_others"])
def _duc_loss_pack_kernel(
    queries,  # M of [N, D]
    keys,  # M of [K, D]
    counts_ptr,  # [P]; None, as the two that follow: one pair, with all columns
    starts_ptr,  # [P]
    positions_ptr,  # [P, D]
    packed_queries_ptr,  # [N, W] of every pair
    packed_keys_ptr,  # [K, W] of every pair
    N,
    K,
    D,
    num_others,  # M - 1
    query_strides,  # 2 M
    key_strides,  # 2 M
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Close up the columns that a pair has, and fill up with zeros."""
    pair = tl.program_id(2)
    teacher, student = pair, pair
    if counts_ptr is not None:
        teacher, student = _members(pair, num_others)
    element = packed_queries_ptr.dtype.element_ty
    x_ptr, stride_n, stride_d = _one_of(queries, query_strides, student, element)
    out_ptr = packed_queries_ptr
    rows = tl.cast(N, tl.int64)
    if tl.program_id(1) == 1:
        x_ptr, stride_n, stride_d = _one_of(keys, key_strides, teacher, element)
        out_ptr = packed_keys_ptr
        rows = tl.cast(K, tl.int64)
    count = pair * 0 + D
    if counts_ptr is not None:
        count = tl.load(counts_ptr + pair)
        out_ptr += tl.load(starts_ptr + pair).to(tl.int64) * 16 * rows
    W = _fitted(count)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < rows)[:, None]
    out_ptrs = (out_ptr + offs_n * W)[:, None]
    # A pair without columns has no rows.
    for start in range(0, tl.where(count > 0, D, 0), BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        position = offs_d
        if counts_ptr is not None:
            position = tl.load(positions_ptr + pair.to(tl.int64) * D + offs_d, mask=offs_d < D, other=-1)
        mask = mask_n & ((offs_d < D) & (position >= 0))[None, :]
        x_ptrs = x_ptr + offs_n[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d
        tl.store(out_ptrs + position[None, :], tl.load(x_ptrs, mask=mask), mask=mask)
    offs_p = count + tl.arange(0, 16)
    zeros = tl.zeros((BLOCK_N, 16), dtype=element)
    tl.store(out_ptrs + offs_p[None, :], zeros, mask=mask_n & (offs_p < W)[None, :])


@triton.jit(do_not_specialize=["N", "num_others"])
def _duc_loss_unpack_kernel(
    packed_ptr,  # [N, W] residuals of every pair
    counts_ptr,  # [P]
    starts_ptr,  # [P]
    positions_ptr,  # [P, D]
    residuals_ptr,  # [M, N, D]
    N,
    D,
    num_others,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    student = tl.program_id(2)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=ACC)
    # Teacher after teacher, so the sum's order is always the same.
    for other in range(num_others):
        teacher = other + (other >= student).to(tl.int32)
        pair = (teacher * num_others + student - (student > teacher).to(tl.int32)).to(tl.int64)
        width = _fitted(tl.load(counts_ptr + pair))
        column = tl.load(starts_ptr + pair).to(tl.int64) * 16
        position = tl.load(positions_ptr + pair * D + offs_d, mask=offs_d < D, other=-1)
        packed_ptrs = packed_ptr + column * N + offs_n[:, None] * width + position[None, :]
        total += tl.load(packed_ptrs, mask=mask & (position >= 0)[None, :], other=0.0).to(ACC)
    residuals_ptrs = residuals_ptr + (student.to(tl.int64) * N + offs_n)[:, None] * D + offs_d[None, :]
    tl.store(residuals_ptrs, total.to(residuals_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["numel", "divisor"])
def _duc_loss_sum_kernel(
    losses_ptr,  # [P, N]
    loss_ptr,  # []
    numel,  # P N
    divisor,
    BLOCK: tl.constexpr,
):
    """Add up all losses, in an order that is always the same."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, numel, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + offs, mask=offs < numel, other=0.0)
    loss = tl.sum(total, 0) / tl.cast(divisor, tl.float64)
    tl.store(loss_ptr, loss.to(loss_ptr.dtype.element_ty))


_PLAN_BLOCKS = {"BLOCK_P": 16, "BLOCK_D": 128}
_PACK_BLOCKS = {"BLOCK_N": 16, "BLOCK_D": 128}
_SUM_BLOCKS = {"BLOCK": 4096, "num_warps": 8}


def _residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gradients before their factors, which float16 alone has not the range for."""
    return torch.float32 if dtype == torch.float16 else dtype


class _Columns(NamedTuple):
    """Which columns each pair has, and where its rows lie among those of all pairs."""

    counts: Tensor  # int32 [P]
    starts: Tensor  # int32 [P]: of the pair among the columns of all pairs, in pieces of 16
    positions: Tensor  # int32 [P, D]: where a column went, -1 where nowhere


def _planned(
    effective: Tensor,  # bool [M, D], M at least 2
    is_tight: bool,
) -> _Columns:
    num_modalities, num_dims = effective.shape
    num_pairs = num_modalities * (num_modalities - 1)
    counts = torch.empty(num_pairs, dtype=torch.int32, device=effective.device)
    columns = _Columns(counts, torch.empty_like(counts), counts.new_empty(num_pairs, num_dims))
    _duc_loss_plan_kernel[(num_pairs,)](
        effective.view(torch.uint8),
        *columns,
        num_dims,
        num_modalities - 1,
        _cdiv(num_dims, 16),
        *effective.stride(),
        TIGHT=is_tight,
        **_PLAN_BLOCKS,
        **_OPTIONS,
    )
    return columns


def _packed(
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all columns
    sizes: Sequence[int],  # M^2 counts of columns; none: not known on the host
) -> tuple[Tensor, Tensor, _Columns | None]:
    """Return the rows of queries and of keys, [N, W] and [K, W] pair after pair, and what is where.

    W is a pair's own. Where the host knows it, rows take no more memory than they fill; where it does not,
    every pair has room for all columns.
    """
    query, key = features[0], keys[0]
    num_modalities, (num_samples, num_dims), num_keys = len(features), query.shape, key.shape[0]
    num_pairs = 1 if effective is None else num_modalities * (num_modalities - 1)
    # A modality has no columns with itself.
    num_pieces = sum(_cdiv(size, 16) for size in sizes) if sizes else num_pairs * _cdiv(num_dims, 16)
    num_columns = 16 * num_pieces
    queries = query.new_empty(num_samples * num_columns)
    packed_keys = key.new_empty(num_keys * num_columns)
    columns = None
    grid = (_cdiv(max(num_samples, num_keys), _PACK_BLOCKS["BLOCK_N"]), 2, num_pairs)
    with _on(query.device):
        if effective is not None:
            columns = _planned(effective, bool(sizes))
        _duc_loss_pack_kernel[grid](
            tuple(features),
            tuple(keys),
            *((None, None, None) if columns is None else columns),
            queries,
            packed_keys,
            num_samples,
            num_keys,
            num_dims,
            num_modalities - 1,
            tuple([stride for x in features for stride in x.stride()]),
            tuple([stride for x in keys for stride in x.stride()]),
            **_PACK_BLOCKS,
            **_OPTIONS,
        )
    return queries, packed_keys, columns


def _unpacked(
    residual: Tensor,  # [N, W] pair after pair
    columns: _Columns,
    like: Tensor,  # [N, D]
    num_modalities: int,
) -> Tensor:  # [M, N, D]
    """Return each student's residuals summed over its teachers, columns back in their places."""
    residuals = like.new_empty(num_modalities, *like.shape, dtype=_residual_dtype(like.dtype))
    grid = (
        _cdiv(like.shape[0], _PACK_BLOCKS["BLOCK_N"]),
        _cdiv(like.shape[1], _PACK_BLOCKS["BLOCK_D"]),
        num_modalities,
    )
    with _on(like.device):
        _duc_loss_unpack_kernel[grid](
            residual,
            *columns,
            residuals,
            *like.shape,
            num_modalities - 1,
            ACC=_acc(like.dtype),
            **_PACK_BLOCKS,
            **_OPTIONS,
        )
    return residuals


def _summed(
    losses: Tensor,  # [P, N]
    divisor: int,
) -> Tensor:  # []
    """Return the sum of all losses over a divisor; NaN for 0 over 0."""
    loss = losses.new_empty(())
    with _on(losses.device):
        _duc_loss_sum_kernel[(1,)](losses, loss, losses.numel(), divisor, **{**_OPTIONS, **_SUM_BLOCKS})
    return loss


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.sum(0) if len(losses) != 1 else losses[0]
    return _summed(losses, losses.shape[1] if reduction == "mean" else 1)


def _is_ready(x: Tensor) -> bool:
    """Return whether a [N, D] needs no packing to be read 16 bytes at a time."""
    return x.is_contiguous() and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


def _rows_of(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
) -> tuple[Tensor, Tensor, int]:  # [N, W], [K, W], W
    """Return both as the main kernel reads them, packed if need be."""
    width = 16 * _cdiv(query.shape[1], 16)
    if _is_ready(query) and _is_ready(key):
        return query, key, width
    queries, keys, _ = _packed([query], [key], None, ())
    return queries, keys, width


def _unpacked_rows(
    residual: Tensor | None,  # as the queries of `_rows_of`
    query: Tensor,  # [N, D]
    width: int,
) -> Tensor:  # [N, D], or [0] where there is none
    """Return the residual of one pair like the query it belongs to."""
    if residual is None:
        return query.new_empty(0, dtype=_residual_dtype(query.dtype))
    # Viewed again, a single row has the strides of its own width.
    return residual.view(-1, width)[:, : query.shape[1]].contiguous().view(query.shape)


def _column_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = _Configurations()
    add = configurations.add
    index, size, stride = "*i32:16", "i32", "i64"
    for is_tight in (True, False):
        types = ["*u8:16", index, index, index, size, size, size, stride]
        add(_duc_loss_plan_kernel, types, {**_PLAN_BLOCKS, "stride_ed": 1, "TIGHT": is_tight})
    for element in ("bf16", "fp32"):
        x = f"*{element}:16"
        for num_modalities in (2, 3):
            matrices, strides = (x,) * num_modalities, (stride,) * (2 * num_modalities)
            types = [matrices, matrices, index, index, index, x, x, *[size] * 4, strides, strides]
            add(_duc_loss_pack_kernel, types, _PACK_BLOCKS)
        types = ["*fp32:16", index, index, index, x, size, size, size]
        add(_duc_loss_unpack_kernel, types, {**_PACK_BLOCKS, "ACC": tl.float32})
    for element in ("fp32", "fp64"):
        x = f"*{element}:16"
        add(_duc_loss_sum_kernel, [x, x, size, size], _SUM_BLOCKS)
    return configurations

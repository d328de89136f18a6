"""Columns of a pair of modalities closed up, so that rows are read 16 bytes at a time, and put back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _OPTIONS, _acc, _configuration, _on


@triton.jit
def _fitted(count):
    """Return the elements of a packed row: with a multiple of 16 rows are loaded 16 bytes at a time."""
    return (count + 15) // 16 * 16


@triton.jit
def _is_taught(effective_ptr, offs_d, D, teacher, student, stride_em, stride_ed, HAS_MASK: tl.constexpr):
    """Return which of some columns the teacher teaches the student."""
    taken = offs_d < D
    if HAS_MASK:
        effective_ptrs = effective_ptr + offs_d * stride_ed
        taken &= tl.load(effective_ptrs + teacher * stride_em, mask=taken, other=0) != 0
        taken &= tl.load(effective_ptrs + student * stride_em, mask=taken, other=1) == 0
    return taken


@triton.jit
def _pack(
    x_ptr,  # [N, D]
    effective_ptr,  # [M, D]
    out_ptr,  # [N, W]
    positions_ptr,  # [D]
    N,
    D,
    W,
    teacher,
    student,
    stride_xn,
    stride_xd,
    stride_em,
    stride_ed,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Close up the columns the teacher teaches the student, and fill up with zeros."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    out_ptrs = out_ptr + offs_n * W
    filled = 0
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        taken = _is_taught(effective_ptr, offs_d, D, teacher, student, stride_em, stride_ed, HAS_MASK)
        position = filled + tl.cumsum(taken.to(tl.int32), 0) - 1
        mask = mask_n[:, None] & taken[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask)
        tl.store(out_ptrs[:, None] + position[None, :], x, mask=mask)
        if HAS_MASK & (tl.program_id(0) == 0):
            tl.store(positions_ptr + offs_d, tl.where(taken, position, -1), mask=offs_d < D)
        filled += tl.sum(taken.to(tl.int32), 0)
    offs_p = filled + tl.arange(0, 16)
    zeros = tl.zeros((BLOCK_N, 16), dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptrs[:, None] + offs_p[None, :], zeros, mask=mask_n[:, None] & (offs_p < W)[None, :])


@triton.jit(do_not_specialize=["pair", "start", "teacher", "student"])
def _duc_loss_pack_kernel(
    query_ptr,  # [N, D] of the student
    key_ptr,  # [K, D] of the teacher
    effective_ptr,  # [M, D]; anything where there is one pair with all columns
    packed_queries_ptr,  # [N, W] of every pair
    packed_keys_ptr,  # [K, W] of every pair
    positions_ptr,  # [P, D]: where a column went, -1 where nowhere
    counts_ptr,  # [P]
    starts_ptr,  # [P]
    N,
    K,
    D,
    pair,
    start,  # of the pair among the columns of all pairs, in pieces of 16
    teacher,
    student,
    stride_qn,
    stride_qd,
    stride_kn,
    stride_kd,
    stride_em,
    stride_ed,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    count = D
    positions_ptr += tl.cast(pair, tl.int64) * D
    if HAS_MASK:
        count = 0
        for first in range(0, D, BLOCK_D):
            offs_d = first + tl.arange(0, BLOCK_D).to(tl.int64)
            taken = _is_taught(effective_ptr, offs_d, D, teacher, student, stride_em, stride_ed, HAS_MASK)
            count += tl.sum(taken.to(tl.int32), 0)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(counts_ptr + pair, count)
            tl.store(starts_ptr + pair, start)
    W = _fitted(count)
    column = tl.cast(start, tl.int64) * 16
    if tl.program_id(1) == 0:
        _pack(
            key_ptr, effective_ptr, packed_keys_ptr + column * K, positions_ptr, K, D, W,
            teacher, student, stride_kn, stride_kd, stride_em, stride_ed, HAS_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _pack(
            query_ptr, effective_ptr, packed_queries_ptr + column * N, positions_ptr, N, D, W,
            teacher, student, stride_qn, stride_qd, stride_em, stride_ed, HAS_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
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
        # The positions of a pair without columns need not have been written.
        count = tl.load(counts_ptr + pair)
        column = tl.load(starts_ptr + pair).to(tl.int64) * 16
        written = offs_d < tl.where(count > 0, D, 0)
        position = tl.load(positions_ptr + pair * D + offs_d, mask=written, other=-1)
        packed_ptrs = packed_ptr + column * N + offs_n[:, None] * _fitted(count) + position[None, :]
        total += tl.load(packed_ptrs, mask=mask & (position >= 0)[None, :], other=0.0).to(ACC)
    residuals_ptrs = residuals_ptr + (student.to(tl.int64) * N + offs_n)[:, None] * D + offs_d[None, :]
    tl.store(residuals_ptrs, total.to(residuals_ptr.dtype.element_ty), mask=mask)


_PACK_BLOCKS = {"BLOCK_N": 16, "BLOCK_D": 128}


class _Columns(NamedTuple):
    """Which columns each pair has, and where its rows lie among those of all pairs."""

    counts: Tensor  # int32 [P]
    starts: Tensor  # int32 [P]: of the pair among the columns of all pairs, in pieces of 16
    positions: Tensor  # int32 [P, D]: where a column went, -1 where nowhere


def _packed(
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all columns
    sizes: Sequence[int],  # M^2 numbers of columns; none: not known on the host
) -> tuple[Tensor, Tensor, _Columns]:
    """Return the rows of queries and of keys, [N, W] and [K, W] pair after pair, and what is where.

    W is a pair's own. Where the host knows it, rows take no more memory than they fill; where it does not,
    every pair has room for all columns.
    """
    query, key = features[0], keys[0]
    num_modalities, num_dims = len(features), query.shape[1]
    numbers = range(num_modalities)
    pairs = [(m, n) for m in numbers for n in numbers if m != n] if effective is not None else [(0, 0)]
    pieces = [triton.cdiv(sizes[m * num_modalities + n] if sizes else num_dims, 16) for m, n in pairs]
    num_columns = 16 * sum(pieces)
    queries, packed_keys = (
        query.new_empty(query.shape[0] * num_columns),
        key.new_empty(len(key) * num_columns),
    )
    # Nobody else writes those of pairs that are known to have no columns.
    counts, starts = query.new_zeros(2, len(pairs), dtype=torch.int32)
    columns = _Columns(counts, starts, query.new_empty(len(pairs), num_dims, dtype=torch.int32))
    mask = query if effective is None else effective.view(torch.uint8)
    grid = (triton.cdiv(max(query.shape[0], key.shape[0]), _PACK_BLOCKS["BLOCK_N"]), 2)
    with _on(query.device):
        start = 0
        for pair, ((teacher, student), size) in enumerate(zip(pairs, pieces)):
            if size == 0:
                continue
            _duc_loss_pack_kernel[grid](
                features[student],
                keys[teacher],
                mask,
                queries,
                packed_keys,
                columns.positions,
                columns.counts,
                columns.starts,
                query.shape[0],
                key.shape[0],
                num_dims,
                pair,
                start,
                teacher,
                student,
                *features[student].stride(),
                *keys[teacher].stride(),
                *mask.stride(),
                HAS_MASK=effective is not None,
                **_PACK_BLOCKS,
                **_OPTIONS,
            )
            start += size
    return queries, packed_keys, columns


def _unpacked(
    residual: Tensor,  # [N, W] pair after pair
    columns: _Columns,
    like: Tensor,  # [N, D]
    num_modalities: int,
) -> Tensor:  # [M, N, D]
    """Return each student's residuals summed over its teachers, columns back in their places."""
    residuals = like.new_empty(num_modalities, *like.shape)
    grid = (
        triton.cdiv(like.shape[0], _PACK_BLOCKS["BLOCK_N"]),
        triton.cdiv(like.shape[1], _PACK_BLOCKS["BLOCK_D"]),
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


def _column_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = []
    index = "*i32:16"
    for element in ("bf16", "fp32"):
        x = f"*{element}:16"
        types = [x, x, "*u8:16", x, x, index, index, "*i32", *["i32"] * 7, *["i64"] * 6]
        constants = {**_PACK_BLOCKS, "HAS_MASK": True}
        configurations.append(_configuration(_duc_loss_pack_kernel, types, constants))
        types = ["*fp32:16", index, "*i32", index, x, "i32", "i32", "i32"]
        constants = {**_PACK_BLOCKS, "ACC": tl.float32}
        configurations.append(_configuration(_duc_loss_unpack_kernel, types, constants))
    return configurations

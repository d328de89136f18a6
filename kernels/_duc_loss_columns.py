"""Columns of a pair of modalities closed up, so that rows are read 16 bytes at a time, and put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _OPTIONS, _acc, _configuration, _on


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
    """Close up the columns the teacher teaches the student, fill up with zeros, return their number."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    out_ptrs = out_ptr + offs_n * W
    filled = 0
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D).to(tl.int64)
        taken = offs_d < D
        if HAS_MASK:
            effective_ptrs = effective_ptr + offs_d * stride_ed
            taken &= tl.load(effective_ptrs + teacher * stride_em, mask=taken, other=0) != 0
            taken &= tl.load(effective_ptrs + student * stride_em, mask=taken, other=1) == 0
        position = filled + tl.cumsum(taken.to(tl.int32), 0) - 1
        mask = mask_n[:, None] & taken[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask)
        tl.store(out_ptrs[:, None] + position[None, :], x, mask=mask)
        if HAS_MASK & (tl.program_id(0) == 0):
            tl.store(positions_ptr + offs_d, tl.where(taken, position, -1), mask=offs_d < D)
        filled += tl.sum(taken.to(tl.int32), 0)
    for start in range(filled // BLOCK_D * BLOCK_D, W, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        padding = (offs_d >= filled) & (offs_d < W)
        zeros = tl.zeros((BLOCK_N, BLOCK_D), dtype=out_ptr.dtype.element_ty)
        tl.store(out_ptrs[:, None] + offs_d[None, :], zeros, mask=mask_n[:, None] & padding[None, :])
    return filled


@triton.jit
def _duc_loss_pack_kernel(
    features_ptr,  # [N, D] of one modality
    keys_ptr,  # [K, D] of the same modality
    effective_ptr,  # [M, D]; None: one pair, all columns
    packed_queries_ptr,  # [P, N, W]
    packed_keys_ptr,  # [P, K, W]
    positions_ptr,  # [P, D]: where a column went, -1 where nowhere
    counts_ptr,  # [P]
    N,
    K,
    D,
    W,
    modality,
    num_others,
    stride_fn,
    stride_fd,
    stride_kn,
    stride_kd,
    stride_em,
    stride_ed,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # In the first half of its pairs the modality teaches and gives its keys, in the second it learns.
    teaches = tl.program_id(1) < num_others
    other = tl.program_id(1) % num_others
    other += (other >= modality).to(tl.int32)
    teacher = tl.where(teaches, modality, other)
    student = tl.where(teaches, other, modality)
    pair = (teacher * num_others + student - (student > teacher).to(tl.int32)).to(tl.int64)
    if not HAS_MASK:
        pair = pair * 0
    if teaches:
        filled = _pack(
            keys_ptr, effective_ptr, packed_keys_ptr + pair * K * W, positions_ptr + pair * D, K, D, W,
            teacher, student, stride_kn, stride_kd, stride_em, stride_ed, HAS_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if HAS_MASK & (tl.program_id(0) == 0):
            tl.store(counts_ptr + pair, filled)
    else:
        _pack(
            features_ptr, effective_ptr, packed_queries_ptr + pair * N * W, positions_ptr + pair * D, N, D, W,
            teacher, student, stride_fn, stride_fd, stride_em, stride_ed, HAS_MASK, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _duc_loss_unpack_kernel(
    packed_ptr,  # [P, N, W] residuals of every pair
    positions_ptr,  # [P, D]
    residuals_ptr,  # [M, N, D]
    N,
    D,
    W,
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
        position = tl.load(positions_ptr + pair * D + offs_d, mask=offs_d < D, other=-1)
        packed_ptrs = packed_ptr + (pair * N + offs_n)[:, None] * W + position[None, :]
        total += tl.load(packed_ptrs, mask=mask & (position >= 0)[None, :], other=0.0).to(ACC)
    residuals_ptrs = residuals_ptr + (student.to(tl.int64) * N + offs_n)[:, None] * D + offs_d[None, :]
    tl.store(residuals_ptrs, total.to(residuals_ptr.dtype.element_ty), mask=mask)


_PACK_BLOCKS = {"BLOCK_N": 32, "BLOCK_D": 128}


def _packed(
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all columns
    num_columns: int,  # in the widest pair
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [P, N, W], [P, K, W], [P, D], [P]
    """Return queries and keys of all pairs, the place of each column, -1 for none, and their number."""
    query, key = features[0], keys[0]
    num_others = max(1, len(features) - 1)
    num_pairs = 1 if effective is None else len(features) * num_others
    # Rows of a multiple of 16 elements are loaded 16 bytes at a time.
    width = triton.cdiv(num_columns, 16) * 16
    queries = query.new_empty(num_pairs, query.shape[0], width)
    packed_keys = query.new_empty(num_pairs, key.shape[0], width)
    positions = query.new_empty(num_pairs, query.shape[1], dtype=torch.int32)
    counts = query.new_empty(num_pairs, dtype=torch.int32)
    mask = query if effective is None else effective.view(torch.uint8)
    grid = (triton.cdiv(max(query.shape[0], key.shape[0]), _PACK_BLOCKS["BLOCK_N"]), 2 * num_others)
    with _on(query.device):
        for modality, (feature, own_keys) in enumerate(zip(features, keys)):
            _duc_loss_pack_kernel[grid](
                feature,
                own_keys,
                mask,
                queries,
                packed_keys,
                positions,
                counts,
                query.shape[0],
                key.shape[0],
                query.shape[1],
                width,
                modality,
                num_others,
                *feature.stride(),
                *own_keys.stride(),
                *mask.stride(),
                HAS_MASK=effective is not None,
                **_PACK_BLOCKS,
                **_OPTIONS,
            )
    return queries, packed_keys, positions, counts


def _unpacked(
    residual: Tensor,  # [P, N, W]
    positions: Tensor,  # [P, D]
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
            positions,
            residuals,
            *like.shape,
            residual.shape[-1],
            num_modalities - 1,
            ACC=_acc(like.dtype),
            **_PACK_BLOCKS,
            **_OPTIONS,
        )
    return residuals


def _column_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = []
    for element in ("bf16", "fp32"):
        x = f"*{element}:16"
        types = [x, x, "*u8:16", x, x, "*i32:16", "*i32:16", "i32", "i32", "i32", "i32:16", "i32", "i32"]
        constants = {**_PACK_BLOCKS, "HAS_MASK": True}
        configurations.append(_configuration(_duc_loss_pack_kernel, types + ["i64"] * 6, constants))
        types = ["*fp32:16", "*i32:16", x, "i32", "i32", "i32:16", "i32"]
        constants = {**_PACK_BLOCKS, "ACC": tl.float32}
        configurations.append(_configuration(_duc_loss_unpack_kernel, types, constants))
    return configurations

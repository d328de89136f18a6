"""The Triton kernel of the Shapley values of additive logits, and the sum over blocks that share a sample."""

from __future__ import annotations

import triton
import triton.language as tl

from ._additive_shapley_samples import _empty_coalition, _load_part, _load_samples, _of_rows
from ._additive_shapley_utility import _CARDINALITY, _PROBABILITY, _utility


@triton.jit
def _sum_others(
    others,  # the coalition of the modalities before the last LAST
    first,  # how many these are
    base,  # [parts, BLOCK_N, LANES], the logits without any modality
    label_base,  # [BLOCK_N], the label's
    row_ptrs,
    label_ptrs,
    stride_pm,
    mask,
    mask_label,
    is_label,
    ACC: tl.constexpr,
):
    """Return the logits of a coalition, the label's own, and its size; summed anew, no rounding adds up."""
    z, label = base, label_base
    size = others * 0
    for m in range(first):
        if ((others >> m) & 1) != 0:
            part, label_part = _load_part(row_ptrs, label_ptrs, m, stride_pm, mask, mask_label, is_label, ACC)
            z += part
            label += label_part
            size += 1
    return z, label, size


@triton.jit(do_not_specialize=["N", "M", "coalitions", "stride_pm"])
def _additive_shapley_fwd_kernel(
    p_ptr,  # [M, N, C]
    labels_ptr,  # [N]
    bias_ptr,  # [C] in ACC, contiguous, or null
    weights_ptr,  # [M + 2] in ACC: 0, b_0, ..., b_{M-1}, 0; for the cardinality times the size
    phi_ptr,  # [splits, N, M], contiguous
    N,
    C,
    M,
    coalitions,  # of the modalities but the last LAST, in one split
    stride_pm,
    stride_pn,
    stride_pc,
    stride_ln,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,  # of stride_pm, which is given in units of so many elements: `_unit`
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    IS_ALL: tl.constexpr,  # whether M is LAST
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_pm = tl.cast(stride_pm, tl.int64) * UNIT
    offs_n, offs_c, mask_n, mask, y, is_label, mask_label, row_ptrs, label_ptrs = _load_samples(
        p_ptr, labels_ptr, N, C, stride_pn, stride_pc, stride_ln, BLOCK_N, BLOCK_C, LANES
    )
    offs_m = tl.arange(0, BLOCK_M)
    is_before = offs_c < _of_rows(y)
    first = 0 if IS_ALL else M - LAST
    part0, label0 = _load_part(row_ptrs, label_ptrs, first, stride_pm, mask, mask_label, is_label, ACC)
    if LAST > 1:
        part1, label1 = _load_part(
            row_ptrs, label_ptrs, first + 1, stride_pm, mask, mask_label, is_label, ACC
        )
    if LAST > 2:
        part2, label2 = _load_part(
            row_ptrs, label_ptrs, first + 2, stride_pm, mask, mask_label, is_label, ACC
        )
    base, label_base = _empty_coalition(bias_ptr, y, offs_c, is_label, mask_label, C, HAS_BIAS, ACC)
    origin = tl.zeros((BLOCK_N,), dtype=ACC)
    if UTILITY >= _PROBABILITY:
        # A constant added to all utilities changes no value: without the empty coalition's, nothing cancels.
        origin = _utility(base, label_base, is_before, UTILITY)
        origin = tl.where(origin - origin == 0, origin, 0.0)

    phi = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    begin = 0 if IS_ALL else tl.program_id(1) * coalitions
    for others in range(begin, 1 if IS_ALL else begin + coalitions):
        z, label, size = _sum_others(
            others, first, base, label_base, row_ptrs, label_ptrs, stride_pm, mask, mask_label, is_label, ACC
        )
        for j in tl.static_range(1 << LAST):
            x, label_x = z, label
            if (j & 1) != 0:
                x, label_x = x + part0, label_x + label0
            if (j & 2) != 0:
                x, label_x = x + part1, label_x + label1
            if (j & 4) != 0:
                x, label_x = x + part2, label_x + label2
            u = _utility(x, label_x, is_before, UTILITY) - origin
            players = size + (j & 1) + ((j >> 1) & 1) + ((j >> 2) & 1)
            with_m = tl.load(weights_ptr + players)
            without_m = tl.load(weights_ptr + players + 1)
            if UTILITY == _CARDINALITY:
                with_m *= players
                without_m *= players
            contains = (((others | (j << first)) >> offs_m) & 1) != 0
            phi += u[:, None] * tl.where(contains, with_m, -without_m)[None, :]
    phi_ptrs = phi_ptr + (tl.program_id(1).to(tl.int64) * N + offs_n)[:, None] * M + offs_m[None, :]
    tl.store(phi_ptrs, phi.to(phi_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_m < M)[None, :])


@triton.jit(do_not_specialize=["numel", "splits"])
def _sum_splits_kernel(
    parts_ptr,  # [splits, numel] in ACC, contiguous
    phi_ptr,  # [numel], contiguous
    numel,
    splits,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * numel + offs, mask=mask, other=0.0)
    tl.store(phi_ptr + offs, total.to(phi_ptr.dtype.element_ty), mask=mask)

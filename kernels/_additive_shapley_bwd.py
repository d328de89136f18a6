"""The Triton kernel of the gradient of smooth utilities' Shapley values.

It walks the coalitions as forward does. Gradients of the last three modalities stay in registers, the others'
in a scratch, the result itself, that a block has to itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._additive_shapley_samples import _empty_coalition, _load_part, _load_samples, _of_rows
from ._additive_shapley_utility import _MARGIN, _dlogits


@triton.jit
def _load_dphi(dphi_ptrs, m, stride_dm, mask_n, ACC: tl.constexpr):
    return tl.load(dphi_ptrs + tl.cast(m, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)


@triton.jit
def _sum_others(
    others,  # the coalition of the modalities before the last LAST
    first,  # how many these are
    base,  # [parts, BLOCK_N, LANES], the logits without any modality
    label_base,  # [BLOCK_N], the label's
    row_ptrs,
    label_ptrs,
    dphi_ptrs,
    stride_pm,
    stride_dm,
    mask_n,
    mask,
    mask_label,
    is_label,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return a coalition's logits, the label's own, its size, and the sums of dphi inside and outside."""
    z, label = base, label_base
    size = others * 0
    inside = tl.zeros((BLOCK_N,), dtype=ACC)
    outside = tl.zeros((BLOCK_N,), dtype=ACC)
    for m in range(first):
        dphi = _load_dphi(dphi_ptrs, m, stride_dm, mask_n, ACC)
        if ((others >> m) & 1) != 0:
            part, label_part = _load_part(row_ptrs, label_ptrs, m, stride_pm, mask, mask_label, is_label, ACC)
            z += part
            label += label_part
            size += 1
            inside += dphi
        else:
            outside += dphi
    return z, label, size, inside, outside


@triton.jit
def _spread_nan(
    dphi_ptrs,
    dp_ptrs,
    M,
    step,
    stride_dm,
    mask_n,
    mask,
    is_label,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add to the label's gradients NaN where a dphi is infinite, which `_dlogits` leaves out; return it."""
    sums = tl.zeros((BLOCK_N,), dtype=ACC)
    for m in range(M):
        dphi = _load_dphi(dphi_ptrs, m, stride_dm, mask_n, ACC)
        sums += dphi - dphi
    label_sums = tl.where(is_label, _of_rows(sums), 0.0)
    if tl.max((sums != 0).to(tl.int32)) != 0:
        tl.debug_barrier()
        for m in range(M):
            offset = tl.cast(m, tl.int64) * step
            earlier = tl.load(dp_ptrs + offset, mask=mask, other=0.0).to(ACC)
            tl.store(dp_ptrs + offset, (earlier + label_sums).to(dp_ptrs.dtype.element_ty), mask=mask)
    return label_sums


@triton.jit
def _add_to_members(
    dz,  # [parts, BLOCK_N, LANES]
    others,  # the coalition of the modalities before the last LAST
    first,  # how many these are
    dp_ptrs,
    step,
    mask,
    ACC: tl.constexpr,
):
    """Add a coalition's gradient to those of its members, in memory that no other block touches."""
    for m in range(first):
        if ((others >> m) & 1) != 0:
            offset = tl.cast(m, tl.int64) * step
            earlier = tl.zeros_like(dz)
            # The first coalition with m is the one of m alone.
            if others != (1 << m):
                earlier = tl.load(dp_ptrs + offset, mask=mask, other=0.0).to(ACC)
            tl.store(dp_ptrs + offset, (earlier + dz).to(dp_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "M", "stride_dn", "stride_dm", "stride_pm"])
def _additive_shapley_bwd_kernel(
    dphi_ptr,  # [N, M]
    p_ptr,  # [M, N, C]
    labels_ptr,  # [N]
    bias_ptr,  # [C] in ACC, contiguous, or null
    weights_ptr,  # [M + 2] in ACC
    dp_ptr,  # [M, N, C], contiguous; in ACC where LAST < M, as sums are kept in it
    dbias_ptr,  # [blocks, C] in ACC, contiguous: sums over the samples of a block; None: there is no bias
    N,
    C,
    M,
    stride_dn,
    stride_dm,
    stride_pm,
    stride_pn,
    stride_pc,
    stride_ln,
    UTILITY: tl.constexpr,
    UNIT: tl.constexpr,  # of stride_pm
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    IS_ALL: tl.constexpr,  # whether M is LAST
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_pm = tl.cast(stride_pm, tl.int64) * UNIT
    offs_n, offs_c, mask_n, mask, y, is_label, mask_label, row_ptrs, label_ptrs = _load_samples(
        p_ptr, labels_ptr, N, C, stride_pn, stride_pc, stride_ln, BLOCK_N, BLOCK_C, LANES
    )
    element = dp_ptr.dtype.element_ty
    dp_ptrs = dp_ptr + _of_rows(offs_n) * C + offs_c
    step = tl.cast(N, tl.int64) * C
    dphi_ptrs = dphi_ptr + offs_n * stride_dn

    first = 0 if IS_ALL else M - LAST
    part0, label0 = _load_part(row_ptrs, label_ptrs, first, stride_pm, mask, mask_label, is_label, ACC)
    dphi0 = _load_dphi(dphi_ptrs, first, stride_dm, mask_n, ACC)
    dpart0 = tl.zeros_like(part0)
    if LAST > 1:
        part1, label1 = _load_part(
            row_ptrs, label_ptrs, first + 1, stride_pm, mask, mask_label, is_label, ACC
        )
        dphi1 = _load_dphi(dphi_ptrs, first + 1, stride_dm, mask_n, ACC)
        dpart1 = tl.zeros_like(part0)
    if LAST > 2:
        part2, label2 = _load_part(
            row_ptrs, label_ptrs, first + 2, stride_pm, mask, mask_label, is_label, ACC
        )
        dphi2 = _load_dphi(dphi_ptrs, first + 2, stride_dm, mask_n, ACC)
        dpart2 = tl.zeros_like(part0)
    base, label_base = _empty_coalition(bias_ptr, y, offs_c, is_label, mask_label, C, HAS_BIAS, ACC)
    dbase = tl.zeros_like(part0)

    for others in range(1 << first):
        z, label, size, dphi_in, dphi_out = _sum_others(
            others, first, base, label_base, row_ptrs, label_ptrs, dphi_ptrs, stride_pm, stride_dm,
            mask_n, mask, mask_label, is_label, BLOCK_N, ACC,
        )  # fmt: skip
        dz = tl.zeros_like(part0)
        for j in tl.static_range(1 << LAST):
            x, label_x = z, label
            inside, outside = dphi_in, dphi_out
            if (j & 1) != 0:
                x, label_x, inside = x + part0, label_x + label0, inside + dphi0
            else:
                outside += dphi0
            if (j & 2) != 0:
                x, label_x, inside = x + part1, label_x + label1, inside + dphi1
            elif LAST > 1:
                outside += dphi1
            if (j & 4) != 0:
                x, label_x, inside = x + part2, label_x + label2, inside + dphi2
            elif LAST > 2:
                outside += dphi2
            players = size + (j & 1) + ((j >> 1) & 1) + ((j >> 2) & 1)
            du = tl.load(weights_ptr + players) * inside - tl.load(weights_ptr + players + 1) * outside
            dx = _dlogits(x, label_x, du, offs_c, is_label, UTILITY)
            dz += dx
            if (j & 1) != 0:
                dpart0 += dx
            if (j & 2) != 0:
                dpart1 += dx
            if (j & 4) != 0:
                dpart2 += dx
        dbase += dz
        _add_to_members(dz, others, first, dp_ptrs, step, mask, ACC)
        if not IS_ALL:
            # The next coalition's loads may lie with other threads.
            tl.debug_barrier()
    last_ptrs = dp_ptrs + tl.cast(first, tl.int64) * step
    tl.store(last_ptrs, dpart0.to(element), mask=mask)
    if LAST > 1:
        tl.store(last_ptrs + step, dpart1.to(element), mask=mask)
    if LAST > 2:
        tl.store(last_ptrs + 2 * step, dpart2.to(element), mask=mask)
    if UTILITY != _MARGIN:
        # Last, when little is held in registers.
        dbase += _spread_nan(
            dphi_ptrs, dp_ptrs, LAST if IS_ALL else M, step, stride_dm, mask_n, mask, is_label, BLOCK_N, ACC
        )
    if HAS_BIAS:
        dbias = tl.sum(tl.where(mask, dbase, 0.0), axis=1)[:, None, :]
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * C + offs_c, dbias, mask=offs_c < C)

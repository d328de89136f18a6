"""Triton kernels of the utilities of given logits, one row for each sample and coalition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._additive_shapley_samples import _classes, _of_rows
from ._additive_shapley_utility import (
    _CARDINALITY,
    _MARGIN,
    MAX_CLASSES,
    _blocks,
    _chosen,
    _dlogits,
    _utility,
)
from ._common import _ELEMENT, _acc, _cdiv, _configuration, _on, _wide


@triton.jit
def _load_rows(
    z_ptr, labels_ptr, N, C, stride_zn, stride_zs, stride_zc, stride_ln, LOG_S, BLOCK_N, BLOCK_C, LANES, ACC
):
    """Return what the kernels over [N, S, C] need of a block of its N S rows, the label's logit apart."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = _classes(BLOCK_C, LANES)
    offs_n = offs_r >> LOG_S
    coalition = offs_r & ((1 << LOG_S) - 1)
    mask_r = offs_n < N
    mask = _of_rows(mask_r) & (offs_c < C)
    y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_r, other=0).to(tl.int64)
    is_label = offs_c == _of_rows(y)
    rows = z_ptr + offs_n * stride_zn + coalition * stride_zs
    z = tl.load(_of_rows(rows) + offs_c.to(tl.int64) * stride_zc, mask=mask, other=float("-inf"))
    label = tl.load(rows + y * stride_zc, mask=mask_r & (y >= 0) & (y < C), other=0.0).to(ACC)
    z = tl.where(is_label, float("-inf"), z.to(ACC))
    return offs_r, offs_c, coalition, mask_r, mask, y, is_label, z, label


@triton.jit(do_not_specialize=["N"])
def _coalition_utilities_fwd_kernel(
    z_ptr,  # [N, S, C]
    labels_ptr,  # [N]
    u_ptr,  # [N, S], contiguous
    N,
    C,
    stride_zn,
    stride_zs,
    stride_zc,
    stride_ln,
    LOG_S: tl.constexpr,
    UTILITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_r, offs_c, coalition, mask_r, _, y, _, z, label = _load_rows(
        z_ptr,
        labels_ptr,
        N,
        C,
        stride_zn,
        stride_zs,
        stride_zc,
        stride_ln,
        LOG_S,
        BLOCK_N,
        BLOCK_C,
        LANES,
        ACC,
    )
    u = _utility(z, label, offs_c < _of_rows(y), UTILITY)
    if UTILITY == _CARDINALITY:
        size = tl.zeros_like(coalition)
        for m in range(LOG_S):
            size += (coalition >> m) & 1
        u *= size.to(ACC)
    tl.store(u_ptr + offs_r, u.to(u_ptr.dtype.element_ty), mask=mask_r)


@triton.jit(do_not_specialize=["N", "stride_dn", "stride_ds"])
def _coalition_utilities_bwd_kernel(
    du_ptr,  # [N, S]
    z_ptr,  # [N, S, C]
    labels_ptr,  # [N]
    dz_ptr,  # [N, S, C], contiguous
    N,
    C,
    stride_dn,
    stride_ds,
    stride_zn,
    stride_zs,
    stride_zc,
    stride_ln,
    LOG_S: tl.constexpr,
    UTILITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_r, offs_c, coalition, mask_r, mask, _, is_label, z, label = _load_rows(
        z_ptr,
        labels_ptr,
        N,
        C,
        stride_zn,
        stride_zs,
        stride_zc,
        stride_ln,
        LOG_S,
        BLOCK_N,
        BLOCK_C,
        LANES,
        ACC,
    )
    du_ptrs = du_ptr + (offs_r >> LOG_S) * stride_dn + coalition * stride_ds
    du = tl.load(du_ptrs, mask=mask_r, other=0.0).to(ACC)
    dz = _dlogits(z, label, du, offs_c, is_label, UTILITY)
    if UTILITY != _MARGIN:
        dz += tl.where(is_label, _of_rows(du - du), 0.0)
    tl.store(dz_ptr + _of_rows(offs_r) * C + offs_c, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def coalition_utilities_fwd(
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    utility: int,
) -> Tensor:  # [N, S]
    """Return the utility of every coalition's logits; C up to MAX_CLASSES, any strides."""
    num_samples, num_coalitions, num_classes = logits.shape
    values = logits.new_empty(num_samples, num_coalitions)
    if values.numel() == 0:
        return values
    blocks = _chosen(logits.transpose(0, 1), "rows")
    with _on(logits.device):
        _coalition_utilities_fwd_kernel[(_cdiv(values.numel(), blocks["BLOCK_N"]),)](
            logits,
            labels,
            values,
            num_samples,
            num_classes,
            *logits.stride(),
            labels.stride(0),
            LOG_S=num_coalitions.bit_length() - 1,
            UTILITY=utility,
            ACC=_acc(logits.dtype),
            enable_fp_fusion=True,
            **blocks,
        )
    return values


def coalition_utilities_bwd(
    dutilities: Tensor,  # [N, S]
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    utility: int,
) -> Tensor:  # [N, S, C]
    """Return the gradient of a smooth utility with respect to the logits."""
    num_samples, num_coalitions, num_classes = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if dlogits.numel() == 0:
        return dlogits
    blocks = _chosen(logits.transpose(0, 1), "rows bwd")
    with _on(logits.device):
        _coalition_utilities_bwd_kernel[(_cdiv(dutilities.numel(), blocks["BLOCK_N"]),)](
            dutilities,
            logits,
            labels,
            dlogits,
            num_samples,
            num_classes,
            *dutilities.stride(),
            *logits.stride(),
            labels.stride(0),
            LOG_S=num_coalitions.bit_length() - 1,
            UTILITY=utility,
            ACC=_acc(logits.dtype),
            enable_fp_fusion=True,
            **blocks,
        )
    return dlogits


def _row_configurations() -> list[tuple]:
    """Return what of this file is to compile ahead of time."""
    configurations = []
    for dtype, element in _ELEMENT.items():
        x = f"*{element}"
        types = [x, "*i64", x, "i32", "i32", "i64", "i64", "i64"]
        for num_classes in (10, MAX_CLASSES) if dtype == _wide(dtype) else (10,):
            constants = {"LOG_S": 3, "UTILITY": 3, "stride_zc": 1, "ACC": _acc(dtype)}
            constants |= _blocks(num_classes, dtype, _wide(dtype), "rows")
            configurations.append(_configuration(_coalition_utilities_fwd_kernel, types, constants))
            types_bwd = [x, *types[:5], "i64", "i64", *types[5:]]
            configurations.append(_configuration(_coalition_utilities_bwd_kernel, types_bwd, constants))
    return configurations

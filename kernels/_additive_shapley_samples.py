"""What the kernels over partial logits [M, N, C] load of a block of samples: logits, the label's apart.

A tile of a block's samples and classes is [parts, samples, lanes]: lane l of part k is class k LANES + l. So
few neighbouring threads share a row, each with several of its classes, and what is summed over classes goes
through few of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _classes(BLOCK_C: tl.constexpr, LANES: tl.constexpr):
    """Return the classes of a tile, [BLOCK_C / LANES, 1, LANES]."""
    parts = tl.arange(0, BLOCK_C // LANES) * LANES
    return parts[:, None, None] + tl.arange(0, LANES)[None, None, :]


@triton.jit
def _of_rows(values):
    """Return one number a row as it meets tiles, [1, BLOCK_N, 1]."""
    return values[None, :, None]


@triton.jit
def _load_samples(
    p_ptr,
    labels_ptr,
    N,
    C,
    stride_pn,
    stride_pc,
    stride_ln,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    LANES: tl.constexpr,
):
    """Return what the kernels over [M, N, C] need of a block of samples before its partial logits."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = _classes(BLOCK_C, LANES)
    mask_n = offs_n < N
    mask = _of_rows(mask_n) & (offs_c < C)
    y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_n, other=0).to(tl.int64)
    is_label = offs_c == _of_rows(y)
    mask_label = mask_n & (y >= 0) & (y < C)
    row_ptrs = p_ptr + _of_rows(offs_n) * stride_pn + offs_c.to(tl.int64) * stride_pc
    label_ptrs = p_ptr + offs_n * stride_pn + y * stride_pc
    return offs_n, offs_c, mask_n, mask, y, is_label, mask_label, row_ptrs, label_ptrs


@triton.jit
def _load_part(row_ptrs, label_ptrs, m, stride_pm, mask, mask_label, is_label, ACC: tl.constexpr):
    """Return a modality's partial logits, 0 in the label's place, and the label's own."""
    offset = tl.cast(m, tl.int64) * stride_pm
    part = tl.load(row_ptrs + offset, mask=mask, other=0.0).to(ACC)
    label_part = tl.load(label_ptrs + offset, mask=mask_label, other=0.0).to(ACC)
    return tl.where(is_label, 0.0, part), label_part


@triton.jit
def _empty_coalition(bias_ptr, y, offs_c, is_label, mask_label, C, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """Return the logits without any modality, -inf in the label's place, and the label's own."""
    base = tl.where(is_label | (offs_c >= C), float("-inf"), 0.0).to(ACC)
    label = tl.zeros_like(y).to(ACC)
    if HAS_BIAS:
        base += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0)
        base = tl.where(is_label, float("-inf"), base)
        label += tl.load(bias_ptr + y, mask=mask_label, other=0.0)
    return base, label

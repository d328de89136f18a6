"""Triton kernels of logits fused by weights that grow with how sure each modality is, and of their gradient.

    entropy    score_m = sum_c p_c ln p_c    = t / s - ln s     e_c = exp(z_c - max z), s = sum_c e_c
    certainty  score_m = max_c p_c / T       = 1 / (s T)        t = sum_c e_c (z_c - max z)
    w = softmax_m(score),  fused = sum_m w_m z^m

A block takes some samples with all their modalities, as _logit_fusion_scores.py and _logit_fusion_tiles.py
say. Where all classes fit, logits stay in registers from the first sum to the fusion; else they are read
again, from L2, for the fusion. Backward makes the sums anew, and the product of dfused and z with them.
Floor: (M + 1) N C + M N elements, backward (2 M + 1) N C; about 15 operations a logit, one of them an exp.
Predicted and measured: bench/results/logit_fusion.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _acc, _bits, _cdiv, _Configurations, _from_bits, _on, _unit, _wide
from ._logit_fusion_scores import (
    _ENTROPY,
    _NO_CLASS,
    _VANISHED,
    _accumulate,
    _finite_top,
    _joined,
    _lane_sums,
    _load_parts,
    _load_present,
    _lowest_class,
    _maxima,
    _weights,
)
from ._logit_fusion_tiles import _blocks, _chosen


@triton.jit
def _store_fused(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]
    w,  # [BLOCK_M, BLOCK_N]
    fused_ptr,
    offs_n,  # [BLOCK_N, 1]
    offs_c,  # [1, LANES]
    N,
    C,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    # A class that a modality excludes is to be -inf though the modality's weight underflow to 0, and 0 times
    # -inf is NaN: which classes are excluded is told apart, and what then stands there is -inf, or NaN where
    # the weights are.
    excluded = float("-inf") + tl.sum(w, axis=0)[:, None]
    ptrs = fused_ptr + offs_n.to(tl.int64) * C + offs_c
    for k in tl.static_range(PARTS):
        fused = tl.sum(w[:, :, None] * parts[k], axis=0)
        fused = tl.where(tl.min(parts[k], axis=0) == float("-inf"), excluded, fused)
        mask = offs_n < N
        if not (ONE_TILE and k < PARTS - 1):
            mask = mask & (offs_c < C - k * LANES)
        tl.store(ptrs + k * LANES, fused.to(fused_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["temperature_bits", "M", "N", "stride_zm", "stride_hm"])
def _logit_fusion_fwd_kernel(
    z_ptr,  # [M, N, C]
    present_ptr,  # uint8 [M, N] or null
    fused_ptr,  # [N, C], contiguous
    w_ptr,  # [M, N], contiguous
    temperature_bits,  # of a float64
    M,
    N,
    C,
    stride_zm,
    stride_zn,
    stride_zc,
    stride_hm,
    stride_hn,
    SCORE: tl.constexpr,
    UNIT: tl.constexpr,  # of stride_zm, which is given in units of so many elements: `_unit`
    HAS_PRESENT: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whether PARTS is ceil(C / LANES)
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_zm = tl.cast(stride_zm, tl.int64) * UNIT
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_c = tl.arange(0, LANES)
    here = _load_present(present_ptr, offs_m, offs_n, M, N, stride_hm, stride_hn, HAS_PRESENT)
    temperature = _from_bits(temperature_bits, ACC)
    lanes = offs_c[None, None, :]
    is_row = here[:, :, None]
    beyond = tl.where(is_row, float("-inf"), 0.0).to(z_ptr.dtype.element_ty)
    z_ptrs = z_ptr + (offs_m[:, None] * stride_zm + offs_n[None, :] * stride_zn)[:, :, None]
    z_ptrs += lanes.to(tl.int64) * stride_zc
    if ONE_TILE:
        z = _load_parts(z_ptrs, is_row, lanes, C, stride_zc, beyond, PARTS, LANES, True, ACC)
        top = _finite_top(tl.max(_maxima(z, PARTS), axis=2))
        s, t, _ = _lane_sums(z, top[:, :, None], SCORE, PARTS)
        s, t = tl.sum(s, axis=2), tl.sum(t, axis=2)
    else:
        lane_top = tl.full((BLOCK_M, BLOCK_N, LANES), float("-inf"), ACC)
        s = tl.zeros_like(lane_top)
        t = tl.zeros_like(lane_top)
        for start in range(0, C, PARTS * LANES):
            part_ptrs = z_ptrs + tl.cast(start, tl.int64) * stride_zc
            z = _load_parts(part_ptrs, is_row, lanes, C - start, stride_zc, beyond, PARTS, LANES, False, ACC)
            lane_top, s, t = _accumulate(z, lane_top, s, t, SCORE, PARTS)
        _, s, t = _joined(lane_top, s, t, SCORE)
    _, _, w = _weights(s, t, here, temperature, SCORE)
    w_ptrs = w_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])
    rows, columns = offs_n[:, None], offs_c[None, :]
    if ONE_TILE:
        _store_fused(z, w, fused_ptr, rows, columns, N, C, PARTS, LANES, True)
    else:
        for start in range(0, C, PARTS * LANES):
            part_ptrs = z_ptrs + tl.cast(start, tl.int64) * stride_zc
            z = _load_parts(part_ptrs, is_row, lanes, C - start, stride_zc, beyond, PARTS, LANES, False, ACC)
            _store_fused(z, w, fused_ptr, rows, start + columns, N, C, PARTS, LANES, False)


@triton.jit
def _inner(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]
    dfused,  # each [1, BLOCK_N, LANES]
    PARTS: tl.constexpr,
):
    """Return each lane's sum of dfused z; an excluded class is, whatever the weights are, and has none."""
    product = tl.zeros_like(parts[0])
    for k in tl.static_range(PARTS):
        product += dfused[k] * tl.where(parts[k] == float("-inf"), 0.0, parts[k])
    return product


@triton.jit
def _store_dlogits(
    parts,  # each [BLOCK_M, BLOCK_N, LANES]: z
    exponentials,  # each [BLOCK_M, BLOCK_N, LANES]: exp(z - top)
    dfused,  # each [1, BLOCK_N, LANES]
    top,  # [BLOCK_M, BLOCK_N, 1], as those that follow
    w,
    scale,  # dscore / s or, of the certainty, dscore / s^2
    mean,  # t / s or, of the certainty, dscore / s
    top_class,
    here,
    dz_ptr,
    offs_m,  # [BLOCK_M, 1, 1]
    offs_n,  # [1, BLOCK_N, 1]
    offs_c,  # [1, 1, LANES]
    M,
    N,
    C,
    SCORE: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    ptrs = dz_ptr + (offs_m * N + offs_n) * C + offs_c
    for k in tl.static_range(PARTS):
        if SCORE == _ENTROPY:
            # dscore p (ln p + entropy), with ln p + entropy = x - t / s
            x = tl.maximum(parts[k] - top, _VANISHED)
            slope = scale * exponentials[k] * (x - mean)
        else:
            slope = tl.where(offs_c + k * LANES == top_class, mean, 0.0) - scale * exponentials[k]
        # Where a gradient or a neighbour is NaN, 0 times it would be.
        dz = tl.where(here, w * dfused[k] + slope, 0.0)
        mask = (offs_m < M) & (offs_n < N)
        if not (ONE_TILE and k < PARTS - 1):
            mask = mask & (offs_c < C - k * LANES)
        tl.store(ptrs + k * LANES, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["temperature_bits", "M", "N", "stride_dwm", "stride_zm", "stride_hm"])
def _logit_fusion_bwd_kernel(
    df_ptr,  # [N, C]
    dw_ptr,  # [M, N]
    z_ptr,  # [M, N, C]
    present_ptr,  # uint8 [M, N] or null
    dz_ptr,  # [M, N, C], contiguous
    temperature_bits,  # of a float64
    M,
    N,
    C,
    stride_dfn,
    stride_dfc,
    stride_dwm,
    stride_dwn,
    stride_zm,
    stride_zn,
    stride_zc,
    stride_hm,
    stride_hn,
    SCORE: tl.constexpr,
    UNIT: tl.constexpr,  # of stride_zm, which is given in units of so many elements: `_unit`
    HAS_PRESENT: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whether PARTS is ceil(C / LANES)
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_zm = tl.cast(stride_zm, tl.int64) * UNIT
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_c = tl.arange(0, LANES)
    here = _load_present(present_ptr, offs_m, offs_n, M, N, stride_hm, stride_hn, HAS_PRESENT)
    temperature = _from_bits(temperature_bits, ACC)
    lanes = offs_c[None, None, :]
    is_row = here[:, :, None]
    beyond = tl.where(is_row, float("-inf"), 0.0).to(z_ptr.dtype.element_ty)
    z_ptrs = z_ptr + (offs_m[:, None] * stride_zm + offs_n[None, :] * stride_zn)[:, :, None]
    z_ptrs += lanes.to(tl.int64) * stride_zc
    samples, is_sample = offs_n[None, :, None], (offs_n < N)[None, :, None]
    df_ptrs = df_ptr + samples * stride_dfn + lanes.to(tl.int64) * stride_dfc
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dw_ptrs = dw_ptr + offs_m[:, None] * stride_dwm + offs_n[None, :] * stride_dwn
    dw = tl.load(dw_ptrs, mask=mask, other=0.0).to(ACC)
    top_class = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    if ONE_TILE:
        z = _load_parts(z_ptrs, is_row, lanes, C, stride_zc, beyond, PARTS, LANES, True, ACC)
        dfused = _load_parts(df_ptrs, is_sample, lanes, C, stride_dfc, 0.0, PARTS, LANES, True, ACC)
        top = tl.max(_maxima(z, PARTS), axis=2)
        if SCORE != _ENTROPY:
            top_class = tl.min(_lowest_class(z, top[:, :, None], lanes, PARTS, LANES), axis=2)
        top = _finite_top(top)
        s, t, exponentials = _lane_sums(z, top[:, :, None], SCORE, PARTS)
        s, t = tl.sum(s, axis=2), tl.sum(t, axis=2)
        inner = _inner(z, dfused, PARTS)
    else:
        lane_top = tl.full((BLOCK_M, BLOCK_N, LANES), float("-inf"), ACC)
        lane_class = tl.zeros((BLOCK_M, BLOCK_N, LANES), tl.int32)
        s = tl.zeros_like(lane_top)
        t = tl.zeros_like(lane_top)
        inner = tl.zeros_like(lane_top)
        for start in range(0, C, PARTS * LANES):
            offset = tl.cast(start, tl.int64)
            part_ptrs, left = z_ptrs + offset * stride_zc, C - start
            z = _load_parts(part_ptrs, is_row, lanes, left, stride_zc, beyond, PARTS, LANES, False, ACC)
            part_ptrs = df_ptrs + offset * stride_dfc
            dfused = _load_parts(part_ptrs, is_sample, lanes, left, stride_dfc, 0.0, PARTS, LANES, False, ACC)
            if SCORE != _ENTROPY:
                new_top = _maxima(z, PARTS)
                found = _lowest_class(z, new_top, start + lanes, PARTS, LANES)
                lane_class = tl.where(new_top > lane_top, found, lane_class)
            lane_top, s, t = _accumulate(z, lane_top, s, t, SCORE, PARTS)
            inner += _inner(z, dfused, PARTS)
        top, s, t = _joined(lane_top, s, t, SCORE)
        if SCORE != _ENTROPY:
            top_class = tl.min(tl.where(lane_top == top[:, :, None], lane_class, _NO_CLASS), axis=2)
        top = _finite_top(top)
    dw += tl.sum(inner, axis=2)
    r, mean, w = _weights(s, t, here, temperature, SCORE)
    dscore = w * (dw - tl.sum(w * dw, axis=0)[None, :])
    scale = dscore * r
    if SCORE != _ENTROPY:
        mean = scale / temperature
        scale = mean * r
    top, w, scale, mean = top[:, :, None], w[:, :, None], scale[:, :, None], mean[:, :, None]
    top_class, modalities = top_class[:, :, None], offs_m[:, None, None]
    if ONE_TILE:
        _store_dlogits(
            z, exponentials, dfused, top, w, scale, mean, top_class, is_row,
            dz_ptr, modalities, samples, lanes, M, N, C, SCORE, PARTS, LANES, True,
        )  # fmt: skip
    else:
        for start in range(0, C, PARTS * LANES):
            offset = tl.cast(start, tl.int64)
            part_ptrs, left = z_ptrs + offset * stride_zc, C - start
            z = _load_parts(part_ptrs, is_row, lanes, left, stride_zc, beyond, PARTS, LANES, False, ACC)
            part_ptrs = df_ptrs + offset * stride_dfc
            dfused = _load_parts(part_ptrs, is_sample, lanes, left, stride_dfc, 0.0, PARTS, LANES, False, ACC)
            _, _, exponentials = _lane_sums(z, top, SCORE, PARTS)
            _store_dlogits(
                z, exponentials, dfused, top, w, scale, mean, top_class, is_row,
                dz_ptr, modalities, samples, start + lanes, M, N, C, SCORE, PARTS, LANES, False,
            )  # fmt: skip


def _operands(present: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (
        (None, 0, 0) if present is None else (present.view(torch.uint8), present.stride(0), present.stride(1))
    )


def logit_fusion_fwd(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return the fused logits and the weights; any strides."""
    _, num_samples, num_classes = logits.shape
    fused, weights = logits.new_empty(num_samples, num_classes), logits.new_empty(logits.shape[:2])
    if num_samples == 0:
        return fused, weights
    blocks = _chosen(logits, "fwd")
    mask, *mask_strides = _operands(present)
    unit = _unit(logits)
    with _on(logits.device):
        _logit_fusion_fwd_kernel[(_cdiv(num_samples, blocks["BLOCK_N"]),)](
            logits,
            mask,
            fused,
            weights,
            _bits(temperature),
            *logits.shape,
            logits.stride(0) // unit,
            *logits.stride()[1:],
            *mask_strides,
            SCORE=score,
            UNIT=unit,
            HAS_PRESENT=present is not None,
            ACC=_acc(logits.dtype),
            enable_fp_fusion=True,
            **blocks,
        )
    return fused, weights


def logit_fusion_bwd(
    dfused: Tensor,  # [N, C]
    dweights: Tensor,  # [M, N]
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
    score: int,
    temperature: float,
) -> Tensor:  # [M, N, C]
    """Return the gradient with respect to the logits; any strides."""
    num_samples = logits.shape[1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if num_samples == 0:
        return dlogits
    blocks = _chosen(logits, "bwd")
    mask, *mask_strides = _operands(present)
    unit = _unit(logits)
    with _on(logits.device):
        _logit_fusion_bwd_kernel[(_cdiv(num_samples, blocks["BLOCK_N"]),)](
            dfused,
            dweights,
            logits,
            mask,
            dlogits,
            _bits(temperature),
            *logits.shape,
            *dfused.stride(),
            *dweights.stride(),
            logits.stride(0) // unit,
            *logits.stride()[1:],
            *mask_strides,
            SCORE=score,
            UNIT=unit,
            HAS_PRESENT=present is not None,
            ACC=_acc(logits.dtype),
            enable_fp_fusion=True,
            **blocks,
        )
    return dlogits


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = _Configurations()
    # Modalities and classes: short rows, rows read 16 bytes at a time, rows of several warps, several tiles.
    shapes = [(2, 31), (3, 8), (2, 64), (2, 1000), (3, 10_000)]
    # Classes and score: all in float32, of half precision and float64 those that need most registers.
    cases = [[(31, 0), (64, 1), (10_000, 1)], [(31, 0), (64, 1), (1000, 1), (10_000, 0), (10_000, 1)]]
    for dtype, element in _ELEMENT.items():
        x, wide = f"*{element}", _wide(dtype)
        for num_modalities, num_classes in shapes:
            is_aligned = num_classes % 16 == 0
            multiple = ":16" if is_aligned else ""
            stride, row = "i64", "i64" + multiple
            for score in (0, 1):
                if dtype != torch.float32 and (num_classes, score) not in cases[dtype == wide]:
                    continue
                shape = (num_modalities, num_classes, dtype)
                constants = {
                    "stride_zc": 1,
                    "SCORE": score,
                    "UNIT": 16 if is_aligned else 1,
                    "HAS_PRESENT": True,
                    "ACC": _acc(dtype),
                }
                y, sizes = x + multiple, ["i64", "i32", "i32", "i32" + multiple]
                types = [y, "*u8", y, y, *sizes, stride, row, stride, stride]
                blocks = _blocks(*shape, "fwd", is_aligned)
                configurations.add(_logit_fusion_fwd_kernel, types, {**constants, **blocks})
                constants |= {"stride_dfc": 1, **_blocks(*shape, "bwd", is_aligned)}
                types = [y, y, y, "*u8", y, *sizes, row, stride, stride, stride, row, stride, stride]
                configurations.add(_logit_fusion_bwd_kernel, types, constants)
    return configurations

"""Triton kernels of logits fused by weights that grow with how sure each modality is, and of their gradient.

    entropy    score_m = sum_c p_c ln p_c    = t / s - ln s     e_c = exp(z_c - max z), s = sum_c e_c
    certainty  score_m = max_c p_c / T       = 1 / (s T)        t = sum_c e_c (z_c - max z)
    w = softmax_m(score),  fused = sum_m w_m z^m

A block takes some samples with all their modalities. Where all classes fit into its tile the logits stay in
registers from the first sum to the fusion; else they are read again, from L2, for the fusion. Backward makes
the sums anew, and the product of dfused and z with them.
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
    _accumulate,
    _load_logits,
    _load_present,
    _no_classes,
    _shifted,
    _weights,
)
from ._tuning import size_class, tuned


@triton.jit
def _store_fused(z, w, fused_ptr, offs_n, offs_c, N, C):
    # A weight can underflow to 0 at a low temperature; times an excluded class's logit it is to be -inf.
    vanished = tl.where(z == float("-inf"), z, 0.0)
    weighted = tl.where(w[:, :, None] == 0, vanished, w[:, :, None] * z)
    fused = tl.sum(weighted, axis=1).to(fused_ptr.dtype.element_ty)
    mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
    tl.store(fused_ptr + offs_n[:, None] * C + offs_c[None, :], fused, mask=mask)


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
    ONE_TILE: tl.constexpr,  # whether BLOCK_C >= C
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_zm = tl.cast(stride_zm, tl.int64) * UNIT
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    here = _load_present(present_ptr, offs_n, offs_m, N, M, stride_hm, stride_hn, HAS_PRESENT)
    row_ptrs = z_ptr + offs_n[:, None] * stride_zn + offs_m[None, :] * stride_zm
    top, s, t, top_class = _no_classes(BLOCK_N, BLOCK_M, ACC)
    temperature = _from_bits(temperature_bits, ACC)
    if ONE_TILE:
        z = _load_logits(row_ptrs, here, offs_c, C, stride_zc, ACC)
        top, s, t, top_class = _accumulate(z, offs_c, top, s, t, top_class, SCORE)
    else:
        for start in range(0, C, BLOCK_C):
            z = _load_logits(row_ptrs, here, start + offs_c, C, stride_zc, ACC)
            # The class of the maximum is for backward alone.
            top, s, t, _ = _accumulate(z, start + offs_c, top, s, t, top_class, SCORE)
    _, w = _weights(s, t, here, temperature, SCORE)
    w_ptrs = w_ptr + offs_m[None, :] * N + offs_n[:, None]
    tl.store(w_ptrs, w.to(w_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_m < M)[None, :])
    if ONE_TILE:
        _store_fused(z, w, fused_ptr, offs_n, offs_c, N, C)
    else:
        for start in range(0, C, BLOCK_C):
            z = _load_logits(row_ptrs, here, start + offs_c, C, stride_zc, ACC)
            _store_fused(z, w, fused_ptr, offs_n, start + offs_c, N, C)


@triton.jit
def _load_dfused(df_ptr, offs_n, offs_c, N, C, stride_dfn, stride_dfc, ACC: tl.constexpr):
    mask = (offs_n < N)[:, None] & (offs_c < C)[None, :]
    ptrs = df_ptr + offs_n[:, None] * stride_dfn + offs_c.to(tl.int64)[None, :] * stride_dfc
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _inner(z, dfused):
    """Return sum_c dfused z; an excluded class's fused logit is -inf whatever the weights are."""
    finite = tl.where(z == float("-inf"), 0.0, z)
    return tl.sum(dfused[:, None, :] * finite, axis=2)


@triton.jit
def _store_dlogits(
    z,  # [BLOCK_N, BLOCK_M, BLOCK_C]
    dfused,  # [BLOCK_N, BLOCK_C]
    w,  # [BLOCK_N, BLOCK_M], as those that follow
    dscore,
    score,
    top,
    s,
    top_class,
    here,
    dz_ptr,
    offs_n,
    offs_m,
    offs_c,
    M,
    N,
    C,
    SCORE: tl.constexpr,
):
    x = _shifted(z, top)
    p = tl.exp(x) / s[:, :, None]
    if SCORE == _ENTROPY:
        # p (ln p + entropy)
        slope = tl.where(x == float("-inf"), 0.0, p * (x - (tl.log(s) + score)[:, :, None]))
    else:
        is_top = offs_c[None, None, :] == top_class[:, :, None]
        slope = (tl.where(is_top, 1.0, 0.0) - p) / s[:, :, None]
    dz = w[:, :, None] * dfused[:, None, :] + dscore[:, :, None] * slope
    # Where a gradient or a neighbour is NaN, 0 times it would be.
    dz = tl.where(here[:, :, None], dz, 0.0)
    rows = offs_m[None, :, None] * N + offs_n[:, None, None]
    mask = (offs_n < N)[:, None, None] & (offs_m < M)[None, :, None] & (offs_c < C)[None, None, :]
    tl.store(dz_ptr + rows * C + offs_c[None, None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)


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
    ONE_TILE: tl.constexpr,  # whether BLOCK_C >= C
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_zm = tl.cast(stride_zm, tl.int64) * UNIT
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    here = _load_present(present_ptr, offs_n, offs_m, N, M, stride_hm, stride_hn, HAS_PRESENT)
    row_ptrs = z_ptr + offs_n[:, None] * stride_zn + offs_m[None, :] * stride_zm
    top, s, t, top_class = _no_classes(BLOCK_N, BLOCK_M, ACC)
    temperature = _from_bits(temperature_bits, ACC)
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    dw_ptrs = dw_ptr + offs_m[None, :] * stride_dwm + offs_n[:, None] * stride_dwn
    dw = tl.load(dw_ptrs, mask=mask, other=0.0).to(ACC)
    if ONE_TILE:
        z = _load_logits(row_ptrs, here, offs_c, C, stride_zc, ACC)
        dfused = _load_dfused(df_ptr, offs_n, offs_c, N, C, stride_dfn, stride_dfc, ACC)
        top, s, t, top_class = _accumulate(z, offs_c, top, s, t, top_class, SCORE)
        dw += _inner(z, dfused)
    else:
        for start in range(0, C, BLOCK_C):
            z = _load_logits(row_ptrs, here, start + offs_c, C, stride_zc, ACC)
            dfused = _load_dfused(df_ptr, offs_n, start + offs_c, N, C, stride_dfn, stride_dfc, ACC)
            top, s, t, top_class = _accumulate(z, start + offs_c, top, s, t, top_class, SCORE)
            dw += _inner(z, dfused)
    score, w = _weights(s, t, here, temperature, SCORE)
    dscore = w * (dw - tl.sum(w * dw, axis=1)[:, None]) / temperature
    if ONE_TILE:
        _store_dlogits(
            z, dfused, w, dscore, score, top, s, top_class, here,
            dz_ptr, offs_n, offs_m, offs_c, M, N, C, SCORE,
        )  # fmt: skip
    else:
        for start in range(0, C, BLOCK_C):
            z = _load_logits(row_ptrs, here, start + offs_c, C, stride_zc, ACC)
            dfused = _load_dfused(df_ptr, offs_n, start + offs_c, N, C, stride_dfn, stride_dfc, ACC)
            part = start + offs_c
            _store_dlogits(
                z, dfused, w, dscore, score, top, s, top_class, here,
                dz_ptr, offs_n, offs_m, part, M, N, C, SCORE,
            )  # fmt: skip


def _blocks(num_modalities: int, num_classes: int, dtype: torch.dtype, kernel: str) -> dict:
    """Return the tile and the number of warps: 8 or, backward, 2 float32 elements of a tile a thread."""
    held = (8 if kernel == "fwd" else 2) * 4 // _wide(dtype).itemsize
    most = 512 * held
    block_m = triton.next_power_of_2(num_modalities)
    block_c = min(triton.next_power_of_2(num_classes), max(1, most // block_m))
    block_n = max(1, min(64, 128 * held // (block_m * block_c)))
    num_warps = min(16, max(4, block_n * block_m * block_c // (32 * held)))
    return {
        "ONE_TILE": block_c >= num_classes,
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_C": block_c,
        "num_warps": num_warps,
    }


def _chosen(
    logits: Tensor,  # [M, N, C]
    kernel: str,
) -> dict:
    """Return the tile and the number of warps to launch with: the table's, or those stored for this GPU."""
    num_modalities, num_samples, num_classes = logits.shape
    blocks = _blocks(num_modalities, num_classes, logits.dtype, kernel)
    classes = f"C<={blocks['BLOCK_C']}" if blocks["ONE_TILE"] else "C in tiles"
    key = f"{kernel} {logits.dtype} M<={blocks['BLOCK_M']} {classes} {size_class(num_samples)}"
    # One tile holds all classes, several may be of any size.
    names = ("BLOCK_N",) if blocks["ONE_TILE"] else ("BLOCK_N", "BLOCK_C")
    return tuned("logit_fusion", key, blocks, logits.device, *names, "num_warps")


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
    sizes, stride = ["i64", "i32", "i32", "i32"], "i64"
    # Classes and score: all in float32, of half precision and float64 those that need most registers.
    cases = [[(31, 0), (10_000, 1)], [(31, 0), (1000, 1), (10_000, 0), (10_000, 1)]]
    for dtype, element in _ELEMENT.items():
        x, wide = f"*{element}", _wide(dtype)
        # Modalities and classes: one tile, many samples in it, one tile of most threads, several tiles.
        for num_modalities, num_classes in [(2, 31), (3, 8), (2, 1000), (3, 10_000)]:
            for score in (0, 1):
                if dtype != torch.float32 and (num_classes, score) not in cases[dtype == wide]:
                    continue
                shape = (num_modalities, num_classes, dtype)
                constants = {
                    "stride_zc": 1,
                    "SCORE": score,
                    "UNIT": 1,
                    "HAS_PRESENT": True,
                    "ACC": _acc(dtype),
                }
                types = [x, "*u8", x, x, *sizes, stride, stride, stride, stride]
                configurations.add(_logit_fusion_fwd_kernel, types, {**constants, **_blocks(*shape, "fwd")})
                constants |= {"stride_dfc": 1, **_blocks(*shape, "bwd")}
                types = [x, x, x, "*u8", x, *sizes, *[stride] * 7]
                configurations.add(_logit_fusion_bwd_kernel, types, constants)
    return configurations

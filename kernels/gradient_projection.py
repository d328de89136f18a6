"""Triton kernels of the projector's update, P <- P - u u^T with u = P h / sqrt(a + h^T P h), and of G P.

Update, two launches: blocks of rows make P h and their parts of h^T P h and |h|^2; then every tile of P adds
up the parts, all in the same order, and takes off its part of u u^T. A product of two factors does not depend
on their order, so what was symmetric to the last bit stays so, and no half needs the other.
Product, one launch: a tile of 8 rows of the result goes through the rows of P, which all threads share, and
merges their sums at its end, in float32 at least. No sum is shared between blocks: no bit changes from run to
run. Many rows of G read P anew for each 8.
A step of both, up to 64 dimensions (float64: 32) one launch of one block, which holds P in registers and
reads and writes it once; beyond two, the second of which multiplies G with its rows of P as it updates them:
P is symmetric, so a row's products are a column of G P.
Floor: 3 D^2 elements and D^2 + 2 C D. Predicted and measured: bench/results/gradient_projection.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _OPTIONS, _bits, _cdiv, _Configurations, _from_bits, _on, _wide
from ._tuning import tuned


@triton.jit
def _unit_of(h_ptr, D, stride_h, MOST: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """Return a power of two, float64, that brings the largest element near 1, the same in every block."""
    largest = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        h = tl.load(h_ptr + offs_d * stride_h, mask=offs_d < D, other=0.0).to(ACC)
        largest = tl.maximum(largest, tl.abs(h))
    exponent = tl.cast(tl.max(largest, axis=0).to(tl.float64), tl.int64, bitcast=True) >> 52
    exponent = tl.minimum(tl.maximum(exponent - 1023, -MOST), MOST)
    return tl.cast((1023 - exponent) << 52, tl.float64, bitcast=True)


@triton.jit
def _projected_feature_kernel(
    p_ptr,  # [D, D]
    h_ptr,  # [D]
    ph_ptr,  # [D] in ACC
    parts_ptr,  # float64 [3, row blocks]: parts of h^T P h and of |h|^2, h times unit, and the unit
    D,
    stride_pi,
    stride_pj,
    stride_h,
    MOST: tl.constexpr,  # the largest power of two that ACC and its reciprocal hold with ease
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < D
    products = tl.zeros((BLOCK_R, BLOCK_D), dtype=ACC)
    # Features times a power of two, and alpha times its square, which changes nothing: products of large or
    # small ones stay in range.
    wide_unit = _unit_of(h_ptr, D, stride_h, MOST, BLOCK_D, ACC)
    unit = wide_unit.to(ACC)
    for start in range(0, D, BLOCK_D):
        offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        h = tl.load(h_ptr + offs_d * stride_h, mask=mask_d, other=0.0).to(ACC) * unit
        p_ptrs = p_ptr + offs_r[:, None] * stride_pi + offs_d[None, :] * stride_pj
        products += tl.load(p_ptrs, mask=mask_r[:, None] & mask_d[None, :], other=0.0) * h[None, :]
    ph = tl.sum(products, axis=1)
    tl.store(ph_ptr + offs_r, ph, mask=mask_r)
    # Squares in float64.
    h_r = (tl.load(h_ptr + offs_r * stride_h, mask=mask_r, other=0.0).to(ACC) * unit).to(tl.float64)
    part_ptr = parts_ptr + tl.program_id(0)
    tl.store(part_ptr, tl.sum(h_r * ph.to(tl.float64), axis=0))
    tl.store(part_ptr + tl.num_programs(0), tl.sum(h_r * h_r, axis=0))
    tl.store(part_ptr + 2 * tl.num_programs(0), wide_unit)


@triton.jit
def _factor_of(kept, square, unit, alpha_bits, EPS: tl.constexpr):
    """Return what P h is multiplied by to be u, and the sign of u u^T, float64: see mmfast/reference."""
    # No division by less than rounding, and a term below 0 is added.
    least = square * (16 * EPS)
    alpha = _from_bits(alpha_bits, tl.float64) * unit * unit
    factor = 1 / tl.sqrt(tl.where(least > alpha, least, alpha) + tl.abs(kept))
    return factor, tl.where(kept < 0, -1.0, 1.0)


@triton.jit
def _factor_of_parts(parts_ptr, num_parts, alpha_bits, EPS: tl.constexpr, BLOCK_P: tl.constexpr):
    kept_parts = tl.zeros((BLOCK_P,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_P,), dtype=tl.float64)
    for start in range(0, num_parts, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        kept_parts += tl.load(parts_ptr + offs, mask=offs < num_parts, other=0.0)
        squares += tl.load(parts_ptr + num_parts + offs, mask=offs < num_parts, other=0.0)
    unit = tl.load(parts_ptr + 2 * num_parts)
    return _factor_of(tl.sum(kept_parts, axis=0), tl.sum(squares, axis=0), unit, alpha_bits, EPS)


@triton.jit(do_not_specialize=["alpha_bits", "num_parts"])
def _update_projector_kernel(
    p_ptr,  # [D, D] changed in place
    ph_ptr,  # [D] in ACC
    parts_ptr,  # float64 [3, num_parts]
    alpha_bits,  # of a float64
    D,
    num_parts,
    stride_pi,
    stride_pj,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    factor, sign = _factor_of_parts(parts_ptr, num_parts, alpha_bits, EPS, BLOCK_P)
    sign = sign.to(ACC)
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    u_r = (tl.load(ph_ptr + offs_r, mask=offs_r < D, other=0.0).to(tl.float64) * factor).to(ACC) * sign
    u_d = (tl.load(ph_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float64) * factor).to(ACC)
    mask = (offs_r < D)[:, None] & (offs_d < D)[None, :]
    p_ptrs = p_ptr + offs_r[:, None] * stride_pi + offs_d[None, :] * stride_pj
    tl.store(p_ptrs, tl.load(p_ptrs, mask=mask, other=0.0) - u_r[:, None] * u_d[None, :], mask=mask)


@triton.jit(do_not_specialize=["C"])
def _project_gradient_kernel(
    g_ptr,  # [C, D]
    p_ptr,  # [D, D]
    out_ptr,  # [C, D], contiguous
    C,
    D,
    stride_gc,
    stride_gd,
    stride_pi,
    stride_pj,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_d, mask_c = offs_d < D, offs_c < C
    products = tl.zeros((BLOCK_C, BLOCK_K, BLOCK_D), dtype=ACC)
    for start in range(0, D, BLOCK_K):
        offs_k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < D
        g_ptrs = g_ptr + offs_c[:, None] * stride_gc + offs_k[None, :] * stride_gd
        g = tl.load(g_ptrs, mask=mask_c[:, None] & mask_k[None, :], other=0.0).to(ACC)
        p_ptrs = p_ptr + offs_k[:, None] * stride_pi + offs_d[None, :] * stride_pj
        p = tl.load(p_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0).to(ACC)
        products += g[:, :, None] * p[None, :, :]
    out = tl.sum(products, axis=1)
    out_ptrs = out_ptr + offs_c[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask_c[:, None] & mask_d[None, :])


@triton.jit(do_not_specialize=["alpha_bits", "C"])
def _small_step_kernel(
    p_ptr,  # [D, D] changed in place
    h_ptr,  # [D]
    g_ptr,  # [C, D]
    out_ptr,  # [C, D], contiguous
    alpha_bits,  # of a float64
    C,
    D,
    stride_pi,
    stride_pj,
    stride_h,
    stride_gc,
    stride_gd,
    EPS: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D or more
    ACC: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = offs < D
    mask_p = mask[:, None] & mask[None, :]
    p_ptrs = p_ptr + offs[:, None] * stride_pi + offs[None, :] * stride_pj
    p = tl.load(p_ptrs, mask=mask_p, other=0.0)
    wide_unit = _unit_of(h_ptr, D, stride_h, MOST, BLOCK_D, ACC)
    h = tl.load(h_ptr + offs * stride_h, mask=mask, other=0.0).to(ACC) * wide_unit.to(ACC)
    ph = tl.sum(p * h[None, :], axis=1)
    # Squares in float64.
    wide_h, wide_ph = h.to(tl.float64), ph.to(tl.float64)
    kept, square = tl.sum(wide_h * wide_ph, axis=0), tl.sum(wide_h * wide_h, axis=0)
    factor, sign = _factor_of(kept, square, wide_unit, alpha_bits, EPS)
    u = (wide_ph * factor).to(ACC)
    p -= (u * sign.to(ACC))[:, None] * u[None, :]
    for c in range(C):
        g = tl.load(g_ptr + tl.cast(c, tl.int64) * stride_gc + offs * stride_gd, mask=mask, other=0.0)
        out = tl.sum(p * g.to(ACC)[None, :], axis=1)
        tl.store(out_ptr + tl.cast(c, tl.int64) * D + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
    # What lies in P is read before P is written.
    tl.debug_barrier()
    tl.store(p_ptrs, p, mask=mask_p)


@triton.jit(do_not_specialize=["alpha_bits", "num_parts", "C"])
def _step_kernel(
    p_ptr,  # [D, D] changed in place
    ph_ptr,  # [D] in ACC
    parts_ptr,  # float64 [3, num_parts]
    g_ptr,  # [C, D]
    out_ptr,  # [C, D], contiguous
    alpha_bits,  # of a float64
    num_parts,
    C,
    D,
    stride_pi,
    stride_pj,
    stride_gc,
    stride_gd,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACC: tl.constexpr,
):
    factor, sign = _factor_of_parts(parts_ptr, num_parts, alpha_bits, EPS, BLOCK_P)
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < D
    u_r = (tl.load(ph_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float64) * factor).to(ACC) * sign.to(ACC)
    for first in range(0, C, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask_c = offs_c < C
        products = tl.zeros((BLOCK_C, BLOCK_R, BLOCK_D), dtype=ACC)
        for start in range(0, D, BLOCK_D):
            offs_d = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            mask_d = offs_d < D
            u_d = (tl.load(ph_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float64) * factor).to(ACC)
            mask = mask_r[:, None] & mask_d[None, :]
            p_ptrs = p_ptr + offs_r[:, None] * stride_pi + offs_d[None, :] * stride_pj
            p = tl.load(p_ptrs, mask=mask, other=0.0)
            if first == 0:
                p -= u_r[:, None] * u_d[None, :]
                tl.store(p_ptrs, p, mask=mask)
            g_ptrs = g_ptr + offs_c[:, None] * stride_gc + offs_d[None, :] * stride_gd
            g = tl.load(g_ptrs, mask=mask_c[:, None] & mask_d[None, :], other=0.0).to(ACC)
            products += g[:, None, :] * p[None, :, :]
        out_ptrs = out_ptr + offs_c[:, None] * D + offs_r[None, :]
        out = tl.sum(products, axis=2).to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs, out, mask=mask_c[:, None] & mask_r[None, :])


def _small(dtype: torch.dtype) -> int:
    """Return up to how many dimensions one block takes a whole step."""
    return 256 // dtype.itemsize


def _update_blocks(size: int, dtype: torch.dtype) -> dict:
    """Return the tile of P: 4 rows, so that 512 dimensions make about as many blocks as there are SMs."""
    return {"BLOCK_R": 4, "BLOCK_D": min(triton.next_power_of_2(size), 2048 // dtype.itemsize)}


def _product_blocks(num_rows: int, acc: torch.dtype) -> dict:
    """Return the tile of the product; columns of 32 bytes, the least that memory gives."""
    block_c = min(8, triton.next_power_of_2(num_rows))
    return {"BLOCK_C": block_c, "BLOCK_K": 256 // acc.itemsize, "BLOCK_D": 32 // acc.itemsize}


def _most(dtype: torch.dtype) -> int:
    return 120 if dtype == torch.float32 else 1000


def _projected_feature(
    rows: Tensor,  # [D, D]
    mean_feature: Tensor,  # [D]
    blocks: dict,
) -> tuple[Tensor, Tensor]:  # [D], float64 [3, parts]
    """Return the projector times the feature, and each part's share of the feature's numbers."""
    size = len(rows)
    num_parts = _cdiv(size, blocks["BLOCK_R"])
    ph, parts = rows.new_empty(size), rows.new_empty(3, num_parts, dtype=torch.float64)
    with _on(rows.device):
        _projected_feature_kernel[(num_parts,)](
            rows,
            mean_feature,
            ph,
            parts,
            size,
            *rows.stride(),
            *mean_feature.stride(),
            MOST=_most(rows.dtype),
            ACC=_ELEMENT[rows.dtype],
            **blocks,
        )
    return ph, parts


def update_projector_(
    projector: Tensor,  # [D, D] float32 or float64, symmetric; changed in place
    mean_feature: Tensor,  # [D]
    alpha: float,
) -> None:
    """Remove the direction of a mean feature from the projector; any strides."""
    size = len(projector)
    if size == 0:
        return
    # Symmetric: the transpose is the same matrix, and one of the two may have its rows in one piece.
    rows = projector if projector.stride(0) >= projector.stride(1) else projector.T
    acc = _ELEMENT[projector.dtype]
    key = f"update {projector.dtype} D<={triton.next_power_of_2(size)}"
    blocks = {**_OPTIONS, **_update_blocks(size, projector.dtype)}
    blocks = tuned("gradient_projection", key, blocks, projector.device, "BLOCK_R", "BLOCK_D", "num_warps")
    ph, parts = _projected_feature(rows, mean_feature, blocks)
    num_parts = parts.shape[1]
    with _on(projector.device):
        _update_projector_kernel[(num_parts, _cdiv(size, blocks["BLOCK_D"]))](
            rows,
            ph,
            parts,
            _bits(alpha),
            size,
            num_parts,
            *rows.stride(),
            EPS=torch.finfo(projector.dtype).eps,
            BLOCK_P=128,
            ACC=acc,
            **blocks,
        )


def project_gradient(
    grad: Tensor,  # [C, D]
    projector: Tensor,  # [D, D]
) -> Tensor:  # [C, D]
    """Return grad @ projector in the dtype of `grad`; any strides, the projector need not be symmetric."""
    num_rows, size = grad.shape
    projected = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if projected.numel() == 0:
        return projected
    acc = _wide(torch.promote_types(grad.dtype, projector.dtype))
    key = f"product {acc} C<={triton.next_power_of_2(num_rows)} D<={triton.next_power_of_2(size)}"
    blocks = {**_OPTIONS, **_product_blocks(num_rows, acc)}
    blocks = tuned("gradient_projection", key, blocks, grad.device, "BLOCK_K", "BLOCK_D", "num_warps")
    grid = (_cdiv(size, blocks["BLOCK_D"]), _cdiv(num_rows, blocks["BLOCK_C"]))
    with _on(grad.device):
        _project_gradient_kernel[grid](
            grad,
            projector,
            projected,
            num_rows,
            size,
            *grad.stride(),
            *projector.stride(),
            ACC=_ELEMENT[acc],
            **blocks,
        )
    return projected


def update_and_project_(
    projector: Tensor,  # [D, D] float32 or float64, symmetric; changed in place
    mean_feature: Tensor,  # [D]
    grad: Tensor,  # [C, D]
    alpha: float,
) -> Tensor:  # [C, D]
    """Update the projector and return grad @ projector in the dtype of `grad`; any strides."""
    num_rows, size = grad.shape
    is_one = _wide(torch.promote_types(grad.dtype, projector.dtype)) == projector.dtype
    if not is_one or num_rows == 0 or size == 0:
        grad = grad.clone()
        update_projector_(projector, mean_feature, alpha)
        return project_gradient(grad, projector)
    rows = projector if projector.stride(0) >= projector.stride(1) else projector.T
    projected = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    common = {"EPS": torch.finfo(projector.dtype).eps, "ACC": _ELEMENT[projector.dtype]}
    if size <= _small(projector.dtype):
        with _on(projector.device):
            _small_step_kernel[(1,)](
                rows,
                mean_feature,
                grad,
                projected,
                _bits(alpha),
                num_rows,
                size,
                *rows.stride(),
                *mean_feature.stride(),
                *grad.stride(),
                MOST=_most(projector.dtype),
                **_small_blocks(size),
                **common,
            )
        return projected
    if grad.untyped_storage().data_ptr() == projector.untyped_storage().data_ptr():
        # Rows that other blocks have updated must not be read for it.
        grad = grad.clone()
    blocks = {**_OPTIONS, **_step_blocks(size, projector.dtype)}
    ph, parts = _projected_feature(rows, mean_feature, blocks)
    num_parts = parts.shape[1]
    with _on(projector.device):
        _step_kernel[(num_parts,)](
            rows,
            ph,
            parts,
            grad,
            projected,
            _bits(alpha),
            num_parts,
            num_rows,
            size,
            *rows.stride(),
            *grad.stride(),
            BLOCK_C=min(8, triton.next_power_of_2(num_rows)),
            BLOCK_P=128,
            **common,
            **blocks,
        )
    return projected


def _small_blocks(size: int) -> dict:
    """Return the block of a step that holds all of P: at most 32 registers a thread for it."""
    return {**_OPTIONS, "BLOCK_D": max(16, triton.next_power_of_2(size))}


def _step_blocks(size: int, dtype: torch.dtype) -> dict:
    """Return the tile of P, of which a thread holds the products with 8 rows of the gradient."""
    return {"BLOCK_R": 4, "BLOCK_D": min(triton.next_power_of_2(size), 256 // dtype.itemsize)}


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = _Configurations()
    add = configurations.add
    for dtype in (torch.float32, torch.float64):
        acc = _ELEMENT[dtype]
        p = f"*{acc}"
        constants = {"stride_pj": 1, "ACC": acc, **_update_blocks(512, dtype)}
        for feature in (p, "*bf16", "*fp16"):
            types = [p, feature, p, "*fp64", "i32", "i64"]
            add(_projected_feature_kernel, types, {**constants, "stride_h": 1, "MOST": _most(dtype)})
        constants |= {"EPS": torch.finfo(dtype).eps, "BLOCK_P": 128}
        add(_update_projector_kernel, [p, p, "*fp64", "i64", "i32", "i32", "i64"], constants)
        constants = {"stride_pj": 1, "stride_gd": 1, "ACC": acc, "EPS": torch.finfo(dtype).eps}
        for element in ("fp32", "bf16", "fp16") if dtype == torch.float32 else ("fp64",):
            g = f"*{element}"
            types = [p, p, "*fp64", g, g, "i64", "i32", "i32", "i32", "i64", "i64"]
            add(_step_kernel, types, {**constants, "BLOCK_C": 8, "BLOCK_P": 128, **_step_blocks(512, dtype)})
            types = [p, p, g, g, "i64", "i32", "i32", "i64", "i64"]
            small = {**_small_blocks(_small(dtype)), "stride_h": 1, "MOST": _most(dtype)}
            add(_small_step_kernel, types, {**constants, **small})
        for element in _ELEMENT.values():
            for num_rows in (1, 6):
                wide = torch.float64 if tl.float64 in (acc, element) else torch.float32
                constants = {"stride_gd": 1, "stride_pj": 1, "ACC": _ELEMENT[wide]}
                types = [f"*{element}", p, f"*{element}", "i32", "i32", "i64", "i64"]
                add(_project_gradient_kernel, types, {**constants, **_product_blocks(num_rows, wide)})
    return configurations

"""Triton kernels of the Shapley values of modalities whose logits add up, and of utilities of given logits.

z_s = bias + sum_{m in s} z^m, u_s = utility(z_s, y), with b_k = k! (M-k-1)! / M!
phi_m = sum_{s contains m} b_{|s|-1} u_s - sum_{s without m} b_|s| u_s.
A block takes some samples with all their classes through the coalitions. The last three modalities are
decided in registers, eight coalitions to a sum over the others; that sum is made anew each time, in the order
of m, so no rounding accumulates, nothing is subtracted and -inf survives. Only this sum reads the partial
logits again, out of the L1 cache. Utilities fold into phi at once; there is no table.
Backward walks the same way. Gradients of the last three modalities stay in registers, the others' in a
scratch, the result itself, that a block has to itself. Few samples and many modalities: several blocks share
the coalitions of a sample, and a sum over them follows.
The label's class is kept apart, -inf stands in its place: the maximum is then that of the others.
Bytes that must move: M N C numbers once, backward twice. Operations: about 4 an element and coalition for the
counting utilities and the margin, an exp more for the others. N = 100,000, C = 32, M = 2, float32 is 26 MB,
8.5 us on an H100 at 3.0 TB/s; predicted 12 us. M = 8: 0.8 G elements of coalitions, about 4 G operations,
0.3 ms where the bytes take 34 us. Measured on an H100: M = 2 0.12 ms forward, most of it the host's.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._additive_shapley_rows import _row_configurations, coalition_utilities_bwd, coalition_utilities_fwd
from ._additive_shapley_utility import (
    _CARDINALITY,
    _MARGIN,
    _PROBABILITY,
    MAX_CLASSES,
    _blocks,
    _chosen,
    _dlogits,
    _utility,
)
from ._common import _ELEMENT, _OPTIONS, _acc, _cdiv, _configuration, _on, _unit, _wide

__all__ = [
    "MAX_CLASSES",
    "additive_shapley_bwd",
    "additive_shapley_fwd",
    "coalition_utilities_bwd",
    "coalition_utilities_fwd",
    "compile_configurations",
]


@triton.jit
def _load_samples(
    p_ptr, labels_ptr, N, C, stride_pn, stride_pc, stride_ln, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return what the kernels over [M, N, C] need of a block of samples before its partial logits."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, BLOCK_C)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_c < C)[None, :]
    y = tl.load(labels_ptr + offs_n * stride_ln, mask=mask_n, other=0).to(tl.int64)
    is_own = offs_c[None, :] == y[:, None]
    mask_own = mask_n & (y >= 0) & (y < C)
    row_ptrs = p_ptr + offs_n[:, None] * stride_pn + offs_c.to(tl.int64)[None, :] * stride_pc
    own_ptrs = p_ptr + offs_n * stride_pn + y * stride_pc
    return offs_n, offs_c, mask_n, mask, y, is_own, mask_own, row_ptrs, own_ptrs


@triton.jit
def _load_part(row_ptrs, own_ptrs, m, stride_pm, mask, mask_own, is_own, ACC: tl.constexpr):
    """Return a modality's partial logits, 0 in the label's place, and the label's apart."""
    offset = tl.cast(m, tl.int64) * stride_pm
    part = tl.load(row_ptrs + offset, mask=mask, other=0.0).to(ACC)
    own = tl.load(own_ptrs + offset, mask=mask_own, other=0.0).to(ACC)
    return tl.where(is_own, 0.0, part), own


@triton.jit
def _empty_coalition(bias_ptr, y, offs_c, is_own, mask_own, C, HAS_BIAS: tl.constexpr, ACC: tl.constexpr):
    """Return the logits without any modality, -inf in the label's place, and the label's apart."""
    base = tl.where(is_own | (offs_c >= C)[None, :], float("-inf"), 0.0).to(ACC)
    own = tl.zeros_like(y).to(ACC)
    if HAS_BIAS:
        base += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
        base = tl.where(is_own, float("-inf"), base)
        own += tl.load(bias_ptr + y, mask=mask_own, other=0.0)
    return base, own


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
    UNIT: tl.constexpr,  # of stride_pm, which is given in units of so many numbers: `_unit`
    HAS_BIAS: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_pm = tl.cast(stride_pm, tl.int64) * UNIT
    offs_n, offs_c, mask_n, mask, y, is_own, mask_own, row_ptrs, own_ptrs = _load_samples(
        p_ptr, labels_ptr, N, C, stride_pn, stride_pc, stride_ln, BLOCK_N, BLOCK_C
    )
    offs_m = tl.arange(0, BLOCK_M)
    is_before = offs_c[None, :] < y[:, None]
    first = M - LAST
    part0, own0 = _load_part(row_ptrs, own_ptrs, first, stride_pm, mask, mask_own, is_own, ACC)
    if LAST > 1:
        part1, own1 = _load_part(row_ptrs, own_ptrs, first + 1, stride_pm, mask, mask_own, is_own, ACC)
    if LAST > 2:
        part2, own2 = _load_part(row_ptrs, own_ptrs, first + 2, stride_pm, mask, mask_own, is_own, ACC)
    base, own_base = _empty_coalition(bias_ptr, y, offs_c, is_own, mask_own, C, HAS_BIAS, ACC)
    origin = tl.zeros((BLOCK_N,), dtype=ACC)
    if UTILITY >= _PROBABILITY:
        # A number added to all utilities changes no value: without the empty coalition's, nothing cancels.
        origin = _utility(base, own_base, is_before, UTILITY)
        origin = tl.where(origin - origin == 0, origin, 0.0)

    phi = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    begin = tl.program_id(1) * coalitions
    for others in range(begin, begin + coalitions):
        z, own = base, own_base
        size = others * 0
        for m in range(first):
            if ((others >> m) & 1) != 0:
                part, own_part = _load_part(row_ptrs, own_ptrs, m, stride_pm, mask, mask_own, is_own, ACC)
                z += part
                own += own_part
                size += 1
        for j in tl.static_range(1 << LAST):
            x, own_x = z, own
            if (j & 1) != 0:
                x, own_x = x + part0, own_x + own0
            if (j & 2) != 0:
                x, own_x = x + part1, own_x + own1
            if (j & 4) != 0:
                x, own_x = x + part2, own_x + own2
            u = _utility(x, own_x, is_before, UTILITY) - origin
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
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    stride_pm = tl.cast(stride_pm, tl.int64) * UNIT
    offs_n, offs_c, mask_n, mask, y, is_own, mask_own, row_ptrs, own_ptrs = _load_samples(
        p_ptr, labels_ptr, N, C, stride_pn, stride_pc, stride_ln, BLOCK_N, BLOCK_C
    )
    element = dp_ptr.dtype.element_ty
    dp_ptrs = dp_ptr + offs_n[:, None] * C + offs_c[None, :]
    step = tl.cast(N, tl.int64) * C
    dphi_ptrs = dphi_ptr + offs_n * stride_dn

    first = M - LAST
    part0, own0 = _load_part(row_ptrs, own_ptrs, first, stride_pm, mask, mask_own, is_own, ACC)
    dphi0 = tl.load(dphi_ptrs + tl.cast(first, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)
    dpart0 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    if LAST > 1:
        part1, own1 = _load_part(row_ptrs, own_ptrs, first + 1, stride_pm, mask, mask_own, is_own, ACC)
        dphi1 = tl.load(dphi_ptrs + tl.cast(first + 1, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)
        dpart1 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    if LAST > 2:
        part2, own2 = _load_part(row_ptrs, own_ptrs, first + 2, stride_pm, mask, mask_own, is_own, ACC)
        dphi2 = tl.load(dphi_ptrs + tl.cast(first + 2, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)
        dpart2 = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
    base, own_base = _empty_coalition(bias_ptr, y, offs_c, is_own, mask_own, C, HAS_BIAS, ACC)
    dbase = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)

    for others in range(1 << first):
        z, own = base, own_base
        size = others * 0
        dphi_in = tl.zeros((BLOCK_N,), dtype=ACC)
        dphi_out = tl.zeros((BLOCK_N,), dtype=ACC)
        for m in range(first):
            dphi = tl.load(dphi_ptrs + tl.cast(m, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)
            if ((others >> m) & 1) != 0:
                part, own_part = _load_part(row_ptrs, own_ptrs, m, stride_pm, mask, mask_own, is_own, ACC)
                z += part
                own += own_part
                size += 1
                dphi_in += dphi
            else:
                dphi_out += dphi
        dz = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
        for j in tl.static_range(1 << LAST):
            x, own_x = z, own
            inside, outside = dphi_in, dphi_out
            if (j & 1) != 0:
                x, own_x, inside = x + part0, own_x + own0, inside + dphi0
            else:
                outside += dphi0
            if (j & 2) != 0:
                x, own_x, inside = x + part1, own_x + own1, inside + dphi1
            elif LAST > 1:
                outside += dphi1
            if (j & 4) != 0:
                x, own_x, inside = x + part2, own_x + own2, inside + dphi2
            elif LAST > 2:
                outside += dphi2
            players = size + (j & 1) + ((j >> 1) & 1) + ((j >> 2) & 1)
            du = tl.load(weights_ptr + players) * inside - tl.load(weights_ptr + players + 1) * outside
            dx = _dlogits(x, own_x, du, offs_c, is_own, UTILITY)
            dz += dx
            if (j & 1) != 0:
                dpart0 += dx
            if (j & 2) != 0:
                dpart1 += dx
            if (j & 4) != 0:
                dpart2 += dx
        dbase += dz
        for m in range(first):
            if ((others >> m) & 1) != 0:
                offset = tl.cast(m, tl.int64) * step
                earlier = tl.zeros((BLOCK_N, BLOCK_C), dtype=ACC)
                # The first coalition with m is the one of m alone.
                if others != (1 << m):
                    earlier = tl.load(dp_ptrs + offset, mask=mask, other=0.0).to(ACC)
                tl.store(dp_ptrs + offset, (earlier + dz).to(element), mask=mask)
        # The next coalition's loads may lie with other threads.
        tl.debug_barrier()
    last_ptrs = dp_ptrs + tl.cast(first, tl.int64) * step
    tl.store(last_ptrs, dpart0.to(element), mask=mask)
    if LAST > 1:
        tl.store(last_ptrs + step, dpart1.to(element), mask=mask)
    if LAST > 2:
        tl.store(last_ptrs + 2 * step, dpart2.to(element), mask=mask)
    if UTILITY != _MARGIN:
        # 0, or no number where a gradient is infinite: what `_dlogits` leaves to its callers. Last, when
        # little is held in registers.
        sums = tl.zeros((BLOCK_N,), dtype=ACC)
        for m in range(M):
            dphi = tl.load(dphi_ptrs + tl.cast(m, tl.int64) * stride_dm, mask=mask_n, other=0.0).to(ACC)
            sums += dphi - dphi
        own_sums = tl.where(is_own, sums[:, None], 0.0)
        dbase += own_sums
        if tl.max((sums != 0).to(tl.int32)) != 0:
            tl.debug_barrier()
            for m in range(M):
                offset = tl.cast(m, tl.int64) * step
                earlier = tl.load(dp_ptrs + offset, mask=mask, other=0.0).to(ACC)
                tl.store(dp_ptrs + offset, (earlier + own_sums).to(element), mask=mask)
    if HAS_BIAS:
        dbias = tl.sum(tl.where(mask, dbase, 0.0), axis=0)
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * C + offs_c, dbias, mask=offs_c < C)


@triton.jit(do_not_specialize=["number", "splits"])
def _sum_splits_kernel(
    parts_ptr,  # [splits, number] in ACC, contiguous
    phi_ptr,  # [number], contiguous
    number,
    splits,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < number
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    for split in range(splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * number + offs, mask=mask, other=0.0)
    tl.store(phi_ptr + offs, total.to(phi_ptr.dtype.element_ty), mask=mask)


_SUM_BLOCKS = {"BLOCK": 128}
# Blocks that fill the largest GPU; with fewer, several share the coalitions of a sample.
_ENOUGH_BLOCKS = 1024
_WEIGHTS: dict[tuple, Tensor] = {}


def _weights(num_modalities: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return 0, b_0, ..., b_{M-1}, 0; copied to a GPU once."""
    key = (num_modalities, device, dtype)
    weights = _WEIGHTS.get(key)
    if weights is None:
        b = [1 / (num_modalities * math.comb(num_modalities - 1, k)) for k in range(num_modalities)]
        values = [0.0, *b, 0.0]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Nothing can be copied from the host into a graph; a fill carries its value along.
            weights = torch.empty(len(values), dtype=dtype, device=device)
            for entry, value in zip(weights, values):
                entry.fill_(value)
        else:
            weights = _WEIGHTS[key] = torch.tensor(values, dtype=dtype, device=device)
    return weights


def _last(num_modalities: int, blocks: dict, acc: torch.dtype, kernel: str) -> int:
    """Return how many modalities are decided in registers."""
    held = blocks["BLOCK_N"] * blocks["BLOCK_C"] * acc.itemsize // (4 * 32 * blocks["num_warps"])
    if held > (8 if kernel == "fwd" else 4):
        return 1
    return min(num_modalities, 2 if acc == torch.float64 else 3)


def additive_shapley_fwd(
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C] in the dtype of accumulation
    utility: int,
) -> Tensor:  # [N, M]
    """Return each modality's Shapley value; M from 1 to 20, C up to MAX_CLASSES, any strides."""
    num_modalities, num_samples, num_classes = partial_logits.shape
    phi = partial_logits.new_empty(num_samples, num_modalities)
    if phi.numel() == 0:
        return phi
    acc = _wide(partial_logits.dtype)
    blocks = _chosen(partial_logits, "fwd")
    last = _last(num_modalities, blocks, acc, "fwd")
    num_blocks = _cdiv(num_samples, blocks["BLOCK_N"])
    wanted = triton.next_power_of_2(_cdiv(_ENOUGH_BLOCKS, num_blocks))
    splits = min(2 ** (num_modalities - last), wanted)
    parts = phi[None] if splits == 1 else phi.new_empty(splits, *phi.shape, dtype=acc)
    unit = _unit(partial_logits)
    with _on(phi.device):
        _additive_shapley_fwd_kernel[(num_blocks, splits)](
            partial_logits,
            labels,
            bias,
            _weights(num_modalities, phi.device, acc),
            parts,
            num_samples,
            num_classes,
            num_modalities,
            2 ** (num_modalities - last) // splits,
            partial_logits.stride(0) // unit,
            *partial_logits.stride()[1:],
            labels.stride(0),
            UTILITY=utility,
            UNIT=unit,
            HAS_BIAS=bias is not None,
            LAST=last,
            BLOCK_M=triton.next_power_of_2(num_modalities),
            ACC=_acc(acc),
            enable_fp_fusion=True,
            **blocks,
        )
    return phi if splits == 1 else _summed(parts, phi)


def _summed(
    parts: Tensor,  # [splits, N, M] in the dtype of accumulation
    phi: Tensor,  # [N, M] to be filled
) -> Tensor:  # [N, M]
    """Return the sum over splits, in their order, rounded once."""
    with _on(phi.device):
        grid = (_cdiv(phi.numel(), _SUM_BLOCKS["BLOCK"]),)
        _sum_splits_kernel[grid](parts, phi, phi.numel(), len(parts), **_SUM_BLOCKS, **_OPTIONS)
    return phi


def additive_shapley_bwd(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C] in the dtype of accumulation
    utility: int,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    """Return the gradients of a smooth utility's values; up to three modalities' have the logits' dtype.

    Those of more are summed where they lie, and they and the bias's have the dtype of accumulation.
    """
    num_modalities, num_samples, num_classes = partial_logits.shape
    acc = _wide(partial_logits.dtype)
    blocks = _chosen(partial_logits, "bwd")
    last = _last(num_modalities, blocks, acc, "bwd")
    num_blocks = _cdiv(num_samples, blocks["BLOCK_N"])
    dtype = partial_logits.dtype if num_modalities == last else acc
    dpartial_logits = torch.empty(partial_logits.shape, dtype=dtype, device=partial_logits.device)
    sums = None if bias is None else dpartial_logits.new_empty(num_blocks, num_classes, dtype=acc)
    if dpartial_logits.numel() > 0:
        unit = _unit(partial_logits)
        with _on(dphi.device):
            _additive_shapley_bwd_kernel[(num_blocks,)](
                dphi,
                partial_logits,
                labels,
                bias,
                _weights(num_modalities, dphi.device, acc),
                dpartial_logits,
                sums,
                num_samples,
                num_classes,
                num_modalities,
                *dphi.stride(),
                partial_logits.stride(0) // unit,
                *partial_logits.stride()[1:],
                labels.stride(0),
                UTILITY=utility,
                UNIT=unit,
                HAS_BIAS=bias is not None,
                LAST=last,
                ACC=_acc(acc),
                enable_fp_fusion=True,
                **blocks,
            )
    if sums is None:
        return dpartial_logits, dpartial_logits.new_empty(0)
    return dpartial_logits, sums[0] if num_blocks == 1 else sums.sum(0)


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = []

    def add(*item) -> None:
        configurations.append(_configuration(*item))

    size, stride, labels = "i32", "i64", "*i64"
    # Modalities, classes and utility: those that need most registers, and the smallest of all.
    cases = [(8, 10, 0), (8, 10, 3), (8, 10, 4), (8, MAX_CLASSES, 3), (2, 32, 3)]
    for dtype, element in _ELEMENT.items():
        acc = _wide(dtype)
        x, wide = f"*{element}", f"*{_acc(dtype)}"
        for num_modalities, num_classes, utility in cases if dtype == acc else cases[1:2]:
            constants = {
                "UTILITY": utility,
                "stride_pc": 1,
                "UNIT": 1,
                "HAS_BIAS": True,
                "ACC": _acc(dtype),
            }
            blocks = _blocks(num_classes, acc, "fwd")
            constants |= blocks | {"LAST": _last(num_modalities, blocks, acc, "fwd")}
            types = [x, labels, wide, wide, wide, size, size, size, size, stride, stride, stride]
            block_m = triton.next_power_of_2(num_modalities)
            add(_additive_shapley_fwd_kernel, types, {**constants, "BLOCK_M": block_m})
            if utility >= 2:
                blocks = _blocks(num_classes, acc, "bwd")
                constants |= blocks | {"LAST": _last(num_modalities, blocks, acc, "bwd")}
                types = [x, x, labels, wide, wide, wide, wide, *[size] * 3, *[stride] * 5]
                add(_additive_shapley_bwd_kernel, types, constants)
        for out in (f"*{element}", wide):
            add(_sum_splits_kernel, [wide, out, "i64", size], _SUM_BLOCKS)
    return configurations + _row_configurations()

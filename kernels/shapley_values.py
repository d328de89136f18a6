"""Triton kernels of the Shapley values and of their gradient.

phi_m = sum_{s contains m} a_|s| v_s - sum_s b_|s| v_s, b_k = k! (M-k-1)! / M!, b_M = 0, a_k = b_{k-1} + b_k.
Both kernels choose the weights of a chunk of coalitions by size and multiply the chunk by the pattern of its
bits. The utilities are read once, which is the floor. Products are taken in the type of accumulation, not on
tensor cores, whose float32 is too short; M = 12 means 12 multiply-adds for every 4 bytes. Where sums are not
finite, the block is computed once more in a way that no intermediate overflows.
Measured: bench/results/shapley_values.md.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _OPTIONS, _acc, _cdiv, _configuration, _on
from ._tuning import choose


@triton.jit
def _popcount(x):
    count = x - ((x >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    return (count + (count >> 8) + (count >> 16)) & 0x1F


@triton.constexpr_function
def _weight(M, k):
    """Return b_k = 1 / (M binom(M-1, k)), for M players, as a constant the compiler knows."""
    if k < 0 or k >= M:
        return 0.0
    count = M
    for i in range(k):
        count = count * (M - 1 - i) // (i + 1)
    return 1 / count


@triton.jit
def _weights(size, M: tl.constexpr, ACC: tl.constexpr):
    """Return a_k and b_k for a chunk of coalition sizes, chosen among constants: no table is copied."""
    a = tl.zeros(size.shape, dtype=ACC)
    b = tl.zeros(size.shape, dtype=ACC)
    for k in tl.static_range(M + 1):
        # Constants become float32 unless they are given a type.
        b_k = tl.full((), _weight(M, k), ACC)
        a = tl.where(size == k, tl.full((), _weight(M, k - 1), ACC) + b_k, a)
        b = tl.where(size == k, b_k, b)
    return a, b


@triton.jit
def _fold(
    v_ptrs,  # [BLOCK_N, 1]
    mask_n,  # [BLOCK_N]
    offs_m,  # [BLOCK_M]
    origin,  # [BLOCK_N]
    stride_vs,
    SCALE: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the values of SCALE times the utilities, [BLOCK_N, BLOCK_M]."""
    values = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC)
    origin *= SCALE
    for start in range(0, 1 << M, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        size = _popcount(offs_s)
        a, b = _weights(size, M, ACC)
        ptrs = v_ptrs + offs_s.to(tl.int64)[None, :] * stride_vs
        v = tl.load(ptrs, mask=mask_n[:, None], other=0.0).to(ACC) * SCALE - origin[:, None]
        contains = ((offs_s[:, None] >> offs_m[None, :]) & 1) != 0
        pattern = tl.where(contains, (a - b)[:, None], -b[:, None])
        values += tl.sum(v[:, :, None] * pattern[None, :, :], axis=1)
    return values


@triton.jit(do_not_specialize=["N"])
def _shapley_values_fwd_kernel(
    v_ptr,  # [N, S]
    phi_ptr,  # [N, M], contiguous
    N,
    stride_vn,
    stride_vs,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_m = tl.arange(0, BLOCK_M)
    # A constant added to all utilities changes no value: without the empty coalition's, nothing cancels.
    origin = tl.load(v_ptr + offs_n * stride_vn, mask=mask_n, other=0.0).to(ACC)
    # Infinity less infinity would be NaN for all other coalitions.
    origin = tl.where(origin - origin == 0, origin, 0.0)
    v_ptrs = v_ptr + offs_n[:, None] * stride_vn
    values = _fold(v_ptrs, mask_n, offs_m, origin, stride_vs, 1.0, M, BLOCK_N, BLOCK_S, BLOCK_M, ACC)
    is_bad = (values - values != 0) & (offs_m < M)[None, :]
    if tl.max(is_bad.to(tl.int32)) != 0:
        large = _fold(v_ptrs, mask_n, offs_m, origin, stride_vs, 0.25, M, BLOCK_N, BLOCK_S, BLOCK_M, ACC)
        values = tl.where(is_bad, 4 * large, values)
    phi_ptrs = phi_ptr + offs_n[:, None] * M + offs_m[None, :]
    tl.store(phi_ptrs, values.to(phi_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_m < M)[None, :])


@triton.jit(do_not_specialize=["N"])
def _shapley_values_bwd_kernel(
    dphi_ptr,  # [N, M]
    dv_ptr,  # [N, S], contiguous
    N,
    stride_dphin,
    stride_dphim,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    dphi_ptrs = dphi_ptr + offs_n * stride_dphin
    total = tl.zeros((BLOCK_N,), dtype=ACC)
    largest_sum = tl.zeros((BLOCK_N,), dtype=ACC)
    members = tl.zeros((BLOCK_N, BLOCK_S), dtype=ACC)
    for m in tl.static_range(M):
        dphi = tl.load(dphi_ptrs + m * stride_dphim, mask=mask_n, other=0.0).to(ACC)
        total += dphi
        largest_sum += tl.abs(dphi)
        members += tl.where(((offs_s >> m) & 1) != 0, 1.0, 0.0).to(ACC)[None, :] * dphi[:, None]
    a, b = _weights(_popcount(offs_s), M, ACC)
    dv = a[None, :] * members - b[None, :] * total[:, None]
    is_bad = largest_sum - largest_sum != 0
    if tl.max(is_bad.to(tl.int32)) != 0:
        exact = tl.zeros((BLOCK_N, BLOCK_S), dtype=ACC)
        for m in tl.static_range(M):
            dphi = tl.load(dphi_ptrs + m * stride_dphim, mask=mask_n, other=0.0).to(ACC)
            weight = tl.where(((offs_s >> m) & 1) != 0, a - b, -b)
            exact += weight[None, :] * dphi[:, None]
        dv = tl.where(is_bad[:, None], exact, dv)
    dv_ptrs = dv_ptr + (offs_n << M)[:, None] + offs_s[None, :]
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_n[:, None])


def _blocks(num_players: int, kernel: str) -> dict:
    """Return the tile sizes and the number of warps for M players."""
    # ptxas, which aims at occupancy, spills a few bytes of some backward kernels at a tile of 1024.
    tile = 256 if kernel == "fwd" else 512
    block_s = min(2**num_players, 64 if kernel == "fwd" else 256)
    block_n = max(1, tile // block_s)
    blocks = {"BLOCK_N": block_n, "BLOCK_S": block_s}
    if kernel == "fwd":
        blocks["BLOCK_M"] = triton.next_power_of_2(num_players)
    return blocks


def _chosen(kernel: str, x: Tensor, num_players: int) -> dict:
    """Return the constants and the options to launch with: the table's, or those stored for this GPU."""
    default = _blocks(num_players, kernel)
    tile = {"BLOCK_N": default["BLOCK_N"], "BLOCK_S": default["BLOCK_S"], "num_warps": _OPTIONS["num_warps"]}

    def candidates() -> list[dict]:
        wider = [size for size in (64, 128, 256) if size <= 2**num_players] or [2**num_players]
        shapes = itertools.product((1, 2, 4, 8), wider, (4, 8))
        return [
            {"BLOCK_N": max(1, factor * 256 // block_s), "BLOCK_S": block_s, "num_warps": num_warps}
            for factor, block_s, num_warps in shapes
        ]

    chosen = choose("shapley_values", f"{kernel} {x.dtype} M={num_players}", tile, candidates, x.device)
    return {**_OPTIONS, **default, **chosen}


def shapley_values_fwd(
    utilities: Tensor,  # [..., S]
) -> Tensor:  # [..., M]
    """Return the Shapley values of M players; utilities of any strides, S = 2^M with M from 1 to 20."""
    num_players = utilities.shape[-1].bit_length() - 1
    phi = utilities.new_empty(*utilities.shape[:-1], num_players)
    if phi.numel() == 0:
        return phi
    rows = utilities.reshape(-1, utilities.shape[-1])
    blocks = _chosen("fwd", rows, num_players)
    grid = (_cdiv(rows.shape[0], blocks["BLOCK_N"]),)
    with _on(utilities.device):
        _shapley_values_fwd_kernel[grid](
            rows,
            phi,
            rows.shape[0],
            *rows.stride(),
            M=num_players,
            ACC=_acc(utilities.dtype),
            **blocks,
        )
    return phi


def shapley_values_bwd(
    dphi: Tensor,  # [..., M]
) -> Tensor:  # [..., S]
    """Return the gradient with respect to the utilities: the transposed map."""
    num_players = dphi.shape[-1]
    dv = dphi.new_empty(*dphi.shape[:-1], 2**num_players)
    if dv.numel() == 0:
        return dv
    rows = dphi.reshape(-1, num_players)
    blocks = _chosen("bwd", rows, num_players)
    grid = (_cdiv(rows.shape[0], blocks["BLOCK_N"]), 2**num_players // blocks["BLOCK_S"])
    with _on(dphi.device):
        _shapley_values_bwd_kernel[grid](
            rows,
            dv,
            rows.shape[0],
            *rows.stride(),
            M=num_players,
            ACC=_acc(dphi.dtype),
            **blocks,
        )
    return dv


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = []
    for dtype, element in _ELEMENT.items():
        types = [f"*{element}", f"*{element}", "i32", "i64", "i64"]
        # Tiles depend on M alone, so one dtype takes part with all of them and the others with the extremes.
        for num_players in (1, 2, 3, 5, 8, 12, 20) if dtype == torch.float32 else (1, 20):
            for name, kernel in (("fwd", _shapley_values_fwd_kernel), ("bwd", _shapley_values_bwd_kernel)):
                constants = {"M": num_players, **_blocks(num_players, name), "ACC": _acc(dtype)}
                configurations.append(_configuration(kernel, types, constants))
    return configurations

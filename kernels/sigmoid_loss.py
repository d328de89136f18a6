"""Triton kernel of SigLIP's pairwise sigmoid loss with constant keys and of all its gradients.

  s_ij = q_i . k_j / temperature + bias,  t_ij = s_ij, but -s_ii of the own key
  loss_i = sum_j log(1 + exp(t_ij)),  g_ij = sigmoid(t_ij), but -sigmoid(t_ii)
  residual_i = sum_j g_ij k_j,  sums_i = sum_j g_ij and sum_j g_ij q_i . k_j / temperature

Programs are (blocks of queries, columns of the residual), as in `_duc_loss_main.py`: a key tile is loaded
once for both products. A row's factors 1 + exp(-|t|) are multiplied, as their product less 1, which keeps the
digits of small ones as a sum would: one logarithm for up to 64 keys. Two launches, one more where rows are
packed first. Floor: 4 N^2 d operations. Predicted: bench/results/sigmoid_loss.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _acc, _bits, _cdiv, _Configurations, _from_bits, _on, _wide
from ._contrast_columns import _reduced, _residual_dtype, _rows_of, _unpacked_rows
from ._contrast_scores import _scores_in_pieces, _tiles_of
from ._contrast_tiles import _arguments, _choices, _chosen, _compiled_cases, _machine, _precision, _Tile


@triton.jit
def _joint(a, b):
    """Return (1 + a) (1 + b) - 1."""
    return a + b + a * b


@triton.jit
def _log_of_one_and(
    x,  # at least 0
    ACC: tl.constexpr,
):
    """Return log(1 + x)."""
    # log(1 + x) = 2 atanh s, s = x / (2 + x), up to 1/3 for x up to 1; beyond, a GPU's own is good.
    small = tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL)
    s = small / (2.0 + small)
    z = s * s
    p = tl.zeros_like(x)
    TERMS: tl.constexpr = 17 if tl.float64 == ACC else 8
    for i in tl.static_range(TERMS, 0, -1):
        p = (p + 2.0 / (2 * i + 1)) * z
    return tl.where(x > 1.0, tl.log(1.0 + x), p * s + 2.0 * s)


@triton.jit
def _loss_of(
    t,  # [BLOCK_N, BLOCK_K]
    e,  # [BLOCK_N, BLOCK_K], exp(-|t|)
    JOINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return the sums [BLOCK_N] of log(1 + exp(t))."""
    linear = tl.sum(tl.where(t > 0, t, 0.0), 1)
    if not JOINED:
        return linear + tl.sum(_log_of_one_and(e, ACC), 1)
    if BLOCK_K > 64:
        # The product of more factors of 2 might be out of float32's range.
        parts = tl.reshape(e, (BLOCK_N, BLOCK_K // 64, 64))
        return linear + tl.sum(_log_of_one_and(tl.reduce(parts, 2, _joint), ACC), 1)
    return linear + _log_of_one_and(tl.reduce(e, 1, _joint), ACC)


@triton.jit(do_not_specialize=["N", "K", "offset", "scale_bits", "bias_bits"])
def _sigmoid_loss_fwd_kernel(
    q_ptr,  # [N, W]
    k_ptr,  # [K, W]
    numbers_ptr,  # float64 [2], temperature and bias; None: the bits that follow
    losses_ptr,  # [N]
    sums_ptr,  # [2, N]
    residual_ptr,  # [N, W]; None: not wanted
    N,
    K,
    W,
    offset,
    scale_bits,  # of a float64, 1 / temperature
    bias_bits,
    HAS_RESIDUAL: tl.constexpr,
    JOINED: tl.constexpr,  # whether factors are multiplied; Triton's interpreter takes seconds for it
    ENLARGED: tl.constexpr,  # what weights are multiplied by, lest small ones vanish in float16
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    first_row = tl.program_id(0) * BLOCK_N
    first_column = tl.program_id(1) * BLOCK_D
    # Within a tile 32 bits reach, save where rows may have any length.
    rows = tl.arange(0, BLOCK_N)
    keys = tl.arange(0, BLOCK_K)
    if WIDE:
        rows = rows.to(tl.int64)
        keys = keys.to(tl.int64)
    mask_n = first_row + rows < N
    if numbers_ptr is None:
        scale = _from_bits(scale_bits, ACC)
        bias = _from_bits(bias_bits, ACC)
    else:
        scale = (1.0 / tl.load(numbers_ptr)).to(ACC)
        bias = tl.load(numbers_ptr + 1).to(ACC)
    first = first_row.to(tl.int64) * W
    q_ptr += first
    offs_d = first_column + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < W)[None, :]
    offs_qn = (rows * W)[:, None]
    offs_kn = (keys * W)[:, None]
    if not WIDE:
        q = tl.load(q_ptr + (offs_qn + offs_d[None, :]), mask=mask_n[:, None] & mask_d, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_D if HAS_RESIDUAL else 1), dtype=ACC)
    loss = tl.zeros((BLOCK_N,), dtype=ACC)
    weight_sum = tl.zeros((BLOCK_N,), dtype=ACC)
    heated_sum = tl.zeros((BLOCK_N,), dtype=ACC)
    own_weight = tl.zeros((BLOCK_N,), dtype=ACC)
    # Tiles that hold own keys, and a ragged last one, go first and pay for masks; others need none.
    own = offset + first_row
    own_from, own_to, num_tiles, num_masked = _tiles_of(own, K, BLOCK_N, BLOCK_K)
    for MASKED in tl.static_range(1, -1, -1):
        num_steps = num_masked if MASKED else num_tiles - num_masked
        # Few tiles need masks: copies in flight for them would only take registers from the others.
        for step in tl.range(num_steps, num_stages=1 if MASKED else None):
            if MASKED:
                tile = tl.where(own_from + step < own_to, own_from + step, num_tiles - 1)
            else:
                tile = step + tl.where(step >= own_from, own_to - own_from, 0)
            tile_ptr = k_ptr + tile.to(tl.int64) * BLOCK_K * W
            mask_k = tile * BLOCK_K + keys < K
            if HAS_RESIDUAL or not WIDE:
                mask = mask_k[:, None] & mask_d if MASKED else mask_d
                k = tl.load(tile_ptr + (offs_kn + offs_d[None, :]), mask=mask, other=0.0)
            if WIDE:
                s = _scores_in_pieces(
                    q_ptr, tile_ptr, offs_qn, offs_kn, mask_n, mask_k, W, W,
                    MASKED, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION, ACC,
                )  # fmt: skip
            else:
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
            s *= scale
            t = s + bias
            if MASKED:
                is_own = (tile * BLOCK_K + keys)[None, :] == (own + rows)[:, None]
                t = tl.where(is_own, -t, t)
                # A query of infinity makes NaN of keys that are not there.
                s = tl.where(mask_k[None, :], s, 0.0)
                t = tl.where(mask_k[None, :], t, float("-inf"))
            e = tl.exp(-tl.abs(t))
            g = tl.where(t > 0, 1.0, e) / (1.0 + e)
            if MASKED:
                g = tl.where(is_own, -g, g)
                own_weight += tl.sum(tl.where(is_own, g, 0.0), 1)
            loss += _loss_of(t, e, JOINED, BLOCK_N, BLOCK_K, ACC)
            weight_sum += tl.sum(g, 1)
            heated_sum += tl.sum(g * s, 1)
            if HAS_RESIDUAL:
                acc = tl.dot((g * ENLARGED).to(k.dtype), k, acc=acc, input_precision=PRECISION, out_dtype=ACC)
    if first_column == 0:
        rows_ptrs = first_row + rows
        tl.store(losses_ptr + rows_ptrs, loss, mask=mask_n)
        tl.store(sums_ptr + rows_ptrs, weight_sum, mask=mask_n)
        tl.store(sums_ptr + N + rows_ptrs, heated_sum, mask=mask_n)
    if HAS_RESIDUAL:
        offs = offs_qn + offs_d[None, :]
        mask = mask_n[:, None] & mask_d
        residual = acc * (1.0 / ENLARGED)
        if q_ptr.dtype.element_ty.primitive_bitwidth == 16:
            # By far the largest weight at first, the own key's is taken in float32: what rounding it lost is
            # added, save of infinite keys, which have had their effect.
            rounded = (own_weight * ENLARGED).to(q_ptr.dtype.element_ty).to(ACC) * (1.0 / ENLARGED)
            lost = own_weight - rounded
            own_ptr = k_ptr + own.to(tl.int64) * W
            k_own = tl.load(own_ptr + offs, mask=mask, other=0.0).to(ACC)
            residual += tl.where(tl.abs(k_own) < float("inf"), lost[:, None] * k_own, 0.0)
        tl.store(residual_ptr + first + offs, residual.to(residual_ptr.dtype.element_ty), mask=mask)


def _enlarged(dtype: torch.dtype) -> float:
    """Return what weights, of up to 1, are multiplied by before they are rounded to a dtype."""
    return 2.0**15 if dtype == torch.float16 else 1.0


def _sigmoid_choices(
    target: int | str,
    dtype: torch.dtype,
    precision: str,
    width: int,
) -> tuple[dict, list[_Tile]]:
    """Return constants and tiles as `_choices` does, smaller where a tile's weights would not fit."""
    common, tiles = _choices(target, dtype, precision, width)
    if isinstance(target, str) or dtype.itemsize > 2 or common["WIDE"]:
        return common, tiles
    if 90 <= target < 100:
        if common["BLOCK_D"] == 256:
            # Queries in pieces, as longer ones are.
            return _choices(target, dtype, precision, 512)
        tiles = [t._replace(keys=t.keys // 2) if max(t.queries, common["BLOCK_D"]) > 64 else t for t in tiles]
    elif target >= 120:
        tiles = [t._replace(keys=32) for t in tiles]
    return common, tiles


def _joins(target: int | str) -> bool:
    """Return whether the kernel takes one logarithm of many factors."""
    return target != "interpreter"


def sigmoid_loss_fwd(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    numbers: Tensor | None,  # float64 [2]
    temperature: float,
    bias: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [N]; [N, D] or [0]; [2, N]
    """Return the loss, temperature times the gradient of its sum for the queries, and the rows' sums."""
    queries, keys, width = _rows_of(query, key)
    residual = torch.empty_like(queries, dtype=_residual_dtype(query.dtype)) if with_residual else None
    losses = queries.new_empty(1, len(query), dtype=_wide(query.dtype))
    sums = losses.new_empty(2, len(query))
    precision = _precision(query.dtype)
    target, _ = _machine(query.device)
    common, tiles = _sigmoid_choices(target, query.dtype, precision, width)
    part = "both" if with_residual else "loss"
    num_splits, blocks, options = _chosen(
        "sigmoid_loss", queries, part, (1, len(query), width), common, tiles
    )
    with _on(query.device):
        _sigmoid_loss_fwd_kernel[_cdiv(len(query), blocks["BLOCK_N"]), num_splits](
            queries,
            keys,
            numbers,
            losses,
            sums,
            residual,
            len(query),
            len(key),
            width,
            offset,
            _bits(1 / temperature),
            _bits(bias),
            HAS_RESIDUAL=with_residual,
            JOINED=_joins(target),
            ENLARGED=_enlarged(query.dtype),
            PRECISION=precision,
            ACC=_acc(query.dtype),
            **common,
            **blocks,
            **options,
        )
    return _reduced(losses, reduction), _unpacked_rows(residual, query, width), sums


def compile_configurations(target: int | str) -> list[tuple]:
    """Return (kernel, types, constexprs, options, tensor core instructions) of all that is to compile."""
    configurations = _Configurations()
    for dtype, precision, width, with_residual in _compiled_cases(target):
        common, tiles = _sigmoid_choices(target, dtype, precision, width)
        x, acc = f"*{_ELEMENT[dtype]}:16", f"*{_acc(dtype)}:16"
        types = [x, x, "*fp64:16", acc, acc, f"*{_ELEMENT[_residual_dtype(dtype)]}:16"]
        types += ["i32", "i32", "i32:16", "i32", "i64", "i64"]
        constants = {"HAS_RESIDUAL": with_residual, "ENLARGED": _enlarged(dtype), "PRECISION": precision}
        constants |= {"JOINED": _joins(target), "ACC": _acc(dtype), **common}
        if not with_residual:
            del types[5]
            constants["residual_ptr"] = None
        if not with_residual or dtype == torch.float16:
            # Much the same code as above: the largest tile may stand for all. The host knows the numbers.
            tiles = tiles[:1]
            del types[2]
            constants["numbers_ptr"] = None
        instructions = "warp" if precision == "tf32" else "warpgroup" if dtype.itemsize == 2 else None
        for tile in tiles:
            blocks, options = _arguments(tile)
            configurations.add(_sigmoid_loss_fwd_kernel, types, {**constants, **blocks}, options)
            configurations[-1] = (*configurations[-1], instructions)
    return list(configurations)

"""Triton kernels of the dimension-decoupled unidirectional contrastive loss and of its gradient.

For every ordered pair of modalities, over the dimensions d that the first teaches the second,

  s_ij = q_i . k_j,  loss_i = log sum_j exp(s_ij / temperature) - s_ii / temperature
  residual_i = sum_j p_ij k_j - k_i,  p = softmax(s / temperature)

One kernel numbers the columns of each pair, one closes them up (`_contrast_columns.py`), the main one makes
losses and residuals (`_duc_loss_main.py`), one adds up the losses, one puts columns back and sums over
teachers: five launches whatever the number of modalities, four without a gradient.
Floor: 4 N^2 d operations a pair. Predicted and measured: bench/results/duc_loss.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import _ELEMENT, _acc, _bits, _cdiv, _configuration, _Configurations, _on, _wide
from ._contrast_columns import (
    _column_configurations,
    _Columns,
    _packed,
    _reduced,
    _residual_dtype,
    _rows_of,
    _unpacked,
    _unpacked_rows,
)
from ._contrast_tiles import _arguments, _choices, _chosen, _compiled_cases, _machine, _precision
from ._duc_loss_main import _duc_loss_fwd_kernel


def _run(
    queries: Tensor,  # [N, W] of every pair, contiguous
    keys: Tensor,  # [K, W] of every pair, contiguous
    columns: _Columns | None,  # None: one pair
    num_queries: int,
    num_keys: int,
    width: int,  # W of the widest pair
    temperature: float,
    offset: int,
    residual: Tensor | None,  # [N, W] of every pair, contiguous
) -> Tensor:  # [P, N]
    num_pairs = 1 if columns is None else len(columns.counts)
    losses = queries.new_empty(num_pairs, num_queries, dtype=_wide(queries.dtype))
    target, _ = _machine(queries.device)
    precision = _precision(queries.dtype)
    common, tiles = _choices(target, queries.dtype, precision, width)
    part = "loss" if residual is None else "both"
    sizes = (num_pairs, num_queries, width)
    num_splits, blocks, options = _chosen("duc_loss", queries, part, sizes, common, tiles)
    grid = (_cdiv(num_queries, blocks["BLOCK_N"]), num_splits, num_pairs)
    with _on(queries.device):
        _duc_loss_fwd_kernel[grid](
            queries,
            keys,
            None if columns is None else columns.counts,
            None if columns is None else columns.starts,
            losses,
            residual,
            num_queries,
            num_keys,
            width,
            offset,
            _bits(math.log2(math.e) / temperature),
            HAS_RESIDUAL=residual is not None,
            LOWEST=torch.finfo(_wide(queries.dtype)).min,
            HALVED=temperature > (1e300 if queries.dtype == torch.float64 else 1e30),
            PRECISION=precision,
            ACC=_acc(queries.dtype),
            **common,
            **blocks,
            **options,
        )
    return losses


def duc_loss_fwd(
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    effective: Tensor,  # bool [M, D]
    sizes: Sequence[int],  # M^2 numbers of columns a pair has; none: not known on the host
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    """Return the loss and, per feature, temperature times the gradient of the sum of all samples' losses."""
    num_modalities, feature = len(features), features[0]
    num_columns = max(sizes, default=feature.shape[1])
    if num_modalities == 1 or num_columns == 0 or feature.shape[0] == 0:
        losses = feature.new_zeros(1, feature.shape[0], dtype=_wide(feature.dtype))
        shape = (num_modalities, *feature.shape) if with_residual else (0,)
        residuals = feature.new_zeros(shape, dtype=_residual_dtype(feature.dtype))
        return _reduced(losses, reduction), residuals
    queries, packed_keys, columns = _packed(features, keys, effective, sizes)
    residual = None
    if with_residual:
        # Sums over several teachers are rounded once.
        dtype = _wide(feature.dtype) if num_modalities > 2 else _residual_dtype(feature.dtype)
        residual = torch.empty_like(queries, dtype=dtype)
    width = 16 * _cdiv(num_columns, 16)
    shape = (len(feature), len(keys[0]), width)
    losses = _run(queries, packed_keys, columns, *shape, temperature, offset, residual)
    del queries, packed_keys
    loss = _reduced(losses, reduction)
    if residual is None:
        return loss, feature.new_empty(0, dtype=_residual_dtype(feature.dtype))
    return loss, _unpacked(residual, columns, feature, num_modalities)


def info_nce_fwd(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    """Return the loss of one pair in all columns, and temperature times the gradient of its sum."""
    if query.numel() == 0:
        # Without dimensions all scores are 0.
        losses = query.new_full((1, query.shape[0]), math.log(max(1, key.shape[0])), dtype=_wide(query.dtype))
        shape = query.shape if with_residual else (0,)
        return _reduced(losses, reduction), query.new_empty(shape, dtype=_residual_dtype(query.dtype))
    queries, keys, width = _rows_of(query, key)
    residual = torch.empty_like(queries, dtype=_residual_dtype(query.dtype)) if with_residual else None
    losses = _run(queries, keys, None, len(query), len(key), width, temperature, offset, residual)
    return _reduced(losses, reduction), _unpacked_rows(residual, query, width)


def compile_configurations(target: int | str) -> list[tuple]:
    """Return (kernel, types, constexprs, options, tensor core instructions) of all that is to compile."""
    configurations = _Configurations()
    for dtype, precision, width, with_residual in _compiled_cases(target):
        common, tiles = _choices(target, dtype, precision, width)
        x, acc = f"*{_ELEMENT[dtype]}:16", f"*{_acc(dtype)}:16"
        residual = f"*{_ELEMENT[_residual_dtype(dtype)]}:16"
        types = [x, x, "*i32:16", "*i32:16", acc, residual]
        types += ["i32", "i32", "i32:16", "i32", "i64"]
        constants = {"HAS_RESIDUAL": with_residual, "HALVED": False, "PRECISION": precision}
        constants |= {"LOWEST": torch.finfo(_wide(dtype)).min, "ACC": _acc(dtype), **common}
        if not with_residual:
            del types[5]
            constants["residual_ptr"] = None
        if not with_residual or dtype == torch.float16:
            # Much the same code as above: the largest tile may stand for all.
            tiles = tiles[:1]
        if dtype == torch.float16:
            # One pair, of which all columns count.
            del types[2:4]
            constants |= {"counts_ptr": None, "starts_ptr": None}
        instructions = "warp" if precision == "tf32" else "warpgroup" if dtype.itemsize == 2 else None
        for tile in tiles:
            blocks, options = _arguments(tile)
            item = _configuration(_duc_loss_fwd_kernel, types, {**constants, **blocks}, options)
            configurations.append((*item, instructions))
    return [*configurations, *_column_configurations()]

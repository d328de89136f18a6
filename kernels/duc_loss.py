"""Triton kernels of the dimension-decoupled unidirectional contrastive loss and of its gradient.

For every ordered pair of modalities, over the dimensions d that the first teaches the second,

  s_ij = q_i . k_j,  loss_i = log sum_j exp(s_ij / temperature) - s_ii / temperature
  residual_i = sum_j p_ij k_j - k_i,  p = softmax(s / temperature)

One kernel numbers the columns of each pair, one closes them up (`_duc_loss_columns.py`), the main one makes
losses and residuals (`_duc_loss_main.py`), one adds up the losses, one puts columns back and sums over
teachers: five launches whatever the number of modalities, four without a gradient.
Floor: 4 N^2 d operations a pair. Predicted and measured: bench/results/duc_loss.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import _ELEMENT, _acc, _bits, _cdiv, _configuration, _Configurations, _on, _wide
from ._duc_loss_columns import (
    _column_configurations,
    _Columns,
    _packed,
    _residual_dtype,
    _summed,
    _unpacked,
)
from ._duc_loss_main import _duc_loss_fwd_kernel
from ._duc_loss_tiles import _RATE, _arguments, _candidates, _choices, _Tile
from ._tuning import choose, size_class


@functools.cache
def _machine(device: torch.device) -> tuple[int | str, int]:
    """Return architecture and number of SMs."""
    if device.type != "cuda":
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName, properties.multi_processor_count
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: on tensor cores only where the user lets torch do so."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
    target, num_sms = _machine(queries.device)
    precision = _precision(queries.dtype)
    common, tiles = _choices(target, queries.dtype, precision, width)
    num_splits = 1 if residual is None else _cdiv(width, common["BLOCK_D"])

    def duration(tile: _Tile) -> float:
        num_programs = num_splits * num_pairs * _cdiv(num_queries, tile.queries)
        return _cdiv(num_programs, num_sms) * tile.queries / _RATE[tile.queries]

    # Queries by powers of four: what counts is how many programs there are for the SMs.
    size = size_class(num_pairs * num_queries)
    part = "loss" if residual is None else "both"
    key = f"{queries.dtype} {precision} d={common['BLOCK_D']}{'+' * common['WIDE']} {part} {size}"
    default = min(tiles, key=duration)._asdict()
    chosen = choose("duc_loss", key, default, lambda: _candidates(tiles), queries.device)
    blocks, options = _arguments(_Tile(**chosen))
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


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses.sum(0) if len(losses) != 1 else losses[0]
    return _summed(losses, losses.shape[1] if reduction == "mean" else 1)


def _is_ready(x: Tensor) -> bool:
    """Return whether a [N, D] needs no packing to be read 16 bytes at a time."""
    return x.is_contiguous() and x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0


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
    queries, keys = query, key
    if not (_is_ready(query) and _is_ready(key)):
        queries, keys, _ = _packed([query], [key], None, ())
    width = 16 * _cdiv(query.shape[1], 16)
    residual = torch.empty_like(queries, dtype=_residual_dtype(query.dtype)) if with_residual else None
    losses = _run(queries, keys, None, len(query), len(key), width, temperature, offset, residual)
    loss = _reduced(losses, reduction)
    if residual is None:
        return loss, query.new_empty(0, dtype=_residual_dtype(query.dtype))
    # Viewed again, a single row has the strides of its own width.
    return loss, residual.view(-1, width)[:, : query.shape[1]].contiguous().view(query.shape)


def compile_configurations(target: int | str) -> list[tuple]:
    """Return (kernel, types, constexprs, options, tensor core instructions) of all that is to compile."""
    configurations = _Configurations()
    cases = [(torch.bfloat16, "ieee", width, True) for width in (64, 128, 256, 512)]
    cases += [(torch.float32, "ieee", 64, True), (torch.float32, "ieee", 128, True)]
    cases += [(torch.float16, "ieee", 256, True), (torch.float64, "ieee", 64, True)]
    cases += [(torch.bfloat16, "ieee", 128, False)]
    if not isinstance(target, str):
        cases += [(torch.float32, "tf32", 128, True)]
    for dtype, precision, width, with_residual in cases:
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

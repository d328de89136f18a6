"""Triton kernels of the dimension-decoupled unidirectional contrastive loss and of its gradient.

For every ordered pair of modalities, over the dimensions d that the first teaches the second,

  s_ij = q_i . k_j,  loss_i = log sum_j exp(s_ij / temperature) - s_ii / temperature
  residual_i = sum_j p_ij k_j - k_i,  p = softmax(s / temperature)

A first kernel numbers the columns of each pair, a second closes them up, so that the others read 16 bytes at
a time whatever the mask, both for all pairs at once; the main one is attention with values = keys over
(blocks of queries, columns of the residual, pairs): a key tile is loaded once for both products, the maximum
and the sum go along, s_ii is taken from the same tile. One adds up the losses; a last one puts columns back
in their places and sums over teachers, in their order: five launches whatever the number of modalities, four
without a gradient. Above 256 dimensions the queries no longer fit beside the keys: the residual is split by
columns, and each part sums the scores over pieces of d for itself.

Memory: queries, keys and residuals of every pair, N numbers a column. N = 65,536, 512 columns in all pairs
together, float32: 3 x 134 MB. The number of columns stays on the device: where the host does not know it,
every pair takes memory for all D.

Order: blocks of queries run fastest and all meet the keys in the same order, so what runs at one time reads
the same keys, from the second cache. A block of 128 queries makes 256 operations of a byte of keys: 3.1 TB/s
from that cache at the matrix rate below.

Floors, one pair of N = 16,384, d = 256, bf16, H100: 4 N^2 d = 275 Gop, 0.348 ms at 790 TFLOP/s; 25 MB read
and written, 0.008 ms at 3.0 TB/s; besides, N^2 exponentials, 0.075 ms at 16 a clock and multiprocessor, of
which one block a multiprocessor hides little. Predicted: 0.6 ms, 58% of the matrix rate; measured on an
H100 1.14 ms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _acc, _bits, _cdiv, _configuration, _number, _on, _wide
from ._duc_loss_columns import (
    _column_configurations,
    _Columns,
    _fitted,
    _packed,
    _residual_dtype,
    _summed,
    _unpacked,
)
from ._duc_loss_tiles import _RATE, _arguments, _candidates, _choices, _Tile
from ._tuning import choose, size_class


@triton.jit(do_not_specialize=["N", "K", "offset", "scale_bits"])
def _duc_loss_fwd_kernel(
    q_ptr,  # [N, W] of every pair
    k_ptr,  # [K, W] of every pair
    counts_ptr,  # [P], the columns a pair has; None: one pair
    starts_ptr,  # [P], where its columns begin, in pieces of 16; None: one pair
    losses_ptr,  # [P, N]
    residual_ptr,  # [N, W] of every pair; None: not wanted
    N,
    K,
    W,  # of one pair; of several each has its own
    offset,
    scale_bits,  # of a float64
    HAS_RESIDUAL: tl.constexpr,
    LOWEST: tl.constexpr,  # the least finite number of ACC
    HALVED: tl.constexpr,  # whether differences of scores that count may be out of range
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
    pair = tl.program_id(2).to(tl.int64)
    # Within a tile 32 bits reach, save where rows may have any length.
    rows = tl.arange(0, BLOCK_N)
    keys = tl.arange(0, BLOCK_K)
    if WIDE:
        rows = rows.to(tl.int64)
        keys = keys.to(tl.int64)
    mask_n = first_row + rows < N
    losses_ptrs = losses_ptr + (pair * N + first_row) + rows
    count = W if counts_ptr is None else tl.load(counts_ptr + pair)
    if (count == 0) & (first_column == 0):
        tl.store(losses_ptrs, tl.zeros((BLOCK_N,), dtype=ACC), mask=mask_n)
    # A program past the columns in use has nothing to write.
    if first_column < count:
        scale = _number(scale_bits, ACC)
        width = W if counts_ptr is None else _fitted(count)
        # The pair's rows come after those of the pairs before it. `pair` is 0 where there is one: not in so
        # many words, as ptxas then keeps all in registers.
        column = pair * W if counts_ptr is None else tl.load(starts_ptr + pair).to(tl.int64) * 16
        first = column * N + first_row.to(tl.int64) * width
        q_ptr += first
        k_ptr += column * K
        offs_d = first_column + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < width)[None, :]
        offs_qn = (rows * width)[:, None]
        offs_kn = (keys * width)[:, None]
        if not WIDE:
            q = tl.load(q_ptr + (offs_qn + offs_d[None, :]), mask=mask_n[:, None] & mask_d, other=0.0)
        acc = tl.zeros((BLOCK_N, BLOCK_D if HAS_RESIDUAL else 1), dtype=ACC)
        # Not -infinity: as long as all scores are, their difference from it would be NaN.
        row_max = tl.full((BLOCK_N,), LOWEST, dtype=ACC)
        row_sum = tl.zeros((BLOCK_N,), dtype=ACC)
        own_score = tl.zeros((BLOCK_N,), dtype=ACC)
        # Tiles that hold own keys, and a ragged last one, go first and pay for masks; the others need none.
        own = offset + first_row
        num_tiles = tl.cdiv(K, BLOCK_K)
        own_from = own // BLOCK_K
        own_to = tl.minimum((own + BLOCK_N - 1) // BLOCK_K + 1, num_tiles)
        num_masked = own_to - own_from
        if (K % BLOCK_K != 0) & (own_to < num_tiles):
            num_masked += 1
        for MASKED in tl.static_range(1, -1, -1):
            num_steps = num_masked if MASKED else num_tiles - num_masked
            # Few tiles need masks: copies in flight for them would only take registers from the others.
            for step in tl.range(num_steps, num_stages=1 if MASKED else None):
                if MASKED:
                    tile = tl.where(own_from + step < own_to, own_from + step, num_tiles - 1)
                else:
                    tile = step + tl.where(step >= own_from, own_to - own_from, 0)
                tile_ptr = k_ptr + tile.to(tl.int64) * BLOCK_K * width
                mask_k = tile * BLOCK_K + keys < K
                if HAS_RESIDUAL or not WIDE:
                    mask = mask_k[:, None] & mask_d if MASKED else mask_d
                    k = tl.load(tile_ptr + (offs_kn + offs_d[None, :]), mask=mask, other=0.0)
                if WIDE:
                    s = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
                    for start in range(0, count, BLOCK_C):
                        offs_c = start + tl.arange(0, BLOCK_C)
                        mask_c = (offs_c < width)[None, :]
                        q_mask = mask_n[:, None] & mask_c
                        q_part = tl.load(q_ptr + (offs_qn + offs_c[None, :]), mask=q_mask, other=0.0)
                        k_mask = mask_k[:, None] & mask_c if MASKED else mask_c
                        k_part = tl.load(tile_ptr + (offs_kn + offs_c[None, :]), mask=k_mask, other=0.0)
                        s = tl.dot(q_part, tl.trans(k_part), acc=s, input_precision=PRECISION, out_dtype=ACC)
                else:
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
                if MASKED:
                    is_own = (tile * BLOCK_K + keys)[None, :] == (own + rows)[:, None]
                    own_score += tl.sum(tl.where(is_own, s, 0.0), 1)
                    s = tl.where(mask_k[None, :], s, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(s, 1))
                # Differences before the scale: a large score's rounding stays out of the exponent. Of halves
                # where the whole may be out of range and the product is not.
                if HALVED:
                    p = tl.exp2((0.5 * s - 0.5 * new_max[:, None]) * (2 * scale))
                    decay = tl.exp2((0.5 * row_max - 0.5 * new_max) * (2 * scale))
                else:
                    p = tl.exp2((s - new_max[:, None]) * scale)
                    decay = tl.exp2((row_max - new_max) * scale)
                row_sum = row_sum * decay + tl.sum(p, 1)
                row_max = new_max
                if HAS_RESIDUAL:
                    acc = acc * decay[:, None]
                    acc = tl.dot(p.to(k.dtype), k, acc=acc, input_precision=PRECISION, out_dtype=ACC)
        if first_column == 0:
            # The maximum and the own score come from the same products: where they are one, this is log 1.
            loss = tl.log(row_sum) + 2 * ((0.5 * row_max - 0.5 * own_score) * scale * 0.6931471805599453)
            tl.store(losses_ptrs, loss, mask=mask_n)
        if HAS_RESIDUAL:
            offs = offs_qn + offs_d[None, :]
            mask = mask_n[:, None] & mask_d
            own_ptr = k_ptr + own.to(tl.int64) * width
            residual_ptr += first
            if k_ptr.dtype.element_ty == tl.float16:
                # Its residual is float32: whole, sums and own keys side by side would not fit the registers.
                tl.store(residual_ptr + offs, acc / row_sum[:, None], mask=mask)
                tl.debug_barrier()
                columns = first_column + tl.arange(0, 32)
                for begin in tl.range(0, BLOCK_D, 32, num_stages=1):
                    part = offs_qn + (begin + columns)[None, :]
                    inside = mask_n[:, None] & (begin + columns < width)[None, :]
                    own_keys = tl.load(own_ptr + part, mask=inside, other=0.0).to(ACC)
                    sums = tl.load(residual_ptr + part, mask=inside, other=0.0)
                    tl.store(residual_ptr + part, sums - own_keys, mask=inside)
            else:
                own_keys = tl.load(own_ptr + offs, mask=mask, other=0.0).to(ACC)
                residual = acc / row_sum[:, None] - own_keys
                tl.store(residual_ptr + offs, residual.to(residual_ptr.dtype.element_ty), mask=mask)


@functools.cache
def _machine(device: torch.device) -> tuple[int | str, int]:
    """Return architecture and number of multiprocessors."""
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
    target, num_processors = _machine(queries.device)
    precision = _precision(queries.dtype)
    common, tiles = _choices(target, queries.dtype, precision, width)
    num_splits = 1 if residual is None else _cdiv(width, common["BLOCK_D"])

    def duration(tile: _Tile) -> float:
        num_programs = num_splits * num_pairs * _cdiv(num_queries, tile.queries)
        return _cdiv(num_programs, num_processors) * tile.queries / _RATE[tile.queries]

    # Queries by powers of four: what counts is how many programs there are for the processors.
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
    """Return (kernel, types, constexprs, options, matrix instructions) of all that is to compile."""
    configurations: list[tuple] = []
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
    return configurations + _column_configurations()

"""The main Triton kernel of the contrastive loss: attention with values = keys.

Programs are (blocks of queries, columns of the residual, pairs). A key tile is loaded once for both products,
the maximum and the sum go along, s_ii is taken from the same tile. Wider than a tile the queries no longer
fit beside the keys: the residual is split by columns, and each part sums the scores over pieces of d itself.
Blocks of queries run fastest and all meet the keys in the same order, so what runs at one time reads the same
keys, from L2: a block of 128 queries makes 256 operations of a byte of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import _from_bits
from ._contrast_columns import _fitted
from ._contrast_scores import _scores_in_pieces, _tiles_of


@triton.jit
def _softmax_step(
    s,  # [BLOCK_N, BLOCK_K]
    row_max,  # [BLOCK_N], of the tiles so far
    scale,
    HALVED: tl.constexpr,
):
    """Return the exponentials of a tile, the factor of what was summed before, and the new maximum."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # Differences before the scale: a large score's rounding stays out of the exponent. Of halves where the
    # whole may be out of range and the product is not.
    if HALVED:
        p = tl.exp2((0.5 * s - 0.5 * new_max[:, None]) * (2 * scale))
        decay = tl.exp2((0.5 * row_max - 0.5 * new_max) * (2 * scale))
    else:
        p = tl.exp2((s - new_max[:, None]) * scale)
        decay = tl.exp2((row_max - new_max) * scale)
    return p, decay, new_max


@triton.jit
def _store_residual(
    residual_ptr,
    positive_ptr,
    acc,  # [BLOCK_N, BLOCK_D]
    row_sum,  # [BLOCK_N]
    offs_qn,  # [BLOCK_N, 1]
    offs_d,  # [BLOCK_D]
    mask_n,  # [BLOCK_N]
    mask_d,  # [1, BLOCK_D]
    first_column,
    width,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    """Store the weighted mean of the keys less the positive key."""
    offs = offs_qn + offs_d[None, :]
    mask = mask_n[:, None] & mask_d
    if positive_ptr.dtype.element_ty == tl.float16:
        # Its residual is float32: whole, sums and positive keys side by side would not fit the registers.
        tl.store(residual_ptr + offs, acc / row_sum[:, None], mask=mask)
        tl.debug_barrier()
        columns = first_column + tl.arange(0, 32)
        for begin in tl.range(0, BLOCK_D, 32, num_stages=1):
            part = offs_qn + (begin + columns)[None, :]
            inside = mask_n[:, None] & (begin + columns < width)[None, :]
            positive_keys = tl.load(positive_ptr + part, mask=inside, other=0.0).to(ACC)
            sums = tl.load(residual_ptr + part, mask=inside, other=0.0)
            tl.store(residual_ptr + part, sums - positive_keys, mask=inside)
    else:
        positive_keys = tl.load(positive_ptr + offs, mask=mask, other=0.0).to(ACC)
        residual = acc / row_sum[:, None] - positive_keys
        tl.store(residual_ptr + offs, residual.to(residual_ptr.dtype.element_ty), mask=mask)


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
    LOWEST: tl.constexpr,  # the least finite value of ACC
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
        scale = _from_bits(scale_bits, ACC)
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
        positive_score = tl.zeros((BLOCK_N,), dtype=ACC)
        # Tiles that hold positive keys, and a ragged last one, go first and pay for masks; others need none.
        positive = offset + first_row
        positive_from, positive_to, num_tiles, num_masked = _tiles_of(positive, K, BLOCK_N, BLOCK_K)
        for MASKED in tl.static_range(1, -1, -1):
            num_steps = num_masked if MASKED else num_tiles - num_masked
            # Few tiles need masks: copies in flight for them would only take registers from the others.
            for step in tl.range(num_steps, num_stages=1 if MASKED else None):
                if MASKED:
                    tile = tl.where(positive_from + step < positive_to, positive_from + step, num_tiles - 1)
                else:
                    tile = step + tl.where(step >= positive_from, positive_to - positive_from, 0)
                tile_ptr = k_ptr + tile.to(tl.int64) * BLOCK_K * width
                mask_k = tile * BLOCK_K + keys < K
                if HAS_RESIDUAL or not WIDE:
                    mask = mask_k[:, None] & mask_d if MASKED else mask_d
                    k = tl.load(tile_ptr + (offs_kn + offs_d[None, :]), mask=mask, other=0.0)
                if WIDE:
                    s = _scores_in_pieces(
                        q_ptr, tile_ptr, offs_qn, offs_kn, mask_n, mask_k, count, width,
                        MASKED, BLOCK_N, BLOCK_K, BLOCK_C, PRECISION, ACC,
                    )  # fmt: skip
                else:
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
                if MASKED:
                    is_positive = (tile * BLOCK_K + keys)[None, :] == (positive + rows)[:, None]
                    positive_score += tl.sum(tl.where(is_positive, s, 0.0), 1)
                    s = tl.where(mask_k[None, :], s, float("-inf"))
                p, decay, row_max = _softmax_step(s, row_max, scale, HALVED)
                row_sum = row_sum * decay + tl.sum(p, 1)
                if HAS_RESIDUAL:
                    acc = acc * decay[:, None]
                    acc = tl.dot(p.to(k.dtype), k, acc=acc, input_precision=PRECISION, out_dtype=ACC)
        if first_column == 0:
            # Maximum and positive score come from the same products: where they are one, this is log 1.
            loss = tl.log(row_sum) + 2 * ((0.5 * row_max - 0.5 * positive_score) * scale * 0.6931471805599453)
            tl.store(losses_ptrs, loss, mask=mask_n)
        if HAS_RESIDUAL:
            positive_ptr = k_ptr + positive.to(tl.int64) * width
            _store_residual(
                residual_ptr + first, positive_ptr, acc, row_sum, offs_qn, offs_d, mask_n, mask_d,
                first_column, width, BLOCK_D, ACC,
            )  # fmt: skip

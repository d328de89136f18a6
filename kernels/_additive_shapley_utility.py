"""The utilities of a tile of logits and their gradients, and the tables of tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._additive_shapley_samples import _of_rows
from ._common import _cdiv, _unit, _wide
from ._tuning import size_class, tuned

# By their places, as in mmfast/ops/additive_shapley.py.
_CARDINALITY = tl.constexpr(0)
_CORRECT = tl.constexpr(1)
_PROBABILITY = tl.constexpr(2)
_LOG_PROBABILITY = tl.constexpr(3)
_MARGIN = tl.constexpr(4)


@triton.jit
def _max(tile):
    """Return the maximum over the classes of each row, [BLOCK_N]."""
    return tl.max(tl.max(tile, axis=0), axis=1)


@triton.jit
def _sum(tile):
    """Return the sum over the classes of each row, [BLOCK_N]."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def _utility(
    z,  # [parts, BLOCK_N, LANES], -inf in the label's place and beyond the last class
    label,  # [BLOCK_N], the label's logit
    is_before,  # [parts, BLOCK_N, LANES], whether a class comes before the label
    UTILITY: tl.constexpr,
):
    """Return the utility of each row, [BLOCK_N]; the cardinality without its factor."""
    if UTILITY <= _CORRECT:
        # Of equal logits the first counts as largest, and a NaN as larger than all others, as torch has it.
        is_nan = z != z
        is_larger = (z > _of_rows(label)) | (is_nan & _of_rows(label == label))
        is_as_large = (z == _of_rows(label)) | is_nan
        is_beaten = _max((is_larger | (is_before & is_as_large)).to(tl.int32))
        value = tl.where(is_beaten == 0, 1.0, 0.0).to(z.dtype)
    elif UTILITY == _MARGIN:
        # The maximum passes over a NaN.
        poison = _sum(tl.where(z != z, z, 0.0))
        value = label - _max(z) + poison
    else:
        top = tl.maximum(_max(z), label)
        label_exp = tl.exp(label - top)
        total = label_exp + _sum(tl.exp(z - _of_rows(top)))
        value = label_exp / total if UTILITY == _PROBABILITY else label - top - tl.log(total)
    return value


@triton.jit
def _dlogits(
    z,  # [parts, BLOCK_N, LANES], as for _utility
    label,  # [BLOCK_N]
    du,  # [BLOCK_N]
    offs_c,  # [parts, 1, LANES]
    is_label,  # [parts, BLOCK_N, LANES]
    UTILITY: tl.constexpr,
):
    """Return du times the gradient of a smooth utility, the label's in its place.

    Of an infinite du the formula of a softmax, du - du p, makes NaN for the label: callers see to it,
    for here it takes registers.
    """
    if UTILITY == _MARGIN:
        # The lowest class of the others' largest logit; a NaN, larger than all others, is found below 0.
        key = tl.where(z == _of_rows(_max(z)), offs_c, 0x7FFFFFFF)
        key = tl.where(z != z, offs_c - 0x7FFFFFFF, key)
        runner_up = tl.min(tl.min(tl.where(is_label, 0x7FFFFFFF, key), axis=0), axis=1)
        runner_up = tl.where(runner_up < 0, runner_up + 0x7FFFFFFF, runner_up)
        dz = tl.where(offs_c == _of_rows(runner_up), -_of_rows(du), 0.0)
        dz += tl.where(is_label, _of_rows(du), 0.0)
    else:
        top = tl.maximum(_max(z), label)
        label_exp = tl.exp(label - top)
        e = tl.exp(z - _of_rows(top))
        others = _sum(e)
        total = label_exp + others
        weight = (du * (label_exp / total) if UTILITY == _PROBABILITY else du) / total
        dz = tl.where(is_label, _of_rows(weight * others), -_of_rows(weight) * e)
    return dz


# A block holds all classes of a sample.
MAX_CLASSES = 2048


def _blocks(
    num_classes: int, dtype: torch.dtype, acc: torch.dtype, kernel: str, is_aligned: bool = False
) -> dict:
    """Return the tile of samples and classes and the number of warps.

    Args:
        num_classes: C.
        dtype: of the logits.
        acc: of sums.
        kernel: fwd, fwd8 (of more than four modalities), bwd, bwd2 (of at most two) or rows.
        is_aligned: whether rows begin at multiples of 16 bytes, so that a thread reads so many at once.
    """
    # Elements of one tile that a thread holds; backward holds eleven tiles, forward seven.
    held = {"fwd": 8, "fwd8": 4, "bwd": 2, "bwd2": 4, "rows": 4}[kernel] * 4 // acc.itemsize
    block_c = max(2, triton.next_power_of_2(num_classes))
    if block_c == MAX_CLASSES:
        # As many threads on an SM as in two blocks of half the warps, which spill.
        held = min(held, 4)
    # Found by compiling: with more warps, or more of a tile a thread, that of many modalities spills.
    num_warps = min(16, max(1 if kernel == "fwd8" else 4, block_c // (32 * held)))
    block_n = min(128, max(1, 32 * num_warps * held // block_c))
    # A row's threads: few, as their sums go from one to another, and enough that what a warp reads at once
    # lies in some 8 lines of a cache. With one, neighbouring classes would be parts, and Triton would have
    # neighbouring threads read these.
    least = min(4, triton.next_power_of_2(_cdiv(num_classes * dtype.itemsize, 32)))
    lanes = max(2, least, 32 * num_warps // block_n) * (16 // dtype.itemsize if is_aligned else 1)
    lanes = min(block_c, lanes)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "LANES": lanes, "num_warps": num_warps}


def _chosen(
    logits: Tensor,  # [M, N, C] or [S, N, C]
    kernel: str,  # as for _blocks; its first word tells
) -> dict:
    """Return the tile and the number of warps to launch with: the table's, or those stored for this GPU."""
    length, num_samples, num_classes = logits.shape
    is_aligned = _unit(logits) > 1 and logits.stride(2) == 1 and logits.data_ptr() % 16 == 0
    blocks = _blocks(num_classes, logits.dtype, _wide(logits.dtype), kernel.split()[0], is_aligned)
    # Tiles that were stored for rows across a whole warp hold no longer.
    key = f"{kernel} by lanes {logits.dtype} {length} C<={blocks['BLOCK_C']} {size_class(num_samples)}"
    # A tile holds all classes.
    return tuned("additive_shapley", key, blocks, logits.device, "BLOCK_N", "num_warps")

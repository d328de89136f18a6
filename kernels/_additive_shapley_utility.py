"""The utilities of a tile of logits and their gradients, and the tables of tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _wide
from ._tuning import size_class, tuned

# By their places, as in mmfast/ops/additive_shapley.py.
_CARDINALITY = tl.constexpr(0)
_CORRECT = tl.constexpr(1)
_PROBABILITY = tl.constexpr(2)
_LOG_PROBABILITY = tl.constexpr(3)
_MARGIN = tl.constexpr(4)


@triton.jit
def _utility(
    z,  # [BLOCK_N, BLOCK_C], -inf in the label's place and beyond the last class
    label,  # [BLOCK_N], the label's logit
    is_before,  # [BLOCK_N, BLOCK_C], whether a class comes before the label
    UTILITY: tl.constexpr,
):
    """Return the utility of each row, [BLOCK_N]; the cardinality without its factor."""
    if UTILITY <= _CORRECT:
        # Of equal logits the first counts as largest, and a NaN as larger than all others, as torch has it.
        is_nan = z != z
        is_larger = (z > label[:, None]) | (is_nan & (label == label)[:, None])
        is_as_large = (z == label[:, None]) | is_nan
        is_beaten = tl.max((is_larger | (is_before & is_as_large)).to(tl.int32), axis=1)
        value = tl.where(is_beaten == 0, 1.0, 0.0).to(z.dtype)
    elif UTILITY == _MARGIN:
        # The maximum passes over a NaN.
        poison = tl.sum(tl.where(z != z, z, 0.0), axis=1)
        value = label - tl.max(z, axis=1) + poison
    else:
        top = tl.maximum(tl.max(z, axis=1), label)
        label_exp = tl.exp(label - top)
        total = label_exp + tl.sum(tl.exp(z - top[:, None]), axis=1)
        value = label_exp / total if UTILITY == _PROBABILITY else label - top - tl.log(total)
    return value


@triton.jit
def _dlogits(
    z,  # [BLOCK_N, BLOCK_C], as for _utility
    label,  # [BLOCK_N]
    du,  # [BLOCK_N]
    offs_c,  # [BLOCK_C]
    is_label,  # [BLOCK_N, BLOCK_C]
    UTILITY: tl.constexpr,
):
    """Return du times the gradient of a smooth utility, the label's in its place.

    Of an infinite du the formula of a softmax, du - du p, makes NaN for the label: callers see to it,
    for here it takes registers.
    """
    if UTILITY == _MARGIN:
        # The lowest class of the others' largest logit; a NaN, larger than all others, is found below 0.
        key = tl.where(z == tl.max(z, axis=1)[:, None], offs_c[None, :], 0x7FFFFFFF)
        key = tl.where(z != z, offs_c[None, :] - 0x7FFFFFFF, key)
        runner_up = tl.min(tl.where(is_label, 0x7FFFFFFF, key), axis=1)
        runner_up = tl.where(runner_up < 0, runner_up + 0x7FFFFFFF, runner_up)
        dz = tl.where(offs_c[None, :] == runner_up[:, None], -du[:, None], 0.0)
        dz += tl.where(is_label, du[:, None], 0.0)
    else:
        top = tl.maximum(tl.max(z, axis=1), label)
        label_exp = tl.exp(label - top)
        e = tl.exp(z - top[:, None])
        others = tl.sum(e, axis=1)
        total = label_exp + others
        weight = (du * (label_exp / total) if UTILITY == _PROBABILITY else du) / total
        dz = tl.where(is_label, (weight * others)[:, None], -weight[:, None] * e)
    return dz


# A block holds all classes of a sample.
MAX_CLASSES = 2048


def _blocks(num_classes: int, acc: torch.dtype, kernel: str) -> dict:
    """Return the tile of samples and classes and the number of warps; `kernel` is fwd, bwd or rows."""
    # Elements of one tile that a thread holds; backward holds eleven tiles, forward seven.
    held = {"fwd": 8, "bwd": 2, "rows": 4}[kernel] * 4 // acc.itemsize
    block_c = max(2, triton.next_power_of_2(num_classes))
    if block_c == MAX_CLASSES:
        # As many threads on an SM as in two blocks of half the warps, which spill.
        held = min(held, 4)
    num_warps = min(16, max(4, block_c // (32 * held)))
    block_n = min(128, max(1, 32 * num_warps * held // block_c))
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": num_warps}


def _chosen(
    logits: Tensor,  # [M, N, C] or [S, N, C]
    kernel: str,  # as for _blocks; its first word tells
) -> dict:
    """Return the tile and the number of warps to launch with: the table's, or those stored for this GPU."""
    length, num_samples, num_classes = logits.shape
    blocks = _blocks(num_classes, _wide(logits.dtype), kernel.split()[0])
    key = f"{kernel} {logits.dtype} {length} C<={blocks['BLOCK_C']} {size_class(num_samples)}"
    # A tile holds all classes.
    return tuned("additive_shapley", key, blocks, logits.device, "BLOCK_N", "num_warps")

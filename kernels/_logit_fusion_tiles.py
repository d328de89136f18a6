"""The tiles of logit_fusion's Triton kernels, by the number of modalities and classes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ._common import _cdiv, _unit, _wide
from ._tuning import size_class, tuned


def _power_of_2_within(size: int) -> int:
    return 1 << max(0, size.bit_length() - 1)


def _blocks(
    num_modalities: int, num_classes: int, dtype: torch.dtype, kernel: str, is_aligned: bool = False
) -> dict:
    """Return the tile and the number of warps.

    Args:
        num_modalities: M.
        num_classes: C.
        dtype: of the logits.
        kernel: "fwd" or "bwd".
        is_aligned: whether rows begin at multiples of 16 bytes, so that a thread reads so many at once.
    """
    vector = 16 // dtype.itemsize if is_aligned else 1
    # Logits in the registers of a thread. What is done once for a row and a thread costs as much as some 15
    # of them, so a thread has many of one row. Backward holds the exponentials, too.
    held = 32 * 4 // _wide(dtype).itemsize
    block_m = triton.next_power_of_2(num_modalities)
    most = held if kernel == "fwd" else held * 3 // 4
    most_parts = max(1, most // (block_m * vector))
    # Threads that read different rows read far apart: at least so many to a row that what a warp reads at
    # once lies in some 4 lines of a cache.
    least = min(8, triton.next_power_of_2(_cdiv(num_classes * dtype.itemsize, 16)))
    threads = max(least, triton.next_power_of_2(_cdiv(num_classes, most_parts * vector)))
    lanes = min(threads * vector, max(vector, triton.next_power_of_2(num_classes)))
    num_warps = max(4, threads // 32, triton.next_power_of_2(block_m * lanes // (32 * held)))
    one_tile = num_warps <= 16
    if one_tile:
        parts = _cdiv(num_classes, lanes)
    else:
        # What is summed so far is held for every lane, and takes the registers of up to five parts. Backward
        # sums nothing over modalities but what is one number a row.
        if kernel == "fwd":
            num_warps, state, loaded = 4, held, held // 2
        else:
            # Of many modalities fewer logits at a time, or a thread spills.
            num_warps, state, loaded = (
                (8, held // 4, held * 3 // 8) if block_m <= 2 else (8, held // 8, held // 4)
            )
        lanes = 32 * num_warps * max(1, min(vector, state // block_m))
        lanes = min(lanes, _power_of_2_within(32 * num_warps * state // block_m))
        parts = max(1, min(8, 32 * num_warps * loaded // (block_m * lanes)))
    row = block_m * parts * lanes
    # All modalities of a sample are one thread's, unless they are too many.
    block_n = min(32 * num_warps * vector // lanes, _power_of_2_within(32 * num_warps * held // row))
    return {
        "ONE_TILE": one_tile,
        "PARTS": parts,
        "BLOCK_N": block_n if one_tile else 1,
        "BLOCK_M": block_m,
        "LANES": lanes,
        "num_warps": num_warps,
    }


def _chosen(
    logits: Tensor,  # [M, N, C]
    kernel: str,
) -> dict:
    """Return the tile and the number of warps to launch with: the table's, or those stored for this GPU."""
    num_modalities, num_samples, num_classes = logits.shape
    is_aligned = _unit(logits) > 1 and logits.stride(2) == 1 and logits.data_ptr() % 16 == 0
    blocks = _blocks(num_modalities, num_classes, logits.dtype, kernel, is_aligned)
    parts, lanes = blocks["PARTS"], blocks["LANES"]
    classes = f"C={parts}x{lanes}" if blocks["ONE_TILE"] else "C in tiles"
    key = f"{kernel} {logits.dtype} M<={blocks['BLOCK_M']} {classes} {size_class(num_samples)}"
    # One tile holds all classes, several may be of any size.
    names = ("BLOCK_N",) if blocks["ONE_TILE"] else ("BLOCK_N", "LANES")
    return tuned("logit_fusion", key, blocks, logits.device, *names, "num_warps")

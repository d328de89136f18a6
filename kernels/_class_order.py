"""Samples ordered by class, in chunks of one class each: what class moments and k-means begin with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _OPTIONS, _cdiv, _configuration, _on, _wide


class _ByClass(NamedTuple):
    """The samples by class, a class's in their own order."""

    order: Tensor  # int64 [N], as many of them as have a class
    edges: Tensor  # int64 [2, C + 1]: where each class begins in `order`, where its chunks begin
    count: Tensor  # int64 [C]


# A tile of labels is compared with itself. Up to so many tiles are one block's, in one launch.
_TILE, _MOST_OWN_TILES = 128, 4
_SCAN_BLOCKS = {"BLOCK_B": 256, "BLOCK_C": 16}
# Blocks of a larger batch, and the elements their table of classes may hold: so many, or 4 a sample.
_MOST_BLOCKS, _TABLE_NUMEL = 1024, 2**22


def _share(num_samples: int, num_classes: int) -> tuple[int, int]:
    """Return how many blocks order the samples, and the tiles of each."""
    num_tiles = _cdiv(num_samples, _TILE)
    most = min(_MOST_BLOCKS, max(_TABLE_NUMEL, 4 * num_samples) // num_classes)
    num_blocks = 1 if num_tiles <= _MOST_OWN_TILES else max(1, most)
    tiles = _cdiv(num_tiles, num_blocks)
    return _cdiv(num_tiles, tiles), tiles


def _by_class(
    labels: Tensor,  # [N], N at least 1
    num_classes: int,
    chunk: int,  # samples of a chunk; a class's last may have fewer
) -> _ByClass:
    """Return the samples by class; labels out of range are left out.

    Each block counts its samples of each class, a scan over blocks follows, and each sample goes to the place
    that its rank in its class tells: as a stable sort has it, in three launches. A label is read twice and
    compared with the 127 others of its tile.
    """
    num_samples = labels.shape[0]
    num_blocks, tiles = _share(num_samples, num_classes)
    order = torch.empty(num_samples, dtype=torch.int64, device=labels.device)
    edges, count = order.new_empty(2, num_classes + 1), order.new_empty(num_classes)
    dtype = torch.int32 if num_samples < 2**31 else torch.int64
    table = order.new_empty(num_blocks, num_classes, dtype=dtype)
    tensors, sizes = (labels, table, count, order, edges), (num_samples, num_classes, tiles, chunk)
    constants = {"BLOCK": _TILE, **_OPTIONS}
    with _on(labels.device):
        if num_blocks == 1:
            _order_kernel[(1,)](*tensors, *sizes, labels.stride(0), COUNT=True, PLACE=True, **constants)
        else:
            grid, stride = (num_blocks,), labels.stride(0)
            _order_kernel[grid](*tensors, *sizes, stride, COUNT=True, PLACE=False, **constants)
            classes = (_cdiv(num_classes, _SCAN_BLOCKS["BLOCK_C"]),)
            _scan_kernel[classes](table, count, num_blocks, num_classes, **_SCAN_BLOCKS, **_OPTIONS)
            _order_kernel[grid](*tensors, *sizes, stride, COUNT=False, PLACE=True, **constants)
    return _ByClass(order, edges, count)


def _most_chunks(num_samples: int, num_classes: int, chunk: int) -> int:
    """Return how many chunks there can be, whatever the labels; how many there are only the device knows."""
    return num_samples // chunk + min(num_classes, num_samples)


def _order_configurations(label: str) -> list[tuple]:
    """Return what `_by_class` launches with labels of a type, to be compiled ahead of time."""
    types = [label, "*i32", "*i64", "*i64", "*i64", "i32", "i32", "i32", "i32"]
    flags = [(True, True), (True, False), (False, True)]
    constants = {"stride_ln": 1, "BLOCK": _TILE}
    configurations = [
        _configuration(_order_kernel, types, {**constants, "COUNT": count, "PLACE": place})
        for count, place in flags
    ]
    return [*configurations, _configuration(_scan_kernel, ["*i32", "*i64", "i32", "i32"], _SCAN_BLOCKS)]


def _chunk_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    """Return the tile of a chunk of one class: 16 KiB where it is summed, at most 64 dimensions wide."""
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_R": 16384 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d, "BLOCK_C": 128}


@triton.jit
def _take_tiles(
    labels_ptr,
    row_ptr,
    order_ptr,
    N,
    C,
    num_tiles,
    stride_ln,
    PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr = 8,
):
    """Count the samples of a block on from the counts in its row; the count before a sample is its place."""
    lane = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * num_tiles * BLOCK
    for tile in range(num_tiles):
        start = first + tile * BLOCK
        offs_n = start + lane
        y = tl.load(labels_ptr + offs_n * stride_ln, mask=offs_n < N, other=0).to(tl.int64)
        known = (offs_n < N) & (y >= 0) & (y < C)
        key = tl.where(known, y, -1).to(tl.int32)
        # How many of its class are before a sample in the tile, and 2^16 for each that is behind.
        counts = tl.zeros((BLOCK,), tl.int32)
        # The tile's labels once more, a few at a time: all at once would fill the registers.
        for piece in range(0, BLOCK, PIECE):
            others = piece + tl.arange(0, PIECE)
            offs_o = start + others
            other = tl.load(labels_ptr + offs_o * stride_ln, mask=offs_o < N, other=0).to(tl.int64)
            is_class = (offs_o < N) & (other >= 0) & (other < C)
            same = key[:, None] == tl.where(is_class, other, -1).to(tl.int32)[None, :]
            weight = tl.where(others[None, :] < lane[:, None], 1, 1 << 16)
            counts += tl.sum(tl.where(same & (others[None, :] != lane[:, None]), weight, 0), axis=1)
        rank = counts & 0xFFFF
        before = tl.load(row_ptr + y, mask=known, other=0)
        if PLACE:
            tl.store(order_ptr + before + rank, offs_n, mask=known)
        # A class's last sample in the tile writes for all, once all have read.
        tl.debug_barrier()
        tl.store(row_ptr + y, before + rank + 1, mask=known & (counts == rank))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "C", "num_tiles", "chunk"])
def _order_kernel(
    labels_ptr,  # [N]
    table_ptr,  # [blocks, C]: a block's samples of each class, then those of the blocks before it
    count_ptr,  # int64 [C]
    order_ptr,  # int64 [N]
    edges_ptr,  # int64 [2, C + 1]
    N,
    C,
    num_tiles,  # of a block
    chunk,
    stride_ln,
    COUNT: tl.constexpr,  # the first half of the work, into the table
    PLACE: tl.constexpr,  # the second half; both in one launch where there is one block
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row_ptr = table_ptr + block.to(tl.int64) * C
    element = table_ptr.dtype.element_ty
    offs_b = tl.arange(0, BLOCK)
    if COUNT:
        for start in range(0, C, BLOCK):
            tl.store(row_ptr + start + offs_b, tl.zeros((BLOCK,), element), mask=start + offs_b < C)
        tl.debug_barrier()
        _take_tiles(labels_ptr, row_ptr, order_ptr, N, C, num_tiles, stride_ln, False, BLOCK)
    if PLACE:
        chunks_ptr = edges_ptr + C + 1
        edge = tl.full((), 0, tl.int64)
        chunk_edge = tl.full((), 0, tl.int64)
        if block == 0:
            tl.store(edges_ptr, edge)
            tl.store(chunks_ptr, chunk_edge)
        for start in range(0, C, BLOCK):
            offs_c = start + offs_b
            mask_c = offs_c < C
            before = tl.load(row_ptr + offs_c, mask=mask_c, other=0).to(tl.int64)
            if COUNT:
                count = before
                before = tl.zeros((BLOCK,), tl.int64)
                tl.store(count_ptr + offs_c, count, mask=mask_c)
            else:
                count = tl.load(count_ptr + offs_c, mask=mask_c, other=0)
            num_chunks = (count + (chunk - 1)) // chunk
            end = edge + tl.cumsum(count, 0)
            tl.store(row_ptr + offs_c, (end - count + before).to(element), mask=mask_c)
            if block == 0:
                tl.store(edges_ptr + 1 + offs_c, end, mask=mask_c)
                tl.store(chunks_ptr + 1 + offs_c, chunk_edge + tl.cumsum(num_chunks, 0), mask=mask_c)
            edge += tl.sum(count, 0)
            chunk_edge += tl.sum(num_chunks, 0)
        tl.debug_barrier()
        _take_tiles(labels_ptr, row_ptr, order_ptr, N, C, num_tiles, stride_ln, True, BLOCK)


@triton.jit(do_not_specialize=["num_blocks", "C"])
def _scan_kernel(
    table_ptr,  # [blocks, C]: a block's samples of each class; becomes those of the blocks before it
    count_ptr,  # int64 [C]
    num_blocks,
    C,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.int64)
    for start in range(0, num_blocks, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask = (offs_b < num_blocks)[:, None] & (offs_c < C)[None, :]
        ptrs = table_ptr + offs_b.to(tl.int64)[:, None] * C + offs_c[None, :]
        count = tl.load(ptrs, mask=mask, other=0)
        before = total[None, :] + tl.cumsum(count, 0) - count
        tl.store(ptrs, before.to(count.dtype), mask=mask)
        total += tl.sum(count, 0)
    tl.store(count_ptr + offs_c, total, mask=offs_c < C)


@triton.jit
def _class_of_chunk(chunk, edges_ptr, C, BLOCK_C: tl.constexpr):
    """Return the class a chunk belongs to, C where there are not so many."""
    chunks_ptr = edges_ptr + C + 1
    k = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        end = tl.load(chunks_ptr + 1 + offs_c, mask=offs_c < C, other=0x7FFFFFFFFFFFFFFF)
        k += tl.sum((end <= chunk).to(tl.int32))
    return k


@triton.jit
def _rows_of_chunk(chunk, k, order_ptr, edges_ptr, C, BLOCK_R: tl.constexpr):
    """Return the samples of a chunk of class k, which of them there are, and how many."""
    first = tl.load(edges_ptr + k) + (chunk - tl.load(edges_ptr + C + 1 + k)) * BLOCK_R
    beyond = tl.load(edges_ptr + k + 1)
    offs_r = first + tl.arange(0, BLOCK_R)
    mask_r = offs_r < beyond
    return tl.load(order_ptr + offs_r, mask=mask_r, other=0), mask_r, tl.minimum(beyond - first, BLOCK_R)

"""What several ops' launchers share."""

from __future__ import annotations

import contextlib
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# A kernel's unless it has a reason for others.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for itself, float32 for the others."""
    return torch.promote_types(dtype, torch.float32)


def _acc(dtype: torch.dtype) -> tl.dtype:
    """Return the type of sums as kernels take it."""
    return _ELEMENT[_wide(dtype)]


def _configuration(kernel, types: list[str], constants: dict, options: dict = _OPTIONS) -> tuple:
    """Return an item of `compile_configurations`.

    Args:
        kernel: as launched.
        types: of the arguments that are no constants, in their order.
        constants: by name; `num_warps` may be among them, as tables and launchers have it.
        options: those of the launch.
    """
    options = {name: constants.get(name, value) for name, value in options.items()}
    constants = {name: value for name, value in constants.items() if name not in options}
    names = [name for name in kernel.arg_names if name not in constants]
    return kernel, dict(zip(names, types, strict=True)), constants, options


def _on(device: torch.device):
    """Return a context in which launches go to `device`; Triton's go to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bits(number: float) -> int:
    """Return the bits of a float64, for a kernel to take apart: Triton hands floats over in float32."""
    return struct.unpack("q", struct.pack("d", number))[0]


def _by_class(
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor]:  # int64 [N], int64 [C + 1]
    """Return the samples by class, in their order, and where each class begins among them."""
    sorted_labels, order = labels.to(torch.int32).sort(stable=True)
    classes = torch.arange(num_classes + 1, dtype=torch.int32, device=labels.device)
    return order, torch.searchsorted(sorted_labels, classes)


def _chunk_edges(
    edges: Tensor,  # int64 [C + 1]
    chunk: int,
) -> Tensor:  # int64 [C + 1]
    """Return where each class's chunks begin, each of `chunk` samples but a class's last."""
    return torch.nn.functional.pad(((edges.diff() + (chunk - 1)) // chunk).cumsum(0), (1, 0))


def _most_chunks(num_samples: int, num_classes: int, chunk: int) -> int:
    """Return how many chunks there can be, whatever the labels; how many there are only the device knows."""
    return num_samples // chunk + min(num_classes, num_samples)


@triton.jit
def _number(bits, ACC: tl.constexpr):
    """Return the number that `_bits` took apart."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True).to(ACC)


@triton.jit
def _class_of_chunk(chunk, chunks_ptr, C, BLOCK_C: tl.constexpr):
    """Return the class a chunk belongs to, C where there are not so many."""
    k = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        end = tl.load(chunks_ptr + 1 + offs_c, mask=offs_c < C, other=0x7FFFFFFFFFFFFFFF)
        k += tl.sum((end <= chunk).to(tl.int32))
    return k


@triton.jit
def _rows_of_chunk(chunk, k, order_ptr, edges_ptr, chunks_ptr, BLOCK_R: tl.constexpr):
    """Return the samples of a chunk of class k, which of them there are, and their number."""
    first = tl.load(edges_ptr + k) + (chunk - tl.load(chunks_ptr + k)) * BLOCK_R
    beyond = tl.load(edges_ptr + k + 1)
    offs_r = first + tl.arange(0, BLOCK_R)
    mask_r = offs_r < beyond
    return tl.load(order_ptr + offs_r, mask=mask_r, other=0), mask_r, tl.minimum(beyond - first, BLOCK_R)

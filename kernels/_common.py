"""What several ops' launchers share."""

from __future__ import annotations

import contextlib
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor


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
def _class_of_chunk(chunk, chunks_ptr, C, BLOCK_C: tl.constexpr):
    """Return the class a chunk belongs to, C where there are not so many."""
    k = tl.full((), 0, tl.int32)
    for start in range(0, C, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        end = tl.load(chunks_ptr + 1 + offs_c, mask=offs_c < C, other=0x7FFFFFFFFFFFFFFF)
        k += tl.sum((end <= chunk).to(tl.int32))
    return k

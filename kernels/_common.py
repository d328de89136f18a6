"""What several ops' kernels and launchers share: dtypes, options, tiles of rows."""

from __future__ import annotations

import contextlib
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import size_class, tuned

_ELEMENT = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# A kernel's unless it has a reason for others.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


def _cdiv(total: int, size: int) -> int:
    """Return a quotient rounded up; `triton.cdiv` does the same and takes a microsecond more."""
    return -(-total // size)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float64 for itself, float32 for the others."""
    return torch.promote_types(dtype, torch.float32)


def _acc(dtype: torch.dtype) -> tl.dtype:
    """Return the type of sums as kernels take it."""
    return _ELEMENT[_wide(dtype)]


def _configuration(kernel, types: list, constants: dict, options: dict = _OPTIONS) -> tuple:
    """Return an item of `compile_configurations`.

    Args:
        kernel: as launched.
        types: of the arguments that are no constants, in their order; a tuple of types for a tuple.
        constants: by name; `num_warps` may be among them, as tables and launchers have it.
        options: those of the launch.
    """
    options = {name: constants.get(name, value) for name, value in options.items()}
    constants = {name: value for name, value in constants.items() if name not in options}
    names = [name for name in kernel.arg_names if name not in constants]
    return kernel, dict(zip(names, types, strict=True)), constants, options


class _Configurations(list):
    """What an op's `compile_configurations` lists."""

    def add(self, *item) -> None:
        """Append a kernel with types, constants and options, as `_configuration` takes them."""
        self.append(_configuration(*item))


def _row_blocks(num_dims: int, dtype: torch.dtype) -> dict:
    """Return the tile of kernels that read the samples in their order: 16 or 32 bytes a thread."""
    block_d = min(64, triton.next_power_of_2(num_dims))
    return {"BLOCK_N": 8192 // _wide(dtype).itemsize // block_d, "BLOCK_D": block_d}


def _tuned_rows(
    op: str,
    kernel: str,
    features: Tensor,  # [N, D]
    blocks: dict,  # the table's tile
    *names: str,  # of the sizes that may be others
    least: int = 1,
) -> dict:
    """Return what to launch a kernel over samples with: the table's tile, or that stored for this GPU."""
    num_samples, num_dims = features.shape
    key = f"{kernel} {features.dtype} D<={triton.next_power_of_2(num_dims)} {size_class(num_samples)}"
    return tuned(op, key, _OPTIONS | blocks, features.device, *names, "num_warps", least=least)


def _on(device: torch.device):
    """Return a context in which launches go to `device`; Triton's go to the current one."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    # Most often there is nothing to change, and to change it takes a microsecond.
    return contextlib.nullcontext()


def _bits(value: float) -> int:
    """Return the bits of a float64, for `_from_bits`: Triton passes floats to kernels in float32."""
    return struct.unpack("q", struct.pack("d", value))[0]


def _unit(
    logits: Tensor,  # [M, N, C]
) -> int:
    """Return the unit in which a kernel is to be given the distance of modalities, which grows with N.

    A unit of 16 elements tells that rows can be read 16 bytes at a time. The distance, not specialized,
    would not; specialized, it would have the kernel compiled anew for a ragged last batch.
    """
    return 16 if logits.stride(0) % 16 == 0 and logits.stride(1) % 16 == 0 else 1


@triton.jit
def _load_tile(
    x_ptr,
    rows,  # [BLOCK_N]
    columns,  # [BLOCK_D]
    mask,  # [BLOCK_N, BLOCK_D]
    stride_n,
    stride_d,
    ACC: tl.constexpr,
):
    """Return a tile of a matrix in ACC, 0 outside of the mask."""
    ptrs = x_ptr + rows[:, None] * stride_n + columns.to(tl.int64)[None, :] * stride_d
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _from_bits(bits, ACC: tl.constexpr):
    """Return the float that `_bits` took apart."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True).to(ACC)

"""Triton kernel of theta <- (1 - alpha) theta + alpha theta_0 over a list of tensors, one launch a dtype.

A block of the grid serves one piece of one tensor. Which one it looks up in a plan that lies on the device:
addresses, sizes and strengths of the tensors, and the tensor each block belongs to. A plan follows from what
it holds alone, so it is kept, and a list that comes again costs no copy.
Bytes that must move: theta twice, theta_0 once; the plan adds 8 to the 24 KiB of a block. 100M float32
numbers are 1.2 GB, 0.40 ms on an H100 at 3.0 TB/s; predicted 0.44 ms. 10,000 tensors of 64: 7.7 MB, 2.6 us,
but 10,000 blocks that each wait for the memory three times in a row; predicted 10 us. Not timed yet on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _OPTIONS, _acc, _configuration, _on


@triton.jit
def _partial_reinit_kernel(
    table_ptr,  # int64 [5, P]: address of theta, of theta_0, size, first block, bits of a float64 alpha
    owner_ptr,  # int64 [blocks]: the tensor of each block
    P,
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + tl.load(owner_ptr + block)
    P = tl.cast(P, tl.int64)
    alpha = tl.load(entry_ptr + 4 * P).to(tl.float64, bitcast=True)
    if alpha != 0:
        theta = tl.load(entry_ptr)
        theta_0 = tl.load(entry_ptr + P)
        size = tl.load(entry_ptr + 2 * P)
        start = (block - tl.load(entry_ptr + 3 * P)) * BLOCK
        offs = tl.arange(0, BLOCK)
        is_aligned = ((theta | theta_0) % 16 == 0) & (start + BLOCK <= size)
        # In element units from here: a piece starts at a multiple of 16 bytes where its tensor does.
        theta_ptr = theta.to(tl.pointer_type(ELEMENT)) + start
        theta_0_ptr = theta_0.to(tl.pointer_type(ELEMENT)) + start
        if is_aligned:
            theta_ptrs = tl.multiple_of(theta_ptr, 16) + offs
            theta_0_ptrs = tl.multiple_of(theta_0_ptr, 16) + offs
            value = tl.load(theta_ptrs)
            value_0 = tl.load(theta_0_ptrs)
            tl.store(theta_ptrs, _blend(value, value_0, alpha, ACC))
        else:
            mask = offs < size - start
            value = tl.load(theta_ptr + offs, mask=mask)
            value_0 = tl.load(theta_0_ptr + offs, mask=mask)
            tl.store(theta_ptr + offs, _blend(value, value_0, alpha, ACC), mask=mask)


@triton.jit
def _blend(value, value_0, alpha, ACC: tl.constexpr):
    mixed = (1 - alpha).to(ACC) * value.to(ACC) + alpha.to(ACC) * value_0.to(ACC)
    # Chosen in the tensors' own type: no conversion touches the bits that alpha = 1 restores.
    return tl.where(alpha == 1, value_0, mixed.to(value.dtype))


# Plans by what they hold and the stream they were copied on, the least recently made first.
_MAX_PLANS = 16
_PLANS: dict[tuple, tuple[Tensor, Tensor]] = {}
# Plans that captured graphs read at every replay, which nobody can see the end of.
_CAPTURED: list[tuple[Tensor, Tensor]] = []


def _block(dtype: torch.dtype) -> int:
    """Return the number of elements of a block: 8 KiB of each tensor, 64 bytes a thread."""
    return 8192 // dtype.itemsize


def _plan(
    table: tuple[tuple[int, ...], ...],  # [5, P], as the kernel takes it
    num_blocks: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # int64 [5, P], int64 [num_blocks]
    """Return the table on the device and each block's tensor, built where no equal plan is kept."""
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    is_capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    key = (table, device, stream)
    plan = _PLANS.get(key)
    if plan is not None:
        if is_capturing:
            _CAPTURED.append(plan)
        return plan
    if is_capturing:
        # A graph would copy from the host's memory again at each replay; a fill carries its value along.
        rows = torch.empty(len(table), len(table[0]), dtype=torch.int64, device=device)
        for row, values in zip(rows, table):
            for entry, value in zip(row, values):
                entry.fill_(value)
    else:
        rows = torch.tensor(table, dtype=torch.int64)
        if on_gpu:
            rows = rows.pin_memory().to(device, non_blocking=True)
    ends = torch.cat([rows[3, 1:], rows.new_full((1,), num_blocks)])
    plan = rows, torch.repeat_interleave(ends - rows[3], output_size=num_blocks)
    if not is_capturing:
        while len(_PLANS) >= _MAX_PLANS:
            _PLANS.pop(next(iter(_PLANS)), None)
        _PLANS[key] = plan
    return plan


def partial_reinit_(
    params: Sequence[Tensor],  # P tensors of one dtype on one device, each dense in memory; changed in place
    init_params: Sequence[Tensor],  # P tensors in the same order in memory
    alphas: Sequence[float],  # one per tensor
) -> None:
    """Pull every tensor towards its initial value; alpha 0 and 1 are exact to the bit."""
    dtype, device = params[0].dtype, params[0].device
    block = _block(dtype)
    sizes = [theta.numel() for theta in params]
    first_blocks, num_blocks = [], 0
    for size in sizes:
        first_blocks.append(num_blocks)
        num_blocks += -(-size // block)
    if num_blocks == 0:
        return
    table = (
        tuple(theta.data_ptr() for theta in params),
        tuple(theta_0.data_ptr() for theta_0 in init_params),
        tuple(sizes),
        tuple(first_blocks),
        tuple(torch.tensor(alphas, dtype=torch.float64).view(torch.int64).tolist()),
    )
    with _on(device):
        rows, owner = _plan(table, num_blocks, device)
        _partial_reinit_kernel[(num_blocks,)](
            rows,
            owner,
            len(params),
            ELEMENT=_ELEMENT[dtype],
            ACC=_acc(dtype),
            BLOCK=block,
            **_OPTIONS,
        )


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = []
    for dtype, element in _ELEMENT.items():
        constants = {"ELEMENT": element, "ACC": _acc(dtype), "BLOCK": _block(dtype)}
        configurations.append(_configuration(_partial_reinit_kernel, ["*i64", "*i64", "i32"], constants))
    return configurations

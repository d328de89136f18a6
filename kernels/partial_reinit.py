"""Triton kernel of theta <- (1 - alpha) theta + alpha theta_0 over a list of tensors, one launch a dtype.

A block of the grid serves one piece of one tensor, whose record it finds in a plan on the device: addresses,
alpha and size, as mmfast/ops/_partial_reinit_table.py lays it out for the CUDA kernel, too. It keeps the
plans, so that a list that comes again costs no copy; one alpha for all comes with the launch. What alpha = 0
leaves alone has no record.
A captured graph that finds no plan writes one at each replay: addresses, strengths and sizes of 96 tensors go
along as arguments of a launch, and the pieces of each are worked out on the device.
Floor: theta twice, theta_0 once; a record adds 32 bytes to the 24 KiB of a piece. 100M float32 elements are
1.2 GB, 0.40 ms on an H100 at 3.0 TB/s. Predicted and measured: bench/results/partial_reinit.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import _ELEMENT, _OPTIONS, _acc, _bits, _cdiv, _configuration, _on

# Of a tensor, that a record stands for: 64 bytes a thread.
PIECE_BYTES = 8192


@triton.jit(do_not_specialize=["alpha_bits"])
def _partial_reinit_kernel(
    plan_ptr,  # int64 [pieces, 4]: addresses of theta and theta_0, bits of alpha, size in 32 bits
    alpha_bits,  # of one alpha for all records; those of a number below 0 leave each its own
    ELEMENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    record_ptr = plan_ptr + tl.program_id(0).to(tl.int64) * 4
    theta = tl.load(record_ptr)
    theta_0 = tl.load(record_ptr + 1)
    alpha_bits = tl.cast(alpha_bits, tl.int64)
    bits = tl.where(alpha_bits < 0, tl.load(record_ptr + 2), alpha_bits)
    alpha = bits.to(tl.float64, bitcast=True)
    size = tl.load(record_ptr + 3).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    theta_ptr = theta.to(tl.pointer_type(ELEMENT))
    theta_0_ptr = theta_0.to(tl.pointer_type(ELEMENT))
    if ((theta | theta_0) % 16 == 0) & (size == BLOCK):
        theta_ptrs = tl.multiple_of(theta_ptr, 16) + offs
        theta_0_ptrs = tl.multiple_of(theta_0_ptr, 16) + offs
        value = tl.load(theta_ptrs)
        value_0 = tl.load(theta_0_ptrs)
        tl.store(theta_ptrs, _blend(value, value_0, alpha, ACC))
    else:
        mask = offs < size
        value = tl.load(theta_ptr + offs, mask=mask)
        value_0 = tl.load(theta_0_ptr + offs, mask=mask)
        tl.store(theta_ptr + offs, _blend(value, value_0, alpha, ACC), mask=mask)


@triton.jit
def _blend(value, value_0, alpha, ACC: tl.constexpr):
    mixed = (1 - alpha).to(ACC) * value.to(ACC) + alpha.to(ACC) * value_0.to(ACC)
    # Chosen in the tensors' own type: no conversion touches the bits that alpha = 1 restores.
    return tl.where(alpha == 1, value_0, mixed.to(value.dtype))


# Tensors of one launch: five integers each of the 4 KiB that all arguments may take.
_TENSORS = 96
# Set in every integer, so that it is an int64 whatever its value: of other types it would be another kernel.
# Addresses, sizes and the bits of an alpha up to 1 are all below.
_MARK = tl.constexpr(1 << 62)
_PLAN_BLOCKS = {"BLOCK": 128}


@triton.jit(do_not_specialize=["words"])
def _partial_reinit_plan_kernel(
    plan_ptr,  # int64 [pieces, 4], as above
    words,  # by tensor: addresses of theta and theta_0, bits of alpha, size, first piece
    PIECE: tl.constexpr,  # elements
    ITEMSIZE: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0)
    theta, theta_0, alpha, size, first = words[0], words[1], words[2], words[3], words[4]
    for i in tl.static_range(1, TENSORS):
        theta = tl.where(index == i, words[5 * i], theta)
        theta_0 = tl.where(index == i, words[5 * i + 1], theta_0)
        alpha = tl.where(index == i, words[5 * i + 2], alpha)
        size = tl.where(index == i, words[5 * i + 3], size)
        first = tl.where(index == i, words[5 * i + 4], first)
    size -= _MARK
    num_pieces = tl.cdiv(size, PIECE)
    for start in range(tl.program_id(1) * BLOCK, num_pieces, tl.num_programs(1) * BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < num_pieces
        record_ptrs = plan_ptr + (first - _MARK + offs) * 4
        tl.store(record_ptrs, theta - _MARK + offs * (PIECE * ITEMSIZE), mask=mask)
        tl.store(record_ptrs + 1, theta_0 - _MARK + offs * (PIECE * ITEMSIZE), mask=mask)
        tl.store(record_ptrs + 2, tl.zeros_like(offs) + (alpha - _MARK), mask=mask)
        tl.store(record_ptrs + 3, tl.minimum(size - offs * PIECE, PIECE), mask=mask)


def write_plan(
    plan: Tensor,  # int64 [pieces, 4], written
    dtype: torch.dtype,
    params: Sequence[int],  # P addresses of tensors, each dense in memory
    init_params: Sequence[int],  # P addresses of tensors in the same order in memory
    sizes: Sequence[int],  # P
    alphas: Sequence[float],  # P
) -> None:
    """Write a plan in a form that a graph can capture: nothing is read from the host when it is replayed."""
    piece, first, words = PIECE_BYTES // dtype.itemsize, 0, []
    for theta, theta_0, size, alpha in zip(params, init_params, sizes, alphas):
        if alpha != 0 and size:
            words += [theta, theta_0, _bits(alpha), size, first]
            first += _cdiv(size, piece)
    words += [0] * (-len(words) % (5 * _TENSORS))
    marked = [_MARK.value | word for word in words]
    # Blocks that share a tensor of many pieces.
    grid = (_TENSORS, min(64, max(1, _cdiv(len(plan), _PLAN_BLOCKS["BLOCK"]))))
    with _on(plan.device):
        for start in range(0, len(marked), 5 * _TENSORS):
            _partial_reinit_plan_kernel[grid](
                plan,
                tuple(marked[start : start + 5 * _TENSORS]),
                PIECE=piece,
                ITEMSIZE=dtype.itemsize,
                TENSORS=_TENSORS,
                **_PLAN_BLOCKS,
                **_OPTIONS,
            )


def partial_reinit_(
    plan: Tensor,  # int64 [pieces, 4]
    dtype: torch.dtype,
    alpha: float,  # of all tensors, above 0; below it: each record's own
) -> None:
    """Pull every tensor of a plan towards its initial value; alpha 0 and 1 are exact to the bit."""
    if len(plan) == 0:
        return
    with _on(plan.device):
        _partial_reinit_kernel[(len(plan),)](
            plan,
            _bits(alpha),
            ELEMENT=_ELEMENT[dtype],
            ACC=_acc(dtype),
            BLOCK=PIECE_BYTES // dtype.itemsize,
            **_OPTIONS,
        )


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = []
    for dtype, element in _ELEMENT.items():
        constants = {"ELEMENT": element, "ACC": _acc(dtype), "BLOCK": PIECE_BYTES // dtype.itemsize}
        configurations.append(_configuration(_partial_reinit_kernel, ["*i64", "i64"], constants))
    constants = {"PIECE": 2048, "ITEMSIZE": 4, "TENSORS": _TENSORS, **_PLAN_BLOCKS}
    types = ["*i64", ("i64",) * (5 * _TENSORS)]
    configurations.append(_configuration(_partial_reinit_plan_kernel, types, constants))
    return configurations

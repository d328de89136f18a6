"""Triton kernels of the Shapley values of modalities whose logits add up, and of utilities of given logits.

z_s = bias + sum_{m in s} z^m, u_s = utility(z_s, y), with b_k = k! (M-k-1)! / M!
phi_m = sum_{s contains m} b_{|s|-1} u_s - sum_{s without m} b_|s| u_s.
A block takes some samples with all their classes through the coalitions. The last three modalities are
decided in registers, eight coalitions to a sum over the others; only that sum, made anew in the order of m so
that -inf survives, reads partial logits again, from L1. Utilities fold into phi at once; there is no table.
The label's logit is kept apart, -inf in its place: the maximum is then that of the others.
Floor: M N C elements once, backward twice; about 4 operations an element and coalition for the counting
utilities and the margin, an exp more for the others. Measured: bench/results/additive_shapley.md.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ._additive_shapley_bwd import _additive_shapley_bwd_kernel
from ._additive_shapley_fwd import _additive_shapley_fwd_kernel, _sum_splits_kernel
from ._additive_shapley_rows import _row_configurations, coalition_utilities_bwd, coalition_utilities_fwd
from ._additive_shapley_utility import MAX_CLASSES, _blocks, _chosen
from ._common import _ELEMENT, _OPTIONS, _acc, _cdiv, _Configurations, _on, _unit, _wide

__all__ = [
    "MAX_CLASSES",
    "additive_shapley_bwd",
    "additive_shapley_fwd",
    "coalition_utilities_bwd",
    "coalition_utilities_fwd",
    "compile_configurations",
]

_SUM_BLOCKS = {"BLOCK": 128}
# Blocks that fill the largest GPU; with fewer, several share the coalitions of a sample.
_ENOUGH_BLOCKS = 1024
_WEIGHTS: dict[tuple, Tensor] = {}


def _weights(num_modalities: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return 0, b_0, ..., b_{M-1}, 0; copied to a GPU once."""
    key = (num_modalities, device, dtype)
    weights = _WEIGHTS.get(key)
    if weights is None:
        b = [1 / (num_modalities * math.comb(num_modalities - 1, k)) for k in range(num_modalities)]
        values = [0.0, *b, 0.0]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # Nothing can be copied from the host into a graph; a fill carries its value along.
            weights = torch.empty(len(values), dtype=dtype, device=device)
            for entry, value in zip(weights, values):
                entry.fill_(value)
        else:
            weights = _WEIGHTS[key] = torch.tensor(values, dtype=dtype, device=device)
    return weights


def _fwd(num_modalities: int, acc: torch.dtype) -> str:
    """Return what `_blocks` calls the forward kernel: tiles for many modalities are smaller, or it spills."""
    return "fwd" if num_modalities <= 4 or acc == torch.float64 else "fwd8"


def _last(num_modalities: int, blocks: dict, acc: torch.dtype, kernel: str) -> int:
    """Return how many modalities are decided in registers."""
    held = blocks["BLOCK_N"] * blocks["BLOCK_C"] * acc.itemsize // (4 * 32 * blocks["num_warps"])
    if held > (8 if kernel == "fwd" else 4):
        return 1
    return min(num_modalities, 2 if acc == torch.float64 else 3)


def additive_shapley_fwd(
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C] in the dtype of accumulation
    utility: int,
) -> Tensor:  # [N, M]
    """Return each modality's Shapley value; M from 1 to 20, C up to MAX_CLASSES, any strides."""
    num_modalities, num_samples, num_classes = partial_logits.shape
    phi = partial_logits.new_empty(num_samples, num_modalities)
    if phi.numel() == 0:
        return phi
    acc = _wide(partial_logits.dtype)
    blocks = _chosen(partial_logits, _fwd(num_modalities, acc))
    last = _last(num_modalities, blocks, acc, "fwd")
    num_blocks = _cdiv(num_samples, blocks["BLOCK_N"])
    wanted = triton.next_power_of_2(_cdiv(_ENOUGH_BLOCKS, num_blocks))
    splits = min(2 ** (num_modalities - last), wanted)
    parts = phi[None] if splits == 1 else phi.new_empty(splits, *phi.shape, dtype=acc)
    unit = _unit(partial_logits)
    with _on(phi.device):
        _additive_shapley_fwd_kernel[(num_blocks, splits)](
            partial_logits,
            labels,
            bias,
            _weights(num_modalities, phi.device, acc),
            parts,
            num_samples,
            num_classes,
            num_modalities,
            2 ** (num_modalities - last) // splits,
            partial_logits.stride(0) // unit,
            *partial_logits.stride()[1:],
            labels.stride(0),
            UTILITY=utility,
            UNIT=unit,
            HAS_BIAS=bias is not None,
            LAST=last,
            IS_ALL=num_modalities == last,
            BLOCK_M=triton.next_power_of_2(num_modalities),
            ACC=_acc(acc),
            enable_fp_fusion=True,
            **blocks,
        )
    return phi if splits == 1 else _summed(parts, phi)


def _summed(
    parts: Tensor,  # [splits, N, M] in the dtype of accumulation
    phi: Tensor,  # [N, M] to be filled
) -> Tensor:  # [N, M]
    """Return the sum over splits, in their order, rounded once."""
    with _on(phi.device):
        grid = (_cdiv(phi.numel(), _SUM_BLOCKS["BLOCK"]),)
        _sum_splits_kernel[grid](parts, phi, phi.numel(), len(parts), **_SUM_BLOCKS, **_OPTIONS)
    return phi


def additive_shapley_bwd(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C] in the dtype of accumulation
    utility: int,
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C] or [0] where there is no bias
    """Return the gradients of a smooth utility's values; up to three modalities' have the logits' dtype.

    Those of more are summed where they lie, and they and the bias's have the dtype of accumulation.
    """
    num_modalities, num_samples, num_classes = partial_logits.shape
    acc = _wide(partial_logits.dtype)
    blocks = _chosen(partial_logits, "bwd" if num_modalities > 2 else "bwd2")
    last = _last(num_modalities, blocks, acc, "bwd")
    num_blocks = _cdiv(num_samples, blocks["BLOCK_N"])
    dtype = partial_logits.dtype if num_modalities == last else acc
    dpartial_logits = torch.empty(partial_logits.shape, dtype=dtype, device=partial_logits.device)
    sums = None if bias is None else dpartial_logits.new_empty(num_blocks, num_classes, dtype=acc)
    if dpartial_logits.numel() > 0:
        unit = _unit(partial_logits)
        with _on(dphi.device):
            _additive_shapley_bwd_kernel[(num_blocks,)](
                dphi,
                partial_logits,
                labels,
                bias,
                _weights(num_modalities, dphi.device, acc),
                dpartial_logits,
                sums,
                num_samples,
                num_classes,
                num_modalities,
                *dphi.stride(),
                partial_logits.stride(0) // unit,
                *partial_logits.stride()[1:],
                labels.stride(0),
                UTILITY=utility,
                UNIT=unit,
                HAS_BIAS=bias is not None,
                LAST=last,
                IS_ALL=num_modalities == last,
                ACC=_acc(acc),
                enable_fp_fusion=True,
                **blocks,
            )
    if sums is None:
        return dpartial_logits, dpartial_logits.new_empty(0)
    return dpartial_logits, sums[0] if num_blocks == 1 else sums.sum(0)


def compile_configurations() -> list[tuple]:
    """Return (kernel, signature, constexprs, options) of all that is to compile ahead of time."""
    configurations = _Configurations()
    size, stride, labels = "i32", "i64", "*i64"
    # Modalities, classes and utility: those that need most registers, and the smallest of all.
    cases = [(8, 10, 0), (8, 10, 3), (8, 10, 4), (8, MAX_CLASSES, 3), (2, 32, 3)]
    for dtype, element in _ELEMENT.items():
        acc = _wide(dtype)
        x, wide = f"*{element}", f"*{_acc(dtype)}"
        for num_modalities, num_classes, utility in cases if dtype == acc else cases[1:2]:
            constants = {
                "UTILITY": utility,
                "stride_pc": 1,
                "UNIT": 1,
                "HAS_BIAS": True,
                "ACC": _acc(dtype),
            }
            blocks = _blocks(num_classes, dtype, acc, _fwd(num_modalities, acc))
            last = _last(num_modalities, blocks, acc, "fwd")
            constants |= blocks | {"LAST": last, "IS_ALL": num_modalities == last}
            types = [x, labels, wide, wide, wide, size, size, size, size, stride, stride, stride]
            block_m = triton.next_power_of_2(num_modalities)
            configurations.add(_additive_shapley_fwd_kernel, types, {**constants, "BLOCK_M": block_m})
            if utility >= 2:
                blocks = _blocks(num_classes, dtype, acc, "bwd" if num_modalities > 2 else "bwd2")
                last = _last(num_modalities, blocks, acc, "bwd")
                constants |= blocks | {"LAST": last, "IS_ALL": num_modalities == last}
                types = [x, x, labels, wide, wide, wide, wide, *[size] * 3, *[stride] * 5]
                configurations.add(_additive_shapley_bwd_kernel, types, constants)
        for out in (f"*{element}", wide):
            configurations.add(_sum_splits_kernel, [wide, out, "i64", size], _SUM_BLOCKS)
    return [*configurations, *_row_configurations()]

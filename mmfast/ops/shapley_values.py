"""Shapley values of M modalities from the utilities of their 2^M coalitions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant
from mmfast.ops._checks import check_float, shape_text
from mmfast.ops._launch import DTYPE_CODE, large_parts, strided
from mmfast.ops._registration import define
from mmfast.reference import shapley_values as _reference

MAX_PLAYERS = 20


def shapley_values(
    utilities: Tensor,  # [..., S]
    *,
    backend: str = "auto",
) -> Tensor:  # [..., M]
    """Return each player's Shapley value, its mean marginal utility over all orders of arrival.

    Equivalent to, with `W[s, m] = (|s|-1)! (M-|s|)! / M!` where s contains m, else
    `-|s|! (M-|s|-1)! / M!`:

        values = utilities @ W

    in O(2^M) operations a row instead of O(M 2^M). Differentiable to any order.

    Args:
        utilities: [..., S] float32, float64, bfloat16 or float16, any strides; S = 2^M with M from 1 to 20.
            `utilities[..., s]` is the value of the coalition of the players whose bit is set in s.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [..., M] in the dtype of `utilities`; half precision is accumulated in float32. The values of a row
        sum to `utilities[..., S-1] - utilities[..., 0]`. A coalition worth infinity gives infinity to the
        players in it and minus infinity to the others, and so the reverse; who gets both, has NaN.

    Raises:
        TypeError: `utilities` is no tensor of a floating dtype.
        ValueError: the last dimension is missing, no power of two, 1, or above 2^20.

    Source: Shapley, "A value for n-person games", 1953; per sample in Wei et al., "Enhancing multimodal
    cooperation via sample-level modality valuation", CVPR 2024.
    """
    _check(utilities)
    _backend.check_name(backend)
    if is_constant(utilities):
        return _fwd_op(utilities, backend)
    return _shapley_values((backend,), utilities)


def _check(utilities: Tensor) -> None:
    check_float("utilities", utilities)
    if utilities.dim() == 0:
        raise ValueError("utilities must have shape [..., S], got a scalar")
    size = utilities.shape[-1]
    if size == 0:
        raise ValueError(
            f"utilities must hold the coalitions of at least one player, got {shape_text(utilities.shape)}"
        )
    if size & (size - 1):
        shape = shape_text(utilities.shape)
        raise ValueError(
            f"utilities must have S = 2^M, a power of two, as last dimension, got {size} in {shape}"
        )
    if not 2 <= size <= 2**MAX_PLAYERS:
        shape = shape_text(utilities.shape)
        raise ValueError(
            f"utilities must have S = 2^M with M from 1 to {MAX_PLAYERS}, got S = {size} in {shape}"
        )


class _ShapleyValues(Op):
    is_linear = True

    @staticmethod
    def forward(options, utilities):
        return _fwd_op(utilities, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return (_bwd_op(gradients[0], *options),)

    @staticmethod
    def formula(options, gradients, tensors):
        return (_transposed(options, gradients[0]),)


class _Transposed(Op):
    """The transposed map; its own gradient is the map again."""

    is_linear = True

    @staticmethod
    def forward(options, dphi):
        return _bwd_op(dphi, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        return (_fwd_op(gradients[0], *options),)

    @staticmethod
    def formula(options, gradients, tensors):
        return (_shapley_values(options, gradients[0]),)


_shapley_values, _transposed = differentiable(_ShapleyValues), differentiable(_Transposed)


def _joined(
    run: Callable[[Tensor], Tensor],
    parts: list[Tensor],  # some rows each
    like: Tensor,  # [..., D], all rows
) -> Tensor:  # [..., E]
    """Return `run` of all rows, some at a time, for a matrix of all would be a large copy."""
    found = [run(part) for part in parts]
    size = found[0].shape[-1]
    return torch.cat([part.view(-1, size) for part in found]).view(*like.shape[:-1], size)


def _compiled(backend: str, entry: str, size_of: Callable[[int], int]) -> Callable[[Tensor], Tensor]:
    """Return the function of one tensor that runs a compiled kernel; its rows become `size_of(D)` long."""

    def run(
        x: Tensor,  # [..., D]
    ) -> Tensor:  # [..., size_of(D)]
        size = size_of(x.shape[-1])
        if x.dim() == 2:
            rows, out = x, x.new_empty(x.shape[0], size)
        elif len(parts := large_parts(x)) > 1:
            return _joined(run, parts, x)
        else:
            rows, out = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], size)
        if out.numel() > 0:
            getattr(_backend.extension(backend), entry)(
                *strided(rows), out.data_ptr(), DTYPE_CODE[x.dtype], *_backend.where(backend, x)
            )
        return out

    return run


def _triton(entry: str) -> Callable[[Tensor], Tensor]:
    def run(
        x: Tensor,  # [..., D]
    ) -> Tensor:  # [..., E]
        parts = large_parts(x)
        if len(parts) > 1:
            return _joined(run, parts, x)
        return getattr(_backend.kernels("shapley_values"), entry)(x)

    return run


def _num_players(num_coalitions: int) -> int:
    return int(num_coalitions).bit_length() - 1


def _num_coalitions(num_players: int) -> int:
    return 2**num_players


def _define(name: str, argument: str, reference: Callable, size_of: Callable[[int], int]) -> Callable:
    return define(
        "shapley_values",
        f"{name}(Tensor {argument}, str backend) -> Tensor",
        fake=lambda x, backend: x.new_empty(*x.shape[:-1], size_of(x.shape[-1])),
        reference=reference,
        cpu=_compiled("cpu", name, size_of),
        cuda=_compiled("cuda", name, size_of),
        triton=_triton(name),
    )


_fwd_op = _define("shapley_values_fwd", "utilities", _reference.shapley_values, _num_players)
_bwd_op = _define("shapley_values_bwd", "dphi", _reference.shapley_values_bwd, _num_coalitions)

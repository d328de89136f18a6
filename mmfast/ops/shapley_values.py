"""Shapley values of M modalities from the utilities of their 2^M coalitions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant
from mmfast.ops._common import DTYPE_CODE, check_float, large_parts, register, shape_text
from mmfast.reference import shapley_values as _reference

MAX_PLAYERS = 20


def shapley_values(
    utilities: Tensor,  # [..., S]
    *,
    backend: str = "auto",
) -> Tensor:  # [..., M]
    """Return each player's Shapley value, its mean marginal utility over all orders of arrival.

    Equivalent to, with W[s, m] = (|s|-1)! (M-|s|)! / M! where s contains m, else -|s|! (M-|s|-1)! / M!:

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


def _run(
    entry: str,  # "shapley_values_fwd" or "shapley_values_bwd"
    x: Tensor,  # [..., S] or [..., M]
    out_size: int,
    num_players: int,
    chosen: str,  # "cpu" or "cuda"
) -> Tensor:  # [..., out_size]
    is_matrix = x.dim() == 2
    out = x.new_empty(x.shape[0], out_size) if is_matrix else x.new_empty(*x.shape[:-1], out_size)
    if out.numel() == 0:
        return out
    rows = x if is_matrix else x.reshape(-1, x.shape[-1])
    getattr(_backend.extension(chosen), entry)(
        rows.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        num_players,
        *rows.stride(),
        DTYPE_CODE[x.dtype],
        *_backend.where(chosen, x),
    )
    return out


def _joined(
    parts: list[Tensor],  # of the rows of `like`, each [..., E]
    like: Tensor,  # [..., D]
) -> Tensor:  # [..., E]
    size = parts[0].shape[-1]
    return torch.cat([part.view(-1, size) for part in parts]).view(*like.shape[:-1], size)


def _fwd(utilities: Tensor, backend: str) -> Tensor:
    num_players = utilities.shape[-1].bit_length() - 1
    chosen = _backend.choose("shapley_values", backend, utilities)
    if chosen == "reference":
        return _reference.shapley_values(utilities)
    if utilities.dim() > 2 and len(parts := large_parts(utilities)) > 1:
        return _joined([_fwd(part, chosen) for part in parts], utilities)
    if chosen == "triton":
        return _backend.kernels("shapley_values").shapley_values_fwd(utilities)
    return _run("shapley_values_fwd", utilities, num_players, num_players, chosen)


def _bwd(dphi: Tensor, backend: str) -> Tensor:
    num_players = dphi.shape[-1]
    chosen = _backend.choose("shapley_values", backend, dphi)
    if chosen == "reference":
        return _reference.shapley_values_bwd(dphi)
    if dphi.dim() > 2 and len(parts := large_parts(dphi)) > 1:
        return _joined([_bwd(part, chosen) for part in parts], dphi)
    if chosen == "triton":
        return _backend.kernels("shapley_values").shapley_values_bwd(dphi)
    return _run("shapley_values_bwd", dphi, 2**num_players, num_players, chosen)


def _fwd_fake(utilities: Tensor, backend: str) -> Tensor:
    return utilities.new_empty(*utilities.shape[:-1], int(utilities.shape[-1]).bit_length() - 1)


def _bwd_fake(dphi: Tensor, backend: str) -> Tensor:
    return dphi.new_empty(*dphi.shape[:-1], 2 ** dphi.shape[-1])


_fwd_op = register("shapley_values_fwd(Tensor utilities, str backend) -> Tensor", _fwd, _fwd_fake)
_bwd_op = register("shapley_values_bwd(Tensor dphi, str backend) -> Tensor", _bwd, _bwd_fake)

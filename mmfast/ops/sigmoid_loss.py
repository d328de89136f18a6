"""SigLIP's pairwise sigmoid loss with constant keys: loss and all gradients out of the forward pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant, is_transformed
from mmfast.ops._checks import (
    check_float,
    check_same_device,
    check_shape,
    check_shift,
    check_shift_tensor,
)
from mmfast.ops._contrast import as_key, check_options, gathered, scaled
from mmfast.ops._launch import promoted
from mmfast.ops._sigmoid_loss_launch import sigmoid_loss_op
from mmfast.reference import sigmoid_loss as _reference


def unidirectional_sigmoid_loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [N, D]
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # [] or [N]
    """Return the loss by which each query tells its own key from all others, pair by pair; keys are constant.

    Equivalent to:

        scores = query @ key.detach().T / temperature + bias
        signs = 2 * torch.eye(N) - 1
        losses = -torch.nn.functional.logsigmoid(signs * scores).sum(1)
        loss = losses.mean()

    without an N x N matrix kept.

    Args:
        query: [N, D] float32, float64, bfloat16 or float16, any strides; not normalised.
        key: [N, D], row i belongs to row i of `query`; mixed dtypes are promoted to a common one.
        temperature: positive, divides the dot products: SigLIP's t is 1 / temperature. A number, or a tensor
            of one element that may be learnt and is not read on a GPU.
        bias: is added to the scores, SigLIP's b. A number or a tensor, as `temperature`.
        reduction: "mean", "sum" or "none" over samples; each sample's losses are summed over the keys.
        group: a torch.distributed process group: keys are gathered from all its processes (which may hold
            different N), each reduces over its own rows, and gradients averaged over processes that hold
            equal N are those of one process with the whole batch. Waits for the host to exchange sizes. None:
            this process alone.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, or [N] without reduction, in float32 for half precision, else in the dtype of `query`.
        The mean of an empty batch is NaN, its sum 0. Differentiable with respect to `query` and to a
        temperature or bias that is a tensor; `key` gets no gradient.

    Raises:
        TypeError: `query` or `key` is no tensor of a floating dtype, or `bias` no number.
        ValueError: shapes differ, `temperature` or `reduction` is out of range, or `bias` beyond +-1e30.

    Source: Zhai et al., "Sigmoid loss for language image pre-training", ICCV 2023, equation 1.
    """
    check_float("query", query)
    check_shape("query", query, "N, D", (None, None))
    check_float("key", key)
    check_shape("key", key, "N, D", (query.shape[0], query.shape[1]))
    check_same_device(query=query, key=key)
    check_options(temperature, reduction)
    if isinstance(bias, Tensor):
        check_shift_tensor("bias", bias)
    else:
        check_shift("bias", bias)
    _backend.check_name(backend)
    query, key = promoted(query, as_key(key))
    keys, offset = gathered([key], group)
    key = keys[0] if keys else key
    scale, heat = _as_argument(temperature, 1.0)
    shift, cold = _as_argument(bias, 0.0)
    if is_constant(query, scale, shift):
        numbers = _numbers(query, scale, shift, heat, cold)
        return sigmoid_loss_op(query, key, numbers, heat, cold, offset, reduction, False, backend)[0]
    options = (heat, cold, offset, reduction, _asks_residual(query), backend)
    return _sigmoid_loss(options, query, key, scale, shift)


def _as_argument(value: float | Tensor, default: float) -> tuple[Tensor | None, float]:
    """Return a tensor and a number that is not read, or no tensor and the number."""
    return (value, default) if isinstance(value, Tensor) else (None, float(value))


def _asks_residual(query: Tensor) -> bool:
    """Whether the gradient for the queries is asked for, or only that for a temperature or a bias."""
    return is_transformed() or (torch.is_grad_enabled() and query.requires_grad)


def _numbers(
    query: Tensor,  # [N, D]
    temperature: Tensor | None,  # [] or [1]
    bias: Tensor | None,  # [] or [1]
    heat: float,  # in place of no temperature
    cold: float,  # in place of no bias
) -> Tensor | None:  # float64 [2]
    """Return temperature and bias on the device of the queries; None where both are numbers."""
    if temperature is None and bias is None:
        return None
    numbers = query.new_empty(2, dtype=torch.float64)
    for target, value, number in zip(numbers.unbind(), (temperature, bias), (heat, cold)):
        # Not by an index: to set an element to a number waits for a GPU.
        if value is None:
            target.fill_(number)
        else:
            target.copy_(value.detach().reshape(()), non_blocking=True)
    return numbers


class _SigmoidLoss(Op):
    smooth, kept, is_hidden = slice(1), slice(1, None), True

    @staticmethod
    def forward(options, query, key, temperature, bias):
        heat, cold, *others = options
        numbers = _numbers(query, temperature, bias, heat, cold)
        return sigmoid_loss_op(query, key, numbers, heat, cold, *others)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        query, _, temperature, bias = tensors
        heat, _, _, reduction, with_residual, _ = options
        (dloss, *_), (residual, sums) = gradients, kept
        scale = heat if temperature is None else temperature
        dquery = scaled(residual, dloss, scale, reduction, query.dtype) if with_residual else None
        if temperature is None and bias is None:
            return dquery, None, None, None
        factor = dloss / sums.shape[1] if reduction == "mean" else dloss
        dbias, heated = (sums * factor).sum(1).unbind()
        return (
            dquery,
            None,
            None if temperature is None else _like(-heated / temperature.reshape(()), temperature),
            None if bias is None else _like(dbias, bias),
        )

    @staticmethod
    def formula(options, gradients, tensors):
        query, key, temperature, bias = tensors
        heat, cold, offset, reduction, *_ = options
        dquery, dtemperature, dbias = _reference.sigmoid_loss_bwd(
            gradients[0],
            query,
            key,
            heat if temperature is None else temperature.to(query.device).reshape(()),
            cold if bias is None else bias.to(query.device).reshape(()),
            offset=offset,
            reduction=reduction,
        )
        return (
            dquery.to(query.dtype),
            None,
            None if temperature is None else _like(dtemperature, temperature),
            None if bias is None else _like(dbias, bias),
        )


def _like(
    gradient: Tensor,  # []
    value: Tensor,  # [] or [1]
) -> Tensor:  # like `value`
    return gradient.to(value.device, value.dtype).reshape(value.shape)


_sigmoid_loss = differentiable(_SigmoidLoss)

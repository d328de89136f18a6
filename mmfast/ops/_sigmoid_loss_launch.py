"""Where the sigmoid loss runs: from queries and keys to the kernel of each backend and its results back."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._contrast import REDUCTIONS, loss_like, views_of, workspace_of
from mmfast.ops._launch import DTYPE_CODE, address, outside_autocast, strided
from mmfast.ops._registration import define
from mmfast.reference import sigmoid_loss as _reference
from mmfast.reference._common import accumulation_dtype, reduced, residual_dtype


def _dense(numbers: Tensor | None) -> Tensor | None:  # float64 [2]
    return None if numbers is None else numbers.contiguous()


def _sigmoid_loss_cpu(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    numbers: Tensor | None,  # float64 [2]
    temperature: float,
    bias: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [N]; [N, D] or [0]; [2, N]
    if numbers is not None:
        temperature, bias = numbers.tolist()
    if query.shape[1] == 0:
        # Without dimensions there is nothing to sweep.
        return _sigmoid_loss_reference(query, key, None, temperature, bias, offset, reduction, with_residual)
    loss, residual, sums = _results(query, reduction, with_residual)
    _backend.extension("cpu").sigmoid_loss_fwd(
        *strided(query),
        *strided(key),
        loss.data_ptr(),
        residual.data_ptr() if with_residual else 0,
        sums.data_ptr(),
        temperature,
        bias,
        offset,
        REDUCTIONS.index(reduction),
        DTYPE_CODE[query.dtype],
        torch.get_num_threads(),
    )
    return loss, residual, sums


def _sigmoid_loss_cuda(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    numbers: Tensor | None,  # float64 [2]
    temperature: float,
    bias: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [N]; [N, D] or [0]; [2, N]
    if query.numel() == 0:
        # Without dimensions there is nothing to sweep.
        return _sigmoid_loss_reference(
            query, key, numbers, temperature, bias, offset, reduction, with_residual
        )
    module, dtype = _backend.extension("cuda"), DTYPE_CODE[query.dtype]
    loss, residual, sums = _results(query, reduction, with_residual)
    views, numbers = views_of([query], [key]), _dense(numbers)
    operands = (views.buffer_info()[0], 0, 1, key.shape[0], *query.shape)
    workspace = workspace_of(loss, query, module.sigmoid_loss_plan(*operands, with_residual, dtype))
    module.sigmoid_loss_fwd(
        *operands,
        *map(address, workspace),
        loss.data_ptr(),
        residual.data_ptr() if with_residual else 0,
        sums.data_ptr(),
        address(numbers),
        temperature,
        bias,
        offset,
        REDUCTIONS.index(reduction),
        dtype,
        *_backend.stream_of(query),
    )
    return loss, residual, sums


def _sigmoid_loss_triton(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    numbers: Tensor | None,  # float64 [2]
    *options: float | int | str | bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [N]; [N, D] or [0]; [2, N]
    if query.numel() == 0:
        # Without dimensions there is nothing to sweep.
        return _sigmoid_loss_reference(query, key, numbers, *options)
    return _backend.kernels("sigmoid_loss").sigmoid_loss_fwd(query, key, _dense(numbers), *options)


@outside_autocast
def _sigmoid_loss_reference(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    numbers: Tensor | None,  # float64 [2]
    temperature: float | Tensor,
    bias: float | Tensor,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [] or [N]; [N, D] or [0]; [2, N]
    if numbers is not None:
        temperature, bias = numbers.unbind()
    losses, residual, sums = _reference.sigmoid_loss_fwd(
        query, key, temperature=temperature, bias=bias, offset=offset, with_residual=with_residual
    )
    residual = query.new_empty(0) if residual is None else residual
    return reduced(losses, reduction), residual.to(residual_dtype(query.dtype)), sums


def _results(query: Tensor, reduction: str, with_residual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return room for the loss, the residual and the sums of queries [N, D]."""
    shape = query.shape if with_residual else (0,)
    residual = query.new_empty(shape, dtype=residual_dtype(query.dtype))
    sums = query.new_empty(2, query.shape[0], dtype=accumulation_dtype(query.dtype))
    return loss_like(query, reduction), residual, sums


def _sigmoid_loss_fake(query, key, numbers, temperature, bias, offset, reduction, with_residual, backend):
    return _results(query, reduction, with_residual)


# Returns the loss; temperature times the gradient of its sum for the queries, of float16 in float32; and for
# each query the gradient for the bias, and -temperature times that for the temperature. `numbers`, where it
# is given, takes the place of temperature and bias: a GPU's are not read on the host.
sigmoid_loss_op = define(
    "sigmoid_loss",
    "sigmoid_loss_fwd(Tensor query, Tensor key, Tensor? numbers, float temperature, float bias,"
    " SymInt offset, str reduction, bool with_residual, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_sigmoid_loss_fake,
    reference=_sigmoid_loss_reference,
    cpu=_sigmoid_loss_cpu,
    cuda=_sigmoid_loss_cuda,
    triton=_sigmoid_loss_triton,
)

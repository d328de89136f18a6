"""Where the contrastive losses run: from features to the kernels of each backend, loss and residuals back."""

from __future__ import annotations

import math
from array import array

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._contrast import REDUCTIONS, loss_like, views_of, workspace_of
from mmfast.ops._launch import DTYPE_CODE, address, outside_autocast
from mmfast.ops._registration import define
from mmfast.reference import duc_loss as _reference
from mmfast.reference._common import reduced, residual_dtype


def _residuals(features: list[Tensor], with_residual: bool) -> Tensor:  # [M, N, D] or [0]
    query = features[0]
    shape = (len(features), *query.shape) if with_residual else (0,)
    return query.new_empty(shape, dtype=residual_dtype(query.dtype))


def _duc_cpu(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]; none: the features
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all dimensions
    columns: Tensor | None,  # not read
    sizes: list[int],  # not read
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    query, keys = features[0], keys or features
    num_samples, num_dims = query.shape
    loss, residuals = loss_like(query, reduction), _residuals(features, with_residual)
    views = views_of(features, keys)
    mask = None if effective is None else effective.contiguous()
    _backend.extension("cpu").duc_loss_fwd(
        views.buffer_info()[0],
        0 if mask is None else mask.data_ptr(),
        len(features),
        keys[0].shape[0],
        num_samples,
        num_dims,
        loss.data_ptr(),
        residuals.data_ptr() if with_residual else 0,
        temperature,
        offset,
        REDUCTIONS.index(reduction),
        DTYPE_CODE[query.dtype],
        torch.get_num_threads(),
    )
    return loss, residuals


def _duc_cuda(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]; none: the features
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all dimensions
    columns: Tensor | None,  # not read
    sizes: list[int],  # M^2 counts of columns of a pair; none: not known on the host
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    query, keys, module = features[0], keys or features, _backend.extension("cuda")
    loss, residuals = loss_like(query, reduction), _residuals(features, with_residual)
    views, known, dtype = views_of(features, keys), array("q", sizes), DTYPE_CODE[query.dtype]
    mask = None if effective is None else effective.contiguous()
    shape = (len(features), keys[0].shape[0], *query.shape)
    operands = (views.buffer_info()[0], address(mask), *shape, known.buffer_info()[0] if sizes else 0)
    plan = module.duc_loss_plan(*operands, with_residual, dtype)
    if not any(plan):
        # Without dimensions all scores are 0.
        num_samples, num_keys = query.shape[0], keys[0].shape[0]
        nothing = math.log(num_keys) if effective is None and num_samples else 0.0
        loss.fill_(math.nan if num_samples == 0 and reduction == "mean" else nothing)
        if reduction == "sum":
            loss.mul_(num_samples)
        return loss, residuals.zero_()
    workspace = workspace_of(loss, query, plan)
    module.duc_loss_fwd(
        *operands,
        *map(address, workspace),
        loss.data_ptr(),
        residuals.data_ptr() if with_residual else 0,
        temperature,
        offset,
        REDUCTIONS.index(reduction),
        dtype,
        *_backend.stream_of(query),
    )
    return loss, residuals


def _duc_triton(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]; none: the features
    effective: Tensor,  # bool [M, D]
    columns: Tensor | None,  # not read
    sizes: list[int],  # M^2; none: not known on the host
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    run = _backend.kernels("duc_loss").duc_loss_fwd
    return run(features, keys or features, effective, sizes, temperature, offset, reduction, with_residual)


@outside_autocast
def _duc_reference(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]; none: the features
    effective: Tensor,  # bool [M, D]
    columns: Tensor | None,  # int64 [sum of sizes]; None: not prepared
    sizes: list[int],  # M^2
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    if columns is None:
        columns, sizes = _reference.split_dims(effective)
    return _reference.duc_loss_fwd(
        features,
        keys or features,
        columns,
        sizes,
        temperature=temperature,
        offset=offset,
        reduction=reduction,
        with_residual=with_residual,
    )


def _info_nce_cpu(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    if query.shape[1] == 0:
        # A pair without dimensions adds 0 to the kernel's sum over pairs; alone its scores are 0 and count.
        return _info_nce_reference(query, key, temperature, offset, reduction, with_residual)
    loss, residuals = _duc_cpu([query], [key], None, None, [], temperature, offset, reduction, with_residual)
    return loss, residuals[0] if with_residual else residuals


def _info_nce_cuda(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    loss, residuals = _duc_cuda([query], [key], None, None, [], temperature, offset, reduction, with_residual)
    return loss, residuals[0] if with_residual else residuals


def _info_nce_triton(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    *options: float | int | str | bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    return _backend.kernels("duc_loss").info_nce_fwd(query, key, *options)


@outside_autocast
def _info_nce_reference(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    losses, residual = _reference.info_nce_fwd(
        query, key, temperature=temperature, offset=offset, with_residual=with_residual
    )
    loss = reduced(losses, reduction)
    residual = query.new_empty(0) if residual is None else residual
    return loss, residual.to(residual_dtype(query.dtype))


def _duc_fake(
    features, keys, effective, columns, sizes, temperature, offset, reduction, with_residual, backend
):
    shape = (len(features), *features[0].shape) if with_residual else (0,)
    residuals = features[0].new_empty(shape, dtype=residual_dtype(features[0].dtype))
    return loss_like(features[0], reduction), residuals


def _info_nce_fake(query, key, temperature, offset, reduction, with_residual, backend):
    shape = query.shape if with_residual else (0,)
    return loss_like(query, reduction), query.new_empty(shape, dtype=residual_dtype(query.dtype))


# Both return the loss and temperature times the gradient of its sum, of float16 in float32: out of float16's
# range such a product is soon; the other dtypes have range enough.
duc_op = define(
    "duc_loss",
    "duc_loss_fwd(Tensor[] features, Tensor[] keys, Tensor effective, Tensor? columns, SymInt[] sizes,"
    " float temperature, SymInt offset, str reduction, bool with_residual, str backend) -> (Tensor, Tensor)",
    fake=_duc_fake,
    reference=_duc_reference,
    cpu=_duc_cpu,
    cuda=_duc_cuda,
    triton=_duc_triton,
)
info_nce_op = define(
    "duc_loss",
    "info_nce_fwd(Tensor query, Tensor key, float temperature, SymInt offset, str reduction,"
    " bool with_residual, str backend) -> (Tensor, Tensor)",
    fake=_info_nce_fake,
    reference=_info_nce_reference,
    cpu=_info_nce_cpu,
    cuda=_info_nce_cuda,
    triton=_info_nce_triton,
)

"""The dimension-decoupled unidirectional contrastive loss, with its gradient out of the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant, is_transformed
from mmfast.ops._checks import (
    FLOATS,
    check_bool,
    check_float,
    check_integer,
    check_same_device,
    check_shape,
)
from mmfast.ops._contrast import as_key, check_options, gathered, scaled
from mmfast.ops._duc_loss_launch import duc_op, info_nce_op
from mmfast.ops._launch import promoted
from mmfast.reference import duc_loss as _reference
from mmfast.reference._common import accumulation_dtype


class DucDims:
    """The effective dimensions of every modality, with the column lists of all ordered pairs, prepared once.

    Building it reads `effective` on the host; calls of `duc_loss` with it do not. It is saved as `effective`
    and built again on loading; `torch.load(weights_only=True)` takes it once mmfast.ops is imported.

    Args:
        effective: bool [M, D], True where a dimension of a modality separates the classes.

    Attributes:
        effective: as given; not to be changed, a call with it raises after that.
        columns: int64, on the device of `effective`: the dimensions effective in m and not in n, pair after
            pair.
        sizes: M^2 numbers of such dimensions, n running fastest.
    """

    columns: Tensor  # int64 [sum of sizes]
    sizes: tuple[int, ...]  # M^2

    def __init__(self, effective: Tensor) -> None:
        _check_effective(effective, None, None)
        # Of a tensor made in inference mode nobody would hear that it was changed.
        with torch.inference_mode(False):
            self._effective = effective.detach().clone()
            self._version = self._effective._version
            self.columns, sizes = _reference.split_dims(self._effective)
        self.sizes = tuple(sizes)

    @property
    def effective(self) -> Tensor:  # bool [M, D]
        return self._effective

    def _unchanged(self) -> Tensor:  # bool [M, D]
        """Return the mask; raise where the columns, which were read from it, no longer follow from it."""
        # A compiled graph takes both as they are when it runs, and has no number of changes to ask for.
        if not torch.compiler.is_compiling() and self._effective._version != self._version:
            raise ValueError("effective of DucDims was changed in place: build DucDims(effective) once more")
        return self._effective

    def dims(self, teacher: int, student: int) -> Tensor:  # int64 [d]
        """Return the dimensions in which modality `teacher` teaches modality `student`."""
        num_modalities = len(self._unchanged())
        for name, modality in (("teacher", teacher), ("student", student)):
            check_integer(name, modality)
            if not 0 <= modality < num_modalities:
                raise IndexError(f"{name} must lie in [0, M) = [0, {num_modalities}), got {modality}")
        return self.columns.split(list(self.sizes))[teacher * num_modalities + student]

    def to(self, device: torch.device | str) -> DucDims:
        """Return the same dimensions on another device, without a question to either."""
        moved = object.__new__(DucDims)
        with torch.inference_mode(False):
            moved._effective, moved.columns = self._unchanged().to(device), self.columns.to(device)
        moved._version, moved.sizes = moved._effective._version, self.sizes
        return moved

    def __reduce__(self):
        # Column lists that do not fit the mask, as a file may hold them, can never be loaded.
        return DucDims, (self._unchanged(),)

    def __repr__(self) -> str:
        num_modalities, num_dims = self.effective.shape
        return (
            f"DucDims(M={num_modalities}, D={num_dims}, sizes={self.sizes}, device={self.effective.device})"
        )


torch.serialization.add_safe_globals([DucDims])


def duc_loss(
    features: Sequence[Tensor] | Tensor,  # M of [N, D]
    effective: Tensor | DucDims,  # bool [M, D]
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # [] or [N]
    """Return the loss by which modalities learn from each other where only one of them is effective.

    Equivalent to, summed over all ordered pairs of different modalities (m, n):

        d = effective[m] & ~effective[n]
        scores = features[n][:, d] @ features[m][:, d].detach().T / temperature
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(N))

    without an N x N matrix kept. A pair without such dimensions adds 0.

    Args:
        features: M tensors [N, D], or one [M, N, D]; float32, float64, bfloat16 or float16, any strides,
            mixed dtypes are promoted to a common one.
        effective: bool [M, D]. Prepare `DucDims(effective)` once: from a bare mask plain torch reads column
            lists on the host in every call, and the Triton kernel, which does not, takes memory for all D.
        temperature: positive, divides the dot products. A tensor of one element may be learnt, and is not
            read on a GPU: queries are divided by it, rounded to their dtype there, and those of float16 must
            stay within its range.
        reduction: "mean" or "sum" over samples, or "none": [N], each sample's losses summed over pairs.
        group: a torch.distributed process group: keys are gathered from all its processes (which may hold
            different N), each reduces over its own rows, and gradients averaged over processes that hold
            equal N are those of one process with the whole batch. Waits for the host to exchange sizes. None:
            this process alone.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, or [N] without reduction, in float32 for half precision, else in the dtype of the features.
        The mean of an empty batch is NaN, its sum 0. Differentiable with respect to the features as
        queries, and to a temperature that is a tensor.

    Raises:
        TypeError: a feature is no tensor of a floating dtype, or `effective` none of bool.
        ValueError: there is no feature, a shape differs, or `temperature` or `reduction` is out of range.

    Source: Fan et al., "Detached and interactive multimodal learning", ACM MM 2024, section on
    the dimension-decoupled unidirectional contrastive loss.
    """
    features = _check_features(features)
    num_modalities, num_dims = len(features), features[0].shape[1]
    # What is wrong is looked for afterwards, as in `_check_features`.
    columns: Tensor | None = None
    sizes: Sequence[int] = ()
    if isinstance(effective, DucDims):
        columns, sizes, mask = effective.columns, effective.sizes, effective._unchanged()
        if mask.shape != (num_modalities, num_dims):
            _check_effective(mask, num_modalities, num_dims)
    else:
        mask = effective
        _check_effective(mask, num_modalities, num_dims)
    if mask.device != features[0].device:
        check_same_device(features=features[0], effective=mask)
    check_options(temperature, reduction)
    _backend.check_name(backend)
    features = promoted(*features)
    keys, offset = ([], 0) if group is None else gathered(features, group)
    if isinstance(temperature, Tensor):
        keys = keys or [as_key(feature) for feature in features]
        features, temperature = [_divided(feature, temperature) for feature in features], 1.0
        keys = [key.to(features[0].dtype) for key in keys]
    if is_constant(*features):
        given = (keys, mask, columns, sizes, float(temperature), offset, reduction)
        return duc_op(features, *given, False, backend)[0]
    options = (list(sizes), float(temperature), offset, reduction, _asks_gradient(features), backend)
    # Constants that no derivative reads need no place among what autograd saves.
    return _duc((num_modalities, columns, *options), mask, *features, *keys)


def unidirectional_info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [N, D]
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:  # [] or [N]
    """Return the InfoNCE loss that draws each query to its positive key among all keys, which are constants.

    Equivalent to:

        scores = query @ key.detach().T / temperature
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(N), reduction=reduction)

    Args:
        query: [N, D] float32, float64, bfloat16 or float16, any strides; not normalised.
        key: [N, D], row i belongs to row i of `query`; mixed dtypes are promoted to a common one.
        temperature: positive, divides the dot products. A tensor of one element may be learnt, and is not
            read on a GPU: queries are divided by it, rounded to their dtype there, and those of float16 must
            stay within its range.
        reduction: "mean", "sum" or "none" over samples.
        group: as for `duc_loss`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, or [N] without reduction, in float32 for half precision, else in the dtype of `query`.
        Differentiable with respect to `query` and to a temperature that is a tensor; `key` gets no
        gradient.

    Raises:
        TypeError: `query` or `key` is no tensor of a floating dtype.
        ValueError: shapes differ, or `temperature` or `reduction` is out of range.

    Source: Fan et al., "Detached and interactive multimodal learning", ACM MM 2024.
    """
    check_float("query", query)
    check_shape("query", query, "N, D", (None, None))
    check_float("key", key)
    check_shape("key", key, "N, D", (query.shape[0], query.shape[1]))
    check_same_device(query=query, key=key)
    check_options(temperature, reduction)
    _backend.check_name(backend)
    query, key = promoted(query, as_key(key))
    is_plain = backend == "auto" and group is None and _backend.is_plain_faster("duc_loss", query)
    if is_plain and not is_transformed():
        scores = query @ key.T / temperature
        positives = torch.arange(query.shape[0], device=query.device)
        return F.cross_entropy(scores, positives, reduction=reduction)
    keys, offset = gathered([key], group)
    key = keys[0] if keys else key
    if isinstance(temperature, Tensor):
        query, temperature = _divided(query, temperature), 1.0
        key = key.to(query.dtype)
    options = (float(temperature), offset, reduction)
    if is_constant(query):
        return info_nce_op(query, key, *options, False, backend)[0]
    return _info_nce((*options, _asks_gradient([query]), backend), query, key)


def _check_features(features: Sequence[Tensor] | Tensor) -> list[Tensor]:
    if isinstance(features, Tensor):
        check_shape("features", features, "M, N, D", (None, None, None))
        features = features.unbind(0)
    try:
        tensors = list(features)
    except TypeError:
        got = type(features).__name__
        raise TypeError(f"features must be a sequence of tensors [N, D], got {got}") from None
    if not tensors:
        raise ValueError("features must hold M >= 1 tensors [N, D], got none")
    first = tensors[0]
    check_float("features[0]", first)
    check_shape("features[0]", first, "N, D", (None, None))
    for index, feature in enumerate(tensors):
        if feature is not first and not _is_like(feature, first):
            # What is wrong is looked for afterwards: names cost more than the questions.
            name = f"features[{index}]"
            check_float(name, feature)
            check_shape(name, feature, "N, D", tuple(first.shape))
            check_same_device(**{"features[0]": first, name: feature})
    return tensors


def _is_like(feature: Tensor, first: Tensor) -> bool:
    return (
        isinstance(feature, Tensor)
        and feature.dtype in FLOATS
        and feature.shape == first.shape
        and feature.device == first.device
    )


def _check_effective(effective: Tensor, num_modalities: int | None, num_dims: int | None) -> None:
    check_bool("effective", effective)
    check_shape("effective", effective, "M, D", (num_modalities, num_dims))


def _divided(
    query: Tensor,  # [N, D]
    temperature: Tensor,  # [] or [1]
) -> Tensor:  # [N, D]
    """Return the queries divided by a temperature that autograd, or a GPU, knows: all of the loss it is in.

    Half precision is divided, and then computed, in float32 on a CPU, where that costs nothing.
    """
    wide = accumulation_dtype(query.dtype) if query.is_cpu else query.dtype
    return (query.to(wide) / temperature.to(query.device).reshape(())).to(wide)


def _asks_gradient(features: Sequence[Tensor]) -> bool:
    """Whether features that are not constant need a gradient; only a compiler makes them so without."""
    if not torch.compiler.is_compiling() or is_transformed():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in features)


class _DucLoss(Op):
    smooth, kept, is_hidden = slice(1), slice(1, None), True

    @staticmethod
    def forward(options, mask, *tensors):
        num_modalities, *others = options
        return duc_op(tensors[:num_modalities], tensors[num_modalities:], mask, *others)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        _, _, _, temperature, _, reduction, *_ = options
        found = scaled(kept[0], gradients[0], temperature, reduction, tensors[1].dtype).unbind(0)
        return None, *found, *[None] * (len(tensors) - 1 - len(found))

    @staticmethod
    def formula(options, gradients, tensors):
        mask, *tensors = tensors
        num_modalities, _, _, temperature, offset, reduction, *_ = options
        features, keys = tensors[:num_modalities], tensors[num_modalities:]
        found = _reference.duc_loss_bwd(
            gradients[0],
            features,
            keys or [feature.detach() for feature in features],
            mask,
            temperature=temperature,
            offset=offset,
            reduction=reduction,
        )
        return None, *found, *[None] * len(keys)


class _InfoNCE(Op):
    smooth, kept, is_hidden = slice(1), slice(1, None), True

    @staticmethod
    def forward(options, query, key):
        return info_nce_op(query, key, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        temperature, _, reduction, *_ = options
        return scaled(kept[0], gradients[0], temperature, reduction, tensors[0].dtype), None

    @staticmethod
    def formula(options, gradients, tensors):
        temperature, offset, reduction, *_ = options
        dquery = _reference.info_nce_bwd(
            gradients[0], *tensors, temperature=temperature, offset=offset, reduction=reduction
        )
        return dquery.to(tensors[0].dtype), None


_duc, _info_nce = differentiable(_DucLoss), differentiable(_InfoNCE)

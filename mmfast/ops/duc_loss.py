"""The dimension-decoupled unidirectional contrastive loss, with its gradient out of the forward pass."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant, is_transformed
from mmfast.ops._common import (
    DTYPE_CODE,
    FLOATS,
    cast,
    check_choice,
    check_float,
    check_integer,
    check_positive,
    check_same_device,
    check_scale_tensor,
    check_shape,
    check_tensor,
    outside_autocast,
    promoted,
    register,
)
from mmfast.reference import duc_loss as _reference
from mmfast.reference._common import accumulation_dtype
from mmfast.reference.duc_loss import residual_dtype

REDUCTIONS = ("mean", "sum", "none")


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
        """Return the mask; raise where the columns, which were read from it, are no longer its own."""
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
    _check_options(temperature, reduction)
    _backend.check_name(backend)
    features = promoted(*features)
    keys, offset = ([], 0) if group is None else _gathered(features, group)
    if isinstance(temperature, Tensor):
        keys = keys or [_as_key(feature) for feature in features]
        features, temperature = [_divided(feature, temperature) for feature in features], 1.0
        keys = [key.to(features[0].dtype) for key in keys]
    if is_constant(*features):
        given = (keys, mask, columns, sizes, float(temperature), offset, reduction)
        return _duc_op(features, *given, False, backend)[0]
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
    """Return the InfoNCE loss that draws each query to its own among all keys, with the keys as constants.

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
    _check_options(temperature, reduction)
    _backend.check_name(backend)
    query, key = promoted(query, _as_key(key))
    is_plain = backend == "auto" and group is None and _backend.is_plain_faster("duc_loss", query)
    if is_plain and not is_transformed():
        scores = query @ key.T / temperature
        own = torch.arange(query.shape[0], device=query.device)
        return F.cross_entropy(scores, own, reduction=reduction)
    keys, offset = _gathered([key], group)
    key = keys[0] if keys else key
    if isinstance(temperature, Tensor):
        query, temperature = _divided(query, temperature), 1.0
        key = key.to(query.dtype)
    options = (float(temperature), offset, reduction)
    if is_constant(query):
        return _info_nce_op(query, key, *options, False, backend)[0]
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
    check_tensor("effective", effective)
    if effective.dtype != torch.bool:
        raise TypeError(f"effective must have dtype bool, got {str(effective.dtype).removeprefix('torch.')}")
    check_shape("effective", effective, "M, D", (num_modalities, num_dims))


def _check_options(temperature: float | Tensor, reduction: str) -> None:
    if isinstance(temperature, Tensor):
        check_scale_tensor("temperature", temperature)
    else:
        check_positive("temperature", temperature)
    check_choice("reduction", reduction, REDUCTIONS)


def _as_key(
    x: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return features as a constant that autograd can save, which it refuses of what inference mode made."""
    if torch.compiler.is_compiling() or is_transformed():
        return x.detach()
    x = x.detach() if x.requires_grad else x
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


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


def _gathered(features: list[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], int]:
    """Return all processes' keys and where this one's begin; no keys where they are the features."""
    if group is None or dist.get_world_size(group) == 1:
        return [], 0
    keys, offset = _reference.gather_keys(torch.stack([feature.detach() for feature in features]), group)
    return list(keys.unbind(0)), offset


def _scaled(
    residuals: Tensor,  # [N, D] or [M, N, D]
    dloss: Tensor,  # [] or [N]
    temperature: float,
    reduction: str,
    dtype: torch.dtype,
) -> Tensor:  # like `residuals`, in `dtype`
    """Return the gradient: the residuals, which are that of the sum at temperature 1, times their factors."""
    if temperature > 1e30:
        # Times N it might be out of float32's range, and the gradient 0.
        dloss, temperature = dloss / temperature, 1.0
    divisor = temperature * residuals.shape[-2] if reduction == "mean" else temperature
    if dloss.dim() == 0 and residuals.dtype == dloss.dtype == dtype:
        return residuals * (dloss / divisor)
    # A factor without dimensions would be rounded to half precision before the product; with them, the
    # product is taken in float32 and rounded once.
    return cast(residuals * (dloss / divisor).reshape(-1, 1), dtype)


class _DucLoss(Op):
    smooth, kept, is_hidden = slice(1), slice(1, None), True

    @staticmethod
    def forward(options, mask, *tensors):
        num_modalities, *others = options
        return _duc_op(tensors[:num_modalities], tensors[num_modalities:], mask, *others)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        _, _, _, temperature, _, reduction, *_ = options
        found = _scaled(kept[0], gradients[0], temperature, reduction, tensors[1].dtype).unbind(0)
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
        return _info_nce_op(query, key, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        temperature, _, reduction, *_ = options
        return _scaled(kept[0], gradients[0], temperature, reduction, tensors[0].dtype), None

    @staticmethod
    def formula(options, gradients, tensors):
        temperature, offset, reduction, *_ = options
        dquery = _reference.info_nce_bwd(
            gradients[0], *tensors, temperature=temperature, offset=offset, reduction=reduction
        )
        return dquery.to(tensors[0].dtype), None


_duc, _info_nce = differentiable(_DucLoss), differentiable(_InfoNCE)


def _views(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]
) -> array:  # int64 [M, 2, 3]
    """Return the addresses and strides of all matrices, as compiled kernels take them."""
    numbers: list[int] = []
    for feature, key in zip(features, keys):
        numbers += feature.data_ptr(), *feature.stride(), key.data_ptr(), *key.stride()
    return array("q", numbers)


def _residuals(features: list[Tensor], with_residual: bool) -> Tensor:  # [M, N, D] or [0]
    query = features[0]
    shape = (len(features), *query.shape) if with_residual else (0,)
    return query.new_empty(shape, dtype=residual_dtype(query.dtype))


def _run_cpu(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all dimensions
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    query = features[0]
    num_samples, num_dims = query.shape
    loss = _loss_fake(query, reduction)
    residuals = _residuals(features, with_residual)
    views = _views(features, keys)
    mask = None if effective is None else effective.contiguous()
    _backend.extension("cpu").duc_loss_fwd(
        views.buffer_info()[0],
        0 if mask is None else mask.data_ptr(),
        loss.data_ptr(),
        residuals.data_ptr() if with_residual else 0,
        len(features),
        num_samples,
        keys[0].shape[0],
        num_dims,
        temperature,
        offset,
        REDUCTIONS.index(reduction),
        DTYPE_CODE[query.dtype],
        torch.get_num_threads(),
    )
    return loss, residuals


def _has_aligned_rows(
    x: Tensor,  # [N, D]
) -> bool:
    """Return whether rows are in one piece each, and begin and end at multiples of 16 bytes."""
    lengths = (x.data_ptr(), x.stride(0) * x.element_size(), x.shape[1] * x.element_size())
    return x.stride(1) == 1 and all(length % 16 == 0 for length in lengths)


def _run_cuda(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]
    effective: Tensor | None,  # bool [M, D]; None: keys[0] teaches features[0] in all dimensions
    sizes: list[int],  # M^2 numbers of columns a pair has; none: not known on the host
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    query = features[0]
    (num_samples, num_dims), num_keys = query.shape, keys[0].shape[0]
    num_pairs = 1 if effective is None else len(features) * (len(features) - 1)
    num_columns = max(sizes, default=num_dims) if num_pairs else 0
    loss = _loss_fake(query, reduction)
    residuals = _residuals(features, with_residual)
    if num_columns == 0 or num_samples == 0:
        # Without dimensions all scores are 0.
        nothing = math.log(num_keys) if effective is None and num_samples else 0.0
        loss.fill_(math.nan if num_samples == 0 and reduction == "mean" else nothing)
        if reduction == "sum":
            loss.mul_(num_samples)
        return loss, residuals.zero_()
    # In half precision up to 512 columns take a power of two of panels, otherwise any number of panels.
    wide = query.dtype.itemsize > 2
    width = -(-num_columns // 64) * 64
    if not wide and num_columns <= 512:
        width = max(64, 1 << (num_columns - 1).bit_length())
    # Where all columns are taken, rows that can be read 16 bytes at a time need no second copy.
    reads_keys = wide and effective is None and _has_aligned_rows(keys[0])
    num_copies = 2 if wide and not reads_keys else 1
    num_rows = -(-num_samples // 128) * 128 + -(-num_keys // 384) * 384 * num_copies
    packed = query.new_empty(num_pairs * num_rows * width)
    # Blocks take 128 samples of a pair. Where they are fewer than a large GPU has processors, keys are split.
    num_splits = max(1, min(8, num_keys // 256, 132 // (num_pairs * -(-num_samples // 128))))
    # Sums over several teachers are rounded once, residuals in float16 after their factors.
    is_rounded = (effective is None or len(features) == 2) and residuals.dtype == query.dtype
    packed_residual = residuals
    if with_residual and (effective is not None or num_dims % 2):
        dtype = query.dtype if is_rounded else accumulation_dtype(query.dtype)
        packed_residual = query.new_empty(num_pairs, num_samples, width, dtype=dtype)
    losses = loss.new_empty(num_pairs, num_samples)
    num_partial = num_splits * num_pairs * num_samples * (3 + width * with_residual) if num_splits > 1 else 0
    partial = loss.new_empty(num_partial)
    indices = loss.new_empty(num_pairs * (2 * num_dims + 1), dtype=torch.int32)
    views = _views(features, keys)
    known = array("q", sizes)
    mask = None if effective is None else effective.contiguous()
    _backend.extension("cuda").duc_loss_fwd(
        views.buffer_info()[0],
        0 if mask is None else mask.data_ptr(),
        indices.data_ptr(),
        packed.data_ptr(),
        packed_residual.data_ptr() if with_residual else 0,
        partial.data_ptr(),
        losses.data_ptr(),
        loss.data_ptr(),
        residuals.data_ptr() if with_residual else 0,
        len(features),
        num_samples,
        num_keys,
        num_dims,
        width,
        known.buffer_info()[0] if sizes else 0,
        num_splits,
        reads_keys,
        is_rounded,
        temperature,
        offset,
        REDUCTIONS.index(reduction),
        DTYPE_CODE[query.dtype],
        *_backend.stream_of(query),
    )
    return loss, residuals


def _duc_impl(
    features: list[Tensor],  # M of [N, D]
    keys: list[Tensor],  # M of [K, D]; none: the features
    effective: Tensor,  # bool [M, D]
    columns: Tensor | None,  # int64 [sum of sizes]; None: not prepared
    sizes: list[int],  # M^2
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [M, N, D] or [0]
    """Return the loss and temperature times the gradient of its sum, of float16 in float32.

    Out of float16's range such a product is soon; the other dtypes have range enough.
    """
    chosen = _backend.choose("duc_loss", backend, features[0])
    if chosen == "cpu":
        return _run_cpu(features, keys or features, effective, temperature, offset, reduction, with_residual)
    if chosen == "triton":
        return _backend.kernels("duc_loss").duc_loss_fwd(
            features, keys or features, effective, sizes, temperature, offset, reduction, with_residual
        )
    if chosen == "cuda":
        return _run_cuda(
            features, keys or features, effective, sizes, temperature, offset, reduction, with_residual
        )
    if columns is None:
        columns, sizes = _reference.split_dims(effective)
    return outside_autocast(_reference.duc_loss_fwd)(
        features,
        keys or features,
        columns,
        sizes,
        temperature=temperature,
        offset=offset,
        reduction=reduction,
        with_residual=with_residual,
    )


def _info_nce_impl(
    query: Tensor,  # [N, D]
    key: Tensor,  # [K, D]
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # [] or [N]; [N, D] or [0]
    chosen = _backend.choose("duc_loss", backend, query)
    # A pair without dimensions adds 0 to the kernel's sum over pairs; alone its scores are 0 and count.
    if chosen == "cpu" and query.shape[1] > 0:
        loss, residuals = _run_cpu([query], [key], None, temperature, offset, reduction, with_residual)
        return loss, residuals[0] if with_residual else residuals
    if chosen == "triton":
        module = _backend.kernels("duc_loss")
        return module.info_nce_fwd(query, key, temperature, offset, reduction, with_residual)
    if chosen == "cuda":
        loss, residuals = _run_cuda([query], [key], None, [], temperature, offset, reduction, with_residual)
        return loss, residuals[0] if with_residual else residuals
    losses, residual = outside_autocast(_reference.info_nce_fwd)(
        query, key, temperature=temperature, offset=offset, with_residual=with_residual
    )
    loss = _reference.reduced(losses, reduction)
    residual = query.new_empty(0) if residual is None else residual
    return loss, residual.to(residual_dtype(query.dtype))


def _loss_fake(query: Tensor, reduction: str) -> Tensor:
    shape = query.shape[:1] if reduction == "none" else ()
    return query.new_empty(shape, dtype=accumulation_dtype(query.dtype))


def _duc_fake(
    features, keys, effective, columns, sizes, temperature, offset, reduction, with_residual, backend
):
    shape = (len(features), *features[0].shape) if with_residual else (0,)
    residuals = features[0].new_empty(shape, dtype=residual_dtype(features[0].dtype))
    return _loss_fake(features[0], reduction), residuals


def _info_nce_fake(query, key, temperature, offset, reduction, with_residual, backend):
    shape = query.shape if with_residual else (0,)
    return _loss_fake(query, reduction), query.new_empty(shape, dtype=residual_dtype(query.dtype))


_duc_op = register(
    "duc_loss_fwd(Tensor[] features, Tensor[] keys, Tensor effective, Tensor? columns, SymInt[] sizes,"
    " float temperature, SymInt offset, str reduction, bool with_residual, str backend) -> (Tensor, Tensor)",
    _duc_impl,
    _duc_fake,
)
_info_nce_op = register(
    "info_nce_fwd(Tensor query, Tensor key, float temperature, SymInt offset, str reduction,"
    " bool with_residual, str backend) -> (Tensor, Tensor)",
    _info_nce_impl,
    _info_nce_fake,
)

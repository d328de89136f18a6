"""Where class moments and dimension accuracy run: from features to the kernels of each backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._checks import check_label_range, shape_text
from mmfast.ops._launch import (
    DTYPE_CODE,
    address,
    as_int64,
    cast,
    columns_at_a_time,
    strided,
    with_contiguous_rows,
)
from mmfast.ops._registration import define
from mmfast.reference import class_separability as _reference
from mmfast.reference._common import accumulation_dtype


def _in_slabs(run: Callable) -> Callable:
    """Return `run`, which reads rows of contiguous elements, for features that lie in any way.

    Others are copied, some columns at a time where all of them would be a large copy.
    """

    def run_slabs(
        features: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        num_classes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
        if features.stride(1) == 1:
            return run(features, labels, num_classes)
        width = columns_at_a_time(features)
        if width == features.shape[1]:
            return run(features.contiguous(), labels, num_classes)
        slabs = [run(slab.contiguous(), labels, num_classes) for slab in features.split(width, 1)]
        counts, means, variances = zip(*slabs, strict=True)
        return counts[0], torch.cat(means, 1), torch.cat(variances, 1)

    return run_slabs


@_in_slabs
def _moments_fwd_triton(
    features: Tensor,  # [N, D], rows contiguous
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    check_label_range("labels", labels, num_classes)
    return _backend.kernels("class_separability").class_moments_fwd(features, labels, num_classes)


def _moments_fwd_reference(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    check_label_range("labels", labels, num_classes)
    return _reference.class_moments(features, labels, num_classes)


@_in_slabs
def _moments_fwd_cpu(
    features: Tensor,  # [N, D], rows contiguous
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    count, mean, var = _moments_fwd_fake(features, labels, num_classes, "cpu")
    labels = as_int64(labels)
    _backend.extension("cpu").class_separability_moments_fwd(
        *strided(features),
        labels.data_ptr(),
        num_classes,
        count.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        DTYPE_CODE[features.dtype],
        torch.get_num_threads(),
    )
    return count, mean, var


@_in_slabs
def _moments_fwd_cuda(
    features: Tensor,  # [N, D], rows contiguous
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    check_label_range("labels", labels, num_classes)
    count, mean, var = _moments_fwd_fake(features, labels, num_classes, "cuda")
    num_dims, dtype, module = features.shape[1], DTYPE_CODE[features.dtype], _backend.extension("cuda")
    is_ordering, num_parts, num_counts = module.class_separability_moments_plan(
        *features.shape, num_classes, dtype
    )
    # Of each of the three or nothing: labels whose samples the kernel orders, else the order itself.
    samples: tuple[Tensor | None, Tensor | None, Tensor | None]
    if is_ordering:
        samples = (as_int64(labels), None, None)
    else:
        sorted_labels, order = labels.int().sort(stable=True)
        samples = (None, order, sorted_labels)
    part_mean = mean.new_empty(num_parts, num_dims, dtype=torch.float64)
    part_squares = mean.new_empty(num_parts, num_dims)
    part_count = count.new_empty(num_counts, dtype=torch.int32)
    module.class_separability_moments_fwd(
        *strided(features),
        *map(address, samples),
        num_classes,
        part_mean.data_ptr(),
        part_squares.data_ptr(),
        part_count.data_ptr(),
        count.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        dtype,
        *_backend.stream_of(features),
    )
    return count, mean, var


def _moments_bwd_triton(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    count: Tensor,  # [C]
    mean: Tensor,  # [C, D]
) -> Tensor:  # [N, D]
    launch = _backend.kernels("class_separability").class_moments_bwd
    return launch(dmean, dvar, features, labels, count, mean)


def _moments_bwd_compiled(backend: str) -> Callable:
    def run(
        dmean: Tensor,  # [C, D]
        dvar: Tensor,  # [C, D]
        features: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        count: Tensor,  # [C]
        mean: Tensor,  # [C, D]
    ) -> Tensor:  # [N, D]
        dfeatures = features.new_empty(*features.shape)
        features, labels = with_contiguous_rows(features), as_int64(labels)
        dmean, dvar = cast(dmean, mean.dtype).contiguous(), cast(dvar, mean.dtype).contiguous()
        count, mean = count.contiguous(), mean.contiguous()
        _backend.extension(backend).class_separability_moments_bwd(
            dmean.data_ptr(),
            dvar.data_ptr(),
            count.data_ptr(),
            mean.data_ptr(),
            *strided(features),
            labels.data_ptr(),
            dfeatures.data_ptr(),
            mean.shape[0],
            DTYPE_CODE[features.dtype],
            *_backend.where(backend, features),
        )
        return dfeatures

    return run


def _check_hits(
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> None:
    """Raise ValueError as the C++ kernel does, which looks for both by itself."""
    check_label_range("labels", labels, centroids.shape[0])
    if centroids.device.type == "cpu" and centroids.numel() and not bool(centroids.isfinite().any()):
        raise ValueError(
            f"centroids must hold a class with samples, got none finite in {shape_text(centroids.shape)}"
        )


def _in_slabs_of_columns(
    run: Callable,  # of features with contiguous rows
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    """Return `run`, of copies where rows are not contiguous, some columns at a time where they are many."""
    if features.stride(1) == 1:
        return run(features, labels, centroids)
    width = columns_at_a_time(features)
    if width == features.shape[1]:
        return run(features.contiguous(), labels, centroids)
    _check_hits(labels, centroids)
    slabs = zip(features.split(width, 1), centroids.split(width, 1), strict=True)
    return torch.cat([_hits_of_slab(run, slab.contiguous(), labels, c) for slab, c in slabs])


def _hits_of_slab(
    run: Callable,
    features: Tensor,  # [N, d]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, d]
) -> Tensor:  # int64 [d]
    if features.is_cpu and not bool(centroids.isfinite().any()):
        # What a kernel refuses, and other columns may make up for.
        return features.new_zeros(features.shape[1], dtype=torch.int64)
    return run(features, labels, centroids)


def _hits_cpu(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    return _in_slabs_of_columns(_run_hits_cpu, features, labels, centroids)


def _hits_cuda(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    _check_hits(labels, centroids)
    return _in_slabs_of_columns(_run_hits_cuda, features, labels, centroids)


def _hits_triton(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    _check_hits(labels, centroids)
    return _backend.kernels("class_separability").dimension_hits(features, labels, centroids)


def _hits_reference(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    _check_hits(labels, centroids)
    return _reference.dimension_hits(features, labels, centroids)


def _run_hits_cpu(
    features: Tensor,  # [N, D], rows contiguous
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    hits = features.new_empty(features.shape[1], dtype=torch.int64)
    labels = as_int64(labels)
    centroids = cast(centroids, accumulation_dtype(centroids.dtype)).contiguous()
    _backend.extension("cpu").class_separability_hits(
        *strided(features),
        labels.data_ptr(),
        centroids.data_ptr(),
        DTYPE_CODE[centroids.dtype],
        centroids.shape[0],
        hits.data_ptr(),
        DTYPE_CODE[features.dtype],
        torch.get_num_threads(),
    )
    return hits


def _run_hits_cuda(
    features: Tensor,  # [N, D], rows contiguous
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    hits = features.new_zeros(features.shape[1], dtype=torch.int64)
    labels = as_int64(labels)
    centroids = cast(centroids, accumulation_dtype(centroids.dtype)).contiguous()
    intervals = centroids.new_empty(2, *centroids.shape, dtype=accumulation_dtype(features.dtype))
    _backend.extension("cuda").class_separability_hits(
        *strided(features),
        labels.data_ptr(),
        centroids.data_ptr(),
        DTYPE_CODE[centroids.dtype],
        centroids.shape[0],
        intervals.data_ptr(),
        hits.data_ptr(),
        DTYPE_CODE[features.dtype],
        *_backend.stream_of(features),
    )
    return hits


def _moments_fwd_fake(features, labels, num_classes, backend):
    dtype = accumulation_dtype(features.dtype)
    count = features.new_empty(num_classes, dtype=torch.int64)
    mean = features.new_empty(num_classes, features.shape[1], dtype=dtype)
    return count, mean, torch.empty_like(mean)


def _moments_bwd_fake(dmean, dvar, features, labels, count, mean, backend):
    return features.new_empty(features.shape)


def _hits_fake(features, labels, centroids, backend):
    return features.new_empty(features.shape[1], dtype=torch.int64)


moments_fwd_op = define(
    "class_separability",
    "class_moments_fwd(Tensor features, Tensor labels, SymInt num_classes, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_moments_fwd_fake,
    reference=_moments_fwd_reference,
    cpu=_moments_fwd_cpu,
    cuda=_moments_fwd_cuda,
    triton=_moments_fwd_triton,
)
moments_bwd_op = define(
    "class_separability",
    "class_moments_bwd(Tensor dmean, Tensor dvar, Tensor features, Tensor labels, Tensor count, Tensor mean,"
    " str backend) -> Tensor",
    fake=_moments_bwd_fake,
    reference=_reference.class_moments_bwd,
    cpu=_moments_bwd_compiled("cpu"),
    cuda=_moments_bwd_compiled("cuda"),
    triton=_moments_bwd_triton,
    by="features",
)
hits_op = define(
    "class_separability",
    "dimension_hits(Tensor features, Tensor labels, Tensor centroids, str backend) -> Tensor",
    fake=_hits_fake,
    reference=_hits_reference,
    cpu=_hits_cpu,
    cuda=_hits_cuda,
    triton=_hits_triton,
)

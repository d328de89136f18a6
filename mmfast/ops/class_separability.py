"""How well single feature dimensions separate classes: moments of classes and nearest-centroid accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.ops._autograd import Op, differentiable, is_constant, without_derivative
from mmfast.ops._common import (
    DTYPE_CODE,
    cast,
    check_float,
    check_integer,
    check_label_range,
    check_labels,
    check_same_device,
    check_shape,
    columns_at_a_time,
    register,
    shape_text,
    unbroken_rows,
    whole_labels,
)
from mmfast.reference import class_separability as _reference
from mmfast.reference._common import accumulation_dtype


class ClassMoments(NamedTuple):
    """Number, mean and population variance of each class's samples; NaN moments where there are none."""

    count: Tensor  # type: ignore[assignment]  # int64 [C]; hides tuple.count
    mean: Tensor  # [C, D]
    var: Tensor  # [C, D]

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Return the moments of both sets of samples together.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
            variances", 1979.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other must have moments of shape [C, D] = {shape_text(self.mean.shape)}, "
                f"got {shape_text(other.mean.shape)}"
            )
        count = self.count + other.count
        # Each from whole numbers: a small share would be lost in 1 less the other.
        share, own_share = (
            (part.double() / count)[:, None].to(self.mean.dtype) for part in (other.count, self.count)
        )
        empty = (self.count == 0)[:, None]
        mean, var = torch.where(empty, other.mean, self.mean), torch.where(empty, other.var, self.var)
        # A side without samples changes nothing; its NaN times a share of 0 would, forward and backward.
        unchanged = empty | (other.count == 0)[:, None]
        # An infinite mean stays where it is, save for its opposite or a NaN.
        is_fixed = mean.isinf() & (other.mean.isfinite() | (mean == other.mean))
        # Halves, and never the square alone: out of range is only what the results are.
        half = torch.where(unchanged | is_fixed, 0, other.mean / 2 - mean / 2)
        growth = torch.where(unchanged, 0, other.var - var)
        var = var + growth * share + (half * (2 * share)) * (half * (2 * own_share))
        return ClassMoments(count, mean + half * (2 * share), var)


torch.serialization.add_safe_globals([ClassMoments])


def class_moments(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
    *,
    backend: str = "auto",
) -> ClassMoments:  # [C], [C, D], [C, D]
    """Return the number, mean and population variance of each class's samples.

    Equivalent to, for every class k:

        count[k] = (labels == k).sum()
        mean[k] = features[labels == k].mean(0)
        var[k] = features[labels == k].var(0, correction=0)

    Args:
        features: [N, D] float32, float64, bfloat16 or float16, any strides.
        labels: [N] of an integer dtype, in [0, C).
        num_classes: C.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        ClassMoments with count int64 [C], and mean and var [C, D] in float32 for half precision, else in the
        dtype of `features`; NaN for a class without samples. `merge` joins the moments of two sets of
        samples. mean and var are differentiable.

    Raises:
        TypeError: `features` is no tensor of a floating dtype, or `labels` none of an integer dtype.
        ValueError: a shape is wrong, a label on the CPU lies outside [0, C), or `num_classes` is below 1.
    """
    _check(features, labels, num_classes)
    _backend.check_name(backend)
    if is_constant(features):
        return ClassMoments(*_moments_fwd_op(features, labels, num_classes, backend))
    return ClassMoments(*_moments((num_classes, backend), features, labels))


def dimension_accuracy(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
    *,
    backend: str = "auto",
) -> Tensor:  # [D]
    """Return, for each dimension alone, the share of samples to which their own class's centroid is nearest.

    Equivalent to, in exact arithmetic:

        distance = (features[:, None] - centroids).abs()
        accuracy = (distance.nan_to_num(nan=torch.inf).argmin(1) == labels[:, None]).float().mean(0)

    in O(N D) instead of O(N C D). Of equal distances the lowest class is the nearest.

    Args:
        features: [N, D] float32, float64, bfloat16 or float16, any strides; a sample that is not finite is
            not right.
        labels: [N] of an integer dtype, in [0, C).
        centroids: [C, D] of any of these dtypes; one that is NaN or infinite is never the nearest.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        [D] in [0, 1], float64 for float64 features, else float32; NaN for N = 0. No gradient.

    Raises:
        TypeError: `features` or `centroids` is no tensor of a floating dtype, or `labels` none of an integer
            dtype.
        ValueError: a shape is wrong, or, on the CPU, a label lies outside [0, C) or no class has a finite
            centroid.

    Source: Fan et al., "Detached and interactive multimodal learning", ACM MM 2024.
    """
    check_float("centroids", centroids)
    check_shape("centroids", centroids, "C, D", (None, None))
    _check(features, labels, centroids.shape[0], num_classes_name="the number of centroids")
    check_shape("centroids", centroids, "C, D", (None, features.shape[1]))
    check_same_device(features=features, centroids=centroids)
    _backend.check_name(backend)
    features, centroids = without_derivative(features, centroids)
    hits = _hits_op(features, labels, centroids, backend)
    dtype = accumulation_dtype(features.dtype)
    # A quotient of whole numbers has torch's default dtype: most often the one that is wanted.
    wide = hits if dtype == torch.get_default_dtype() else cast(hits, dtype)
    num_samples = features.shape[0]
    if features.is_cuda:
        # By a number a GPU divides as by a factor, its reciprocal, and misses the nearest quotient.
        return wide / torch.full((), num_samples, device=features.device)
    return wide / num_samples


def effective_dimensions(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
    *,
    backend: str = "auto",
) -> Tensor:  # bool [D]
    """Return which dimensions tell the classes apart better than the mean dimension does.

    Equivalent to:

        centroids = class_moments(features, labels, num_classes).mean
        accuracy = dimension_accuracy(features, labels, centroids)
        effective = accuracy > accuracy.mean()

    Args:
        features: [N, D] float32, float64, bfloat16 or float16, any strides.
        labels: [N] of an integer dtype, in [0, C).
        num_classes: C; classes without samples are left out.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        bool [D], the comparison made in whole numbers.

    Raises:
        TypeError: `features` is no tensor of a floating dtype, or `labels` none of an integer dtype.
        ValueError: a shape is wrong, there is no sample, `num_classes` is below 1, or, on the CPU, a label
            lies outside [0, C) or no class has a finite mean.

    Source: Fan et al., "Detached and interactive multimodal learning", ACM MM 2024.
    """
    _check(features, labels, num_classes)
    if features.shape[0] == 0:
        raise ValueError(f"features must hold at least one sample, got {shape_text(features.shape)}")
    _backend.check_name(backend)
    (features,) = without_derivative(features)
    _, mean, _ = _moments_fwd_op(features, labels, num_classes, backend)
    hits = _hits_op(features, labels, mean, backend)
    return hits * hits.shape[0] > hits.sum()


def _check(features: Tensor, labels: Tensor, num_classes: int, num_classes_name: str = "num_classes") -> None:
    check_float("features", features)
    check_shape("features", features, "N, D", (None, None))
    check_labels("labels", labels, features.shape[0])
    check_same_device(features=features, labels=labels)
    check_integer(num_classes_name, num_classes)
    if num_classes < 1:
        raise ValueError(f"{num_classes_name} must be at least 1, got {num_classes}")


class _ClassMoments(Op):
    smooth, kept = slice(1, None), slice(2)

    @staticmethod
    def forward(options, features, labels):
        return _moments_fwd_op(features, labels, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        dmean, dvar = _both(gradients[1:], kept[1])
        return _moments_bwd_op(dmean, dvar, *tensors, *kept, options[1]), None

    @staticmethod
    def formula(options, gradients, tensors):
        num_classes, _ = options
        features, labels = tensors
        like = features.new_empty((), dtype=accumulation_dtype(features.dtype))
        dmean, dvar = _both(gradients, like.expand(num_classes, features.shape[1]))
        return _reference.class_moments_gradient(dmean, dvar, features, labels), None


def _both(
    gradients: Sequence[Tensor | None],  # [C, D] each; None where nothing depends on the result
    mean: Tensor,  # [C, D]
) -> list[Tensor]:  # [C, D] each
    # One number for all: nothing is written.
    return [mean.new_zeros(()).expand(mean.shape) if x is None else x for x in gradients]


_moments = differentiable(_ClassMoments)


def _moments_fwd(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    chosen = _backend.choose("class_separability", backend, features)
    if features.stride(1) != 1 and chosen != "reference":
        width = columns_at_a_time(features)
        if width < features.shape[1]:
            parts = [_moments_fwd(part, labels, num_classes, chosen) for part in features.split(width, 1)]
            counts, means, variances = zip(*parts, strict=True)
            return counts[0], torch.cat(means, 1), torch.cat(variances, 1)
        features = features.contiguous()
    if chosen == "cpu":
        return _moments_fwd_cpu(features, labels, num_classes)
    check_label_range("labels", labels, num_classes)
    if chosen == "triton":
        launch = _backend.kernels("class_separability").class_moments_fwd
        return launch(features, labels, num_classes)
    if chosen == "cuda":
        return _moments_fwd_cuda(features, labels, num_classes)
    return _reference.class_moments(features, labels, num_classes)


def _moments_fwd_cpu(
    features: Tensor,  # [N, D], every row in one piece
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    count, mean, var = _moments_fwd_fake(features, labels, num_classes, "cpu")
    labels = whole_labels(labels)
    _backend.extension("cpu").class_separability_moments_fwd(
        features.data_ptr(),
        labels.data_ptr(),
        count.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        *features.shape,
        num_classes,
        features.stride(0),
        DTYPE_CODE[features.dtype],
        torch.get_num_threads(),
    )
    return count, mean, var


# What a block of the CUDA kernel takes: samples, and classes by which it can order its samples itself.
_MOST_ROWS, _MOST_OWN_CLASSES = 1024, 128
# What blocks that do so leave of each class stays in the second-level cache up to so many numbers.
_MOST_PARTS = 2**20
# Two blocks for each multiprocessor of an H100. Fixed: the same bits on every GPU.
_BLOCKS = 264


def _blocks_of_moments(
    num_samples: int, num_dims: int, num_classes: int, itemsize: int
) -> tuple[int, bool]:  # samples a block, whether it orders them itself
    """Return how the CUDA kernel shares out the samples: enough of a class to a block, and enough blocks."""
    slabs = max(1, -(-num_dims * itemsize // 512))
    rows = max(64, -(-num_samples * slabs // _BLOCKS))
    few_parts = num_samples * num_dims * num_classes <= _MOST_PARTS * _MOST_ROWS
    is_ordering = num_classes <= _MOST_OWN_CLASSES // 2 or (num_classes <= _MOST_OWN_CLASSES and few_parts)
    if is_ordering:
        rows = max(rows, 16 * num_classes)
    return min(_MOST_ROWS, -(-rows // 16) * 16), is_ordering


def _moments_fwd_cuda(
    features: Tensor,  # [N, D], every row in one piece
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    count, mean, var = _moments_fwd_fake(features, labels, num_classes, "cuda")
    num_samples, num_dims = features.shape
    rows, is_ordering = _blocks_of_moments(num_samples, num_dims, num_classes, features.element_size())
    num_blocks = -(-num_samples // rows)
    if is_ordering:
        labels, order, sorted_labels = whole_labels(labels), None, None
        num_parts = num_blocks * num_classes
        part_count = count.new_empty(num_parts, dtype=torch.int32)
    else:
        sorted_labels, order = labels.int().sort(stable=True)
        num_parts, part_count = num_blocks + num_classes, None
    part_squares = torch.empty(num_parts, num_dims, dtype=mean.dtype, device=mean.device)
    part_mean = torch.empty_like(part_squares, dtype=torch.float64)
    _backend.extension("cuda").class_separability_moments_fwd(
        features.data_ptr(),
        labels.data_ptr() if is_ordering else 0,
        0 if order is None else order.data_ptr(),
        0 if sorted_labels is None else sorted_labels.data_ptr(),
        part_mean.data_ptr(),
        part_squares.data_ptr(),
        0 if part_count is None else part_count.data_ptr(),
        count.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        num_samples,
        num_dims,
        num_classes,
        features.stride(0),
        rows,
        DTYPE_CODE[features.dtype],
        *_backend.stream_of(features),
    )
    return count, mean, var


def _moments_bwd(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    count: Tensor,  # [C]
    mean: Tensor,  # [C, D]
    backend: str,
) -> Tensor:  # [N, D]
    chosen = _backend.choose("class_separability", backend, features)
    if chosen in ("cpu", "cuda"):
        return _moments_bwd_run(dmean, dvar, features, labels, count, mean, chosen)
    if chosen == "triton":
        launch = _backend.kernels("class_separability").class_moments_bwd
        return launch(dmean, dvar, features, labels, count, mean)
    return _reference.class_moments_bwd(dmean, dvar, features, labels, count, mean)


def _moments_bwd_run(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    count: Tensor,  # [C]
    mean: Tensor,  # [C, D]
    chosen: str,  # "cpu" or "cuda"
) -> Tensor:  # [N, D]
    dfeatures = features.new_empty(*features.shape)
    features, labels = unbroken_rows(features), whole_labels(labels)
    dmean, dvar = cast(dmean, mean.dtype).contiguous(), cast(dvar, mean.dtype).contiguous()
    count, mean = count.contiguous(), mean.contiguous()
    _backend.extension(chosen).class_separability_moments_bwd(
        dmean.data_ptr(),
        dvar.data_ptr(),
        features.data_ptr(),
        labels.data_ptr(),
        count.data_ptr(),
        mean.data_ptr(),
        dfeatures.data_ptr(),
        *features.shape,
        mean.shape[0],
        features.stride(0),
        DTYPE_CODE[features.dtype],
        *_backend.where(chosen, features),
    )
    return dfeatures


def _hits(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
    backend: str,
) -> Tensor:  # int64 [D]
    chosen = _backend.choose("class_separability", backend, features)
    if chosen == "cpu" and features.stride(1) == 1:
        return _hits_cpu(features, labels, centroids)
    width = features.shape[1]
    if features.stride(1) != 1 and chosen in ("cpu", "cuda"):
        width = columns_at_a_time(features)
        features = features if width < features.shape[1] else features.contiguous()
    if chosen == "cpu" and width == features.shape[1]:
        return _hits_cpu(features, labels, centroids)
    check_label_range("labels", labels, centroids.shape[0])
    if centroids.device.type == "cpu" and centroids.numel() and not bool(centroids.isfinite().any()):
        # As the C++ kernel says it.
        raise ValueError(
            f"centroids must hold a class with samples, got none finite in {shape_text(centroids.shape)}"
        )
    if width < features.shape[1]:
        parts = zip(features.split(width, 1), centroids.split(width, 1), strict=True)
        return torch.cat([_hits_of_columns(x, labels, c, chosen) for x, c in parts])
    if chosen == "cuda":
        return _hits_cuda(features, labels, centroids)
    if chosen == "triton":
        return _backend.kernels("class_separability").dimension_hits(features, labels, centroids)
    return _reference.dimension_hits(features, labels, centroids)


def _hits_of_columns(
    features: Tensor,  # [N, d]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, d]
    chosen: str,  # "cpu" or "cuda"
) -> Tensor:  # int64 [d]
    if chosen == "cuda":
        return _hits_cuda(features.contiguous(), labels, centroids)
    if bool(centroids.isfinite().any()):
        return _hits_cpu(features.contiguous(), labels, centroids)
    # What the kernel refuses, and other columns may make up for.
    return features.new_zeros(features.shape[1], dtype=torch.int64)


def _hits_cpu(
    features: Tensor,  # [N, D], every row in one piece
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    hits = features.new_empty(features.shape[1], dtype=torch.int64)
    labels = whole_labels(labels)
    centroids = cast(centroids, accumulation_dtype(centroids.dtype)).contiguous()
    _backend.extension("cpu").class_separability_hits(
        features.data_ptr(),
        labels.data_ptr(),
        centroids.data_ptr(),
        hits.data_ptr(),
        *features.shape,
        centroids.shape[0],
        features.stride(0),
        DTYPE_CODE[features.dtype],
        DTYPE_CODE[centroids.dtype],
        torch.get_num_threads(),
    )
    return hits


def _hits_cuda(
    features: Tensor,  # [N, D], every row in one piece
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    hits = features.new_zeros(features.shape[1], dtype=torch.int64)
    labels = whole_labels(labels)
    centroids = cast(centroids, accumulation_dtype(centroids.dtype)).contiguous()
    intervals = centroids.new_empty(2, *centroids.shape, dtype=accumulation_dtype(features.dtype))
    _backend.extension("cuda").class_separability_hits(
        features.data_ptr(),
        labels.data_ptr(),
        centroids.data_ptr(),
        intervals.data_ptr(),
        hits.data_ptr(),
        *features.shape,
        centroids.shape[0],
        features.stride(0),
        DTYPE_CODE[features.dtype],
        DTYPE_CODE[centroids.dtype],
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


_moments_fwd_op = register(
    "class_moments_fwd(Tensor features, Tensor labels, SymInt num_classes, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _moments_fwd,
    _moments_fwd_fake,
)
_moments_bwd_op = register(
    "class_moments_bwd(Tensor dmean, Tensor dvar, Tensor features, Tensor labels, Tensor count, Tensor mean,"
    " str backend) -> Tensor",
    _moments_bwd,
    _moments_bwd_fake,
)
_hits_op = register(
    "dimension_hits(Tensor features, Tensor labels, Tensor centroids, str backend) -> Tensor",
    _hits,
    _hits_fake,
)

"""How well single feature dimensions separate classes: moments of classes and nearest-centroid accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmfast import backend as _backend
from mmfast.errors import shown
from mmfast.ops._autograd import Op, differentiable, is_constant, without_derivative
from mmfast.ops._checks import (
    check_float,
    check_integer,
    check_labels,
    check_same_device,
    check_shape,
    shape_text,
)
from mmfast.ops._class_separability_launch import hits_op, moments_bwd_op, moments_fwd_op
from mmfast.ops._launch import cast
from mmfast.reference import class_separability as _reference
from mmfast.reference._common import accumulation_dtype


class ClassMoments(NamedTuple):
    """Number, mean and population variance of each class's samples; NaN moments where there are none."""

    count: Tensor  # type: ignore[assignment]  # int64 [C]; hides tuple.count
    mean: Tensor  # [C, D]
    var: Tensor  # [C, D]

    def __repr__(self) -> str:
        return f"ClassMoments({shown(self._asdict())})"

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
        return ClassMoments(*moments_fwd_op(features, labels, num_classes, backend))
    return ClassMoments(*_moments((num_classes, backend), features, labels))


def dimension_accuracy(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
    *,
    backend: str = "auto",
) -> Tensor:  # [D]
    """Return, for each dimension alone, the share of samples to which their true class's centroid is nearest.

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
    hits = hits_op(features, labels, centroids, backend)
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
    _, mean, _ = moments_fwd_op(features, labels, num_classes, backend)
    hits = hits_op(features, labels, mean, backend)
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
        return moments_fwd_op(features, labels, *options)

    @staticmethod
    def gradient(options, gradients, tensors, kept):
        dmean, dvar = _both(gradients[1:], kept[1])
        return moments_bwd_op(dmean, dvar, *tensors, *kept, options[1]), None

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

"""Moments of each class and nearest-centroid accuracy of each dimension, as the formulas are written."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype, row_chunks


def class_moments(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [C], [C, D], [C, D]
    """Return the number, mean and population variance of each class's samples."""
    num_samples, num_dims = features.shape
    dtype = accumulation_dtype(features.dtype)
    labels = labels.long()
    count = labels.new_zeros(num_classes).index_add_(0, labels, torch.ones_like(labels))
    # Millions of elements are added one after the other: in float32 the last ones would count for nothing.
    total = features.new_zeros(num_classes, num_dims, dtype=torch.float64)
    squares = torch.zeros_like(total)
    exponent = _class_exponents(features, labels, num_classes)

    def scaled(rows: slice) -> Tensor:
        x = features[rows].double()
        return x if exponent is None else x.ldexp(-exponent.index_select(0, labels[rows]))

    for rows in row_chunks(features, num_samples, num_dims):
        total = total.index_add(0, labels[rows], scaled(rows))
    # Zero divided by zero: the NaN of a class without samples.
    mean = total / count[:, None]
    if exponent is not None:
        # What rounding left: of numbers near the end of range its square would be out of range.
        rest = torch.zeros_like(total)
        for rows in row_chunks(features, num_samples, num_dims):
            rest = rest.index_add(0, labels[rows], scaled(rows) - mean.index_select(0, labels[rows]))
        mean = torch.where(mean.isfinite(), mean + rest / count[:, None], mean)
    for rows in row_chunks(features, num_samples, num_dims):
        deviation = scaled(rows) - mean.index_select(0, labels[rows])
        squares = squares.index_add(0, labels[rows], deviation.square())
    var = squares / count[:, None]
    if exponent is not None:
        mean, var = mean.ldexp(exponent), var.ldexp(exponent).ldexp(exponent)
    return count, mean.to(dtype), var.to(dtype)


def _class_exponents(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> Tensor | None:  # int32 [C, D]; None: sums and squares of the features are in float64's range
    """Return the powers of two by which elements too large to be squared are divided, 0 for all others."""
    if features.dtype != torch.float64:
        return None
    largest = features.new_zeros(num_classes, features.shape[1])
    for rows in row_chunks(features, *features.shape):
        index = labels[rows, None].expand_as(features[rows])
        largest = largest.scatter_reduce(0, index, features[rows].abs(), "amax")
    # 2^400: sums of 2^200 squares are in range.
    return torch.where(largest.isfinite() & (largest > 2.0**400), 600, 0).to(torch.int32)


def class_moments_bwd(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    count: Tensor,  # [C]
    mean: Tensor,  # [C, D]
) -> Tensor:  # [N, D]
    """Return (dmean_y + 2 (x - mean_y) dvar_y) / count_y."""
    dfeatures = torch.empty_like(features, memory_format=torch.contiguous_format)
    labels = labels.long()
    dmean, dvar = dmean / count[:, None], dvar * (2 / count.to(dvar.dtype))[:, None]
    for rows in row_chunks(features, *features.shape):
        y = labels[rows]
        deviation = features[rows].to(mean.dtype) - mean.index_select(0, y)
        dfeatures[rows] = dmean.index_select(0, y) + deviation * dvar.index_select(0, y)
    return dfeatures


def class_moments_gradient(
    dmean: Tensor,  # [C, D]
    dvar: Tensor,  # [C, D]
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
) -> Tensor:  # [N, D]
    """Return `class_moments_bwd` with the means as functions of the features, for derivatives of it."""
    x, labels = features.to(dmean.dtype), labels.long()
    ones = torch.ones_like(labels)
    count = labels.new_zeros(len(dmean)).index_add(0, labels, ones)[:, None].clamp_min(1)
    mean = torch.zeros_like(dmean).index_add(0, labels, x) / count
    deviation = x - mean.index_select(0, labels)
    dx = (dmean / count).index_select(0, labels) + deviation * (2 * dvar / count).index_select(0, labels)
    return dx.to(features.dtype)


def class_intervals(
    centroids: Tensor,  # [C, D]
    dtype: torch.dtype,  # float32 or float64: what features are compared in
) -> tuple[Tensor, Tensor]:  # [C, D], [C, D]
    """Return ends such that, for every x of `dtype`, centroid k is nearest just when low[k] <= x < high[k].

    Equal distances go to the lowest class. The ends are exact: for neighbours a < b, x is nearer to b when
    2x > a + b, and the sum is kept with its rounding error.
    """
    c = torch.where(centroids.isfinite(), centroids, torch.inf).double()
    value, order = c.sort(dim=0, stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = value[1:] != value[:-1]
    # Of equal centroids only the lowest class, which the stable sort puts first, can win.
    rank = torch.arange(len(c), device=c.device)[:, None]
    winner = order.gather(0, torch.where(first, rank, 0).cummax(0).values)

    a, b = value[:-1], value[1:]
    # A sum out of range is that of two numbers so large that their halves are exact.
    unit = torch.where((a + b).isfinite(), 1.0, 0.5)
    a, b = a * unit, b * unit
    twice = a + b
    b_rounded = twice - a
    error = (a - (twice - b_rounded)) + (b - b_rounded)
    tie_to_b = (error < 0) | ((error == 0) & (winner[1:] < winner[:-1]))
    # The smallest number of `dtype` on b's side; doubling it is exact where halving the sum is not.
    end = (twice / (2 * unit)).to(dtype)
    doubled = 2 * unit * end.double()
    on_b_side = (doubled > twice) | ((doubled == twice) & tie_to_b)
    end = torch.where(on_b_side, end, end.nextafter(torch.full_like(end, torch.inf)))
    # Between equal centroids there is no end: the interval reaches to the next larger centroid's.
    end = torch.where(first[1:], end, torch.inf)

    outside = torch.full_like(value[:1], torch.inf).to(dtype)
    low = torch.cat([torch.full_like(outside, torch.finfo(dtype).min), end])
    high = torch.cat([end, outside]).flip(0).cummin(0).values.flip(0)
    wins = first & value.isfinite()
    low, high = torch.where(wins, low, torch.inf), torch.where(wins, high, -torch.inf)
    return torch.empty_like(low).scatter_(0, order, low), torch.empty_like(high).scatter_(0, order, high)


def dimension_hits(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # int64 [D]
    """Return in how many samples the true class's centroid is the nearest, dimension by dimension."""
    low, high = class_intervals(centroids, accumulation_dtype(features.dtype))
    hits = features.new_zeros(features.shape[1], dtype=torch.int64)
    labels = labels.long()
    for rows in row_chunks(features, *features.shape):
        x, y = features[rows], labels[rows]
        right = (x >= low.index_select(0, y)) & (x < high.index_select(0, y))
        hits += right.sum(0, dtype=torch.int32)
    return hits


def dimension_accuracy(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # [D]
    """Return the share of samples whose true class's centroid is the nearest, dimension by dimension."""
    hits = dimension_hits(features, labels, centroids)
    return hits.to(accumulation_dtype(features.dtype)) / len(features)


def effective_dimensions(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
) -> Tensor:  # bool [D]
    """Return which dimensions have an accuracy above the mean over dimensions."""
    _, mean, _ = class_moments(features, labels, num_classes)
    hits = dimension_hits(features, labels, mean)
    # Whole numbers: equal accuracies are never above their own mean.
    return hits * len(hits) > hits.sum()

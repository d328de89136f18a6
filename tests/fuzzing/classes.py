"""Cases of class_moments, ClassMoments.merge, dimension_accuracy and effective_dimensions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from fuzzing.draw import Draw
from fuzzing.judge import check, check_same, clean, gamma, grain, unit, wide
from fuzzing.moved import is_on_gpu
from fuzzing.shapley import gradients, leaf
from fuzzing.tensors import assert_unchanged, exact, float_dtype, float_dtypes, floats, labels
from mmfast import ops

_KINDS = ("normal", "offset", "ties", "huge", "tiny", "wide", "special", "equal")


def moments(
    x: np.ndarray,  # [N, D]
    y: np.ndarray,  # [N]
    num_classes: int,
    u: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # [C], then [C, D]
    """Return the numbers, the means, the variances, and bounds of the last two's errors.

    Two passes: a mean of n samples errs by (n + 1) u mean |x|, one of their deviations from a centre c, |c|
    up to mean |x|, by twice that, e. The mean of n squared deviations from it errs by
    (2 n + 8) u var + e^2 (the sum of deviations from the mean is 0, so e enters squared). Deviations from any
    sample instead of the mean, in short blocks, stay within it: their squares have a mean of at most
    (n + 1) var. Means of parts that are merged in float64 round there, which enters once: 8 u64 max |x d|.
    """
    shape = (num_classes, x.shape[1])
    count = np.bincount(y, minlength=num_classes)
    mean, var, mean_error, var_error = (np.full(shape, np.nan, np.longdouble) for _ in range(4))
    for label in np.flatnonzero(count):
        mine, n = x[y == label], int(count[label])
        mean[label] = mine.mean(0)
        deviation = mine - mean[label]
        var[label] = (deviation * deviation).mean(0)
        e = 2 * gamma(n + 1, u) * np.abs(mine).mean(0)
        mean_error[label] = e
        merging = 8 * unit(torch.float64) * np.abs(mine).max(0) * np.abs(deviation).max(0)
        var_error[label] = gamma(2 * n + 8, u) * var[label] + e * e + merging
    return count, mean, var, clean(mean_error), clean(var_error)


def class_moments(draw: Draw, backend: str, small: bool) -> None:
    """One call of class_moments, its vector-Jacobian product, and a merge of two parts."""
    dtype, num_classes = (
        float_dtype(draw, backend),
        draw.choice((3, 1, 2, 5, 7, 17) if small else (3, 1, 2, 5, 7, 17, 65)),
    )
    shape = (draw.size(33 if small else 300), draw.size(33 if small else 129))
    features, target = floats(draw, shape, dtype, kinds=_KINDS), labels(draw, shape[0], num_classes)
    acc = wide(dtype)
    u, info = unit(acc), torch.finfo(acc)
    x = leaf(features)
    result = ops.class_moments(x, target.tensor, num_classes, backend=backend)
    values, y = exact(features.tensor), target.tensor.long().numpy()
    count, mean, var, mean_error, var_error = moments(values, y, num_classes, u)
    tiny = np.longdouble(info.tiny)
    check_same("count", result.count, count)
    # A sum of float64 beyond the dtype is excused where the variance is, too.
    over = np.isfinite(var) & (var > np.longdouble(info.max)) if dtype == torch.float64 else False
    check("mean", result.mean, mean, mean_error + tiny * info.eps, dtype=acc, loose=over)
    check("var", result.var, var, var_error + tiny, dtype=acc)

    dmean, dvar = (gradients(draw, tuple(mean.shape), acc) for _ in range(2))
    (dfeatures,) = torch.autograd.grad([result.mean, result.var], x, [dmean.tensor, dvar.tensor])
    n = np.maximum(count, 1)[y][:, None].astype(np.longdouble)
    dm, dv, centre = exact(dmean.tensor)[y], exact(dvar.tensor)[y], mean[y]
    deviation = values - centre
    truth = (dm + 2 * deviation * dv) / n
    finite = np.abs(np.where(np.isfinite(deviation), deviation, 0))
    # The deviation from a mean that is rounded, too; then five roundings.
    error = clean(mean_error[y]) + u * np.abs(np.where(np.isfinite(centre), centre, 0))
    bound = (2 * np.abs(dv) * (error + 5 * u * finite) + 5 * u * np.abs(dm)) / n
    # 2 dvar / n below the normal numbers, times a deviation.
    subnormal = 4 * grain(acc) * (1 + finite) + tiny * np.abs(dv)
    top = np.longdouble(info.max)
    loose = (finite * 2 * np.maximum(np.abs(dv), 1) > top) | (
        over[y] if isinstance(over, np.ndarray) else False
    )
    check("dfeatures", dfeatures, truth, bound + subnormal, dtype=dtype, loose=loose)
    if not small or draw.chance(0.3):
        _check_merge(draw, features.tensor, target.tensor, num_classes, backend)
    assert_unchanged(features=features, labels=target, dmean=dmean, dvar=dvar)


def _check_merge(draw: Draw, x: torch.Tensor, y: torch.Tensor, num_classes: int, backend: str) -> None:
    """Merge the moments of two parts and hold them against those of what they were made of.

    With d the difference of means and s the other's share, var = (1 - s) v + s v' + s (1 - s) d^2: d carries
    the roundings of both means, e, and costs 2 |d| e, its square and the products a few u. An infinite mean
    is that of all, save beside its opposite or NaN. Halves below the normal numbers err by half their grain.
    """
    cut = draw.integer(0, x.shape[0])
    first, second = (
        ops.class_moments(x[part], y[part], num_classes, backend=backend)
        for part in (slice(0, cut), slice(cut, None))
    )
    acc = first.mean.dtype
    u, info = unit(acc), torch.finfo(acc)
    merged = first.merge(second)
    n1, n2 = (part.count.numpy().astype(np.longdouble)[:, None] for part in (first, second))
    total = n1 + n2
    share = n2 / np.maximum(total, 1)
    m1, m2, v1, v2 = (exact(t) for t in (first.mean, second.mean, first.var, second.var))
    delta, growth = (np.where((n1 == 0) | (n2 == 0), 0, b - a) for a, b in ((m1, m2), (v1, v2)))
    m1, v1 = np.where(n1 == 0, m2, m1), np.where(n1 == 0, v2, v1)
    mean, rest = m1 + delta * share, delta * delta * share * (1 - share)
    mean = np.where(np.isinf(m1) & (np.isfinite(m2) | (m1 == m2)), m1, mean)
    var = v1 + growth * share + rest
    both = [np.abs(np.where(np.isfinite(a), a, 0)) for a in (m1, m2, v1, v2)]
    top = np.longdouble(info.max)
    check_same("merged count", merged.count, (n1 + n2)[:, 0].astype(np.int64))
    # Differences of means, or of variances, beyond the dtype.
    loose = (both[0] + both[1] > top) | (both[2] + both[3] > top)
    rounding = 4 * u * (both[0] + both[1]) + 2 * grain(acc)
    check("merged mean", merged.mean, mean, rounding, dtype=acc, loose=loose)
    bound = 8 * u * (both[2] + both[3] + clean(rest)) + 4 * np.longdouble(info.tiny)
    check("merged var", merged.var, var, bound, dtype=acc, loose=loose)


def nearest_hits(
    x: np.ndarray,  # [N, D] extended
    y: np.ndarray,  # [N]
    centroids: np.ndarray,  # [C, D] extended
) -> np.ndarray:  # int64 [D]
    """Return in how many samples the own centroid is the nearest; ties go to the lowest class.

    Extended precision decides where distances differ by more than its rounding, else fractions do.
    """
    usable = np.isfinite(centroids)
    c = np.where(usable, centroids, 0)
    hits = np.zeros(x.shape[1], np.int64)
    for row, label in zip(x, y, strict=True):
        distance = np.where(usable, np.abs(row - c), np.inf)
        mine = distance[label]
        others = np.where(np.arange(len(c))[:, None] == label, np.inf, distance).min(0)
        slack = 4 * np.finfo(np.longdouble).eps * (np.abs(row) + np.abs(c).max(0))
        right = mine < others
        for d in np.flatnonzero(np.isfinite(row) & (np.abs(mine - others) <= slack) & usable[label]):
            exact_distance = [
                abs(_fraction(row[d]) - _fraction(k)) if ok else None for k, ok in zip(c[:, d], usable[:, d])
            ]
            least = min(value for value in exact_distance if value is not None)
            right[d] = exact_distance.index(least) == label
        hits += right & np.isfinite(row) & usable[label]
    return hits


def _fraction(x: np.longdouble) -> Fraction:
    # Every number comes from float64 at most.
    return Fraction(float(x))


def dimension_accuracy(draw: Draw, backend: str, small: bool) -> None:
    """One call of dimension_accuracy."""
    dtype, num_classes = float_dtype(draw, backend), draw.choice((3, 1, 2, 5, 7, 17))
    shape = (draw.size(33 if small else 65), draw.size(33))
    features, target = floats(draw, shape, dtype, kinds=_KINDS), labels(draw, shape[0], num_classes)
    kinds = ("ties", "normal", "offset", "huge", "tiny", "wide", "special", "equal")
    centroid_dtype = draw.choice((wide(dtype), dtype, *float_dtypes(backend)))
    centroids = floats(draw, (num_classes, shape[1]), centroid_dtype, kinds=kinds)
    c = exact(centroids.tensor)
    if c.size and not np.isfinite(c).any() and not is_on_gpu():
        try:
            ops.dimension_accuracy(features.tensor, target.tensor, centroids.tensor, backend=backend)
        except ValueError:
            return
        raise AssertionError("no centroid is finite, and no ValueError was raised")
    result = ops.dimension_accuracy(features.tensor, target.tensor, centroids.tensor, backend=backend)
    hits = nearest_hits(exact(features.tensor), target.tensor.long().numpy(), c)
    acc = wide(dtype)
    truth = hits.astype(np.longdouble) / np.longdouble(shape[0])
    check("accuracy", result, truth, 0.0, dtype=acc)
    assert_unchanged(features=features, labels=target, centroids=centroids)


def effective_dimensions(draw: Draw, backend: str, small: bool) -> None:
    """One call of effective_dimensions, held against the centroids that class_moments gives."""
    dtype, num_classes = float_dtype(draw, backend), draw.choice((3, 1, 2, 5, 7, 17))
    shape = (draw.size(33 if small else 65, zero=0), draw.size(33))
    kinds = tuple(kind for kind in _KINDS if kind != "special")
    features, target = floats(draw, shape, dtype, kinds=kinds), labels(draw, shape[0], num_classes)
    result = ops.effective_dimensions(features.tensor, target.tensor, num_classes, backend=backend)
    centroids = ops.class_moments(features.tensor, target.tensor, num_classes, backend=backend).mean
    hits = nearest_hits(exact(features.tensor), target.tensor.long().numpy(), exact(centroids))
    assert result.dtype == torch.bool
    check_same("effective", result, hits * len(hits) > hits.sum())
    assert_unchanged(features=features, labels=target)

"""Nearest-centroid accuracy of dimensions, and moments of classes: against brute force and plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import class_separability as reference

from .harness import Case, Options, Work
from .peers import DIRECTIONS, Missing, bind_all, check_against, compiled

SIZE = "Classes C"
# N, D: features of a training set, 41 MB.
SHAPE, QUICK_SHAPE = (20_000, 512), (2_000, 128)
CLASSES = (6, 10, 31, 101, 309)
# Brute force under eager torch holds so many samples' distances at a time.
CHUNK = 256


def cases(options: Options) -> Iterator[Case]:
    """Yield dimension_accuracy and the passes of class_moments for few to many classes."""
    num_samples, num_dims = QUICK_SHAPE if options.quick else SHAPE
    for num_classes in CLASSES[:3:2] if options.quick else CLASSES:
        labels = torch.randint(num_classes, (num_samples,), device=options.device)
        prototypes = torch.randn(num_classes, num_dims, device=options.device)
        features = torch.randn(num_samples, num_dims, device=options.device) + prototypes[labels]
        centroids = ops.class_moments(features, labels, num_classes).mean
        sizes = f"N={num_samples:,} D={num_dims} C={num_classes}"
        yield Case(
            name=f"accuracy {sizes}",
            size=num_classes,
            panel="nearest centroid",
            ours=partial(ops.dimension_accuracy, features, labels, centroids),
            peers={
                "brute force": partial(_brute_force_in_chunks, features, labels, centroids)
                if num_classes <= 31
                else Missing(f"takes seconds at C={num_classes}"),
                "compiled brute force": _given(
                    compiled(_brute_force, options.quick), features, labels, centroids
                ),
                "intervals": partial(reference.dimension_accuracy, features, labels, centroids),
                "compiled intervals": _given(
                    compiled(_intervals, options.quick), features, labels, centroids
                ),
            },
            check=_make_accuracy_check(features, labels, centroids),
            work=Work(features.nbytes + labels.nbytes, 0),
        )
        yield from _moments(features.requires_grad_(), labels, num_classes, sizes, options)


def _moments(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    num_classes: int,
    sizes: str,
    options: Options,
) -> Iterator[Case]:
    def ours(features: Tensor) -> Tensor:
        _, mean, var = ops.class_moments(features, labels, num_classes)
        return torch.cat([mean, var])

    def plain(features: Tensor) -> Tensor:
        count = torch.bincount(labels, minlength=num_classes)[:, None]
        zero = features.new_zeros(num_classes, features.shape[1])
        mean = zero.index_add(0, labels, features) / count
        squares = (features - mean.index_select(0, labels)).square()
        return torch.cat([mean, zero.index_add(0, labels, squares) / count])

    def by_class(features: Tensor) -> Tensor:
        parts = [features[labels == k] for k in range(num_classes)]
        return torch.stack([p.mean(0) for p in parts] + [p.var(0, correction=0) for p in parts])

    peers = {
        "two sums": plain,
        "compiled two sums": compiled(plain, options.quick),
        "class by class": by_class,
    }
    size = features.nbytes
    work = {"forward": Work(size), "backward": Work(size, size), "both": Work(2 * size, size)}
    for direction in DIRECTIONS:
        yield Case(
            name=f"moments {sizes}",
            size=num_classes,
            panel="moments",
            check=check_against(plain, (features,), direction),
            work=work[direction],
            **bind_all(ours, peers, (features,), direction),
        )


def _brute_force(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Tensor:  # [D]
    distance = (features[:, None] - centroids).abs()
    return (distance.argmin(1) == labels[:, None]).float().mean(0)


def _brute_force_in_chunks(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    parts = zip(features.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.stack([len(y) * _brute_force(x, y, centroids) for x, y in parts]).sum(0) / len(labels)


def _intervals(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Return the accuracy from intervals between midpoints of sorted centroids; ties are left to rounding."""
    value, order = centroids.sort(0)
    middle = (value[:-1] + value[1:]) / 2
    edge = torch.full_like(value[:1], torch.inf)
    low = torch.empty_like(value).scatter(0, order, torch.cat([-edge, middle]))
    high = torch.empty_like(value).scatter(0, order, torch.cat([middle, edge]))
    return ((features > low[labels]) & (features <= high[labels])).float().mean(0)


def _given(call: Callable[..., Tensor] | Missing, *arguments: Tensor) -> Callable[[], Tensor] | Missing:
    return call if isinstance(call, Missing) else partial(call, *arguments)


def _make_accuracy_check(
    features: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    centroids: Tensor,  # [C, D]
) -> Callable[[Tensor], None]:
    def check(found: Tensor) -> None:
        # The differences are exact in float64, so whole numbers of samples must agree.
        truth = _brute_force_in_chunks(features[:2000].double(), labels[:2000], centroids.double())
        some = ops.dimension_accuracy(features[:2000], labels[:2000], centroids)
        assert torch.equal((2000 * some).round(), (2000 * truth).round()), "accuracy differs from brute force"
        whole = reference.dimension_accuracy(features, labels, centroids)
        assert torch.equal(found, whole), "accuracy over all samples differs from the reference"

    return check

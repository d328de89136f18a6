"""Checks of k-means and cluster purity, alone and over a group, and the power of two that keeps range."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast import backend as _backend
from mmfast.distributed import ask_all
from mmfast.errors import describe, dtype_name
from mmfast.ops._checks import (
    check_choice,
    check_float,
    check_integer,
    check_labels,
    check_same_device,
    check_shape,
    check_tensor,
    shape_text,
)
from mmfast.reference._common import accumulation_dtype, row_chunks


class Facts(NamedTuple):
    """What is known of a process's call: number of samples, the largest magnitude, what must be alike."""

    num_samples: int
    largest: float  # of a feature or given centroid
    alike: dict[str, Any]


def is_shared(group: dist.ProcessGroup | None) -> bool:
    """Return whether a call is one of several processes together; raise TypeError for what is no group."""
    if group is None:
        return False
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a process group that this process is in, got {describe(group)}")
    return dist.get_world_size(group) > 1


def facts_of_all(check: Callable[[], Facts], group: dist.ProcessGroup) -> list[Facts]:
    """Return the facts of all processes by rank; raise in each where one's call is wrong or differs."""
    facts = ask_all(check, group)
    for name, first in facts[0].alike.items():
        values = [fact.alike[name] for fact in facts]
        if any(value != first for value in values):
            listed = ", ".join(map(str, values))
            raise ValueError(f"{name} must be the same in all processes of the group, got {listed}")
    return facts


def check_clustering(
    features: Tensor,  # [N, D]
    num_clusters: int,
    init: str | Tensor,  # or [K, D]
    options: dict[str, Any],  # num_init, max_iter, tol and seed
    backend: str,
    group: dist.ProcessGroup | None,
) -> list[Facts]:
    """Return the facts of every process that takes part; raise in all of them for what is wrong."""

    def check() -> Facts:
        largest = _check(features, num_clusters, init, is_alone=not is_shared(group))
        _check_options(**options)
        _backend.check_name(backend)
        if not is_shared(group):
            return Facts(len(features), largest, {})
        # What cannot run in one process must not be left to find out when the others wait.
        _backend.choose("kmeans", backend, features)
        alike = {
            "the dtype of features": dtype_name(features.dtype),
            "the number of features' dimensions": features.shape[1],
            "num_clusters": int(num_clusters),
            "init": "centroids" if isinstance(init, Tensor) else init,
            **{name: float(value) if name == "tol" else int(value) for name, value in options.items()},
        }
        return Facts(len(features), largest, alike)

    if group is None or not is_shared(group):
        return [check()]
    facts = facts_of_all(check, group)
    sizes = [fact.num_samples for fact in facts]
    if num_clusters > sum(sizes):
        raise ValueError(
            f"num_clusters must lie in [1, N] = [1, {sum(sizes)}], got {num_clusters} "
            f"for processes of {', '.join(map(str, sizes))} samples"
        )
    return facts


def check_purity(
    assignments: Tensor,  # [N]
    labels: Tensor,  # [N]
    backend: str,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise for what is wrong, in every process that takes part."""

    def check() -> Facts:
        check_tensor("assignments", assignments)
        check_shape("assignments", assignments, "N", (None,))
        check_labels("assignments", assignments, assignments.shape[0])
        check_labels("labels", labels, assignments.shape[0])
        check_same_device(assignments=assignments, labels=labels)
        if labels.shape[0] == 0 and not is_shared(group):
            raise ValueError("labels must hold at least one sample, got shape [0]")
        for name, value in (("assignments", assignments), ("labels", labels)):
            if value.shape[0] and int(value.min()) < 0:
                raise ValueError(f"{name} must not be negative, got {int(value.min())}")
        _backend.check_name(backend)
        if is_shared(group):
            _backend.choose("kmeans", backend, assignments)
        return Facts(labels.shape[0], 0.0, {})

    if group is None or not is_shared(group):
        check()
    elif sum(fact.num_samples for fact in facts_of_all(check, group)) == 0:
        raise ValueError("labels must hold at least one sample in some process of the group, got none")


def _check(features: Tensor, num_clusters: int, init: str | Tensor, is_alone: bool) -> float:
    """Raise unless all is as it should be; return the largest magnitude of a feature or given centroid."""
    check_float("features", features)
    check_shape("features", features, "N, D", (None, None))
    check_integer("num_clusters", num_clusters)
    if is_alone and not 1 <= num_clusters <= features.shape[0]:
        raise ValueError(
            f"num_clusters must lie in [1, N] = [1, {features.shape[0]}], got {num_clusters} "
            f"for features {shape_text(features.shape)}"
        )
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    if isinstance(init, Tensor):
        check_float("init", init)
        check_shape("init", init, "K, D", (num_clusters, features.shape[1]))
        check_same_device(features=features, init=init)
    else:
        check_choice("init", init, ("k-means++",))
    largest = 0.0
    for name, value in (("features", features), ("init", init)):
        if isinstance(value, Tensor) and value.numel() > 0:
            # The extremes tell in one read; a mask of all elements costs as much as several iterations.
            low, high = _extremes(value)
            if not (math.isfinite(low) and math.isfinite(high)):
                num_bad = sum(int((~part.isfinite()).sum()) for part in _parts(value))
                raise ValueError(f"{name} must be finite, got {num_bad} NaN or infinite values")
            largest = max(largest, -low, high)
    return largest


def _extremes(
    x: Tensor,  # [N, D] or [K, D], not empty
) -> tuple[float, float]:
    """Return the least and the largest element; NaN where one is."""
    lows, highs = zip(*[part.aminmax() for part in _parts(x)], strict=True)
    low, high = torch.stack([torch.stack(lows).amin(), torch.stack(highs).amax()]).tolist()
    return low, high


def _parts(
    x: Tensor,  # [N, D] or [K, D], not empty
) -> list[Tensor]:
    """Return `x`, some rows at a time where it does not lie in one piece: torch copies that."""
    return [x] if x.is_contiguous() else [x[rows] for rows in row_chunks(x, *x.shape)]


def exponent_of(largest: float, dtype: torch.dtype) -> int:
    """Return the power of two to divide by, so that squared distances stay in range; mostly 0."""
    exponent = math.frexp(largest)[1]
    return exponent if abs(exponent) > (400 if dtype == torch.float64 else 40) else 0


def scaled(
    x: Tensor,  # any shape
    exponent: int,
) -> Tensor:  # like `x`, of the dtype of accumulation
    """Return x * 2^exponent, rounded nowhere but where it has no such number."""
    x = x.to(accumulation_dtype(x.dtype))
    # Step by step: the whole power may have no number either.
    while exponent != 0:
        step = max(-100, min(100, exponent))
        x, exponent = x * 2.0**step, exponent - step
    return x


def _check_options(num_init: int, max_iter: int, tol: float, seed: int) -> None:
    for name, value in (("num_init", num_init), ("max_iter", max_iter)):
        check_integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(tol, bool) or not isinstance(tol, Real):
        raise TypeError(f"tol must be a number, got {describe(tol)}")
    if not 0 <= tol < float("inf"):
        raise ValueError(f"tol must be finite and not negative, got {tol}")
    check_integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2^63, 2^64), got {seed}")

"""Figures of a learner in the loops of others: measured without Fabric, and under names of one level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from lightning_fabric import Fabric
from torch import Tensor

from mmfast.distributed import sum_over_processes
from mmfast.methods.base import Learner


class _Place:
    """What evaluation asks of Fabric, by the loop that drives the course."""

    def __init__(self, learner: Learner) -> None:
        self.autocast = learner.autocast

    @staticmethod
    def all_reduce(values: Tensor, reduce_op: str = "sum") -> Tensor:  # same shape
        assert reduce_op == "sum"
        return sum_over_processes(values)


def as_fabric(learner: Learner) -> Fabric:
    """Return what evaluation takes for Fabric."""
    return cast(Fabric, _Place(learner))


def flat(figures: Mapping[str, Any], prefix: str, separator: str = "/") -> dict[str, float]:
    """Return figures under names of one level: val/accuracy, val/audio_accuracy.

    Args:
        figures: as the history has them; None, of what no sample has, is left out.
        prefix: of each name.
        separator: after the prefix.
    """
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            kind = key.removeprefix("modality_")
            found |= flat({f"{name}_{kind}": item for name, item in value.items()}, prefix, separator)
        elif isinstance(value, int | float):
            found[prefix + separator + key] = float(value)
    return found

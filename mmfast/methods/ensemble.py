"""Ensemble: late average of separately trained unimodal models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.methods._late_fusion import average_probabilities
from mmfast.methods.base import Method
from mmfast.methods.unimodal import SeparateLearner


class _EnsembleLearner(SeparateLearner):
    def combine(self, logits, present):
        return average_probabilities(logits, present)


@dataclass(frozen=True)
class Ensemble(Method):
    """Train every modality alone; average their class probabilities."""

    name: ClassVar[str] = "ensemble"
    title: ClassVar[str] = "Ensemble"
    learner = _EnsembleLearner

"""Ensemble: late average of separately trained unimodal models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.methods.base import Method
from mmfast.methods.unimodal import SeparateLearner


class _EnsembleLearner(SeparateLearner):
    def combine(self, logits, present):
        return self.average(logits, present)


@dataclass(frozen=True)
class Ensemble(Method):
    """Train every modality alone; average their probabilities, or in regression their numbers."""

    name: ClassVar[str] = "ensemble"
    title: ClassVar[str] = "Ensemble"
    is_baseline: ClassVar[bool] = True
    learner = _EnsembleLearner

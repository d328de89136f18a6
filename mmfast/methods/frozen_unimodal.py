"""Frozen unimodal encoders under a fusion head: unimodal training first, then the head alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mmfast.methods._frozen_encoders import FrozenEncodersLearner
from mmfast.methods._late_fusion import separate_scores
from mmfast.methods.base import Method, check_numbers


class _FrozenUnimodalLearner(FrozenEncodersLearner):
    @property
    def additive(self):
        return self.in_head_stage and self.model.additive

    def fuse(self, features, *, coalition=None, present=None):
        if self.in_head_stage:
            return self.model.fuse(features, coalition=coalition, present=present)
        return super().fuse(features, coalition=coalition, present=present)

    def coalition_logits(self, features, coalitions):
        if self.in_head_stage:
            return self.model.coalition_logits(features, coalitions)
        return super().coalition_logits(features, coalitions)

    def selection_scores(self, accuracy, unimodal_accuracy):
        if self.in_head_stage:
            return super().selection_scores(accuracy, unimodal_accuracy)
        return separate_scores(self.modalities, unimodal_accuracy)


@dataclass(frozen=True)
class FrozenUnimodal(Method):
    """Train every modality alone, freeze the encoders, then train the fusion head on their features.

    Attributes:
        head_epochs: epochs of the second stage.
    """

    name: ClassVar[str] = "frozen-unimodal"
    title: ClassVar[str] = "Frozen unimodal + head"
    is_baseline: ClassVar[bool] = True
    learner = _FrozenUnimodalLearner

    head_epochs: int = 20

    def __post_init__(self) -> None:
        check_numbers(self, head_epochs=(1, math.inf))

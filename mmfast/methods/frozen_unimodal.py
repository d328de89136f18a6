"""Frozen unimodal encoders under a fusion head: unimodal training first, then the head alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from mmfast.batches import presence
from mmfast.methods.base import Method, Stage, check_numbers
from mmfast.methods.late_fusion import (
    LateFusionLearner,
    OwnHeads,
    average_probabilities,
    own_losses,
    separate_scores,
)


class FrozenEncodersLearner(LateFusionLearner):
    """A learner of two stages: the encoders with own heads first, then the fusion head over frozen encoders.

    In the first stage, whose fusion head knows nothing yet, it predicts by the average of the own heads.
    """

    def build(self) -> None:
        self.own_heads = OwnHeads(self.model)

    @property
    def in_head_stage(self) -> bool:
        """Whether the fusion head is what trains."""
        return self.stage.name == "head"

    def stages(self, max_epochs):
        return [Stage("encoders", max_epochs), Stage("head", self.method.head_epochs)]

    def frozen(self):
        if not self.in_head_stage:
            return (self.model.head,)
        return tuple(module for module in (self.model.encoders, *self.children()) if module is not self.model)

    def train(self, mode=True):
        super().train(mode)
        if self.in_head_stage:
            # Frozen means batch-norm statistics and dropout too.
            self.model.encoders.eval()
            self.own_heads.eval()
        return self

    def forward(self, batch, step=0):
        features, present = self.encode(batch), presence(batch, self.modalities)
        if not self.in_head_stage:
            return self.encoder_loss(features, batch["label"], present)
        logits = self.model.fuse(features, present=present)
        return F.cross_entropy(logits.float(), batch["label"])

    def encoder_loss(self, features, labels, present):
        """Return the loss of the first stage."""
        return own_losses(self.own_logits(features), labels, present)

    def own_logits(self, features):
        return self.own_heads(features)

    def combine(self, logits, present):
        return average_probabilities(logits, present)


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

    def selection_scores(self, accuracy, own_accuracy):
        if self.in_head_stage:
            return super().selection_scores(accuracy, own_accuracy)
        return separate_scores(self.modalities, own_accuracy)


@dataclass(frozen=True)
class FrozenUnimodal(Method):
    """Train every modality alone, freeze the encoders, then train the fusion head on their features.

    Attributes:
        head_epochs: epochs of the second stage.
    """

    name: ClassVar[str] = "frozen-unimodal"
    title: ClassVar[str] = "Frozen unimodal + head"
    learner = _FrozenUnimodalLearner

    head_epochs: int = 20

    def __post_init__(self) -> None:
        check_numbers(self, head_epochs=(1, math.inf))

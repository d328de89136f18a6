"""Multi-loss training: the fused loss plus one loss per modality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mmfast.data.batches import presence
from mmfast.methods._late_fusion import UnimodalHeads
from mmfast.methods.base import Learner, Method, check_numbers
from mmfast.ranges import tuned


class _MultiLossLearner(Learner):
    protocol = "own-head"

    def build(self) -> None:
        self.own_heads = UnimodalHeads(self.model)

    def own_logits(self, features):
        return self.own_heads(features)

    def forward(self, batch, step=0):
        features, present = self.encode(batch), presence(batch, self.modalities)
        fused = self.loss(self.model.fuse(features, present=present), batch["label"])
        return fused + self.method.lam * self.unimodal_loss(
            self.own_logits(features), batch["label"], present
        )


@dataclass(frozen=True)
class MultiLoss(Method):
    """Train encoders and head by the fused loss plus `lam` times the sum of the unimodal ones.

    Attributes:
        lam: weight of the unimodal losses.
    """

    name: ClassVar[str] = "multi-loss"
    title: ClassVar[str] = "Joint + unimodal losses"
    is_baseline: ClassVar[bool] = True
    learner = _MultiLossLearner

    lam: float = tuned(1.0, 0.1, 10.0, log=True)

    def __post_init__(self) -> None:
        check_numbers(self, lam=(0, math.inf))

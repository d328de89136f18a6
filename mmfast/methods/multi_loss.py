"""Multi-loss training: the fused cross-entropy plus one cross-entropy per modality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from mmfast.data.batches import presence
from mmfast.methods._late_fusion import UnimodalHeads, unimodal_losses
from mmfast.methods.base import Learner, Method, check_numbers


class _MultiLossLearner(Learner):
    protocol = "own-head"

    def build(self) -> None:
        self.own_heads = UnimodalHeads(self.model)

    def own_logits(self, features):
        return self.own_heads(features)

    def forward(self, batch, step=0):
        features, present = self.encode(batch), presence(batch, self.modalities)
        fused = F.cross_entropy(self.model.fuse(features, present=present).float(), batch["label"])
        return fused + self.method.lam * unimodal_losses(self.own_logits(features), batch["label"], present)


@dataclass(frozen=True)
class MultiLoss(Method):
    """Train encoders and head by the fused cross-entropy plus `lam` times the sum of the unimodal ones.

    Attributes:
        lam: weight of the unimodal losses.
    """

    name: ClassVar[str] = "multi-loss"
    title: ClassVar[str] = "Joint + unimodal losses"
    learner = _MultiLossLearner

    lam: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, lam=(0, math.inf))

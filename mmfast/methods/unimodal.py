"""Unimodal training: every modality with an encoder and a head of its own, none sees another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.data.batches import presence
from mmfast.methods._late_fusion import LateFusionLearner, UnimodalHeads, separate_scores
from mmfast.methods.base import Method


class SeparateLearner(LateFusionLearner):
    """Encoders with unimodal heads, side by side: they share no parameter, so each trains as if alone."""

    def build(self) -> None:
        self.own_heads = UnimodalHeads(self.model)

    def frozen(self):
        return (self.model.head,)

    def forward(self, batch, step=0):
        logits = self.own_logits(self.encode(batch))
        return self.unimodal_loss(logits, batch["label"], presence(batch, self.modalities))

    def own_logits(self, features):
        return self.own_heads(features)

    def selection_scores(self, accuracy, unimodal_accuracy):
        return separate_scores(self.modalities, unimodal_accuracy)


class _UnimodalLearner(SeparateLearner):
    score: Tensor  # [M]

    def build(self) -> None:
        super().build()
        # Accuracy on validation data, or on training data without any; the best modality present answers.
        self.register_buffer("score", torch.zeros(len(self.modalities)))

    def note_unimodal_accuracy(self, unimodal_accuracy):
        # A modality that no sample has comes after all others.
        known = [unimodal_accuracy[name] for name in self.modalities]
        score = torch.tensor(
            [-torch.inf if value is None else value for value in known], dtype=self.score.dtype, device="cpu"
        )
        before = self.score.cpu().argsort(stable=True, descending=True)
        self.score.copy_(score)
        return not torch.equal(before, score.argsort(stable=True, descending=True))

    def combine(self, logits, present):
        if present is None:
            # Not as a Python index, which a GPU would be waited for.
            return logits.index_select(0, self.score.argmax()[None])[0]
        best = self.score[:, None].masked_fill(~present, -torch.inf).argmax(0)  # [N]
        chosen = logits.gather(0, best[None, :, None].expand_as(logits[:1]))[0]
        return chosen.masked_fill(~present.any(0)[:, None], 0.0)


@dataclass(frozen=True)
class Unimodal(Method):
    """Train every modality alone; the one with the best accuracy on validation data answers."""

    name: ClassVar[str] = "unimodal"
    title: ClassVar[str] = "Best unimodal"
    is_baseline: ClassVar[bool] = True
    learner = _UnimodalLearner

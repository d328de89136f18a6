"""Late fusion: a head for every modality, their unimodal losses, and predictions combined from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.coalitions import members
from mmfast.methods.base import Learner
from mmfast.models import MultimodalModel

# Elements held at a time where logits are repeated for coalitions (16 MB in float32).
_MAX_ELEMENTS = 2**22


class UnimodalHeads(nn.ModuleList):
    """One linear classifier per modality on its features alone: g_m of the papers."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__(nn.Linear(dim, model.num_classes) for dim in model.dims)

    def forward(self, features: Sequence[Tensor]) -> Tensor:  # M x [N, D] -> [M, N, C]
        return torch.stack([head(h) for head, h in zip(self, features, strict=True)])


class LateFusionLearner(Learner):
    """A learner that predicts by combining the unimodal logits of every modality's head."""

    protocol = "own-head"

    @property
    def additive(self) -> bool:
        return False

    def combine(
        self,
        logits: Tensor,  # [M, N, C]
        present: Tensor | None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the prediction from the logits of the modalities that are present."""
        raise NotImplementedError

    def average(
        self,
        logits: Tensor,  # [M, N, C]
        present: Tensor | None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the average prediction over the modalities present, as the task has it."""
        return AVERAGES[self.objective.task](logits, present)

    def fuse(self, features, *, coalition=None, present=None):
        logits = self.own_logits(features)
        return self.combine(logits, self.mask_of(logits, coalition, present))

    def mask_of(
        self, logits: Tensor, coalition: int | None, present: Tensor | None
    ) -> Tensor | None:  # bool [M, N]
        """Return which modalities of [M, N, C] logits are present, from a coalition's index or a mask."""
        if coalition is None:
            return present
        return members(coalition, len(logits), logits.device)[:, None].expand(logits.shape[:2])

    def coalition_logits(self, features, coalitions):
        logits = self.own_logits(features)
        # Every coalition repeats the logits of all modalities; so many at a time that memory stays bounded.
        parts = coalitions.split(max(1, _MAX_ELEMENTS // max(1, logits.numel())))
        return torch.cat([self.under(logits, features, part) for part in parts], dim=1)

    def under(
        self,
        logits: Tensor,  # [M, N, C]
        features: Sequence[Tensor],  # M x [N, D]
        coalitions: Tensor,  # [L] int64
    ) -> Tensor:  # [N, L, C]
        """Return the prediction under each coalition, all at once."""
        repeated, member = repeat_for(logits, coalitions)
        return self.combine(repeated, member).unflatten(0, (-1, len(coalitions)))


def separate_scores(
    modalities: Sequence[str], unimodal_accuracy: Sequence[float | None]
) -> dict[tuple[str, ...], float]:
    """Return scores that let each modality's encoder and unimodal head keep their best epoch.

    A modality that could not be measured has none, and keeps its last epoch.
    """
    return {
        (f"model.encoders.{name}.", f"own_heads.{m}."): score
        for m, (name, score) in enumerate(zip(modalities, unimodal_accuracy, strict=True))
        if score is not None
    }


def repeat_for(
    logits: Tensor,  # [M, N, C]
    coalitions: Tensor,  # [L] int64
) -> tuple[Tensor, Tensor]:  # [M, N L, C], bool [M, N L]
    """Return logits repeated for every coalition, and which modalities each repetition shows."""
    member = members(coalitions, len(logits), logits.device).T.contiguous()  # [M, L]
    repeated = logits[:, :, None].expand(-1, -1, len(coalitions), -1).flatten(1, 2)
    return repeated, member.repeat(1, logits.shape[1])


def average_probabilities(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
) -> Tensor:  # [N, C]
    """Return the log of the mean class probabilities over the modalities present; uniform where none is."""
    log_probs = logits.float().log_softmax(-1)
    if present is None:
        return log_probs.logsumexp(0) - math.log(len(logits))
    count = present.sum(0)[:, None]  # [N, 1]
    mean = log_probs.masked_fill(~present[..., None], -torch.inf).logsumexp(0) - count.clamp(min=1).log()
    return mean.masked_fill(count == 0, -math.log(logits.shape[-1]))


def average_of_labels(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
) -> Tensor:  # [N, C]
    """Return the log-odds of each label's mean probability over the modalities present; 0 where none is."""
    logits = logits.float()
    # Of each label, the classes "not" and "it".
    pair = torch.stack([torch.zeros_like(logits), logits], dim=-1)  # [M, N, C, 2]
    shown = None if present is None else present.repeat_interleave(logits.shape[-1], dim=1)
    mean = average_probabilities(pair.flatten(1, 2), shown).unflatten(0, logits.shape[1:])
    return mean[..., 1] - mean[..., 0]


def average_of_numbers(
    outputs: Tensor,  # [M, N, K]
    present: Tensor | None,  # bool [M, N]
) -> Tensor:  # [N, K]
    """Return the mean output over the modalities present; 0 where none is."""
    outputs = outputs.float()
    if present is None:
        return outputs.mean(0)
    return outputs.masked_fill(~present[..., None], 0.0).sum(0) / present.sum(0)[:, None].clamp(min=1)


# By task, how late fusion averages.
AVERAGES = {
    "multiclass": average_probabilities,
    "multilabel": average_of_labels,
    "regression": average_of_numbers,
}

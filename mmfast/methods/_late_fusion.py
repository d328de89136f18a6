"""Late fusion: a head for every modality, their unimodal losses, and predictions combined from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.coalitions import members
from mmfast.distributed import share_of_batch
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


def unimodal_losses(
    logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    present: Tensor | None = None,  # bool [M, N]
) -> Tensor:  # scalar
    """Return the sum over modalities of their cross-entropies, each over the samples where it is present.

    Of several processes, each returns what makes their mean that of the whole batch.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.repeat(logits.shape[0]), reduction="none"
    ).view(logits.shape[:2])
    if present is None:
        return losses.mean(1).sum()
    return ((losses * present).mean(1) / share_of_batch(present)).sum()

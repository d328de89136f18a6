"""Epochs that add copies of samples showing one modality only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast import coalitions
from mmfast.coalitions import PRESENT_SUFFIX
from mmfast.data.batches import Entries, iterate, presence
from mmfast.distributed import broadcast_from_first
from mmfast.methods.base import Learner
from mmfast.valuation import contributions


class ResamplingLearner(Learner):
    """A learner whose `end_epoch` chooses the copies that the next epoch trains on besides all samples."""

    def build(self) -> None:
        self.indices = torch.zeros(0, dtype=torch.int64, device="cpu")  # [E] sample of each copy
        self.coalitions = torch.zeros_like(self.indices)  # [E] the modality it shows, as a coalition

    def contributions(self, data: Any) -> tuple[Tensor, Tensor | None]:  # [N, M], bool [N, M]
        """Return contributions under the published value function, or under the released code's."""
        if self.method.released:
            return contributions(self, data, utility="correct", none_is_worthless=True)
        return contributions(self, data)

    def start_epoch(self, epoch, train):
        if len(self.indices) == 0:
            return train
        samples = torch.arange(len(train), device="cpu")
        num_modalities = len(self.modalities)
        full = torch.full_like(samples, coalitions.everyone(num_modalities))
        shown = coalitions.members(torch.cat([full, self.coalitions]), num_modalities)
        return Entries(train, torch.cat([samples, self.indices]), shown)

    def add_copies(
        self,
        train: Any,
        indices: Tensor,  # [E] int64
        modalities: Tensor,  # [E] int64
    ) -> None:
        """Let the next epoch train on these samples once more, each showing one modality.

        Of several processes all take the first one's.

        Copies that would show nothing, because their sample lacks the modality, are dropped.
        """
        if any(key.endswith(PRESENT_SUFFIX) for key in train[0]):
            shown = coalitions.members(coalitions.alone(modalities), len(self.modalities))
            entries = Entries(getattr(train, "evaluation", train), indices, shown)
            batches = iterate(entries, 4096, torch.device("cpu"))
            visible = [presence(batch, self.modalities).any(0) for batch in batches]  # type: ignore[union-attr]
            keep = torch.cat([torch.zeros(0, dtype=torch.bool, device="cpu"), *visible])
            indices, modalities = indices[keep], modalities[keep]
        self.indices, self.coalitions = broadcast_from_first((indices, coalitions.alone(modalities)))

    def figures(
        self,
        phi: Tensor,  # [M] mean contributions
    ) -> dict[str, float]:
        """Return what a valuation says in the log."""
        shares = {f"phi_{name}": value for name, value in zip(self.modalities, phi.tolist(), strict=True)}
        return {"copies": float(len(self.indices)), **shares}

    def extra_state(self):
        return {"indices": self.indices, "coalitions": self.coalitions}

    def load_extra_state(self, state):
        self.indices, self.coalitions = state["indices"], state["coalitions"]

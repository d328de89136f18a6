"""Epochs that add copies of samples showing one modality only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.data.arrays import PRESENT_SUFFIX
from mmfast.data.batches import Entries, iterate, presence
from mmfast.distributed import of_first
from mmfast.methods.base import Learner
from mmfast.valuation import contributions


class CopiesLearner(Learner):
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
        full = torch.full_like(samples, 2 ** len(self.modalities) - 1)
        indices = torch.cat([samples, self.indices])
        return Entries(train, indices, torch.cat([full, self.coalitions]))

    def take_copies(self, train: Any, indices: Tensor, coalitions: Tensor) -> None:  # [E], [E] int64
        """Let the next epoch train on these copies besides all samples; of several processes on the first's.

        Copies that would show nothing, because their sample lacks the modality, are dropped.
        """
        if any(key.endswith(PRESENT_SUFFIX) for key in train[0]):
            entries = Entries(getattr(train, "evaluation", train), indices, coalitions)
            batches = iterate(entries, 4096, torch.device("cpu"))
            shown = [presence(batch, self.modalities).any(0) for batch in batches]  # type: ignore[union-attr]
            keep = torch.cat([torch.zeros(0, dtype=torch.bool, device="cpu"), *shown])
            indices, coalitions = indices[keep], coalitions[keep]
        self.indices, self.coalitions = of_first((indices, coalitions))

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

"""Epochs that add copies of samples showing one modality only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.coalitions import members
from mmfast.data.batches import Entries, presence
from mmfast.data.reader import evaluation_batches
from mmfast.distributed import broadcast_from_first
from mmfast.methods.base import Learner
from mmfast.valuation import contributions


class ResamplingLearner(Learner):
    """A learner whose `end_epoch` chooses the copies that the next epoch trains on besides all samples."""

    def build(self) -> None:
        # How many copies of each sample show modality m alone; a byte each, where they fit.
        self.copies = torch.zeros(0, len(self.modalities), dtype=torch.uint8, device="cpu")  # [N, M]

    def contributions(self, data: Any) -> tuple[Tensor, Tensor | None]:  # [N, M], bool [N, M]
        """Return contributions under the published value function, or under the released code's.

        Of several processes each values its share, and all get the whole.
        """
        if self.method.released:
            return contributions(self, data, utility="correct", none_is_worthless=True, share=True)
        return contributions(self, data, share=True)

    def start_epoch(self, epoch, train):
        sample, modality = self.copies.nonzero(as_tuple=True)
        if len(sample) == 0:
            return train
        repeats = self.copies[sample, modality].long()
        everyone = torch.arange(len(train), device="cpu")
        shown = torch.ones(len(train), len(self.modalities), dtype=torch.bool, device="cpu")
        alone = torch.eye(len(self.modalities), dtype=torch.bool, device="cpu")[modality]
        return Entries(
            train,
            torch.cat([everyone, sample.repeat_interleave(repeats)]),
            torch.cat([shown, alone.repeat_interleave(repeats, dim=0)]),
        )

    def add_copies(
        self,
        counts: Tensor,  # [N, M] int64
        present: Tensor | None,  # bool [N, M]
    ) -> None:
        """Let the next epoch train on so many copies of each sample besides, each showing one modality.

        Copies that would show nothing, because their sample lacks the modality, are left out. Of several
        processes all take the first one's.
        """
        if present is not None:
            counts = counts * present
        self.copies = broadcast_from_first(_compact(counts))

    def presence_of(
        self,
        train: Any,
        samples: Tensor,  # [E] int64
    ) -> Tensor | None:  # bool [N, M]
        """Return which modalities these samples have, from passes made so far; those never seen are read.

        None: all samples have all.
        """
        marks = self.reader.marks(train, self.modalities)
        present, known = marks.over_processes()
        unseen = samples[~known[samples]].unique()
        if len(unseen):
            # A loop of the user's own does not tell; every process reads them all.
            entries, start = Entries(train, unseen), 0
            for batch in evaluation_batches(self, entries):
                part = unseen[start : start + len(batch["label"])]
                if (found := presence(batch, self.modalities)) is not None:
                    present[part] = found.T.cpu()
                start += len(part)
        return None if bool(present.all()) else present

    def figures(
        self,
        phi: Tensor,  # [M] mean contributions
    ) -> dict[str, float]:
        """Return what a valuation says in the log."""
        shares = {f"phi_{name}": value for name, value in zip(self.modalities, phi.tolist(), strict=True)}
        return {"copies": float(self.copies.sum()), **shares}

    def extra_state(self):
        return {"copies": self.copies}

    def load_extra_state(self, state):
        if "copies" in state:
            self.copies = state["copies"]
            return
        # A checkpoint from when each copy had an entry: its sample, and what it shows as a coalition.
        samples, shown = state["indices"], members(state["coalitions"], len(self.modalities)).long()
        counts = torch.zeros(int(samples.amax()) + 1 if len(samples) else 0, len(self.modalities)).long()
        self.copies = _compact(counts.index_add_(0, samples, shown))


def _compact(
    counts: Tensor,  # int64, any shape
) -> Tensor:  # uint8 or int32, same shape
    return counts.to(torch.uint8 if counts.numel() == 0 or int(counts.max()) < 256 else torch.int32)

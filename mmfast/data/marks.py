"""Which samples have which modality, as far as passes over a data set have shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.coalitions import present_key
from mmfast.distributed import max_over_processes


class Marks:
    """What is known of the samples of one data set.

    Args:
        dataset: of N samples; one with an attribute `present`, a mask for some modalities, tells all itself.
        modalities: names of the M modalities.
    """

    def __init__(self, dataset: Any, modalities: Sequence[str]) -> None:
        self.dataset = dataset  # held: it is found by its identity
        self.modalities = tuple(modalities)
        self.present = torch.ones(
            len(dataset), len(self.modalities), dtype=torch.bool, device="cpu"
        )  # [N, M]
        self.known = torch.zeros(len(dataset), dtype=torch.bool, device="cpu")  # [N]
        masks = getattr(dataset, "present", None)
        if isinstance(masks, Mapping):
            for m, name in enumerate(self.modalities):
                if name in masks:
                    self.present[:, m] = torch.as_tensor(masks[name], device="cpu")
            self.known.fill_(True)

    def note(
        self,
        samples: Tensor,  # [B] int64
        read: Tensor | None,  # bool [B, M]: what was read of them; None: all
        batch: Mapping[str, Any],  # optionally <m>__present: bool [B]
    ) -> None:
        """Take in what a batch tells of the samples that were read whole."""
        whole = slice(None) if read is None else read.all(1)
        for m, name in enumerate(self.modalities):
            if (mask := batch.get(present_key(name))) is not None:
                self.present[samples[whole], m] = mask.cpu()[whole]
        self.known[samples[whole]] = True

    def over_processes(self) -> tuple[Tensor, Tensor]:  # bool [N, M], bool [N]
        """Return what is present, and of which samples that is known, as all processes together know it."""
        absent = max_over_processes(self.known[:, None] & ~self.present)
        return ~absent, max_over_processes(self.known)

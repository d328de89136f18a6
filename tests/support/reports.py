"""A data set of texts of any length, as dicts of sequences, beside vectors."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

NUM_CLASSES = 3
# Of a text of two words, one of whose weights is no number.
NAN = {"ids": [1, 2], "weights": np.array([1, np.nan])}


class Reports(Dataset):
    """Texts as dicts of sequences of different lengths, beside vectors; every tenth has no text."""

    def __init__(self, num_samples: int, change=lambda sample, index: sample) -> None:
        rng = torch.Generator().manual_seed(num_samples)
        self.labels = torch.arange(num_samples) % NUM_CLASSES
        self.vectors = torch.randn(num_samples, 5, generator=rng) + self.labels[:, None]
        self.lengths = torch.randint(1, 9, (num_samples,), generator=rng).tolist()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        label, length = int(self.labels[index]), self.lengths[index]
        text = {"ids": [1 + label] * length, "weights": np.linspace(0.5, 1, length, dtype=np.float64)}
        sample = {
            "text": text if index % 10 else None,
            "text__present": index % 10 > 0,
            "vector": self.vectors[index],
            "label": label,
            "path": f"{index}.txt",
        }
        return self.change(sample, index)


class Alike(Reports):
    """All texts have four words; what stands for an absent one is `filler`."""

    def __init__(self, num_samples, filler=None):
        super().__init__(num_samples)
        self.filler = filler

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        text = {"ids": torch.arange(4), "weights": torch.ones(4), "mask": torch.arange(4) < 3, "no": None}
        return sample | {"text": text if index % 10 else self.filler and self.filler(text)}


def spoilt(text=None, at=2, **changes):
    def change(sample, index):
        if index != at:
            return sample
        return sample | changes | ({} if text is None else {"text": text})

    return Reports(70, change)

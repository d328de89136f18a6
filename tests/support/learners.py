"""Small data and learners for the methods' tests."""

from __future__ import annotations

import torch

from mmfast import methods
from mmfast.data import ArrayDataset
from mmfast.models import build_model

NUM_CLASSES = 3


def make_data(num_samples: int = 60, num_modalities: int = 2, seed: int = 0) -> ArrayDataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_samples) % NUM_CLASSES
    means = torch.randn(num_modalities, NUM_CLASSES, 5, generator=draw)
    arrays = {
        f"m{m}": means[m][labels] + torch.randn(num_samples, 5, generator=draw) for m in range(num_modalities)
    }
    return ArrayDataset(arrays, labels)


def bind(method: methods.Method | str, num_modalities: int = 2, seed: int = 0, fusion: str = "concat"):
    method = methods.make(method) if isinstance(method, str) else method
    torch.manual_seed(seed)
    model = build_model({f"m{m}": (5,) for m in range(num_modalities)}, NUM_CLASSES, dim=8, fusion=fusion)
    learner = method.bind(model, seed=seed)
    learner.start_stage(learner.stages(4)[0])
    return learner

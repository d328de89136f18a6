"""What the test files of additive_shapley share: inputs, and the logits of every coalition."""

from __future__ import annotations

import torch


def make(shape, dtype=torch.float64, seed=0, device="cpu"):
    _, num_samples, num_classes = shape
    generator = torch.Generator().manual_seed(seed)
    partial_logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64).to(dtype)
    return partial_logits.to(device), labels.to(device), bias.to(device)


def all_logits(partial_logits, bias):
    """Return the logits of every coalition, added up one by one."""
    num_modalities = len(partial_logits)
    tables = []
    for coalition in range(2**num_modalities):
        members = [partial_logits[m] for m in range(num_modalities) if coalition >> m & 1]
        tables.append(sum(members, torch.zeros_like(partial_logits[0])) + bias)
    return torch.stack(tables, dim=1)

"""What the test files of class_separability share: inputs, and the results by other means."""

from __future__ import annotations

import torch

from support.cases import laws

SHAPES = [(1, 1, 1), (64, 16, 8), (333, 33, 7), (5, 130, 31)]

LAWS = laws(40)


def make(shape, dtype=torch.float64, seed=0, label_dtype=torch.int64, device="cpu"):
    num_samples, num_dims, num_classes = shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_samples,), generator=generator)
    centres = torch.randn(num_classes, num_dims, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_samples, num_dims, generator=generator, dtype=torch.float64)
    features = (centres[labels] + noise).to(device, dtype)
    return features, labels.to(device, label_dtype), num_classes


def plain_moments(features, labels, num_classes):
    rows = [features[labels == k] for k in range(num_classes)]
    empty = features.new_full(features.shape[1:], torch.nan)
    mean = torch.stack([row.mean(0) if len(row) else empty for row in rows])
    var = torch.stack([row.var(0, correction=0) if len(row) else empty for row in rows])
    return labels.new_tensor([len(row) for row in rows], dtype=torch.int64), mean, var

"""What the test files of duc_loss share: inputs, and the loss by other means."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def make(shape, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    effective = torch.rand(shape[0], shape[2], generator=generator) > 0.5
    return features.to(device), effective.to(device)


def masked_cross_entropy(features, effective, temperature=1.0, reduction="mean"):
    """Return the loss as cross-entropy of logits from features with all other dimensions set to zero."""
    target = torch.arange(features[0].shape[0], device=features[0].device)
    loss = sum(0 * feature.sum() for feature in features)
    for m, key in enumerate(features):
        for n, query in enumerate(features):
            d = effective[m] & ~effective[n]
            if d.any():
                scores = (query * d) @ (key.detach() * d).T / temperature
                loss = loss + cross_entropy(scores, target, reduction=reduction)
    return loss


def value_and_gradient(function, features, dtype, **options):
    leaves = [feature.detach().to(dtype).requires_grad_() for feature in features]
    loss = function(leaves, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaves)

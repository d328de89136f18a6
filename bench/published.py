"""The published training loops in plain torch, as their papers describe them: peers of bench_train.py.

Every loop gets a model and the heads its method adds, and makes one step of SGD on a batch, or what the
method does between epochs. Nothing here is clever: contrastive scores are materialised, coalitions are
forward passes of the whole model, samples and parameters are walked one by one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.models import MultimodalModel

Batch = Mapping[str, Tensor]  # <modality>: [N, ...], label: [N]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Return the optimizer of the papers."""
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4)


def fused(
    model: MultimodalModel,
    features: Sequence[Tensor],  # M x [N, D]
) -> Tensor:  # [N, C]
    """Return the logits of the concatenation head."""
    head: Any = model.head
    return head.linear(torch.cat(list(features), 1))


def joint(model: MultimodalModel, own_heads: Sequence[nn.Module] = ()) -> Callable[[Batch], None]:
    """Return a step of joint training, or with own heads of joint plus unimodal losses.

    A batch may hold `shown`, bool [M, N]: features that are not shown are zero, as those of copies.
    """
    optimizer = sgd([*model.parameters(), *(p for head in own_heads for p in head.parameters())])

    def step(batch: Batch) -> None:
        features = [model.encoders[name](batch[name]) for name in model.modalities]
        if "shown" in batch:
            features = [h * shown[:, None] for h, shown in zip(features, batch["shown"], strict=True)]
        loss = F.cross_entropy(fused(model, features), batch["label"])
        for head, h in zip(own_heads, features, strict=False):
            loss = loss + F.cross_entropy(head(h), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def unimodal(model: MultimodalModel, own_heads: Sequence[nn.Module]) -> Callable[[Batch], None]:
    """Return a step of every modality's own training, one after the other."""
    parts = [
        (name, model.encoders[name], head) for name, head in zip(model.modalities, own_heads, strict=True)
    ]
    optimizers = [sgd([*encoder.parameters(), *head.parameters()]) for _, encoder, head in parts]

    def step(batch: Batch) -> None:
        for (name, encoder, head), optimizer in zip(parts, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(head(encoder(batch[name])), batch["label"]).backward()
            optimizer.step()

    return step


def di_mml(
    model: MultimodalModel,
    own_heads: Sequence[nn.Module],
    shared_head: nn.Module,
    effective: Tensor,  # bool [M, D]
    temperature: float,
) -> Callable[[Batch], None]:
    """Return a step of DI-MML's first stage, its contrastive scores an N x N matrix for each ordered pair."""
    heads = [*own_heads, shared_head]
    optimizer = sgd([*model.encoders.parameters(), *(p for head in heads for p in head.parameters())])

    def step(batch: Batch) -> None:
        labels = batch["label"]
        features = [model.encoders[name](batch[name]) for name in model.modalities]
        loss = torch.zeros((), device=labels.device)
        for head, h in zip(own_heads, features, strict=True):
            loss = loss + F.cross_entropy(head(h), labels) + F.cross_entropy(shared_head(h), labels)
        for m, n in itertools.permutations(range(len(features)), 2):
            dims = effective[m] & ~effective[n]
            if dims.any():
                scores = features[n][:, dims] @ features[m][:, dims].detach().T / temperature
                loss = loss - scores.log_softmax(1).diagonal().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def mla(model: MultimodalModel, shared_head: nn.Linear, alpha: float) -> Callable[[Batch], None]:
    """Return a step of MLA: a turn of every modality on the shared head, its gradient times the projector."""
    optimizer = sgd([*model.encoders.parameters(), *shared_head.parameters()])
    dim = shared_head.in_features
    device = shared_head.weight.device
    state = {"projector": torch.eye(dim, device=device), "previous": torch.zeros(dim, 1, device=device)}

    def step(batch: Batch) -> None:
        for name in model.modalities:
            h = model.encoders[name](batch[name])
            optimizer.zero_grad()
            F.cross_entropy(shared_head(h), batch["label"]).backward()
            with torch.no_grad():
                projector, previous = state["projector"], state["previous"]
                k = projector @ previous
                projector = projector - k @ k.T / (alpha + previous.T @ k)
                assert shared_head.weight.grad is not None
                shared_head.weight.grad = shared_head.weight.grad @ projector
                state["projector"], state["previous"] = projector, h.mean(0)[:, None]
            optimizer.step()

    return step


@torch.no_grad()
def valuation(model: MultimodalModel, batches: Sequence[Batch]) -> list[list[float]]:  # N lists of M
    """Return every sample's Shapley values, from a forward pass of the whole model for each coalition."""
    model.eval()
    names = model.modalities
    values = []
    for batch in batches:
        right = {}
        for size in range(1, len(names) + 1):
            for members in itertools.combinations(range(len(names)), size):
                features = [model.encoders[name](batch[name]) for name in names]
                features = [h if m in members else torch.zeros_like(h) for m, h in enumerate(features)]
                logits = fused(model, features)
                right[members] = (logits.argmax(1) == batch["label"]).tolist()
        for i in range(len(batch["label"])):
            worth = {members: len(members) * right[members][i] for members in right} | {(): 0}
            values.append([_shapley_value(worth, m, len(names)) for m in range(len(names))])
    model.train()
    return values


def _shapley_value(worth: Mapping[tuple[int, ...], int], player: int, num_players: int) -> float:
    others = [m for m in range(num_players) if m != player]
    total = 0.0
    for size in range(num_players):
        weight = math.factorial(size) * math.factorial(num_players - size - 1) / math.factorial(num_players)
        for members in itertools.combinations(others, size):
            total += weight * (worth[tuple(sorted((*members, player)))] - worth[members])
    return total


def copies(values: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Return (sample, modality) of each copy of the sample-level method, 2 (1 - phi)_+ of them."""
    counts = ((i, m, round(2 * (1 - phi))) for i, row in enumerate(values) for m, phi in enumerate(row))
    return [(i, m) for i, m, count in counts for _ in range(count)]


@torch.no_grad()
def extract(
    model: MultimodalModel, batches: Sequence[Batch]
) -> tuple[list[Tensor], Tensor]:  # M x [N, D], [N]
    """Return the features of all samples and their labels."""
    model.eval()
    parts = [[model.encoders[name](batch[name]) for name in model.modalities] for batch in batches]
    model.train()
    return [torch.cat(h) for h in zip(*parts, strict=True)], torch.cat([batch["label"] for batch in batches])


def effective_dimensions(model: MultimodalModel, batches: Sequence[Batch]) -> Tensor:  # bool [M, D]
    """Return every modality's effective dimensions from all N C D distances."""
    features, labels = extract(model, batches)
    masks = []
    for h in features:
        centroids = torch.stack([h[labels == k].mean(0) for k in range(model.num_classes)])
        nearest = (h[:, None] - centroids).abs().argmin(1)
        accuracy = (nearest == labels[:, None]).float().mean(0)
        masks.append(accuracy > accuracy.mean())
    return torch.stack(masks)


def diagnose(
    model: MultimodalModel,
    theta_0: Mapping[str, Tensor],  # parameters training began with
    splits: Sequence[Sequence[Batch]],  # training and validation
    lam: float,
    num_init: int,
) -> list[float]:
    """Pull every encoder back by the gap between the purities of its clusters; return the gaps."""
    purities = [_purities(model, batches, num_init) for batches in splits]
    gaps = [abs(train - val) for train, val in zip(*purities, strict=True)]
    with torch.no_grad():
        for gap, name in zip(gaps, model.modalities, strict=True):
            alpha = math.tanh(lam * gap)
            for key, p in model.encoders[name].named_parameters():
                p.copy_((1 - alpha) * p + alpha * theta_0[f"encoders.{name}.{key}"])
    return gaps


def _purities(model: MultimodalModel, batches: Sequence[Batch], num_init: int) -> list[float]:
    from sklearn.cluster import KMeans

    features, labels = extract(model, batches)
    purities = []
    for h in features:
        low, high = h.min(0).values, h.max(0).values
        scaled = torch.nan_to_num(2 * (h - low) / (high - low) - 1, nan=0.0)
        found = KMeans(model.num_classes, n_init=num_init).fit_predict(scaled.cpu().numpy())
        right = 0
        for k in range(model.num_classes):
            members = labels.cpu()[torch.from_numpy(found) == k].tolist()
            right += max((members.count(c) for c in set(members)), default=0)
        purities.append(right / len(labels))
    return purities

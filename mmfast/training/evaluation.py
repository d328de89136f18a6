"""What a learner is measured by: accuracy, macro-F1, every modality alone, contributions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mmfast.data.batches import evaluating, evaluation_batches, presence
from mmfast.data.threads import fitting_threads
from mmfast.methods.base import Learner
from mmfast.valuation import batch_contributions


@dataclass(frozen=True)
class Metrics:
    """Figures of one data set; those of a modality over the samples that have it, None where none has."""

    accuracy: float
    macro_f1: float
    loss: float
    modality_accuracy: dict[str, float | None]  # by the learner's protocol
    contribution: dict[str, float | None]  # mean Shapley value under `cardinality`


def evaluate(learner: Learner, dataset: Any, fabric: Fabric, *, batch_size: int = 256) -> Metrics:
    """Return the figures of a learner on a data set, read once; every process reads its part.

    A sample whose logits hold NaN counts as wrong, and a warning tells how many do.
    """
    metrics, num_nan = measure(learner, dataset, fabric, batch_size=batch_size)
    if num_nan:
        warnings.warn(f"{num_nan} of {len(dataset)} samples have NaN logits and count as wrong", stacklevel=2)
    return metrics


def measure(learner: Learner, dataset: Any, fabric: Fabric, *, batch_size: int = 256) -> tuple[Metrics, int]:
    """Return the figures as `evaluate` does, and the number of samples whose logits hold NaN."""
    names, classes = learner.modalities, learner.num_classes
    fused = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "macro_f1": MulticlassF1Score(classes, average="macro"),
        }
    ).to(learner.device)
    alone = [MulticlassAccuracy(classes, average="micro").to(learner.device) for _ in names]
    contribution = [MeanMetric().to(learner.device) for _ in names]
    # What is NaN is said, not left out.
    loss = MeanMetric(nan_strategy="disable").to(learner.device)
    counts = torch.zeros(len(names), dtype=torch.int64, device="cpu")
    num_nan = torch.zeros((), dtype=torch.int64, device=learner.device)
    with fitting_threads(learner, dataset, batch_size), evaluating(learner), fabric.autocast():
        for batch in evaluation_batches(
            learner, dataset, batch_size, rank=fabric.global_rank, world_size=fabric.world_size
        ):
            labels, present = batch["label"], presence(batch, names)
            features = learner.encode(batch)
            logits = learner.fuse(features, present=present).float()
            fused.update(_predicted(logits, labels), labels)
            num_nan += logits.isnan().any(1).sum()
            loss.update(F.cross_entropy(logits, labels), len(labels))
            phi = batch_contributions(learner, features, labels, present)
            for m, unimodal in enumerate(learner.own_logits(features)):
                keep = slice(None) if present is None else present[m]
                if len(labels[keep]):
                    alone[m].update(_predicted(unimodal[keep].float(), labels[keep]), labels[keep])
                    contribution[m].update(phi[keep, m])
                counts[m] += len(labels[keep])
    whole = {name: float(value) for name, value in fused.compute().items()}
    counts = fabric.all_reduce(counts.to(learner.device), reduce_op="sum")  # type: ignore[assignment]

    def figures(metrics: Sequence[Metric]) -> dict[str, float | None]:
        known = zip(names, metrics, counts.tolist(), strict=True)
        return {name: float(metric.compute()) if count else None for name, metric, count in known}

    metrics = Metrics(
        **whole,
        loss=float(loss.compute()),
        modality_accuracy=figures(alone),
        contribution=figures(contribution),
    )
    return metrics, int(fabric.all_reduce(num_nan, reduce_op="sum"))  # type: ignore[arg-type]


def _predicted(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # [N]
) -> Tensor:  # [N]
    """Return the predicted classes; where logits hold NaN, of which argmax makes a class, a wrong one."""
    wrong = (labels + 1) % logits.shape[1]
    return torch.where(logits.isnan().any(1), wrong, logits.argmax(1))


def probe(learner: Learner, train: Any, test: Any) -> dict[str, float]:
    """Return each modality's test accuracy by a logistic regression on its frozen features (`probe`).

    Features are standardised by the training part. Samples that lack the modality are left out of both parts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = []
    for dataset in (train, test):
        features: list[list[torch.Tensor]] = [[] for _ in learner.modalities]
        labels: list[list[torch.Tensor]] = [[] for _ in learner.modalities]
        for m, h, y in learner.modality_features(dataset):
            features[m].append(h.cpu())
            labels[m].append(y.cpu())
        parts.append(
            [(torch.cat(h).numpy(), torch.cat(y).numpy()) for h, y in zip(features, labels, strict=True)]
        )
    accuracy = {}
    for name, fitted, asked in zip(learner.modalities, *parts, strict=True):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*fitted)
        accuracy[name] = float(classifier.score(*asked))
    return accuracy

"""What a learner is measured by: accuracy, macro-F1, every modality alone, contributions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score

from mmfast.data.batches import evaluating, presence
from mmfast.data.threads import fitting_threads
from mmfast.distributed import broadcast_from_first, rank_and_size
from mmfast.methods.base import Learner
from mmfast.valuation import batch_contributions, without_waiting


@dataclass(frozen=True)
class Metrics:
    """Figures of one data set; those of a modality over the samples that have it, None where none has."""

    accuracy: float
    macro_f1: float
    loss: float
    modality_accuracy: dict[str, float | None]  # by the learner's protocol
    contribution: dict[str, float | None]  # mean Shapley value under `cardinality`


def evaluate(learner: Learner, dataset: Any, fabric: Fabric, *, batch_size: int | None = None) -> Metrics:
    """Return the figures of a learner on a data set, read once; every process reads its part.

    A sample whose logits hold NaN counts as wrong, and a warning tells how many do.
    """
    metrics, num_nan = measure(learner, dataset, fabric, batch_size=batch_size)
    if num_nan:
        warnings.warn(f"{num_nan} of {len(dataset)} samples have NaN logits and count as wrong", stacklevel=2)
    return metrics


def measure(
    learner: Learner, dataset: Any, fabric: Fabric, *, batch_size: int | None = None
) -> tuple[Metrics, int]:
    """Return the figures as `evaluate` does, and the number of samples whose logits hold NaN.

    What a batch gives stays on the device: the host waits for it at the end of the pass alone.
    """
    size = batch_size or learner.reader.batch_size
    with fitting_threads(learner, dataset, size), evaluating(learner), fabric.autocast():
        found = without_waiting(functools.partial(_measured, learner, dataset, size))
    return found.metrics(fabric)


class _Figures:
    """The sums of a pass so far, on the device."""

    def __init__(self, learner: Learner) -> None:
        self.names, self.classes, device = learner.modalities, learner.num_classes, learner.device
        # A million numbers are more than float32 adds up; MPS has no other.
        real: dict[str, Any] = {
            "device": device,
            "dtype": torch.float32 if device.type == "mps" else torch.float64,
        }
        self.loss, self.right, self.num_nan = torch.zeros(3, 1, **real)
        self.alone, self.contribution, self.counts = torch.zeros(3, len(self.names), **real)
        self.num_samples = torch.zeros(1, **real)
        self.predicted: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(
        self,
        logits: Tensor,  # [N, C]
        own_logits: Tensor,  # [M, N, C]
        phi: Tensor,  # [N, M]
        labels: Tensor,  # [N]
        present: Tensor | None,  # bool [M, N]
    ) -> None:
        """Take in a batch."""
        logits = logits.float()
        predicted = _predicted(logits, labels)
        self.predicted.append(predicted)
        self.labels.append(labels)
        self.num_samples += len(labels)
        self.right += (predicted == labels).sum()
        self.num_nan += logits.isnan().any(1).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        if present is None:
            present = torch.ones_like(own_logits[..., 0], dtype=torch.bool)
        alone = torch.stack([_predicted(unimodal.float(), labels) for unimodal in own_logits])
        self.alone += ((alone == labels) & present).sum(1)
        # Not 0 times what it is where a sample lacks the modality: that may be NaN.
        self.contribution += phi.T.masked_fill(~present, 0).to(self.contribution.dtype).sum(1)
        self.counts += present.sum(1)

    def metrics(self, fabric: Fabric) -> tuple[Metrics, int]:
        """Return the figures of all processes' samples."""
        f1 = MulticlassF1Score(self.classes, average="macro", validate_args=False).to(self.loss.device)
        if self.predicted:
            f1.update(torch.cat(self.predicted), torch.cat(self.labels))
        sums = [self.loss, self.right, self.num_nan, self.num_samples]
        sums += [self.alone, self.contribution, self.counts]
        # All figures in one message, and the host waits for them once.
        total = fabric.all_reduce(torch.cat(sums), reduce_op="sum").tolist()  # type: ignore[union-attr]
        loss, right, num_nan, num_samples, *rest = total
        count = len(self.names)
        alone, contribution, counts = rest[:count], rest[count:-count], rest[-count:]
        metrics = Metrics(
            accuracy=right / num_samples,
            macro_f1=self._of_all(f1),
            loss=loss / num_samples,
            modality_accuracy=self._means(alone, counts),
            contribution=self._means(contribution, counts),
        )
        return metrics, int(num_nan)

    @staticmethod
    def _of_all(metric: Metric) -> float:
        with warnings.catch_warnings():
            # Of few samples a process may have had none, which torchmetrics takes for a mistake.
            warnings.filterwarnings("ignore", message="The ``compute`` method")
            return float(metric.compute())

    def _means(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float | None]:
        each = zip(self.names, sums, counts, strict=True)
        return {name: value / count if count else None for name, value, count in each}


def _measured(learner: Learner, dataset: Any, batch_size: int, sound: list[Tensor] | None) -> _Figures:
    figures = _Figures(learner)
    for batch in learner.batches(dataset, batch_size, share=True):
        labels, present = batch["label"], presence(batch, learner.modalities)
        features = learner.encode(batch)
        figures.add(
            learner.fuse(features, present=present),
            learner.own_logits(features),
            batch_contributions(learner, features, labels, present, sound=sound),
            labels,
            present,
        )
    return figures


def _predicted(
    logits: Tensor,  # [N, C]
    labels: Tensor,  # [N]
) -> Tensor:  # [N]
    """Return the predicted classes; where logits hold NaN, of which argmax makes a class, a wrong one."""
    wrong = (labels + 1) % logits.shape[1]
    return torch.where(logits.isnan().any(1), wrong, logits.argmax(1))


def probe(learner: Learner, train: Any, test: Any, fabric: Fabric) -> dict[str, float]:
    """Return each modality's test accuracy by a logistic regression on its frozen features (`probe`).

    Features are standardised by the training part. Samples that lack the modality are left out of both parts.
    Several processes share the encoding, and the first fits.
    """
    parts = []
    for dataset in (train, test):
        with fabric.autocast():
            if learner.takes_kept:
                learner.keep(dataset, whole=True)
            found = [
                [(h.cpu(), y.cpu()) for m, h, y in learner.modality_features(dataset) if m == wanted]
                for wanted in range(len(learner.modalities))
            ]
        learner.forget()
        parts.append([[torch.cat(each).numpy() for each in zip(*pairs, strict=True)] for pairs in found])
    accuracy = _fitted_accuracy(learner.modalities, *parts) if rank_and_size()[0] == 0 else None
    return broadcast_from_first(accuracy)


def _fitted_accuracy(names: Sequence[str], train: Sequence[Any], test: Sequence[Any]) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    accuracy = {}
    for name, fitted, asked in zip(names, train, test, strict=True):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*fitted)
        accuracy[name] = float(classifier.score(*asked))
    return accuracy

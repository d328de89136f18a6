"""What a learner is measured by: figures of its task, every modality alone, contributions."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from mmfast.data.batches import evaluating, presence
from mmfast.data.threads import fitting_threads
from mmfast.methods.base import Learner
from mmfast.training.metrics import AnyMetrics, ExtraMetrics, Measures
from mmfast.training.metrics import Metrics as Metrics
from mmfast.valuation import batch_contributions, without_waiting


def evaluate(
    learner: Learner,
    dataset: Any,
    fabric: Fabric,
    *,
    measures: Measures | None = None,
    batch_size: int | None = None,
) -> AnyMetrics:
    """Return the figures of a learner on a data set, read once; every process reads its part.

    A sample whose logits hold NaN counts as wrong, and a warning tells how many do.
    """
    metrics, num_nan = measure(learner, dataset, fabric, measures=measures, batch_size=batch_size)
    if num_nan:
        warnings.warn(f"{num_nan} of {len(dataset)} samples have NaN logits and count as wrong", stacklevel=2)
    return metrics


def measure(
    learner: Learner,
    dataset: Any,
    fabric: Fabric,
    *,
    measures: Measures | None = None,
    batch_size: int | None = None,
) -> tuple[AnyMetrics, int]:
    """Return the figures as `evaluate` does, and the number of samples whose logits hold NaN.

    What a batch gives stays on the device: the host waits for it at the end of the pass alone, save for
    metrics of the user's own.

    Raises:
        ValueError: no sample has a label.
    """
    size = batch_size or learner.reader.batch_size
    measures = measures or Measures(learner.objective)
    with fitting_threads(learner, dataset, size), evaluating(learner), fabric.autocast():
        found = without_waiting(functools.partial(_measured, learner, dataset, size, measures))
        return found.metrics(fabric)


class _Pass:
    """What a pass over a data set has found so far: sums of the fused prediction, and of each modality."""

    def __init__(self, learner: Learner, measures: Measures) -> None:
        self.measures, self.objective = measures, learner.objective
        self.names, device = learner.modalities, learner.device
        tally = functools.partial(measures.tally, self.objective, learner.num_classes, device)
        # Of a modality alone what stands for accuracy, and what selects.
        asked = {measures.main, measures.selected}
        self.fused = tally(measures.tally.names)
        self.alone = [tally(asked & set(measures.tally.names)) for _ in self.names]
        extra = functools.partial(ExtraMetrics, objective=self.objective, device=device)
        self.extra = extra(measures.metrics)
        selecting = {name: metric for name, metric in measures.metrics.items() if name in asked}
        self.extra_alone = [extra(selecting) for _ in self.names]
        self.num_nan, self.num_samples = torch.zeros(2, 1, device=device, dtype=self.fused.sums.dtype)
        self.contribution, self.counts = torch.zeros_like(
            self.num_nan.expand(2, len(self.names)).contiguous()
        )

    def add(
        self,
        logits: Tensor,  # [N, C]
        own_logits: Tensor,  # [M, N, C]
        phi: Tensor,  # [N, M]
        target: Tensor,  # [N] or [N, C]
        present: Tensor | None,  # bool [M, N]
    ) -> None:
        """Take in a batch."""
        logits, own_logits = logits.float(), own_logits.float()
        counted = self.objective.counted(target)
        may_ignore = self.objective.may_ignore and self.measures.task == "multiclass"
        self.fused.add(logits, target, counted)
        self.extra.add(logits, target, counted if may_ignore else None)
        self.num_samples += counted.sum()
        self.num_nan += (logits.isnan().any(1) & counted).sum()
        known = counted.expand(len(self.names), -1) if present is None else present & counted
        for m, own in enumerate(own_logits):
            self.alone[m].add(own, target, known[m])
            self.extra_alone[m].add(own, target, None if present is None and not may_ignore else known[m])
        # Not 0 times what it is where a sample lacks the modality: that may be NaN.
        self.contribution += phi.T.masked_fill(~known, 0).to(self.contribution.dtype).sum(1)
        self.counts += known.sum(1)

    def metrics(self, fabric: Fabric) -> tuple[AnyMetrics, int]:
        """Return the figures of all processes' samples."""
        parts: list[Any] = [self.fused, *self.alone, self.extra, *self.extra_alone]
        sums = [*(part.message() for part in parts), self.contribution, self.counts]
        sums += [self.num_nan, self.num_samples]
        # All figures in one message, and the host waits for them once.
        sent = torch.cat([values.to(self.counts.dtype) for values in sums])
        total = fabric.all_reduce(sent, reduce_op="sum")
        found = [values.tolist() for values in total.split([len(values) for values in sums])]  # type: ignore[union-attr]
        *messages, contribution, counts, (num_nan,), (num_samples,) = found
        if not num_samples:
            raise ValueError("the data set must hold a sample with a label, got none")
        figures, *rest = [part.figures(message) for part, message in zip(parts, messages, strict=True)]
        count = len(self.names)
        alone, extra, extra_alone = rest[:count], rest[count], rest[count + 1 :]
        # A modality that no sample has is None in every figure.
        by_modality = [
            dict.fromkeys({**own, **more}) if not n else {**own, **more}
            for own, more, n in zip(alone, extra_alone, counts, strict=True)
        ]
        each = {
            figure: {name: own[figure] for name, own in zip(self.names, by_modality, strict=True)}
            for figure in by_modality[0]
        }
        pairs = zip(self.names, contribution, counts, strict=True)
        means = {name: value / n if n else None for name, value, n in pairs}
        return self.measures.made(figures, each, means, extra), int(num_nan)


def _measured(
    learner: Learner, dataset: Any, batch_size: int, measures: Measures, sound: list[Tensor] | None
) -> _Pass:
    found = _Pass(learner, measures)
    for batch in learner.batches(dataset, batch_size, share=True):
        target, present = batch["label"], presence(batch, learner.modalities)
        features = learner.encode(batch)
        found.add(
            learner.fuse(features, present=present),
            learner.own_logits(features),
            batch_contributions(learner, features, target, present, sound=sound),
            target,
            present,
        )
    return found

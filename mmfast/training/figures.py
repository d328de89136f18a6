"""Sums that figures are made of, on the device until a pass is over: of classes, of labels, of numbers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassF1Score, MultilabelAveragePrecision
from torchmetrics.functional.classification import multiclass_f1_score

from mmfast.distributed import sum_over_processes, world
from mmfast.objectives import IGNORED, Objective


class Tally:
    """The sums of a pass for one predictor, so far.

    Args:
        objective: its losses are counted.
        num_classes: C, or K numbers.
        device: of the predictions.
        wanted: the figures that are asked for.
    """

    names: ClassVar[tuple[str, ...]]  # of all figures, what stands for accuracy first
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"loss"})

    def __init__(
        self, objective: Objective, num_classes: int, device: torch.device, wanted: Collection[str]
    ) -> None:
        self.objective, self.num_classes, self.wanted = objective, num_classes, frozenset(wanted)
        self.outputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        # A million numbers are more than float32 adds up; MPS has no other.
        real = torch.float32 if device.type == "mps" else torch.float64
        self.loss = torch.zeros(2, device=device, dtype=real)
        self.sums = torch.zeros(self.num_sums, device=device, dtype=real)

    @property
    def num_sums(self) -> int:
        raise NotImplementedError

    def add(
        self,
        outputs: Tensor,  # [N, C] float32
        target: Tensor,  # [N] or [N, C]
        counted: Tensor,  # bool [N]
    ) -> None:
        """Take in the samples of a batch that count."""
        if "loss" in self.wanted:
            self.loss += self.objective.sums(outputs, target, counted)
        self._add(outputs, target, counted)

    def _add(self, outputs: Tensor, target: Tensor, counted: Tensor) -> None:
        raise NotImplementedError

    def message(self) -> Tensor:  # [2 + num_sums]
        """Return all sums, which add up over processes."""
        return torch.cat([self.loss, self.sums])

    def figures(self, message: Sequence[float]) -> dict[str, float | None]:
        """Return the figures that are wanted from the sums of all processes; None where no sample counts."""
        loss, weight, *sums = message
        found = self._figures(sums)
        found["loss"] = loss / weight if weight else None
        return {name: found[name] for name in self.names if name in self.wanted}

    def _figures(self, sums: Sequence[float]) -> dict[str, float | None]:
        raise NotImplementedError


class ClassTally(Tally):
    """Accuracy and macro-F1; a sample whose logits hold NaN counts as wrong."""

    names = ("accuracy", "macro_f1", "loss")
    num_sums = 2

    def _add(self, outputs, target, counted):
        labels = self.objective.classes(target)
        # Argmax makes a class of NaN: it is to be a wrong one.
        wrong = (labels + 1) % outputs.shape[1]
        predicted = torch.where(outputs.isnan().any(1), wrong, outputs.argmax(1))
        self.sums += torch.stack([((predicted == labels) & counted).sum(), counted.sum()])
        if "macro_f1" in self.wanted:
            self.outputs.append(predicted)
            self.targets.append(labels.masked_fill(~counted, IGNORED))

    def _figures(self, sums):
        right, count = sums
        found = {"accuracy": right / count if count else None}
        if "macro_f1" in self.wanted:
            found["macro_f1"] = self._macro_f1() if count else None
        return found

    def _macro_f1(self) -> float:
        options: dict[str, Any] = {"ignore_index": IGNORED, "validate_args": False}
        if world() is None and self.outputs:
            # The same without a metric's state, which takes longer than the figure itself.
            outputs, targets = torch.cat(self.outputs), torch.cat(self.targets)
            return float(multiclass_f1_score(outputs, targets, self.num_classes, "macro", **options))
        metric = MulticlassF1Score(self.num_classes, average="macro", **options)
        return of_all(metric, self.outputs, self.targets, self.sums.device)


class LabelTally(Tally):
    """Micro-F1 and mean average precision; where logits hold NaN all labels of the sample count as wrong."""

    names = ("micro_f1", "map", "loss")
    num_sums = 3

    def _add(self, outputs, target, counted):
        true = target.bool()
        given = torch.where(outputs.isnan().any(1)[:, None], ~true, outputs > 0)
        counted = counted[:, None]
        both, either = (given & true & counted).sum(), ((given.long() + true) * counted).sum()
        self.sums += torch.stack([both, either, counted.sum()])
        if "map" in self.wanted:
            self.outputs.append(self._ranks(outputs, true))
            self.targets.append(torch.where(counted, true.long(), -1))

    def _ranks(self, outputs, true):
        """Return scores in [0, 1] in the order of the logits; the metric's own sigmoid makes large ones 1."""
        logits = outputs.nan_to_num().to(self.sums.dtype)
        scores = (logits / (1 + logits.abs()) + 1) / 2
        return torch.where(outputs.isnan().any(1)[:, None], (~true).to(scores), scores)

    def _figures(self, sums):
        both, either, count = sums
        found = {"micro_f1": (2 * both / either if either else 0.0) if count else None}
        if "map" in self.wanted:
            precision = MultilabelAveragePrecision(self.num_classes, ignore_index=-1, validate_args=False)
            found["map"] = of_all(precision, self.outputs, self.targets, self.sums.device) if count else None
        return found


class NumberTally(Tally):
    """The coefficient of determination R2, the mean over K numbers, and the mean absolute error."""

    names = ("r2", "mae", "loss")
    lower_is_better = frozenset({"loss", "mae"})

    @property
    def num_sums(self):
        return 4 * self.num_classes + 1

    def __init__(self, objective, num_classes, device, wanted):
        super().__init__(objective, num_classes, device, wanted)
        # Targets are counted from here, as the squares of large ones would hide how they differ.
        self.origin = torch.zeros_like(self.sums[:num_classes])

    def _add(self, outputs, target, counted):
        real, count, counted = self.sums.dtype, counted.sum(), counted[:, None]
        y = target.view_as(outputs).to(real)
        first = y.masked_fill(~counted, 0.0).sum(0) / count.clamp(min=1)
        self.origin = torch.where(self.sums[-1] > 0, self.origin, first)
        error = (outputs.to(real) - y).masked_fill(~counted, 0.0)
        y = (y - self.origin).masked_fill(~counted, 0.0)
        columns = torch.stack([y, y * y, error * error, error.abs()]).sum(1)  # [4, K]
        self.sums += torch.cat([columns.flatten(), count[None]])

    def message(self):
        # From one origin for all processes: the mean of theirs.
        size, count = self.num_classes, self.sums[-1:]
        *total, all_counts = sum_over_processes(torch.cat([self.origin * count, count])).split([size, 1])
        shift = self.origin - total[0] / all_counts.clamp(min=1)
        y, squares, rest = self.sums.split([size, size, 2 * size + 1])
        moved = y + count * shift, squares + 2 * shift * y + count * shift * shift
        return torch.cat([self.loss, *moved, rest])

    def _figures(self, sums):
        *columns, count = sums
        if not count:
            return dict.fromkeys(self.names)
        size = self.num_classes
        total, squares, errors, absolute = (columns[i * size : (i + 1) * size] for i in range(4))
        each = []
        for y, y2, e2 in zip(total, squares, errors, strict=True):
            spread = max(0.0, y2 - y * y / count)
            # A target that never varies is met or not, as scikit-learn has it.
            each.append(1 - e2 / spread if spread > 1e-12 * y2 else float(e2 == 0))
        return {"r2": sum(each) / size, "mae": sum(absolute) / (size * count)}


TALLIES: dict[str, type[Tally]] = {
    "multiclass": ClassTally,
    "multilabel": LabelTally,
    "regression": NumberTally,
}


def of_all(
    metric: Metric,
    outputs: Sequence[Tensor],  # [n, ...] each
    targets: Sequence[Tensor],  # [n, ...] each
    device: torch.device,
) -> float:
    """Return a metric of all processes' samples."""
    metric = metric.to(device)
    if outputs:
        metric.update(torch.cat(list(outputs)), torch.cat(list(targets)))
    return computed(metric)


def computed(metric: Metric) -> Any:
    """Return what a metric computes; of few samples a process may have had none."""
    with warnings.catch_warnings():
        # Which torchmetrics takes for a mistake.
        warnings.filterwarnings("ignore", message="The ``compute`` method")
        return float(metric.compute())

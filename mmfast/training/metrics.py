"""Figures of a data set by the task, metrics of the user's own, and what model selection looks at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mmfast.errors import check_one_of, describe, did_you_mean
from mmfast.objectives import Objective
from mmfast.training.figures import TALLIES, computed

MODES = ("max", "min")
# Samples that a metric is tried on before any training.
_TRIED = 8


class _Figures:
    """What figures of all tasks can do; `extra` holds metrics of the user's own by name.

    Also `modality_<name>`, by modality, of a figure that model selection looks at.
    """

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, those of `extra` among them."""
        found = asdict(self)  # type: ignore[call-overload]
        return found | found.pop("extra")

    def __getitem__(self, name: str) -> Any:
        """Return a figure by name: metrics["auroc"]."""
        found = self.as_dict()
        if name not in found:
            raise KeyError(f"{name!r}{did_you_mean(name, found)}; there are {', '.join(found)}")
        return found[name]


@dataclass(frozen=True)
class Metrics(_Figures):
    """Figures of classes; those of a modality are over the samples that have it, None where none has.

    Attributes:
        accuracy, macro_f1: of the fused prediction.
        loss: mean of the objective's.
        modality_accuracy: of each modality alone, by the learner's protocol.
        contribution: mean Shapley value of each modality under `cardinality`.
        extra: metrics of the user's own.
    """

    accuracy: float
    macro_f1: float
    loss: float
    modality_accuracy: dict[str, float | None]
    contribution: dict[str, float | None]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MultilabelMetrics(_Figures):
    """Figures of several labels a sample, micro-F1 at logits above 0; `contribution` is of the F1 by sample.

    Attributes:
        micro_f1: over all labels of all samples.
        map: mean over labels of their average precisions.
        modality_micro_f1: of each modality alone.
    """

    micro_f1: float
    map: float
    loss: float
    modality_micro_f1: dict[str, float | None]
    contribution: dict[str, float | None]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RegressionMetrics(_Figures):
    """Figures of numbers; `contribution` is of minus the squared error.

    Attributes:
        r2: coefficient of determination, the mean over K numbers.
        mae: mean absolute error.
        modality_r2: of each modality alone.
    """

    r2: float
    mae: float
    loss: float
    modality_r2: dict[str, float | None]
    contribution: dict[str, float | None]
    extra: dict[str, Any] = field(default_factory=dict)


AnyMetrics = Metrics | MultilabelMetrics | RegressionMetrics
_KINDS: dict[str, type[AnyMetrics]] = {
    "multiclass": Metrics,
    "multilabel": MultilabelMetrics,
    "regression": RegressionMetrics,
}


class Measures:
    """What is measured of a task besides its own figures, and which figure selects.

    Args:
        objective: of the learner.
        metrics: name -> torchmetrics object, which gets probabilities [N, C] and classes [N]; of several
            labels probabilities [N, C] and 0 and 1 [N, C]; of numbers both in the form of the targets.
        select: "val/<figure>", which model selection looks at; None: accuracy, or what stands for it.
        select_mode: "max" or "min"; None: as the figure is known to be.

    Raises:
        TypeError, ValueError: no torchmetrics object, a name that is taken or unknown, a mode that is not
            known.
    """

    def __init__(
        self,
        objective: Objective | None = None,
        metrics: Mapping[str, Metric] | None = None,
        select: str | None = None,
        select_mode: str | None = None,
    ) -> None:
        self.task = (objective or Objective()).task
        self.tally = TALLIES[self.task]
        self.metrics = _by_name(metrics)
        taken = {name.name for name in fields(_KINDS[self.task])}
        for name, metric in self.metrics.items():
            if isinstance(metric, type) or not isinstance(metric, Metric):
                raise TypeError(f"metrics[{name!r}] must be a torchmetrics object, got {describe(metric)}")
            if name in taken or name.startswith("modality_") or "/" in name:
                raise ValueError(
                    f"metrics must not be named {', '.join(sorted(taken))}, begin with modality_ or hold "
                    f"'/', got {name!r}"
                )
        self.selected, self.sign = self._selection(select, select_mode)

    @property
    def main(self) -> str:
        """What stands for accuracy."""
        return self.tally.names[0]

    def config(self) -> dict[str, Any]:
        """Return what checkpoints say of selection."""
        return {"select": f"val/{self.selected}", "select_mode": "max" if self.sign > 0 else "min"}

    def _selection(self, select: str | None, mode: str | None) -> tuple[str, float]:
        if mode is not None:
            check_one_of("select_mode", mode, MODES)
        known = [*self.tally.names, *self.metrics]
        name = f"val/{self.main}" if select is None else select
        part, _, figure = name.rpartition("/") if isinstance(name, str) else (None, "", "")
        if part not in ("val", "") or figure not in known:
            names = [f"val/{each}" for each in known]
            hint = did_you_mean(f"val/{figure}", names)
            raise ValueError(f"select must be one of {', '.join(names)}, got {describe(select)}{hint}")
        if mode is None:
            mode = self._known_mode(figure)
        return figure, 1.0 if mode == "max" else -1.0

    def _known_mode(self, figure: str) -> str:
        if figure in self.tally.names:
            return "min" if figure in self.tally.lower_is_better else "max"
        higher = self.metrics[figure].higher_is_better
        if higher is None:
            raise ValueError(
                f"select_mode must be max or min for val/{figure}, as {describe(type(self.metrics[figure]))} "
                "does not say which is better, got None"
            )
        return "max" if higher else "min"

    def score(self, entry: Mapping[str, Any]) -> tuple[float, list[float | None]]:
        """Return the figure that selects, and that of each modality alone, so that the highest is the best.

        Args:
            entry: figures of validation data, as `as_dict` gives them.
        """
        alone = entry[f"modality_{self.selected}"].values()
        scores = [None if value is None else self._score(value) for value in alone]
        return self._score(entry[self.selected]), scores

    def _score(self, value: float | None) -> float:
        # A metric that has no value, as a correlation with what never varies, is no better than any.
        return -math.inf if value is None or math.isnan(value) else self.sign * value

    def of_modalities(self, entry: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the accuracy of each modality alone, or what stands for it."""
        return entry[f"modality_{self.main}"]

    def made(
        self,
        figures: dict[str, Any],
        alone: dict[str, dict[str, float | None]],
        contribution: dict[str, float | None],
        extra: dict[str, Any],
    ) -> AnyMetrics:
        """Return the figures of the task.

        Args:
            figures: of the fused prediction.
            alone: by figure, that of each modality.
            contribution: of each modality.
            extra: of the user's metrics.
        """
        mine: dict[str, Any] = {f"modality_{self.main}": alone.pop(self.main)}
        others = {f"modality_{name}": values for name, values in alone.items()}
        return _KINDS[self.task](**figures, **mine, contribution=contribution, extra=extra | others)

    def check(self, objective: Objective, num_classes: int) -> None:
        """Raise ValueError where a metric does not take what it will get, or gives more than one number."""
        draw = torch.Generator("cpu").manual_seed(0)
        outputs = torch.randn(_TRIED, num_classes, generator=draw)
        target = {
            "multiclass": torch.arange(_TRIED) % num_classes,
            "multilabel": torch.arange(_TRIED * num_classes).view(_TRIED, -1) % 2,
            "regression": torch.randn(_TRIED, num_classes, generator=draw),
        }[self.task]
        if self.task == "regression" and num_classes == 1:
            target = target.flatten()
        prediction = predictions(objective, outputs, target)
        for name, metric in self.metrics.items():
            tried = metric.clone().cpu()
            text = f"metrics[{name!r}] must take {_GIVEN[self.task]}, C = {num_classes}, and give one number"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tried.reset()
                    tried.update(prediction, target)
                    found = tried.compute()
            except Exception as error:
                raise ValueError(f"{text}; {type(metric).__name__} says: {error}") from error
            if not isinstance(found, Tensor | float | int) or torch.as_tensor(found).numel() != 1:
                raise ValueError(f"{text}, got {describe(found)} of {type(metric).__name__}")


_GIVEN = {
    "multiclass": "probabilities [N, C] and classes [N]",
    "multilabel": "probabilities [N, C] and 0 and 1 [N, C]",
    "regression": "numbers and targets, [N] or [N, C] both",
}


def predictions(
    objective: Objective,
    outputs: Tensor,  # [N, C]
    target: Tensor,  # [N] or [N, C]
) -> Tensor:  # [N, C], or [N]
    """Return what metrics get of outputs: probabilities, or numbers in the form of the targets."""
    if objective.task == "multiclass":
        return outputs.softmax(1)
    return outputs.sigmoid() if objective.task == "multilabel" else objective.like_target(outputs, target)


def _by_name(metrics: Any) -> dict[str, Any]:
    """Return metrics by name; a MetricCollection has names, too."""
    if metrics is None:
        return {}
    if not hasattr(metrics, "items") or not all(isinstance(name, str) for name, _ in metrics.items()):
        raise TypeError(f"metrics must map names to torchmetrics objects, got {describe(metrics)}")
    return dict(metrics.items())


class ExtraMetrics:
    """The user's metrics of a pass, for one predictor.

    Args:
        metrics: those asked for, of which copies are taken.
        objective: of the learner.
        device: of the predictions.
    """

    def __init__(self, metrics: Mapping[str, Metric], objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.metrics = {name: metric.clone().to(device) for name, metric in metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        # Of NaN in the outputs, and of samples.
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def add(
        self,
        outputs: Tensor,  # [N, C] float32
        target: Tensor,  # [N] or [N, C]
        counted: Tensor | None,  # bool [N], None: all
    ) -> None:
        """Take in a batch; samples that do not count are left out, for which the host waits for a GPU."""
        if not self.metrics:
            return
        if counted is not None:
            outputs, target = outputs[counted], target[counted]
        if len(outputs) == 0:
            return
        self.counts[0] += outputs.isnan().sum()
        self.counts[1] += len(outputs)
        prediction = predictions(self.objective, outputs.nan_to_num(0.0), target)
        if self.objective.task == "multiclass":
            target = self.objective.classes(target)
        elif self.objective.task == "multilabel":
            target = target.long()
        for metric in self.metrics.values():
            metric.update(prediction, target)

    def message(self) -> Tensor:  # [2]
        """Return the numbers of NaN in the outputs and of samples so far."""
        return self.counts

    def figures(self, message: Sequence[float]) -> dict[str, float | None]:
        """Return the metrics of all processes' samples; NaN where an output of any is, None of no samples."""
        if not message[1]:
            return dict.fromkeys(self.metrics)
        found: dict[str, float | None] = {name: computed(metric) for name, metric in self.metrics.items()}
        return dict.fromkeys(found, math.nan) if message[0] else found

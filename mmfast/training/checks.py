"""What is wrong with data for a model, found before any work: samples, labels, shapes that do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmfast.data.batches import Entries, evaluating
from mmfast.data.reader import evaluation_batches
from mmfast.data.samples import check_samples
from mmfast.errors import describe
from mmfast.methods.base import Learner, Method
from mmfast.models import MultimodalModel
from mmfast.objectives import Objective
from mmfast.training.groups import check_scales, modules_named, trains_in
from mmfast.training.metrics import Measures
from mmfast.training.optimization import Optimization


def check_data(
    model: MultimodalModel,
    name: str,
    dataset: Any,
    *,
    whole: bool = False,
    collate_fn: Callable | None = None,
    task: str = "multiclass",
) -> Tensor | None:  # [N] or [N, C]
    """Return the labels if the data set tells them; raise unless it holds labelled samples of the modalities.

    As `check_samples` does.

    Args:
        model: names the modalities and the number of classes C.
        name: what errors call the data set.
        dataset: map-style data set.
        whole: every class and every modality must occur, as in a training set.
        collate_fn: what makes batches of its samples, which may then differ in shape.
        task: what labels are.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model must be a mmfast.MultimodalModel, got {describe(model)}")
    if whole and task == "multiclass" and model.num_classes < 2:
        raise ValueError(
            "model must have C = 2 classes at least to be trained, got 1: all data have one label"
        )
    return check_samples(
        model.modalities, model.num_classes, name, dataset, whole=whole, collate_fn=collate_fn, task=task
    )


def objective_for(
    method: Method,
    model: MultimodalModel,
    train: Any,
    val: Any | None,
    *,
    objective: Objective,
    measures: Measures,
    collate_fn: Callable | None,
) -> Objective:
    """Return the objective of a run with what it takes from the data, which are checked, as are metrics.

    Args:
        method: to train by.
        model, train, val: what is trained, and on what.
        objective: as it was given.
        measures: of the run.
        collate_fn: what makes batches.

    Raises:
        TypeError, ValueError: as `check_data`; or the method needs a validation split and has none.
    """
    options: dict[str, Any] = {"collate_fn": collate_fn, "task": objective.task}
    labels = check_data(model, "train", train, whole=True, **options)
    objective = objective.for_data(labels, model.num_classes)
    measures.check(objective, model.num_classes)
    if val is not None:
        labels = check_data(model, "val", val, **options)
        objective.may_ignore |= labels is None or not bool(objective.counted(labels).all())
    elif method.needs_validation:
        raise ValueError(f"{method.name} needs a validation split, got val=None")
    return objective


def check_fits(learner: Learner, train: Any) -> None:
    """Raise what encoders or prediction have against two samples, before any training."""
    with evaluating(learner):
        few = Entries(getattr(train, "evaluation", train), torch.arange(min(2, len(train)), device="cpu"))
        # Two samples are not worth workers.
        here = replace(learner.reader, num_workers=0)
        for batch in evaluation_batches(learner, few, reader=here):
            learner.predict(batch)


def check_settings(learner: Learner, settings: Optimization, num_samples: int, *, has_val: bool) -> None:
    """Raise ValueError for settings that do not fit a learner and its data, before any training.

    Args:
        learner: just bound.
        settings: of the run.
        num_samples: of the training data.
        has_val: whether there are validation data.
    """
    if settings.patience and not has_val:
        raise ValueError(
            f"patience needs validation data, on which it looks for improvement, got {settings.patience} "
            "and val=None"
        )
    held = modules_named(learner.model, settings.freeze)
    check_scales(learner, settings.lr_scale)
    batches = math.ceil(num_samples / settings.batch_size)
    steps = math.ceil(batches / settings.accumulate_grad_batches) * learner.steps_per_batch
    for stage in learner.stages(settings.max_epochs):
        if not trains_in(learner, stage, held):
            raise ValueError(
                f"freeze must leave something to train in stage {stage.name!r} of {learner.method.name}, got "
                f"{settings.freeze}"
            )
        for name, length in (("warmup_epochs", stage.epochs), ("warmup_steps", stage.epochs * steps)):
            if (value := getattr(settings, name)) and value >= length:
                raise ValueError(
                    f"{name} must be below the {length} {name.removeprefix('warmup_')} of stage "
                    f"{stage.name!r} of {learner.method.name}, got {value}"
                )

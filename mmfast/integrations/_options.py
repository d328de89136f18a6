"""What a run in the loop of others is made of: a method bound to a model, and settings of `Optimization`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from mmfast import methods
from mmfast.data.reader import Reader
from mmfast.errors import either
from mmfast.methods.base import Learner, Method
from mmfast.models import MultimodalModel
from mmfast.objectives import Objective
from mmfast.training.checks import objective_for
from mmfast.training.divergence import check_weights
from mmfast.training.metrics import Measures
from mmfast.training.optimization import Optimization, with_settings
from mmfast.training.state import note_data


def bound(
    method: Method | str,
    model: MultimodalModel,
    train: Any,
    val: Any | None,
    *,
    reader: Reader,
    seed: int,
    objective: Objective,
    measures: Measures,
) -> Learner:
    """Return a method's learner, bound to a model as `mmfast.Trainer.fit` binds it.

    Args:
        method: a method, or its name.
        model, train, val: what is trained, and on what.
        reader: of all data.
        seed: of the run.
        objective: task and loss.
        measures: what is measured besides the task's figures, and what of all selects.
    """
    made = methods.chosen(method)
    objective = objective_for(
        made, model, train, val, objective=objective, measures=measures, collate_fn=reader.collate_fn
    )
    learner = made.bind(model, seed=seed, objective=objective)
    check_weights(learner)
    learner.reader = reader
    note_data(learner, train)
    return learner


def taken(
    what: str,
    optimization: Optimization | None,
    settings: Mapping[str, Any],
    names: tuple[str, ...],
    instead: str,
) -> Optimization:
    """Return the settings of a run.

    Args:
        what: takes them, as the sentence begins: "MethodModule".
        optimization: None stands for the defaults.
        settings: fields to set on top of it.
        names: of the fields that are taken.
        instead: what to use in place of the others.

    Raises:
        ValueError: another field is set, or there is none of that name.
    """
    found = with_settings(what, optimization, settings, names)
    others = [field for field in fields(found) if field.name not in names]
    wrong = [field.name for field in others if getattr(found, field.name) != _default(field)]
    if wrong:
        raise ValueError(f"{what} does not take {either(wrong)} of Optimization: {instead}")
    return found


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()

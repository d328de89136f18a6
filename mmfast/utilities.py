"""What a coalition of modalities is worth to a sample, where that is not a matter of one class alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmfast.errors import check_one_of, describe
from mmfast.objectives import Objective
from mmfast.ops.additive_shapley import UTILITIES as OF_CLASSES

# The outputs of all coalitions [N, S, K] and targets, [N] or [N, K], to values [N, S].
Utility = Callable[[Tensor, Tensor], Tensor]

# By task, what is taken where nothing is asked for.
DEFAULTS = {
    "multiclass": "cardinality",
    "multilabel": "multilabel_f1",
    "regression": "negative_squared_error",
}
# By name, the task whose targets a utility takes; None: that of the learner.
_TASKS = {
    **dict.fromkeys(OF_CLASSES, "multiclass"),
    "negative_loss": None,
    "negative_squared_error": "regression",
    "multilabel_f1": "multilabel",
}
UTILITIES = tuple(_TASKS)


def negative_squared_error(
    outputs: Tensor,  # [N, S, K]
    target: Tensor,  # [N] or [N, K]
) -> Tensor:  # [N, S]
    """Return minus the squared error of each coalition, the mean over K numbers."""
    return -(outputs - target.to(outputs.dtype).reshape(len(outputs), 1, -1)).square().mean(-1)


def multilabel_f1(
    outputs: Tensor,  # [N, S, C]
    target: Tensor,  # [N, C] of 0 and 1
) -> Tensor:  # [N, S]
    """Return the F1 of the labels that each coalition gives a sample, those of positive logits.

    1 where neither the sample has a label nor the coalition gives one.
    """
    given, true = outputs > 0, target.bool()[:, None]
    both, either = (given & true).sum(-1), given.sum(-1) + true.sum(-1)
    return torch.where(either == 0, 1.0, 2 * both / either.clamp(min=1))


def negative_loss(objective: Objective | None = None) -> Utility:
    """Return the utility that is minus an objective's loss; None: the cross-entropy's."""
    objective = objective or Objective()

    def worth(
        outputs: Tensor,  # [N, S, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N, S]
        return -objective.stacked_losses(outputs.transpose(0, 1), target).T

    return worth


_READY: dict[str, Callable[[Objective], Utility]] = {
    "negative_loss": negative_loss,
    "negative_squared_error": lambda objective: negative_squared_error,
    "multilabel_f1": lambda objective: multilabel_f1,
}


def chosen(utility: str | Utility | None, objective: Objective) -> str | Utility:
    """Return the name of one of the ops' utilities, or the function of another, with its shape checked.

    Args:
        utility: a name of UTILITIES, a function, or None for the default of the task.
        objective: of the learner.

    Raises:
        TypeError, ValueError: neither, or one that is for another task than the learner's.
    """
    if utility is None:
        utility = DEFAULTS[objective.task]
    if callable(utility):
        return _checking(utility)
    check_one_of("utility", utility, UTILITIES)
    task = task_of(utility, objective)
    if task != objective.task and not objective.is_plain:
        raise ValueError(f"utility {utility!r} is for task={task!r}, the model's is {objective.task!r}")
    return utility if utility in OF_CLASSES else _checking(_READY[utility](objective))


def task_of(utility: str | Utility | None, objective: Objective) -> str | None:
    """Return the task whose labels a utility takes; None: whatever a function of one's own takes."""
    if callable(utility):
        return None if objective.is_plain else objective.task
    named = None if utility is None else _TASKS.get(utility)
    return named or objective.task


def name_of(utility: str | Utility | None, objective: Objective) -> str:
    """Return what reports call a utility."""
    if callable(utility):
        return str(getattr(utility, "__name__", type(utility).__name__))
    return utility or DEFAULTS[objective.task]


def _checking(utility: Utility) -> Utility:
    def worth(
        outputs: Tensor,  # [N, S, K]
        target: Tensor,  # [N] or [N, K]
    ) -> Tensor:  # [N, S]
        found: Any = utility(outputs, target)
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:2]:
            raise ValueError(
                f"utility must return values [N, S] = {list(outputs.shape[:2])}, got {describe(found)}"
            )
        return found if found.is_floating_point() else found.float()

    return worth

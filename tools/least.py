"""How many decodes a run needs at least, by method: derived from the algorithms, not from any code.

Counted are modalities of samples. Nothing that is decoded outlives its batch, as data may be larger than
memory and augmented anew each time. Features and contributions are small, and are kept as long as the
encoders' weights stand still. Then these passes must read data:

| pass | reads | why no less |
| --- | --- | --- |
| training epoch | all of train, and what copies show | weights move at each step; a copy shows one modality |
| validation after it | all of val | its figures are the history's, and choose the epoch |
| sample-valuation, from warmup on | all of train | no pass had the epoch's last weights, in eval mode |
| modality-valuation, from warmup on | the samples drawn, once | a sample drawn twice has one contribution |
| effective dimensions at e0 | all of train, once | weights stand from moments to accuracies |
| diagnosis | all of train | val's features are those of the validation just made |
| head stage | train and val, once in all | frozen encoders give the same features in each epoch |

And these need not:

- Valuation and diagnosis after the last epoch: no epoch comes that they change, and the weights kept are
  those of an epoch that validation has chosen before.
- Validation of the weights that a stage ends with: each part's figures are known from its best epoch.
- Validation again once it is known which modality predicts: the logits of all are there.
- The few samples that are read to find out early what is wrong.

The head stage's pass over val could be had from the validation of the best epoch, if features were kept for
that as weights are; it counts as needed. Several processes share what one would read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Decodes(NamedTuple):
    """Modalities of samples of each data set."""

    train: int
    val: int


def least(
    learner: Any,
    history: Sequence[dict[str, Any]],
    train: Tensor,  # bool [M, N], which samples have which modality
    val: Tensor,  # bool [M, n]
) -> list[Decodes]:
    """Return the least of each entry of a fitted learner's history, over all processes.

    What epochs decided, the copies, is taken from the history. A run is one that validates.
    """
    every_train, every_val = int(train.sum()), int(val.sum())
    between = _BETWEEN.get(learner.method.name, _nothing)
    first_stage = history[0]["stage"]
    last = sum(entry["stage"] == first_stage for entry in history) - 1
    found, copies = [], 0
    for entry in history:
        epoch = entry["epoch"]
        if entry["stage"] != first_stage:
            found.append(Decodes(every_train, every_val) if epoch == 0 else Decodes(0, 0))
            continue
        extra = between(learner, epoch, train) if _is_used(learner.method.name, epoch, last) else 0
        found.append(Decodes(every_train + copies + extra, every_val))
        copies = int(entry.get("method", {}).get("copies", 0))
    return found


def _is_used(name: str, epoch: int, last: int) -> bool:
    # Effective dimensions are found before their epoch, all else after it.
    return epoch < last or name == "di-mml"


def _nothing(learner: Any, epoch: int, train: Tensor) -> int:
    return 0


def _all_valuated(learner: Any, epoch: int, train: Tensor) -> int:
    return int(train.sum()) if epoch + 1 >= learner.method.warmup else 0


def _drawn_valuated(learner: Any, epoch: int, train: Tensor) -> int:
    return (
        int(train[:, drawn(learner, epoch, train.shape[1])].sum())
        if epoch + 1 >= learner.method.warmup
        else 0
    )


def drawn(learner: Any, epoch: int, num_samples: int) -> Tensor:  # [n] int64
    """Return the different samples that modality-level valuation draws after an epoch, as the method does."""
    count = max(1, int(learner.method.fraction * num_samples))
    return torch.randint(num_samples, (count,), generator=learner.generator(epoch)).unique()


def _effective(learner: Any, epoch: int, train: Tensor) -> int:
    return int(train.sum()) if epoch == learner.method.e0 else 0


def _diagnosed(learner: Any, epoch: int, train: Tensor) -> int:
    method = learner.method
    return int(train.sum()) if epoch in sorted(set(method.epochs))[: method.max_times] else 0


# What a method reads of train beside training; methods that are not here read nothing else.
_BETWEEN: dict[str, Callable[[Any, int, Tensor], int]] = {
    "sample-valuation": _all_valuated,
    "modality-valuation": _drawn_valuated,
    "di-mml": _effective,
    "diagnose-relearn": _diagnosed,
}

"""Who is to blame for a loss or predictions that are not finite: the data, an encoder, or the settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from mmfast.data.batches import Shard, dataset_indices
from mmfast.methods.base import Learner, Stage
from mmfast.training.divergence import (
    LOSS,
    PREDICTIONS,
    DivergedError,
    absence_text,
    bad_inputs,
    bad_inputs_of,
    cause_text,
    input_text,
    spoilt_by_absence,
)
from mmfast.training.optimization import Optimization


@dataclass(frozen=True)
class Blame:
    """Ends a run that has no result, with the cause as far as the data show it.

    Attributes:
        learner: what is trained.
        train: on what.
        settings, precision: how.
        is_first: whether this is the first epoch of the run.
    """

    learner: Learner
    train: Any
    settings: Optimization
    precision: str
    is_first: bool

    def for_batch(
        self,
        entries: Any,
        shard: Shard,
        batch: int,
        stage: Stage,
        epoch: int,
        seed: int,
        content: dict[str, Any] | None = None,
    ) -> NoReturn:
        """Raise DivergedError for the loss of a batch.

        A gradient that is NaN under a finite loss shows in the batch after it, so all data are looked at
        where this batch is innocent.

        Args:
            entries: what the epoch trains on.
            shard: its batches.
            batch: number of the one.
            stage, epoch: where that was.
            seed: of the epoch.
            content: of the batch; None reads it again.
        """
        modalities, chosen = self.learner.modalities, shard.batches[batch]
        samples = dataset_indices(entries, chosen).tolist()
        reader = self.learner.reader
        if content is None:
            here = replace(reader, num_workers=0)
            found = here.read(entries, [chosen], modalities, torch.device("cpu"), seed=seed, first=batch)
            (content,) = found
        bad = bad_inputs(content, samples, modalities) or bad_inputs_of(self.train, modalities, reader)
        where = f"batch {batch + 1} of {len(shard.batches)}"
        self.end(bad, "the training data", stage, epoch, where, batch)

    def end(
        self,
        bad: Mapping[str, Sequence[int]],
        part: str,
        stage: Stage,
        epoch: int,
        where: str,
        batch: int | None = None,
    ) -> NoReturn:
        """Raise DivergedError.

        Args:
            bad: by modality, the samples whose input is not finite.
            part: what the data are called.
            stage, epoch: where that was.
            where: in the epoch, in words.
            batch: of the epoch; None: predictions are what is not finite.
        """
        cause, learner = input_text(part, bad), self.learner
        if not bad and (names := spoilt_by_absence(learner.model, self.train, learner.reader)):
            cause = absence_text(names)
        elif not bad:
            first_group = (
                self.is_first and batch is not None and batch < self.settings.accumulate_grad_batches
            )
            cause = cause_text(lr=self.settings.lr, precision=self.precision, has_stepped=not first_group)
        what = LOSS if batch is not None else PREDICTIONS
        text = f"{what} in epoch {epoch + 1} of {stage.epochs}, {where}: {cause}"
        samples = sorted({sample for found in bad.values() for sample in found})
        raise DivergedError(text, epoch=epoch, batch=batch, samples=samples)

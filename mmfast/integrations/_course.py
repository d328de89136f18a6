"""A method's run as loops of others drive it: stages, epochs, batches and what lies between, one at a time.

The order is that of `mmfast.training.loop`, and so are the seeds: figures and weights are the trainer's. What
moves parameters (optimizers, schedules, precision, data parallelism, checkpoints) is the other loop's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.data.batches import epoch_shard
from mmfast.data.seeds import seed_host
from mmfast.distributed import (
    check_agreement,
    min_over_processes,
    rank_and_size,
    share_buffers,
    sum_over_processes,
    world,
)
from mmfast.integrations._epoch import EpochBatches
from mmfast.integrations._figures import as_fabric
from mmfast.methods.base import Learner, Stage
from mmfast.training.blame import Blame
from mmfast.training.checks import check_fits, check_settings
from mmfast.training.divergence import Losses, bad_inputs_of, has_finite_weights
from mmfast.training.evaluation import evaluate, measure
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.optimization import Optimization
from mmfast.training.run_folder import as_lists, check_same
from mmfast.training.selection import BestWeights
from mmfast.training.state import Cut, random_state


class Course:
    """Where a learner stands in its stages and epochs.

        course.begin()
        while not course.is_over:
            batches = course.batches()
            for batch in batches:
                for step in course.steps:
                    loss = course.loss(learner, batch, step)
                    ...  # backward of loss * batches.scale; edit_gradients(step, batches.progress); move
                batches.done += 1
            course.end_epoch(optimizer)  # enters the next stage after the last epoch of one
        course.finish()

    Args:
        learner: what is trained, in place; its reader reads all data.
        train, val: data sets; without `val` the last epoch is kept.
        measures: what is measured besides the task's figures, and what selects.
        settings: `max_epochs`, of the first stage; `batch_size`, over all processes; `lr`, for errors alone.

    Attributes:
        stages: of the run.
        index: of the current stage.
        epoch: epochs that are done of it.
        history: entries as those of the trainer, without seconds.
        is_finished: `finish` was called, so that it goes on from a state alone.
        precision: for errors alone; whoever drives the course sets it.
    """

    def __init__(
        self,
        learner: Learner,
        train: Any,
        val: Any | None,
        *,
        measures: Measures,
        settings: Optimization,
    ) -> None:
        self.learner = learner
        self.train = train
        self.val = val
        self.settings = settings
        check_settings(learner, settings, len(train), has_val=val is not None)
        self.stages = learner.stages(settings.max_epochs)
        self.index, self.epoch = 0, 0
        self.history: list[dict[str, Any]] = []
        self.precision = "32-true"
        self.measures = measures
        self._best = BestWeights()
        self._cut: Cut | None = None
        self._current: EpochBatches | None = None
        self._running = contextlib.ExitStack()
        self.is_finished = False

    # Where it stands

    @property
    def stage(self) -> Stage:
        return self.stages[self.index]

    @property
    def num_epochs(self) -> int:
        """Epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def epochs_done(self) -> int:
        return sum(stage.epochs for stage in self.stages[: self.index]) + self.epoch

    @property
    def is_over(self) -> bool:
        return self.epochs_done == self.num_epochs

    @cached_property
    def plain_batches(self) -> int:
        """Batches of an epoch that trains on the data set itself."""
        size, world_size = len(self.train), rank_and_size()[1]
        shard = epoch_shard(size, self.settings.batch_size, torch.Generator("cpu"), world_size=world_size)
        return len(shard.batches)

    @property
    def stages_left(self) -> str:
        """The names of the stages behind the current one, as a sentence has them; "" without any."""
        return " and ".join(stage.name for stage in self.stages[self.index + 1 :])

    def stages_text(self) -> str:
        """Return the number of epochs as errors print it: 24 = 4 (encoders) + 20 (head)."""
        each = " + ".join(f"{stage.epochs} ({stage.name})" for stage in self.stages)
        return f"{self.num_epochs} = {each}" if len(self.stages) > 1 else str(self.num_epochs)

    # The run

    def begin(self) -> None:
        """Enter the first stage; workers that read data stay from now on."""
        self._running.close()
        self._running.enter_context(self.learner.reader.staying())
        if not self.is_finished:
            check_fits(self.learner, self.train)
            self._enter(0)

    def _enter(self, index: int) -> None:
        self.index, self.epoch = index, 0
        self._best = BestWeights()
        self.learner.start_stage(self.stage)

    def finish(self) -> None:
        """End the run, also before its end: the stage's best weights are kept, and all may train again."""
        self.close()
        if not self.is_over and self.stages_left:
            name, stage = self.learner.method.name, self.stage.name
            text = f"{name} was ended in its stage {stage}, before the stage {self.stages_left}"
            warnings.warn(text, stacklevel=3)
        if not self.is_over and self.epoch > 0:
            self._take_best()
        self.is_finished = True
        # Data that come later may have samples without label.
        self.learner.objective.may_ignore = True
        self.learner.unfreeze()
        self.learner.zero_grad(set_to_none=True)
        self.learner.eval()

    def abandon(self) -> None:
        """Give back all but the weights' values, where the run has failed."""
        self.close()
        self.is_finished = True
        self.learner.abandon()

    def close(self) -> None:
        """Let go of workers and threads."""
        self._drop_batches()
        self._running.close()

    def _drop_batches(self) -> None:
        if self._current is not None:
            self._current.close()
            self._current = None

    # An epoch

    def batches(self) -> EpochBatches:
        """Return the batches of the epoch that is under way, or of the next one."""
        if self._current is None:
            self._current = self._start_epoch()
        return self._current

    def _start_epoch(self) -> EpochBatches:
        learner, cut = self.learner, self._cut
        learner.objective.to(learner.device)
        rank, world_size = rank_and_size()
        seed = learner.generator(self.index, self.epoch, rank).initial_seed()
        if learner.device.type != "cpu":
            torch.manual_seed(seed)
        seed_host(seed)
        start = learner.resume_epoch if cut else learner.start_epoch
        entries = start(self.epoch, self.train)
        order = learner.generator(self.index, self.epoch)
        shard = epoch_shard(len(entries), self.settings.batch_size, order, rank=rank, world_size=world_size)
        check_agreement("samples of an epoch", len(entries))
        first = cut.batch if cut else 0
        num_steps = learner.steps_per_batch
        losses = Losses(num_steps * len(shard.batches), learner.device, world() is None, num_steps * first)
        if cut:
            cut.check(len(shard.batches))
            losses.values[: num_steps * first] = cut.losses_of(rank, world_size)
            cut.set_random_state(rank, learner.device)
        self._cut = None
        draws = random_state(learner.device)
        place = learner, self.train, self.settings.batch_size
        return EpochBatches(*place, entries, shard, seed, losses, draws, first)

    @property
    def steps(self) -> range:
        """The optimizer steps of a batch."""
        return range(self.learner.steps_per_batch)

    def loss(self, module: nn.Module, batch: dict[str, Any], step: int) -> Tensor:  # scalar
        """Return the loss of a step.

        Raises:
            DivergedError: it, or one before, is NaN or infinite.
        """
        epoch = self.batches()
        loss = module(batch, step)
        if (bad := epoch.losses.add(loss.detach() * epoch.scale)) is not None:
            number = bad // len(self.steps)
            self._diverged(number, batch if number == epoch.done else None)
        return loss

    def end_epoch(self, optimizer: Any) -> dict[str, Any]:
        """Validate, select, let the method do what it does between epochs, and return the history's entry.

        After the last epoch of a stage the best weights are put back and the next stage is entered, whose
        optimizer is to be made anew: `epoch` is 0 then.

        Args:
            optimizer: torch's, whose state some methods drop.
        """
        learner, stage = self.learner, self.stage
        entry: dict[str, Any] = {"stage": stage.name, "epoch": self.epoch, "loss": self._end_batches()}
        if self.val is not None:
            if learner.encodes_once or (learner.reads_again(self.epoch) and learner.takes_kept):
                learner.keep(self.val, whole=True)
            entry["val"] = self._measure(self.val, "validation").as_dict()
            if self.epoch >= stage.first_selectable:
                self._best.update(learner, *self.measures.score(entry["val"]), self.epoch)
        entry["method"] = learner.end_epoch(self.epoch, self.train, self.val)
        if learner.optimizer_reset_due():
            optimizer.state.clear()
        if not learner.encodes_once:
            learner.forget()
        self.history.append(entry)
        self.epoch += 1
        if self.epoch == stage.epochs:
            self._take_best()
            if self.index + 1 < len(self.stages):
                self._enter(self.index + 1)
        return entry

    def _end_batches(self) -> float:
        """Close the epoch's batches, and return its mean loss over batches and processes."""
        epoch = self.batches()
        bad, num_steps = epoch.losses.first_bad(), len(self.steps)
        # All processes stop with the one whose loss was the first.
        worst = min_over_processes(len(epoch) if bad is None else bad // num_steps)
        if worst < len(epoch):
            self._diverged(worst)
        self._drop_batches()
        share_buffers(self.learner)
        total = sum_over_processes(epoch.losses.values.sum())
        # Fewer than all where a loop was told so, as by limit_train_batches.
        return float(total / rank_and_size()[1] / max(1, epoch.done))

    def _take_best(self) -> None:
        """Put the best weights of the stage back, and tell the learner each modality's accuracy with them."""
        learner, best, last = self.learner, self._best, self.epoch - 1
        best.restore(learner)
        known = (
            None
            if self.val is None
            else best.unimodal_accuracy(learner, self.history[-self.epoch :], self.measures)
        )
        if known is not None:
            learner.note_unimodal_accuracy(known)
        elif learner.reads_again(last) or not has_finite_weights(learner):
            part, data = ("training", self.train) if self.val is None else ("validation", self.val)
            self._measure(data, part)
        learner.forget()

    # Figures

    def evaluate(self, dataset: Any) -> AnyMetrics:
        """Return the figures of a data set, as `mmfast.Trainer.test` does."""
        # Asked for while it trains, too, of data that training knows nothing of.
        with self.learner.objective.for_any_labels():
            return evaluate(self.learner, dataset, as_fabric(self.learner), measures=self.measures)

    def figures(self, dataset: Any) -> dict[str, Any]:
        """Return the same as plain values, as the history has them."""
        return self.evaluate(dataset).as_dict()

    def _measure(self, dataset: Any, part: str) -> AnyMetrics:
        learner, fabric = self.learner, as_fabric(self.learner)
        found, num_nan = measure(learner, dataset, fabric, measures=self.measures)
        if num_nan:
            bad = bad_inputs_of(dataset, learner.modalities, learner.reader)
            where = f"{part}, for {num_nan} sample{'s' * (num_nan > 1)}"
            self._blame.end(
                bad, f"the {part} data", self.stage, min(self.epoch, self.stage.epochs - 1), where
            )
        if learner.note_unimodal_accuracy(self.measures.of_modalities(found.as_dict())):
            found, _ = measure(learner, dataset, fabric, measures=self.measures)
        return found

    @property
    def _blame(self) -> Blame:
        return Blame(self.learner, self.train, self.settings, self.precision, is_first=not self.history)

    def _diverged(self, number: int, batch: dict[str, Any] | None = None) -> None:
        """Raise the error of a batch whose loss is not finite, which is read again where it is not given."""
        epoch = self.batches()
        self._blame.for_batch(epoch.entries, epoch.shard, number, self.stage, self.epoch, epoch.seed, batch)

    # What it goes on from

    def state(self) -> dict[str, Any]:
        """Return all it takes to go on, beside the state dict of the learner: plain values and tensors.

        All processes ask for it.
        """
        best = {
            part: {**kept, "weights": dict(kept["weights"].entries)}
            for part, kept in self._best.parts.items()
        }
        cut, epoch = self._cut, self._current
        if epoch is not None and epoch.done > 0:
            losses = epoch.losses.values[: len(self.steps) * epoch.done]
            cut = Cut.after(epoch.done, len(epoch), losses, 0.0)
        return {
            **self._description(),
            "stage": self.index,
            "epoch": self.epoch,
            "cut": vars(cut) if cut else None,
            "best": best,
            "history": list(self.history),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the learner's state dict is loaded after it, as it enters the stage.

        Raises:
            ValueError: it is of another run.
        """
        keys = ("method", "config", "objective", "seed", "max_epochs", "batch_size")
        check_same(state, self._description(), self.learner.method, *keys)
        self._drop_batches()
        self.is_finished = False
        self._enter(state["stage"])
        self.epoch = state["epoch"]
        self._best = BestWeights.of(self.learner, state["best"])
        self.history = list(state["history"])
        self._cut = Cut(**state["cut"]) if state["cut"] else None

    def _description(self) -> dict[str, Any]:
        method = self.learner.method
        return {
            "method": method.name,
            "config": as_lists(method.config()),
            "objective": self.learner.objective.config() | self.measures.config(),
            "seed": self.learner.seed,
            "max_epochs": self.settings.max_epochs,
            "batch_size": self.settings.batch_size,
        }

"""A method's run as loops of others drive it: stages, epochs, batches and what lies between, one at a time.

The order is that of `mmfast.training.loop`, and so are the seeds: figures and weights are the trainer's. What
moves parameters (optimizers, schedules, precision, data parallelism, checkpoints) is the other loop's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from mmfast import methods
from mmfast.data.batches import Shard, all_marks, dataset_indices, epoch_shard
from mmfast.data.devices import model_place
from mmfast.data.reader import Reader
from mmfast.data.seeds import seed_host
from mmfast.data.sources import in_memory
from mmfast.data.threads import fitting_threads
from mmfast.distributed import (
    check_agreement,
    min_over_processes,
    rank_and_size,
    share_buffers,
    sum_over_processes,
    world,
)
from mmfast.errors import describe
from mmfast.methods.base import Learner, Method, Stage
from mmfast.models import MultimodalModel
from mmfast.training.checks import check_data, check_fits
from mmfast.training.divergence import (
    LOSS,
    PREDICTIONS,
    DivergedError,
    Losses,
    bad_inputs,
    bad_inputs_of,
    cause_text,
    check_weights,
    has_finite_weights,
    input_text,
)
from mmfast.training.evaluation import evaluate, measure
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.run_folder import as_lists, check_same
from mmfast.training.selection import BestWeights
from mmfast.training.state import Cut, random_state, set_random_state


class Course:
    """Where a learner stands in its stages and epochs.

        course.begin()
        while not course.is_over:
            for batch in course.batches():
                for step in course.steps:
                    loss = course.loss(learner, batch, step)
                    ...  # backward of loss * course.scale; edit_gradients(step, course.progress); move
                course.end_batch()
            course.end_epoch(optimizer)  # enters the next stage after the last epoch of one
        course.finish()

    Args:
        learner: what is trained, in place; its reader reads all data.
        train, val: data sets; without `val` the last epoch is kept.
        max_epochs: of the first stage.
        batch_size: samples of a batch over all processes.

    Attributes:
        stages: of the run.
        index: of the current stage.
        epoch: epochs that are done of it.
        history: entries as those of the trainer, without seconds.
        is_finished: `finish` was called, so that it goes on from a state alone.
        lr, precision: for the text of errors; whoever drives the course sets them.
    """

    def __init__(
        self, learner: Learner, train: Any, val: Any | None, *, max_epochs: int, batch_size: int
    ) -> None:
        self.learner = learner
        self.train = train
        self.val = val
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.stages = learner.stages(max_epochs)
        self.index, self.epoch = 0, 0
        self.history: list[dict[str, Any]] = []
        self.lr, self.precision = 0.0, "32-true"
        self.measures = Measures(learner.objective)
        self._best = BestWeights()
        self._cut: Cut | None = None
        self._current: EpochBatches | None = None
        self._running = contextlib.ExitStack()
        self.is_finished = False
        method, collate = learner.method, learner.reader.collate_fn
        if val is not None:
            check_data(learner.model, "val", val, collate_fn=collate)
        elif method.needs_validation:
            raise ValueError(f"{method.name} needs a validation split, got val=None")

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

    @property
    def batches_done(self) -> int:
        """Batches that are done of the epoch that is under way."""
        if self._current is not None:
            return self._current.done
        return self._cut.batch if self._cut else 0

    @property
    def plain_batches(self) -> int:
        """Batches of an epoch that trains on the data set itself."""
        return len(epoch_shard(len(self.train), self.batch_size, torch.Generator("cpu")).batches)

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
        rank, world_size = rank_and_size()
        seed = learner.generator(self.index, self.epoch, rank).initial_seed()
        torch.manual_seed(seed)
        seed_host(seed)
        start = learner.resume_epoch if cut else learner.start_epoch
        entries = start(self.epoch, self.train)
        order = learner.generator(self.index, self.epoch)
        shard = epoch_shard(len(entries), self.batch_size, order, rank=rank, world_size=world_size)
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
        return EpochBatches(self, entries, shard, seed, losses, draws, first)

    @property
    def steps(self) -> range:
        """The optimizer steps of a batch."""
        return range(self.learner.steps_per_batch)

    @property
    def progress(self) -> float:
        """b / B of the epoch, as `edit_gradients` takes it."""
        epoch = self.batches()
        return epoch.done / len(epoch)

    @property
    def scale(self) -> float:
        """What a loss is multiplied by, so that the mean of gradients over processes is the whole batch's."""
        epoch = self.batches()
        return epoch.shard.scales[epoch.done]

    def loss(self, module: nn.Module, batch: Mapping[str, Any], step: int) -> Tensor:  # scalar
        """Return the loss of a step.

        Raises:
            DivergedError: it, or one before, is NaN or infinite.
        """
        epoch = self.batches()
        loss = module(batch, step)
        if (bad := epoch.losses.add(loss.detach() * self.scale)) is not None:
            number = bad // len(self.steps)
            self._diverged(number, batch if number == epoch.done else None)
        return loss

    def end_batch(self) -> None:
        """Count a batch."""
        self.batches().done += 1

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
        return evaluate(self.learner, dataset, _as_fabric(self.learner))

    def figures(self, dataset: Any) -> dict[str, Any]:
        """Return the same as plain values, as the history has them."""
        return self.evaluate(dataset).as_dict()

    def _measure(self, dataset: Any, part: str) -> AnyMetrics:
        learner, fabric = self.learner, _as_fabric(self.learner)
        found, num_nan = measure(learner, dataset, fabric)
        if num_nan:
            bad = bad_inputs_of(dataset, learner.modalities, learner.reader)
            where = f"{part}, for {num_nan} sample{'s' * (num_nan > 1)}"
            self._raise(PREDICTIONS, where, f"the {part} data", bad)
        if learner.note_unimodal_accuracy(self.measures.of_modalities(found.as_dict())):
            found, _ = measure(learner, dataset, fabric)
        return found

    def _diverged(self, number: int, batch: Mapping[str, Any] | None = None) -> None:
        """Raise the error of a batch whose loss is not finite, which is read again where it is not given."""
        epoch, reader, names = self.batches(), self.learner.reader, self.learner.modalities
        chosen = epoch.shard.batches[number]
        if batch is None:
            here, cpu = replace(reader, num_workers=0), torch.device("cpu")
            (batch,) = here.read(epoch.entries, [chosen], names, cpu, seed=epoch.seed, first=number)
        samples = dataset_indices(epoch.entries, chosen).tolist()
        bad = bad_inputs(batch, samples, names) or bad_inputs_of(self.train, names, reader)
        self._raise(LOSS, f"batch {number + 1} of {len(epoch)}", "the training data", bad, number)

    def _raise(
        self, what: str, where: str, data: str, bad: Mapping[str, list[int]], batch: int | None = None
    ) -> None:
        if bad:
            cause = input_text(data, bad)
        else:
            has_stepped = batch != 0 or bool(self.history)
            cause = cause_text(lr=self.lr, precision=self.precision, has_stepped=has_stepped)
        samples = sorted({sample for found in bad.values() for sample in found})
        text = f"{what} in epoch {self.epoch + 1} of {self.stage.epochs}, {where}: {cause}"
        raise DivergedError(text, epoch=self.epoch, batch=batch, samples=samples)

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
        keys = ("method", "config", "seed", "max_epochs", "batch_size")
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
            "seed": self.learner.seed,
            "max_epochs": self.max_epochs,
            "batch_size": self.batch_size,
        }


def bound(method: Method | str, model: MultimodalModel, train: Any, *, reader: Reader, seed: int) -> Learner:
    """Return a method's learner, bound to a model as `mmfast.Trainer.fit` binds it.

    Args:
        method: a method, or its name.
        model, train: what is trained, and on what.
        reader: of all data.
        seed: of the run.
    """
    if isinstance(method, type):
        raise TypeError(f"method must be an instance, {method.__name__}(), or a name, got the class")
    if not isinstance(method, str | Method):
        raise TypeError(f"method must be a method of mmfast.methods or its name, got {describe(method)}")
    check_data(model, "train", train, whole=True, collate_fn=reader.collate_fn)
    made = methods.make(method) if isinstance(method, str) else method
    learner = made.bind(model, seed=seed)
    check_weights(learner)
    learner.reader = reader
    return learner


@dataclass(eq=False)
class EpochBatches:
    """The batches of an epoch from where it stands, in this process: sized, and iterated once.

    Attributes:
        course: of which run.
        entries: what the epoch trains on.
        shard: this process's batches, of all of which `len` is the number.
        seed: of what data sets draw.
        losses: of the steps so far, scaled by this process's share of the batch.
        draws: random state to begin with.
        done: batches that are.
    """

    course: Course
    entries: Any
    shard: Shard
    seed: int
    losses: Losses
    draws: dict[str, Any]
    done: int = 0

    def __post_init__(self) -> None:
        self._held = contextlib.ExitStack()

    def __len__(self) -> int:
        return len(self.shard.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Nothing happens before the first batch is asked for: loops make iterators they drop again.
        learner, first = self.course.learner, self.done
        self.close()
        self._held.enter_context(fitting_threads(learner, self.course.train, self.course.batch_size))
        set_random_state(self.draws, learner.device)
        learner.train()
        device, dtype = model_place(learner)
        read = learner.reader.read(
            self.entries,
            self.shard.batches[first:],
            learner.modalities,
            device,
            dtype=dtype,
            seed=self.seed,
            first=first,
        )
        # Sized loops ask for no batch beyond the last, at which a generator would end by itself.
        self._held.enter_context(contextlib.closing(read))
        alone = world() is None or in_memory(getattr(self.entries, "base", self.entries))
        for batch in read:
            # All processes must know of a mark that one of them has met.
            yield batch if alone else batch | all_marks(batch, learner.modalities)

    def close(self) -> None:
        """End reading, and give torch its threads back."""
        self._held.close()


class _Place:
    """What evaluation asks of Fabric, by the loop that drives the course."""

    def __init__(self, learner: Learner) -> None:
        self.autocast = learner.autocast

    @staticmethod
    def all_reduce(values: Tensor, reduce_op: str = "sum") -> Tensor:  # same shape
        assert reduce_op == "sum"
        return sum_over_processes(values)


def _as_fabric(learner: Learner) -> Fabric:
    return cast(Fabric, _Place(learner))


def flat(figures: Mapping[str, Any], prefix: str, separator: str = "/") -> dict[str, float]:
    """Return figures under names of one level: val/accuracy, val/audio_accuracy.

    Args:
        figures: as the history has them; None, of what no sample has, is left out.
        prefix: of each name.
        separator: after the prefix.
    """
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            kind = key.removeprefix("modality_")
            found |= flat({f"{name}_{kind}": item for name, item in value.items()}, prefix, separator)
        elif isinstance(value, int | float):
            found[prefix + separator + key] = float(value)
    return found

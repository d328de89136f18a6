"""The training loop: one flat loop over stages, epochs, batches and steps, the same for every method."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from mmfast.data.batches import all_marks, epoch_shard
from mmfast.data.devices import model_place
from mmfast.data.seeds import seed_host
from mmfast.data.sources import in_memory
from mmfast.data.threads import fitting_threads
from mmfast.distributed import check_agreement, min_over_processes, share_buffers, world
from mmfast.methods.base import Learner, Stage
from mmfast.training.blame import Blame
from mmfast.training.divergence import Losses, bad_inputs_of, has_finite_weights
from mmfast.training.evaluation import measure
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.optimization import Optimization
from mmfast.training.standing import Standing
from mmfast.training.state import Cut, load_state
from mmfast.training.stopping import Stop, Stopped


@dataclass
class TrainingLoop:
    """One run: what is trained, on what, and what is told of it.

    Attributes:
        learner: what is trained, in place.
        train, val: data sets; `val` may be None, then the last epoch is kept.
        fabric, optimization: how.
        on_epoch: called with every epoch's entry of the history; whether the stage is to end with it.
        on_step: called with what is known of every step, if anyone wants to.
        stepping: context of the steps of an epoch.
        on_state: called after every epoch, and where one is stopped within, with all it takes to go on.
        stop: whether to.
        measures: what is measured of validation data, and what of it selects; None: as the task has it.
        history: the entries so far.
    """

    learner: Learner
    train: Any
    val: Any | None
    fabric: Fabric
    optimization: Optimization
    on_epoch: Callable[[dict[str, Any]], bool]
    on_state: Callable[[dict[str, Any]], None]
    on_step: Callable[[dict[str, Any]], None] | None = None
    stepping: Callable[[], Any] = contextlib.nullcontext
    stop: Stop = field(default_factory=Stop)
    measures: Measures | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self, state: dict[str, Any] | None) -> None:
        """Train all stages, from the beginning or from what `on_state` was given.

        Raises:
            DivergedError: a loss is NaN or infinite.
            Stopped: it was to stop, and has given its state.
        """
        learner, measures = self.learner, self.measures or Measures(self.learner.objective)
        # Before any state is loaded: an optimizer's is as wide as its parameters.
        self.fabric.strategy.precision.convert_module(learner)
        first_stage, epoch = (state["stage"], state["epoch"] + 1) if state else (0, 0)
        cut = Cut(**state["cut"]) if state and state.get("cut") else None
        for index, stage in enumerate(learner.stages(self.optimization.max_epochs)):
            if index < first_stage:
                continue
            learner.start_stage(stage)
            if state:
                load_state(learner, state["learner"])
                if "extra" in state:
                    # A checkpoint of format 1.
                    learner.load_extra_state(state["extra"])
            standing = Standing.begin(learner, self.fabric, self.optimization, index, state)
            if standing.is_ended:
                stage = self._end(stage, epoch - 1, standing)
            while epoch < stage.epochs:
                entry: dict[str, Any] = {"stage": stage.name, "epoch": epoch}
                with fitting_threads(learner, self.train, self.optimization.batch_size):
                    figures, cut = self._train_epoch(standing, stage, epoch, cut)
                if cut is not None:
                    self.on_state(standing.state(epoch - 1, cut))
                    self._stopped(f"after batch {cut.batch} of {cut.num_batches} in", epoch, stage)
                entry |= figures
                standing.schedule.end_epoch()
                if self.val is not None:
                    entry["val"] = self._validate(standing, stage, epoch)
                if standing.has_waited(epoch):
                    stage = self._end(stage, epoch, standing)
                self._end_epoch(standing.optimizer, epoch, entry)
                if not learner.encodes_once:
                    learner.forget()
                self.history.append(entry)
                if self.on_epoch(entry):
                    stage = self._end(stage, epoch, standing)
                self.on_state(standing.state(epoch))
                if self.stop.due(now=True):
                    self._stopped("after", epoch, stage)
                epoch += 1
            standing.finish()
            known = (
                None
                if self.val is None
                else standing.best.unimodal_accuracy(learner, self.history[-stage.epochs :], measures)
            )
            if known is not None:
                learner.note_unimodal_accuracy(known)
            elif learner.reads_again(stage.epochs - 1) or not has_finite_weights(learner):
                # The last step is one that no loss has seen.
                part, data = ("train", self.train) if self.val is None else ("val", self.val)
                self._measure(data, part, stage, stage.epochs - 1)
            learner.forget()
            state, epoch = None, 0

    def _end(self, stage: Stage, epoch: int, standing: Standing) -> Stage:
        """Let a stage end with an epoch; return it as what it has become, which the method is told, too."""
        standing.is_ended = True
        self.learner.stage = replace(stage, epochs=epoch + 1)
        return self.learner.stage

    def _stopped(self, where: str, epoch: int, stage: Stage) -> None:
        text = (
            f"stopped by SIGTERM {where} epoch {epoch + 1} of {stage.epochs}: resume=True goes on from there"
        )
        raise Stopped(text, rank=self.fabric.global_rank)

    def _validate(self, standing: Standing, stage: Stage, epoch: int) -> dict[str, Any]:
        """Return the figures of an epoch on validation data, after letting selection look at them."""
        learner, average = self.learner, standing.average
        measures = self.measures or Measures(learner.objective)
        with contextlib.nullcontext() if average is None else average.in_place():
            if learner.encodes_once or (learner.reads_again(epoch) and learner.takes_kept):
                learner.keep(self.val, whole=True)
            found = self._measure(self.val, "val", stage, epoch).as_dict()
            if epoch >= stage.first_selectable:
                standing.best.update(learner, *measures.score(found), epoch)
        return found

    def _measure(self, dataset: Any, part: str, stage: Stage, epoch: int) -> AnyMetrics:
        """Return the learner's figures by the predictions it makes when it knows those of each modality.

        Raises:
            DivergedError: predictions are NaN, as after a last step that no loss has seen.
        """
        measures = self.measures or Measures(self.learner.objective)
        found, num_nan = measure(self.learner, dataset, self.fabric, measures=measures)
        if num_nan:
            bad = bad_inputs_of(dataset, self.learner.modalities, self.learner.reader)
            place = "validation" if part == "val" else "training"
            self._blame.end(
                bad, f"the {place} data", stage, epoch, f"{place}, for {num_nan} sample{'s' * (num_nan > 1)}"
            )
        if self.learner.note_unimodal_accuracy(measures.of_modalities(found.as_dict())):
            found, _ = measure(self.learner, dataset, self.fabric, measures=measures)
        return found

    def _train_epoch(
        self, standing: Standing, stage: Stage, epoch: int, cut: Cut | None
    ) -> tuple[dict[str, float], Cut | None]:
        """Train an epoch, or the rest of one; return its mean loss and seconds, and where it was stopped."""
        learner, fabric, index = self.learner, self.fabric, standing.index
        # A seed of its own for every epoch: a resumed run needs no random state of the one before.
        seed = learner.generator(index, epoch, fabric.global_rank).initial_seed()
        if fabric.device.type != "cpu":
            # A look at all kinds of devices, which tiny epochs feel.
            torch.manual_seed(seed)
        # Models may draw from numpy and random; data sets draw by seeds of their batches.
        seed_host(seed)
        begun = time.perf_counter() - (cut.seconds if cut else 0)
        start = learner.resume_epoch if cut else learner.start_epoch
        entries = start(epoch, self.train)
        shard = epoch_shard(
            len(entries),
            self.optimization.batch_size,
            learner.generator(index, epoch),
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        check_agreement("samples of an epoch", len(entries))
        if cut:
            cut.check(len(shard.batches))
        standing.module.train()
        steps, is_alone, first = learner.steps_per_batch, world() is None, cut.batch if cut else 0
        groups = shard.groups(self.optimization.accumulate_grad_batches)
        # The batch of each loss, in the order in which they are taken.
        order = [b for group in groups for _ in range(steps) for b in group]
        losses = Losses(len(order), fabric.device, is_alone, steps * first)
        device, dtype = model_place(learner)
        batches = learner.reader.read(
            entries, shard.batches[first:], learner.modalities, device, dtype=dtype, seed=seed, first=first
        )
        if cut:
            cut.set_random_state(fabric.global_rank, fabric.device)
        stopped_at = None
        needs_marks = not is_alone and not in_memory(getattr(entries, "base", entries))

        def note(loss: Tensor, b: int, batch: dict[str, Any]) -> None:
            if (bad := losses.add(loss)) is not None:
                # Of an earlier step the batch is gone, and read again.
                content = batch if order[bad] == b else None
                self._blame.for_batch(entries, shard, order[bad], stage, epoch, seed, content)

        # Workers go with a fit that fails, also while its error is held.
        with contextlib.closing(batches), self.stepping():
            for g, group in enumerate(groups):
                if group[0] < first:
                    continue
                held = list(itertools.islice(batches, len(group)))
                if needs_marks:
                    # All processes must know of a mark that one of them has met, or none talks of the same.
                    held = [batch | all_marks(batch, learner.modalities) for batch in held]
                for step in range(steps):
                    standing.drop_gradients()
                    parts = self._add_gradients(standing, step, group, held, shard.weights(group), note)
                    learner.edit_gradients(step, g / len(groups))
                    figures = standing.step()
                    if self.on_step is not None:
                        place = {"stage": stage.name, "epoch": epoch, "batch": group[-1], "step": step}
                        loss = sum(part * weight for part, weight in parts)
                        self.on_step(place | {"loss": loss} | figures)
                if self.stop.due(now=group[-1] + 1 == len(shard.batches)):
                    stopped_at = group[-1] + 1
                    break
        bad = losses.first_bad()
        # All processes stop with the one whose loss was the first.
        worst = min_over_processes(len(shard.batches) if bad is None else order[bad])
        if worst < len(shard.batches):
            self._blame.for_batch(entries, shard, worst, stage, epoch, seed)
        share_buffers(learner)
        scaled = losses.values * torch.tensor([shard.scales[b] for b in order], device=fabric.device)
        if cut:
            scaled[: steps * first] = cut.losses_of(fabric.global_rank, fabric.world_size)
        seconds = time.perf_counter() - begun
        if stopped_at is not None:
            done = scaled[: steps * stopped_at]
            return {}, Cut.after(stopped_at, len(shard.batches), done, seconds)
        mean = fabric.all_reduce(scaled.sum(), reduce_op="mean") / len(shard.batches)  # type: ignore[operator]
        return {"loss": float(mean), "seconds": seconds}, None

    def _add_gradients(
        self,
        standing: Standing,
        step: int,
        group: list[int],
        batches: list[dict[str, Any]],
        weights: list[float],
        note: Callable[[Tensor, int, dict[str, Any]], None],
    ) -> list[tuple[Tensor, float]]:
        """Add up the gradients of a step over the batches of a group; return their losses and weights.

        Args:
            standing: of the stage.
            step: of these batches.
            group: numbers of the batches.
            batches: what they hold.
            weights: of their losses.
            note: called with each loss and its batch before the gradient is taken.
        """
        losses = []
        for b, batch, weight in zip(group, batches, weights, strict=True):
            # Processes tell each other the gradients of a step once.
            with self.fabric.no_backward_sync(standing.module, enabled=b != group[-1]):
                loss = standing.called(batch, step)
                note(loss, b, batch)
                self.fabric.backward(loss * weight)
            losses.append((loss.detach(), weight))
        return losses

    @property
    def _blame(self) -> Blame:
        precision = self.fabric.strategy.precision.precision
        return Blame(self.learner, self.train, self.optimization, precision, is_first=not self.history)

    def _end_epoch(self, optimizer: Any, epoch: int, entry: dict[str, Any]) -> None:
        """Let the method do what it does between epochs; its time counts as training time."""
        begun = time.perf_counter()
        entry["method"] = self.learner.end_epoch(epoch, self.train, self.val)
        if self.learner.optimizer_reset_due():
            optimizer.state.clear()
        entry["seconds"] += time.perf_counter() - begun

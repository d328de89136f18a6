"""The training loop: one flat loop over stages, epochs, batches and steps, the same for every method."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric

from mmfast.data.batches import Shard, all_marks, dataset_indices, epoch_shard
from mmfast.data.devices import model_place
from mmfast.data.seeds import seed_host
from mmfast.data.sources import in_memory
from mmfast.data.threads import fitting_threads
from mmfast.distributed import check_agreement, min_over_processes, share_buffers, world
from mmfast.methods.base import Learner, Stage
from mmfast.training.divergence import (
    LOSS,
    PREDICTIONS,
    DivergedError,
    Losses,
    absence_text,
    bad_inputs,
    bad_inputs_of,
    cause_text,
    has_finite_weights,
    input_text,
    spoilt_by_absence,
)
from mmfast.training.evaluation import measure
from mmfast.training.metrics import AnyMetrics, Measures
from mmfast.training.optimization import Optimization
from mmfast.training.selection import BestWeights
from mmfast.training.state import Cut, learner_state, load_state
from mmfast.training.stopping import Stop, Stopped


@dataclass
class TrainingLoop:
    """One run: what is trained, on what, and what is told of it.

    Attributes:
        learner: what is trained, in place.
        train, val: data sets; `val` may be None, then the last epoch is kept.
        fabric, optimization: how.
        on_epoch: called with every epoch's entry of the history.
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
    on_epoch: Callable[[dict[str, Any]], None]
    on_state: Callable[[dict[str, Any]], None]
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
        first_stage, first_epoch = (state["stage"], state["epoch"] + 1) if state else (0, 0)
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
            optimizer = self.optimization.make_optimizer(learner.trainable_parameters())
            scheduler = self.optimization.make_scheduler(optimizer)
            best = BestWeights.of(learner, state["best"] if state else {})
            if state:
                optimizer.load_state_dict(state["optimizer"])
                self.fabric.strategy.precision.load_state_dict(state["precision"])
                scheduler.load_state_dict(state["scheduler"])
            module, optimizer = self.fabric.setup(learner, optimizer)
            standing = index, optimizer, scheduler, best
            for epoch in range(first_epoch, stage.epochs):
                entry: dict[str, Any] = {"stage": stage.name, "epoch": epoch}
                with fitting_threads(learner, self.train, self.optimization.batch_size):
                    figures, cut = self._train_epoch(module, optimizer, index, stage, epoch, cut)
                if cut is not None:
                    self.on_state(self._state(*standing, epoch - 1, cut))
                    self._stopped(f"after batch {cut.batch} of {cut.num_batches} in", epoch, stage)
                entry |= figures
                scheduler.step()
                if self.val is not None:
                    if learner.encodes_once or (learner.reads_again(epoch) and learner.takes_kept):
                        learner.keep(self.val, whole=True)
                    entry["val"] = self._measure(self.val, "val", stage, epoch).as_dict()
                    if epoch >= stage.first_selectable:
                        best.update(learner, *measures.score(entry["val"]), epoch)
                self._end_epoch(optimizer, epoch, entry)
                if not learner.encodes_once:
                    learner.forget()
                self.history.append(entry)
                self.on_epoch(entry)
                self.on_state(self._state(*standing, epoch))
                if self.stop.due(now=True):
                    self._stopped("after", epoch, stage)
            best.restore(learner)
            known = (
                None
                if self.val is None
                else best.unimodal_accuracy(learner, self.history[-stage.epochs :], measures)
            )
            if known is not None:
                learner.note_unimodal_accuracy(known)
            elif learner.reads_again(stage.epochs - 1) or not has_finite_weights(learner):
                # The last step is one that no loss has seen.
                part, data = ("train", self.train) if self.val is None else ("val", self.val)
                self._measure(data, part, stage, stage.epochs - 1)
            learner.forget()
            state, first_epoch = None, 0

    def _state(
        self,
        index: int,
        optimizer: Any,
        scheduler: Any,
        best: BestWeights,
        epoch: int,
        cut: Cut | None = None,
    ) -> dict[str, Any]:
        """Return all it takes to go on after an epoch of a stage, or within the one behind that."""
        return {
            "stage": index,
            "epoch": epoch,
            "cut": vars(cut) if cut else None,
            "learner": learner_state(self.learner, best.parts),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "best": best.parts,
        }

    def _stopped(self, where: str, epoch: int, stage: Stage) -> None:
        text = (
            f"stopped by SIGTERM {where} epoch {epoch + 1} of {stage.epochs}: resume=True goes on from there"
        )
        raise Stopped(text, rank=self.fabric.global_rank)

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
            self._raise(
                bad, f"the {place} data", stage, epoch, f"{place}, for {num_nan} sample{'s' * (num_nan > 1)}"
            )
        if self.learner.note_unimodal_accuracy(measures.of_modalities(found.as_dict())):
            found, _ = measure(self.learner, dataset, self.fabric, measures=measures)
        return found

    def _train_epoch(
        self, module: Any, optimizer: Any, index: int, stage: Stage, epoch: int, cut: Cut | None
    ) -> tuple[dict[str, float], Cut | None]:
        """Train an epoch, or the rest of one; return its mean loss and seconds, and where it was stopped."""
        learner, fabric = self.learner, self.fabric
        # A seed of its own for every epoch: a resumed run needs no random state of the one before.
        seed = learner.generator(index, epoch, fabric.global_rank).initial_seed()
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
        module.train()
        steps, is_alone, first = learner.steps_per_batch, world() is None, cut.batch if cut else 0
        losses = Losses(steps * len(shard.batches), fabric.device, is_alone, steps * first)
        device, dtype = model_place(learner)
        batches = learner.reader.read(
            entries, shard.batches[first:], learner.modalities, device, dtype=dtype, seed=seed, first=first
        )
        if cut:
            cut.set_random_state(fabric.global_rank, fabric.device)
        stopped_at = None
        needs_marks = not is_alone and not in_memory(getattr(entries, "base", entries))
        # Workers go with a fit that fails, also while its error is held.
        with contextlib.closing(batches):
            for b, batch in enumerate(batches, first):
                if needs_marks:
                    # All processes must know of a mark that one of them has met, or none talks of the same.
                    batch |= all_marks(batch, learner.modalities)
                for step in range(steps):
                    optimizer.zero_grad()
                    loss = module(batch, step)
                    if (bad := losses.add(loss)) is not None:
                        # Of an earlier step the batch is gone, and read again.
                        content = batch if bad // steps == b else None
                        self._diverged(entries, shard, bad // steps, stage, epoch, seed, content)
                    fabric.backward(loss * shard.scales[b])
                    learner.edit_gradients(step, b / len(shard.batches))
                    optimizer.step()
                if self.stop.due(now=b + 1 == len(shard.batches)):
                    stopped_at = b + 1
                    break
        bad = losses.first_bad()
        # All processes stop with the one whose loss was the first.
        worst = min_over_processes(len(shard.batches) if bad is None else bad // steps)
        if worst < len(shard.batches):
            self._diverged(entries, shard, worst, stage, epoch, seed)
        share_buffers(learner)
        scales = torch.tensor(shard.scales, device=fabric.device).repeat_interleave(steps)
        scaled = losses.values * scales
        if cut:
            scaled[: steps * first] = cut.losses_of(fabric.global_rank, fabric.world_size)
        seconds = time.perf_counter() - begun
        if stopped_at is not None:
            done = scaled[: steps * stopped_at]
            return {}, Cut.after(stopped_at, len(shard.batches), done, seconds)
        mean = fabric.all_reduce(scaled.sum(), reduce_op="mean") / len(shard.batches)  # type: ignore[operator]
        return {"loss": float(mean), "seconds": seconds}, None

    def _diverged(
        self,
        entries: Any,
        shard: Shard,
        batch: int,
        stage: Stage,
        epoch: int,
        seed: int,
        content: dict[str, Any] | None = None,
    ) -> None:
        """Raise what ends the run, with the cause as far as the data show it.

        A gradient that is NaN under a finite loss shows in the batch after it, so all data are looked at
        where this batch is innocent.
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
        self._raise(bad, "the training data", stage, epoch, where, batch)

    def _raise(
        self,
        bad: dict[str, list[int]],
        part: str,
        stage: Stage,
        epoch: int,
        where: str,
        batch: int | None = None,
    ) -> None:
        cause, learner = input_text(part, bad), self.learner
        if not bad and (names := spoilt_by_absence(learner.model, self.train, learner.reader)):
            cause = absence_text(names)
        elif not bad:
            cause = cause_text(
                lr=self.optimization.lr,
                precision=self.fabric.strategy.precision.precision,
                has_stepped=batch != 0 or bool(self.history),
            )
        what = LOSS if batch is not None else PREDICTIONS
        text = f"{what} in epoch {epoch + 1} of {stage.epochs}, {where}: {cause}"
        samples = sorted({sample for found in bad.values() for sample in found})
        raise DivergedError(text, epoch=epoch, batch=batch, samples=samples)

    def _end_epoch(self, optimizer: Any, epoch: int, entry: dict[str, Any]) -> None:
        """Let the method do what it does between epochs; its time counts as training time."""
        begun = time.perf_counter()
        entry["method"] = self.learner.end_epoch(epoch, self.train, self.val)
        if self.learner.optimizer_reset_due():
            optimizer.state.clear()
        entry["seconds"] += time.perf_counter() - begun

"""The training loop: one flat loop over stages, epochs, batches and steps, the same for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric

from mmfast.batches import epoch_shard, loader
from mmfast.evaluation import Metrics, evaluate
from mmfast.methods.base import Learner
from mmfast.optimization import Optimization
from mmfast.processes import share_buffers
from mmfast.selection import Selection


@dataclass
class Run:
    """One run: what is trained, on what, and what is told of it.

    Attributes:
        learner: what is trained, in place.
        train, val: data sets; `val` may be None, then the last epoch is kept.
        fabric, optimization, num_workers: how.
        on_epoch: called with every epoch's entry of the history.
        on_state: called after every epoch with all it takes to go on from there.
        history: the entries so far.
    """

    learner: Learner
    train: Any
    val: Any | None
    fabric: Fabric
    optimization: Optimization
    num_workers: int
    on_epoch: Callable[[dict[str, Any]], None]
    on_state: Callable[[dict[str, Any]], None]
    history: list[dict[str, Any]] = field(default_factory=list)

    def go(self, state: dict[str, Any] | None) -> None:
        """Train all stages, from the beginning or from what `on_state` was given."""
        learner = self.learner
        first_stage, first_epoch = (state["stage"], state["epoch"] + 1) if state else (0, 0)
        for index, stage in enumerate(learner.stages(self.optimization.max_epochs)):
            if index < first_stage:
                continue
            learner.start_stage(stage)
            if state:
                learner.load_state_dict(state["learner"])
                learner.load_extra_state(state["extra"])
            optimizer = self.optimization.make_optimizer(learner.trainable_parameters())
            scheduler = self.optimization.make_scheduler(optimizer)
            selection = Selection()
            if state:
                optimizer.load_state_dict(state["optimizer"])
                self.fabric.strategy.precision.load_state_dict(state["precision"])
                scheduler.load_state_dict(state["scheduler"])
                selection = Selection(state["best"])
            module, optimizer = self.fabric.setup(learner, optimizer)
            for epoch in range(first_epoch, stage.epochs):
                entry: dict[str, Any] = {
                    "stage": stage.name,
                    "epoch": epoch,
                    **self._train_epoch(module, optimizer, index, epoch),
                }
                scheduler.step()
                if self.val is not None:
                    entry["val"] = asdict(self._measure(self.val))
                    own = entry["val"]["modality_accuracy"]
                    if epoch >= stage.first_selectable:
                        selection.update(learner, entry["val"]["accuracy"], list(own.values()), epoch)
                self._end_epoch(optimizer, epoch, entry)
                self.history.append(entry)
                self.on_epoch(entry)
                self.on_state(
                    {
                        "stage": index,
                        "epoch": epoch,
                        "learner": learner.state_dict(),
                        "extra": learner.extra_state(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "precision": self.fabric.strategy.precision.state_dict(),
                        "best": selection.best,
                    }
                )
            selection.load_best(learner)
            self._measure(self.train if self.val is None else self.val)
            state, first_epoch = None, 0

    def _measure(self, dataset: Any) -> Metrics:
        """Return the learner's figures by the predictions it makes when it knows its modalities' own."""
        found = evaluate(self.learner, dataset, self.fabric)
        if self.learner.note_own_accuracy(found.modality_accuracy):
            found = evaluate(self.learner, dataset, self.fabric)
        return found

    def _train_epoch(self, module: Any, optimizer: Any, stage: int, epoch: int) -> dict[str, float]:
        """Train one epoch; return its mean loss and its seconds."""
        learner, fabric = self.learner, self.fabric
        # A seed of its own for every epoch: a resumed run needs no random state of the one before.
        torch.manual_seed(learner.generator(stage, epoch, fabric.global_rank).initial_seed())
        begun = time.perf_counter()
        entries = learner.start_epoch(epoch, self.train)
        shard = epoch_shard(
            len(entries),
            self.optimization.batch_size,
            learner.generator(stage, epoch),
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        module.train()
        total = torch.zeros((), device=fabric.device)
        batches = loader(entries, shard.batches, self.num_workers)
        for b, (batch, scale) in enumerate(zip(batches, shard.scales, strict=True)):
            batch = fabric.to_device(batch)
            for step in range(learner.steps_per_batch):
                optimizer.zero_grad()
                loss = module(batch, step)
                fabric.backward(loss * scale)
                learner.edit_gradients(step, b / len(shard.batches))
                optimizer.step()
                total += loss.detach() * scale
        share_buffers(learner)
        mean = fabric.all_reduce(total, reduce_op="mean") / len(shard.batches)  # type: ignore[operator]
        return {"loss": float(mean), "seconds": time.perf_counter() - begun}

    def _end_epoch(self, optimizer: Any, epoch: int, entry: dict[str, Any]) -> None:
        """Let the method do what it does between epochs; its time counts as training time."""
        begun = time.perf_counter()
        entry["method"] = self.learner.end_epoch(epoch, self.train, self.val)
        if self.learner.optimizer_reset_due():
            optimizer.state.clear()
        entry["seconds"] += time.perf_counter() - begun

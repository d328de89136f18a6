"""Where a stage stands: all that its training goes on from, beside the learner itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from lightning_fabric.strategies import SingleDeviceStrategy

from mmfast.methods.base import Learner
from mmfast.training.averaging import Average
from mmfast.training.groups import parameter_groups
from mmfast.training.optimization import Optimization
from mmfast.training.schedule import Schedule
from mmfast.training.selection import BestWeights
from mmfast.training.state import Cut, learner_state


@dataclass
class Standing:
    """What a stage trains with.

    Attributes:
        learner: in this stage.
        fabric, settings: of the run.
        index: of the stage.
        module: the learner as Fabric wraps it.
        optimizer: as Fabric wraps it.
        schedule: of its learning rates.
        best: the best weights so far.
        average: of the weights, where it is wanted.
        is_ended: whether the stage ends before its last epoch.
    """

    learner: Learner
    fabric: Fabric
    settings: Optimization
    index: int
    module: Any
    optimizer: Any
    schedule: Schedule
    best: BestWeights
    average: Average | None
    is_ended: bool = False

    @classmethod
    def begin(
        cls,
        learner: Learner,
        fabric: Fabric,
        settings: Optimization,
        index: int,
        state: Mapping[str, Any] | None,
    ) -> Standing:
        """Return that of a stage that begins, or that goes on from what `state` gave.

        Args:
            learner: in the stage, with its weights of then.
            fabric, settings: of the run.
            index: of the stage.
            state: None: it begins.
        """
        precision = fabric.strategy.precision.precision
        optimizer = settings.make_optimizer(parameter_groups(learner, settings), precision=precision)
        schedule = Schedule(settings, optimizer, learner.stage.epochs)
        best = BestWeights.of(learner, state["best"] if state else {})
        if state:
            optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["precision"])
            schedule.load_state_dict(state["scheduler"])
        module, wrapped = fabric.setup(learner, optimizer)
        average = None if settings.ema_decay is None else Average(learner, settings.ema_decay)
        if state and average is not None:
            average.load_state_dict(state["average"])
        is_ended = bool(state and state.get("ended"))
        return cls(learner, fabric, settings, index, module, wrapped, schedule, best, average, is_ended)

    @cached_property
    def called(self) -> Any:
        """What makes training steps: the learner itself where Fabric would do nothing else than call it."""
        strategy = self.fabric.strategy
        is_plain = type(strategy.precision) is Precision and type(strategy) is SingleDeviceStrategy
        return self.learner if is_plain else self.module

    def drop_gradients(self) -> None:
        """Do as `zero_grad` of the optimizer, which takes longer to say so to torch's profiler."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def step(self) -> dict[str, Any]:
        """Take an optimizer step by the gradients that are there; return its rates, and their norm if known.

        Gradients that are infinite, as float16 makes them, are left to the precision, which skips the step.
        """
        settings = self.settings
        figures: dict[str, Any] = {"lr": [group["lr"] for group in self.optimizer.param_groups]}
        if (most := settings.gradient_clip_val) is not None:
            # Fabric undoes float16's scaling before.
            clip = functools.partial(self.fabric.clip_gradients, self.module, self.optimizer)
            if settings.gradient_clip_algorithm == "norm":
                figures["grad_norm"] = clip(max_norm=most, error_if_nonfinite=False)
            else:
                clip(clip_val=most)
        self.optimizer.step()
        self.schedule.end_step()
        if self.average is not None:
            self.average.update()
        return figures

    def has_waited(self, epoch: int) -> bool:
        """Whether nothing that is selected has improved for as many epochs as patience allows."""
        latest = self.best.last_improved
        return 0 < self.settings.patience <= (0 if latest is None else epoch - latest)

    def finish(self) -> None:
        """Let the learner have the weights that the stage ends with."""
        if self.average is not None:
            self.average.put()
        self.best.restore(self.learner)

    def state(self, epoch: int, cut: Cut | None = None) -> dict[str, Any]:
        """Return all it takes to go on after an epoch of the stage, or within the one behind that."""
        state = {
            "stage": self.index,
            "epoch": epoch,
            "cut": vars(cut) if cut else None,
            "learner": learner_state(self.learner, self.best.parts),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "best": self.best.parts,
            "ended": self.is_ended,
        }
        return state if self.average is None else state | {"average": self.average.state_dict()}

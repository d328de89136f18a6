"""The learning rate of a stage: by epochs, and in a warm-up that goes by optimizer steps."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

from mmfast.training.optimization import Optimization

_WARMUP = "warmup"  # key of its state beside that of the schedule by epochs


class Schedule:
    """Moves the learning rates of an optimizer.

    Args:
        settings: of the run.
        optimizer: whose rates it moves.
        num_epochs: of the stage.
    """

    def __init__(self, settings: Optimization, optimizer: Optimizer, num_epochs: int) -> None:
        self._by_epoch = _by_epoch(settings, optimizer, num_epochs)
        # Both multiply what the rate is at the time, so they do not disturb each other.
        self._by_step = _rising(optimizer, settings.warmup_steps) if settings.warmup_steps else None

    def end_step(self) -> None:
        """Move on after an optimizer step."""
        if self._by_step is not None:
            self._by_step.step()

    def end_epoch(self) -> None:
        """Move on after an epoch."""
        self._by_epoch.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to go on, as plain values."""
        state = self._by_epoch.state_dict()
        return state if self._by_step is None else state | {_WARMUP: self._by_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        state = dict(state)
        if self._by_step is not None:
            self._by_step.load_state_dict(state.pop(_WARMUP))
        self._by_epoch.load_state_dict(state)


def _by_epoch(settings: Optimization, optimizer: Optimizer, num_epochs: int) -> LRScheduler:
    if not (warmup := settings.warmup_epochs):
        return _after_warmup(settings, optimizer, num_epochs)
    parts = [_rising(optimizer, warmup), _after_warmup(settings, optimizer, num_epochs - warmup)]
    return SequentialLR(optimizer, parts, [warmup])


def _after_warmup(settings: Optimization, optimizer: Optimizer, num_epochs: int) -> LRScheduler:
    if settings.schedule == "cosine":
        return CosineAnnealingLR(optimizer, num_epochs)
    return StepLR(optimizer, settings.lr_step or 10**9, settings.lr_gamma)


def _rising(optimizer: Optimizer, length: int) -> LRScheduler:
    """Return the warm-up whose last part, of `length`, lies one below the full rate."""
    return LinearLR(optimizer, 1 / (length + 1), 1.0, length)

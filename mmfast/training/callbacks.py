"""What a program's own objects are told of a fit, and how they end it early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from mmfast.errors import describe, did_you_mean

# What other trainers call these moments.
_OTHER_NAMES = {
    "on_train_begin": "on_fit_start",
    "on_train_start": "on_fit_start",
    "on_train_end": "on_fit_end",
    "on_exception": "on_fit_end",
    "on_epoch": "on_epoch_end",
    "on_train_epoch_end": "on_epoch_end",
    "on_validation_epoch_end": "on_epoch_end",
    "on_validation_end": "on_epoch_end",
    "on_evaluate": "on_epoch_end",
    "on_batch_end": "on_step_end",
    "on_train_batch_end": "on_step_end",
    "on_optimizer_step": "on_step_end",
}


class Callback:
    """What `Trainer(callbacks=[...])` calls; any object with some of these methods is one.

    All are called in every process of a run. One that sets `trainer.should_stop = True` ends the stage after
    the epoch that is under way, in all processes; the best weights are kept, and the method's further stages
    follow, without which it would be half a model: set it again in them to end them, too, after an epoch.
    """

    def on_fit_start(self, trainer: Any, learner: Any) -> None:
        """Be told that data and settings are found to be right, and training begins, or goes on."""

    def on_step_end(self, trainer: Any, learner: Any, entry: dict[str, Any]) -> None:
        """Be told of an optimizer step, whose gradients are still there.

        Args:
            trainer: which trains.
            learner: what it trains, in training mode.
            entry: "stage", "epoch", "batch", of the epoch from 0, and "step" of the batch; "lr" of each group
                of parameters; "loss", whose mean over processes is that of the step, and "grad_norm" before
                clipping, where that is by norm, as scalar tensors: to look at them is to wait for a GPU.
        """

    def on_epoch_end(self, trainer: Any, learner: Any, entry: dict[str, Any]) -> None:
        """Be told of an epoch; `entry` is that of `trainer.history`, and may get further plain values.

        The learner has the weights that train, also where it is their average that is validated.
        """

    def on_fit_end(self, trainer: Any, learner: Any, error: BaseException | None) -> None:
        """Be told that the fit has ended, by an error or without: Stopped and KeyboardInterrupt are errors.

        Without one the learner has its final weights.
        """


_HOOKS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """Callbacks of a trainer, called in their order.

    Args:
        callbacks: objects with some of the methods of `Callback`.
        trainer: what they are given.

    Raises:
        TypeError: one of them has none of the methods, or is a class.
        ValueError: one has a method "on_..." that nobody would call.
    """

    def __init__(self, callbacks: Iterable[Any], trainer: Any) -> None:
        if not isinstance(callbacks, list | tuple):
            raise TypeError(f"callbacks must be a list of objects, got {describe(callbacks)}")
        self.callbacks = list(callbacks)
        self._trainer = trainer
        self.check()

    def check(self) -> None:
        """Raise what the callbacks that there are by now are wrong in."""
        for number, callback in enumerate(self.callbacks):
            _check(f"callbacks[{number}]", callback)

    def has(self, hook: str) -> bool:
        """Whether anyone wants to be told of this."""
        return any(hasattr(callback, hook) for callback in self.callbacks)

    def tell(self, hook: str, learner: Any, *more: Any) -> None:
        """Call a method of all that have it."""
        for callback in self.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(self._trainer, learner, *more)

    @contextlib.contextmanager
    def around(self, learner: Any) -> Iterator[None]:
        """Context of a fit: all are told of its start and its end, whatever ends it."""
        try:
            self.tell("on_fit_start", learner)
            yield
        except BaseException as error:
            self._tell_end(learner, error)
            raise
        self._tell_end(learner, None)

    def _tell_end(self, learner: Any, error: BaseException | None) -> None:
        """Call `on_fit_end` of all, also where that of one fails; the first error is what is raised."""
        first = error
        for callback in self.callbacks:
            try:
                if hasattr(callback, "on_fit_end"):
                    callback.on_fit_end(self._trainer, learner, error)
            except Exception as failed:
                if first is None:
                    first = failed
                else:
                    first.add_note(f"Besides, on_fit_end of {describe(callback)} failed: {failed}")
        if error is None and first is not None:
            raise first


def _check(name: str, callback: Any) -> None:
    if isinstance(callback, type):
        raise TypeError(f"{name} must be an object, {callback.__name__}(), got the class")
    methods = [word for word in dir(callback) if word.startswith("on_") and callable(getattr(callback, word))]
    for method in methods:
        if method not in _HOOKS:
            near = did_you_mean(method, _HOOKS, _OTHER_NAMES)
            raise ValueError(
                f"{name} must have methods among {', '.join(_HOOKS)}, got {method} of "
                f"{describe(callback)}{near}"
            )
    if not methods:
        raise TypeError(f"{name} must have one of the methods {', '.join(_HOOKS)}, got {describe(callback)}")

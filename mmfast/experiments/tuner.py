"""The trials of several methods, of some of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mmfast.experiments.journal import trial_of
from mmfast.experiments.parallel import side_by_side
from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.runs import num_gpus
from mmfast.experiments.trials import Trial
from mmfast.experiments.tuning import Tuned, Tuning
from mmfast.methods import Method


class TrialListener(Protocol):
    """Who is told how far trials are; where several methods have theirs at a time, from a thread."""

    def begin(self, method: Method, number: int) -> None:
        """Note that a trial of a method begins, by its number from 0."""

    def epoch(self, method: Method) -> None:
        """Note that the current trial of a method has made an epoch."""

    def end(self, method: Method, number: int, trial: Trial) -> None:
        """Note what a trial has become."""

    def wait(self, text: str) -> None:
        """Note in a sentence what the trials of a method wait for."""


@dataclass(frozen=True)
class Tuner:
    """Makes trials.

    Attributes:
        setup: data, model and settings.
        tuning: how many, and of what.
        out: folder under which trials are kept; None keeps none.
    """

    setup: RunSetup
    tuning: Tuning
    out: Path | None

    def num_made(self, method: Method) -> int:
        """Return how many trials of a method are there by now, of those wanted."""
        return self.tuning.num_made(self.setup, method, self.out)

    def tune_all(
        self, methods: Sequence[Method], jobs: int = 1, listener: TrialListener | None = None
    ) -> Iterator[Tuned]:
        """Yield each method with the setting of its trials, in the order in which they are found.

        The trials of one method come one after the other, as each is drawn from those before.

        Args:
            methods: to tune.
            jobs: how many of them at a time; see `parallel.side_by_side`.
            listener: is told of trials that are made now.

        Raises:
            As `tuning.tune` and `side_by_side`.
        """

        def note(index: int, event: dict[str, Any]) -> None:
            if listener is not None:
                _tell(listener, methods[index], event)

        calls = [(method, self.num_made(method)) for method in methods]
        # Trials are made on one device.
        gpus = int(jobs > 1 and num_gpus(self.setup, methods[0]) > 0)
        options: dict[str, Any] = {"folder": self.out, "gpus": gpus, "on_event": note}
        for _, tuned in side_by_side(_tune, calls, jobs, shared=self, **options):
            yield tuned

    def __getstate__(self) -> dict[str, Any]:
        # Other processes may have another working folder.
        return self.__dict__ | {"out": None if self.out is None else self.out.absolute()}


def _tune(tuner: Tuner, method: Method, made: int, tell: Callable[[Any], None]) -> Tuned:
    """Return a method with its setting, and tell of its trials."""

    def end(number: int, trial: Trial) -> None:
        tell({"ended": number, "trial": asdict(trial)})
        if number + 1 < tuner.tuning.trials:
            tell({"begun": number + 1})

    if made < tuner.tuning.trials:
        tell({"begun": made})
    return tuner.tuning.tune(
        tuner.setup,
        method,
        tuner.out,
        on_trial=end,
        on_epoch=lambda entry: tell({"epoch": entry["epoch"]}),
        wait=lambda text: tell({"waits": text}),
    )


def _tell(listener: TrialListener, method: Method, event: dict[str, Any]) -> None:
    if "ended" in event:
        listener.end(method, event["ended"], trial_of(event["trial"]))
    elif "begun" in event:
        listener.begin(method, event["begun"])
    elif "epoch" in event:
        listener.epoch(method)
    else:
        listener.wait(event["waits"])

"""Trials of a method's settings: which to try next, which to end early, and what each has scored."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mmfast.data.seeds import mixed
from mmfast.errors import needs_train
from mmfast.ranges import Choices, Numbers

# Trials that must have run to their end before another is ended early: the median of fewer says little.
_UNPRUNED = 4
# Part of the first run's epochs in which none is ended: a low learning rate, or a method that acts after a
# warm-up, begins behind.
_PATIENCE = 1 / 3
# Trials before TPE looks at scores; they lie evenly in the ranges until then.
_EVEN = 10
# Of each field one: the parts of multiples of their roots fill [0, 1) evenly, also together (Richtmyer).
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True)
class Trial:
    """One setting and what it has scored.

    Attributes:
        settings: what was drawn, by field of the method or of Optimization; the first trial has the defaults.
        score: mean over seeds of the figure that selects, on validation data, with the weights that are
            selected. Of a trial that was pruned the best it had by then, None where it has none.
        scores: of each seed that was finished.
        pruned: epochs after which it was ended, as the median of trials before had more; None: it was not.
        diverged: why it has no score, "" where it has one.
        steps: [epoch, best score by then] of all selectable epochs, counted over seeds.
        seconds: that it took.
    """

    settings: dict[str, Any]
    score: float | None
    scores: list[float | None] = field(default_factory=list)
    pruned: int | None = None
    diverged: str = ""
    steps: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether it has a score that counts against others."""
        return self.pruned is None and self.score is not None

    def told(self) -> dict[str, Any]:
        """Return what results tell of it: all but the course of its score."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}


def best_of(trials: Sequence[Trial], sign: float) -> int:
    """Return the number of the best trial that ran to its end, the earliest of equals; 0 where none did."""
    whole = [number for number, trial in enumerate(trials) if trial.is_whole]
    return max(whole, key=lambda number: sign * (trials[number].score or 0.0), default=0)


class Search:
    """Chooses trials: the first has the defaults, nine lie evenly in the ranges, then Optuna's TPE draws.

    What comes next follows from the trials before and their number alone, so that a search which goes on in
    another process is the same. Of the fields that `space` begins with, evenly is the same in all searches:
    methods share the learning rates that they try first.

    Args:
        space: what to draw, by name.
        defaults: of these names.
        sign: 1.0 where the highest score is the best, -1.0 where the lowest.
        epochs: of a run.
    """

    def __init__(
        self, space: Mapping[str, Numbers | Choices], defaults: Mapping[str, Any], sign: float, epochs: int
    ) -> None:
        self.space, self.defaults, self.sign = dict(space), dict(defaults), sign
        self.patience = math.ceil(_PATIENCE * epochs)

    def next(self, past: Sequence[Trial]) -> Asked:
        """Return the trial to make after others."""
        with _quiet() as optuna:
            study = optuna.create_study(
                direction="maximize",
                # One field at a time: trials of the defaults may lack a field whose default is out of range.
                sampler=optuna.samplers.TPESampler(
                    seed=mixed(0, len(past), 1) & 0xFFFFFFFF, n_startup_trials=_EVEN, multivariate=False
                ),
                pruner=optuna.pruners.MedianPruner(_UNPRUNED, self.patience),
            )
            for trial in past:
                study.add_trial(self._as_optuna(trial, optuna))
            if not past:
                return Asked(dict(self.defaults), None, self.sign)
            if len(past) < _EVEN:
                study.enqueue_trial(self._evenly(len(past)))
            drawn = study.ask({name: _distribution(of, optuna) for name, of in self.space.items()})
        return Asked(
            {name: self.space[name].value(drawn.params[name]) for name in self.space}, drawn, self.sign
        )

    def _evenly(self, number: int) -> dict[str, Any]:
        """Return what a trial draws of an even sequence, by name."""
        parts = ((0.5 + number * math.sqrt(_PRIMES[place])) % 1 for place in range(len(self.space)))
        return {name: of.at(part) for (name, of), part in zip(self.space.items(), parts, strict=True)}

    def _as_optuna(self, trial: Trial, optuna: Any) -> Any:
        # A default that lies outside its range teaches the sampler nothing.
        found = {name: of.drawn(_hashable(trial.settings[name])) for name, of in self.space.items()}
        params = {name: value for name, value in found.items() if value is not None}
        steps = {step: self.sign * score for step, score in trial.steps}
        pruned = trial.pruned is not None
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.PRUNED if pruned else optuna.trial.TrialState.COMPLETE,
            # Without a score: worse than all.
            value=-math.inf if trial.score is None else self.sign * trial.score,
            params=params,
            distributions={name: _distribution(self.space[name], optuna) for name in params},
            intermediate_values=steps,
        )


@dataclass
class Asked:
    """A trial that is under way.

    Attributes:
        settings: to try.
        drawn: Optuna's trial, None of the defaults, which are never ended early.
        sign: of scores.
        steps: as Trial has them.
    """

    settings: dict[str, Any]
    drawn: Any
    sign: float
    steps: list[tuple[int, float]] = field(default_factory=list)

    def note(self, step: int, score: float) -> bool:
        """Take the best score after an epoch; return whether the trial is to end, by the median rule."""
        if not math.isfinite(score):
            return False
        self.steps.append((step, score))
        if self.drawn is None:
            return False
        with _quiet():
            self.drawn.report(self.sign * score, step)
            return self.drawn.should_prune()

    def ended(
        self, scores: Sequence[float], *, pruned: int | None = None, diverged: str = "", seconds: float
    ) -> Trial:
        """Return what it has become."""
        score = None
        if pruned is not None:
            score = self.steps[-1][1]
        elif not diverged and all(map(math.isfinite, scores)):
            score = statistics.fmean(scores)
        known = [value if math.isfinite(value) else None for value in scores]
        return Trial(self.settings, score, known, pruned, diverged, self.steps, seconds)


def _distribution(of: Numbers | Choices, optuna: Any) -> Any:
    distributions = optuna.distributions
    if isinstance(of, Choices):
        return distributions.CategoricalDistribution(of.values)
    kind = distributions.IntDistribution if of.is_whole else distributions.FloatDistribution
    return kind(of.low, of.high, log=of.log)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Yield optuna; what it logs of itself is not for who compares methods."""
    with needs_train("tuning"):
        import optuna
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)


def check_optuna() -> None:
    """Raise ImportError where Optuna is not installed."""
    with _quiet():
        # Entering imports it.
        pass

"""The same budget for every method: as many trials of its settings, scored on validation data alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmfast.experiments.journal import Journal, with_tuples
from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.runs import PlannedRun
from mmfast.experiments.trial_runs import TrialRuns, drawn_names, with_settings
from mmfast.experiments.trials import Trial, best_of, check_optuna
from mmfast.files import plain
from mmfast.methods import Method
from mmfast.training.optimization import Optimization
from mmfast.training.stopping import Stopped, listening

# Folder of the trials, beside results.json.
TRIALS = "tuning"
# Seeds of trials begin here: none is one of the runs that are tested.
FIRST_SEED = 1000


@dataclass(frozen=True)
class Tuning:
    """How the methods of a comparison are tuned.

    Attributes:
        trials: of each method.
        num_seeds: runs of each trial.
        fixed: names of what stays as it is given, by method.
    """

    trials: int
    num_seeds: int = 1
    fixed: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """The seeds of a trial's runs."""
        return list(range(FIRST_SEED, FIRST_SEED + self.num_seeds))

    def drawn(self, method: Method) -> list[str]:
        """Return the names of what is drawn for a method."""
        return drawn_names(method, self.fixed.get(method.name, ()))

    def check(self, setup: RunSetup, methods: Sequence[Method], num_seeds: int) -> None:
        """Raise what tuning has against methods, data and machine, before any training.

        Args:
            setup: of the comparison.
            methods: of it.
            num_seeds: of the runs that are tested.

        Raises:
            ImportError: Optuna is not installed.
            ValueError: no trials, nothing to draw for a method, no validation data, or seeds that meet.
        """
        for name, value in (("trials", self.trials), ("tune_seeds", self.num_seeds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_seeds > FIRST_SEED:
            raise ValueError(f"seeds must be at most {FIRST_SEED} with trials, got {num_seeds}")
        if not setup.sizes.get("val"):
            raise ValueError("trials must be scored on validation data, got none")
        for method in methods:
            if not self.drawn(method):
                names = ", ".join(drawn_names(method))
                raise ValueError(
                    f"trials must have something to draw for {method.name}, got {names} set: leave one of "
                    f"them open, or {method.name} out"
                )
        check_optuna()

    def tune(self, setup: RunSetup, method: Method, out: Path | None, **listeners: Any) -> Tuned:
        """Return a method's setting, chosen by its trials, which lie under `out`, if anywhere; see `tune`."""
        return tune(
            setup,
            method,
            trials=self.trials,
            seeds=self.seeds,
            folder=_folder(out),
            fixed=self.fixed.get(method.name, ()),
            **listeners,
        )

    def num_made(self, setup: RunSetup, method: Method, out: Path | None) -> int:
        """Return how many of a method's trials lie under `out`."""
        fixed = self.fixed.get(method.name, ())
        runs = TrialRuns(setup.with_settings(devices=1), method, self.seeds, fixed)
        return min(self.trials, len(_journal(_folder(out), method, runs).read()))

    def told(self, methods: Sequence[Method]) -> dict[str, Any]:
        """Return what results tell of it, before there is a trial."""
        drawn = {method.name: self.drawn(method) for method in methods}
        return {"trials": self.trials, "seeds": self.seeds, "drawn": drawn, "methods": {}}


@dataclass(frozen=True)
class Tuned:
    """A method with the best setting of its trials.

    Attributes:
        method: with that setting.
        optimization: with that setting.
        trials: all of them.
        chosen: number of the best one, from 0.
        select: the figure that scores, such as "val/accuracy".
    """

    method: Method
    optimization: Optimization
    trials: list[Trial]
    chosen: int
    select: str

    @classmethod
    def of(cls, method: Method, optimization: Optimization, told: Mapping[str, Any]) -> Tuned:
        """Return what was told of the tuning of a method, which had these settings before."""
        trials = [Trial(**{**trial, "settings": with_tuples(trial["settings"])}) for trial in told["trials"]]
        settled = with_settings(method, optimization, trials[told["chosen"]].settings)
        return cls(*settled, trials, told["chosen"], told["select"])

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen, by name."""
        return self.trials[self.chosen].settings

    def settled(self, planned: PlannedRun) -> PlannedRun:
        """Return a run with these settings."""
        return replace(planned, method=self.method, optimization=self.optimization)

    def told(self) -> dict[str, Any]:
        """Return it as plain values, from which `of` makes it."""
        return plain(
            {
                "select": self.select,
                "chosen": self.chosen,
                "settings": self.settings,
                "score": self.trials[self.chosen].score,
                "trials": [trial.told() for trial in self.trials],
            }
        )


def tune(
    setup: RunSetup,
    method: Method,
    *,
    trials: int,
    seeds: Sequence[int] = (FIRST_SEED,),
    folder: Path | None = None,
    fixed: Collection[str] = (),
    on_trial: Callable[[int, Trial], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    wait: Callable[[str], None] = print,
) -> Tuned:
    """Try settings of a method and of its optimizer on validation data, and return the best.

    The first trial has the settings as they are given, the others what `Search` draws from the ranges beside
    the fields. A trial trains with each seed; its score is the figure that model selection looks at, on
    validation data, with the weights that are selected. Test data are not read. No checkpoints are written,
    and runs are made on one device, whatever the setup's number.

    Args:
        setup: data, model and settings.
        method: what to tune.
        trials: of it.
        seeds: of a trial's runs.
        folder: where <method>.json keeps the trials, of which the same call goes on; None keeps nothing.
        fixed: names of what is not drawn.
        on_trial: called with the number of each trial that is made now, and what it has become.
        on_epoch: called with every epoch's entry of the history.
        wait: called with a sentence before this process waits for another, which tunes the method there.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the folder holds trials of other data or settings.
        Stopped: this process got SIGTERM. The trial that was under way begins anew.
    """
    runs = TrialRuns(setup.with_settings(devices=1), method, seeds, fixed, on_epoch)
    journal = _journal(folder, method, runs)
    with journal.alone(lambda: wait(f"Waiting for another process, which tunes {method.name} in {folder}.")):
        done = journal.read()[:trials]
        with listening() as stop:
            while len(done) < trials:
                done.append(runs.make(runs.search.next(done), stop))
                journal.write(done)
                if on_trial is not None:
                    on_trial(len(done) - 1, done[-1])
                if stop.asked:
                    raise Stopped(f"stopped by SIGTERM after trial {len(done)} of {trials}")
    chosen = best_of(done, runs.sign)
    settled = with_settings(method, setup.optimization, done[chosen].settings)
    return Tuned(*settled, done, chosen, runs.select)


def _folder(out: Path | None) -> Path | None:
    return None if out is None else out / TRIALS


def _journal(folder: Path | None, method: Method, runs: TrialRuns) -> Journal:
    return Journal(None if folder is None else folder / f"{method.name}.json", runs.facts())

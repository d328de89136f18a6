"""Who makes the runs of a comparison from Python: in memory, or in a folder as the command does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmfast.experiments.comparison import (
    ComparisonRunner,
    described,
    has_run,
    teller_of_epochs,
)
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.parallel import check_jobs, is_made_here, sensible_jobs, side_by_side
from mmfast.experiments.results import RESULTS
from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.runs import PlannedRun, diverged_entry, make_whole_run, num_gpus
from mmfast.experiments.tuner import TrialListener, Tuner
from mmfast.experiments.tuning import TRIALS, Tuned, Tuning
from mmfast.files import plain
from mmfast.methods import METHODS, Method
from mmfast.training.divergence import DivergedError
from mmfast.training.launchers import found, is_first

_OnEvent = Callable[[PlannedRun, int | None], None]
_OnEpoch = Callable[[dict[str, Any]], None] | None


class InMemory:
    """Makes the runs of a comparison, and keeps in memory what they leave.

    Args:
        setup: data, models and settings of all runs.
        methods: to compare.
        seeds: runs of each.
        tuning: how settings are found before the runs; None: they are as they are given.
    """

    out: Path | None = None

    def __init__(
        self, setup: RunSetup, methods: Sequence[Method], seeds: int, tuning: Tuning | None = None
    ) -> None:
        self.setup, self.methods, self.seeds, self.tuning = setup, methods, seeds, tuning
        self.tuned: dict[str, Tuned] = {}
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        self._outcomes: dict[tuple[str, int], Outcome] = {}

    def check(self, jobs: int | str, on_epoch: _OnEpoch) -> None:
        """Check, before any run, what is made at a time, and in which process.

        Args:
            jobs: a number, or "auto".
            on_epoch: as `make_all` takes it.

        Raises:
            ValueError: this machine, or this process, cannot make so many at a time, or trials.
        """
        world = found()
        if (jobs != 1 or self.tuning is not None) and world is not None and world.processes > 1:
            raise ValueError(
                f"jobs and trials must be left out of a program that {world.launcher} has started in several "
                "processes"
            )
        devices, wanted = self.setup.devices, self.number_of(jobs, self.seeds * len(self.methods))
        check_jobs(wanted, devices, num_gpus(self.setup, self.methods[0]) if wanted > 1 else 0)
        is_alone = is_made_here(wanted)
        if is_alone and self.tuning is None:
            return
        told = f"jobs={wanted}" if self.tuning is None else f"trials={self.tuning.trials}"
        if devices not in (1, "1") and (self.out is None or self.setup.is_made_here):
            raise ValueError(f"devices must be 1 with {told}, where runs are made here, got {devices!r}")
        if on_epoch is not None and not is_alone:
            raise ValueError(
                "on_epoch must be None with several jobs, as runs are made by processes of their own: on_run "
                "gets each"
            )
        if self.tuning is not None:
            self.tuning.check(self.setup, self.methods, self.seeds)

    def number_of(self, jobs: int | str, calls: int) -> int:
        """Return how many of some runs, or methods that are tuned, to make at a time."""
        if jobs != "auto":
            return int(jobs)
        gpus = num_gpus(self.setup, self.methods[0])
        return sensible_jobs(torch.get_num_threads(), gpus, self.setup.devices, calls)

    def left(self, epochs: Mapping[str, int]) -> list[PlannedRun]:
        """Return the runs to make, seeds outermost.

        Args:
            epochs: of a run, by method.
        """
        return [
            PlannedRun(method, seed, epochs[method.name])
            for seed in range(self.seeds)
            for method in self.methods
        ]

    def num_trials(self) -> int:
        """Return how many trials are to be made."""
        return 0 if self.tuning is None else self.tuning.trials * len(self.methods)

    def tune_all(self, jobs: int, listener: TrialListener) -> None:
        """Let the runs of all methods have the settings that trials find.

        Args:
            jobs: methods at a time.
            listener: is told of the trials.
        """
        assert self.tuning is not None
        tuner = Tuner(self.setup, self.tuning, None)
        found = {tuned.method.name: tuned for tuned in tuner.tune_all(self.methods, jobs, listener)}
        self.tuned = {method.name: found[method.name] for method in self.methods}

    def settled(self, planned: PlannedRun) -> PlannedRun:
        """Return a run with the settings that trials have found, if there were any."""
        tuned = self.tuned.get(planned.method.name)
        return planned if tuned is None else tuned.settled(planned)

    def make_all(
        self, runs: Sequence[PlannedRun], jobs: int, on_event: _OnEvent, on_epoch: _OnEpoch = None
    ) -> Iterator[dict[str, Any]]:
        """Make runs and yield the entry of each, without figures where it diverges.

        Args:
            runs: of this comparison.
            jobs: at a time.
            on_event: as `ComparisonRunner.make_all` takes it.
            on_epoch: called with every epoch's entry of the history; with one job alone.
        """

        def note(index: int, event: dict[str, Any]) -> None:
            on_event(runs[index], event.get("epoch"))

        calls = [(self.settled(planned), self.folder(planned), on_epoch) for planned in runs]
        options: dict[str, Any] = {"gpus": int(jobs > 1 and num_gpus(self.setup, self.methods[0]) > 0)}
        for _, made in side_by_side(_make, calls, jobs, shared=self.setup, on_event=note, **options):
            entry, outcome = made
            key = entry["method"], entry["seed"]
            self.entries[key] = entry
            if outcome is not None:
                self._outcomes[key] = outcome
            yield entry

    def folder(self, planned: PlannedRun) -> Path | None:
        """Return where the checkpoints of a run go."""
        return None

    def runs(self) -> list[dict[str, Any]]:
        """Return the entries of all runs, methods in the order they were given."""
        return [self.entries[method.name, seed] for method in self.methods for seed in range(self.seeds)]

    def outcomes(self) -> Mapping[tuple[str, int], Outcome]:
        """Return what the runs make of each test sample."""
        return self._outcomes

    def description(self) -> dict[str, Any]:
        """Return what results tell besides runs."""
        told = plain(described(self.setup, self.methods, self.tuning))
        for name, tuned in self.tuned.items():
            told["configuration"]["tuning"]["methods"][name] = tuned.told()
        return told


def _make(
    setup: RunSetup,
    planned: PlannedRun,
    folder: Path | None,
    on_epoch: _OnEpoch,
    tell: Callable[[Any], None],
) -> tuple[dict[str, Any], Outcome | None]:
    """Return the entry of a run, and what it makes of each test sample."""
    tell({})
    method, seed, outcome = planned.method, planned.seed, None
    try:
        entry, outcome = make_whole_run(
            planned.settled(setup), method, seed, folder, on_epoch=teller_of_epochs(tell, on_epoch)
        )
    except DivergedError as error:
        entry = diverged_entry(method, seed, error)
    return planned.told_in(entry), outcome


def _is_held(path: Path) -> bool:
    """Whether a path within a comparison's folder is a run, finished or not, or trials of a method."""
    if path.parent.name == TRIALS:
        return path.suffix == ".json" and path.stem in METHODS
    return path.parent.name == "runs" and "-seed" in path.name and has_run(path)


class InFolder(InMemory):
    """Makes the runs of a comparison in a folder, as the command does.

    Args:
        setup, methods, seeds, tuning: as above.
        out: the folder.
    """

    def __init__(
        self,
        setup: RunSetup,
        methods: Sequence[Method],
        seeds: int,
        tuning: Tuning | None,
        out: Path,
    ) -> None:
        super().__init__(setup, methods, seeds, tuning)
        self.out, self.is_first = out, is_first()
        self.runner = ComparisonRunner(setup, methods, seeds, out, tuning=tuning)

    def open(self, *, resume: bool, overwrite: bool) -> None:
        """Take in what the folder holds, or clear it.

        Raises:
            ValueError: it holds runs, and neither is wanted, or runs of other data or settings.
        """
        out, runner = self.runner.out, self.runner
        if out.exists() and not out.is_dir():
            raise ValueError(f"out_dir must be a folder, {out} is a file")
        if overwrite and self.is_first:
            runner.clear()
        elif (
            not resume and self.is_first and ((out / RESULTS).exists() or any(map(_is_held, out.glob("*/*"))))
        ):
            raise ValueError(f"{out} holds runs already: give resume=True, overwrite=True or another out_dir")
        if resume or self.is_first:
            # What the first process clears, or has begun with, is no result that others go on with.
            runner.results.open()

    def left(self, epochs: Mapping[str, int]) -> list[PlannedRun]:
        return self.runner.left(epochs)

    def num_trials(self) -> int:
        return super().num_trials() - sum(map(self.runner.num_trials, self.methods)) if self.tuning else 0

    def tune_all(self, jobs: int, listener: TrialListener) -> None:
        self.tuned = {tuned.method.name: tuned for tuned in self.runner.tune_all(jobs, listener)}

    def make_all(
        self, runs: Sequence[PlannedRun], jobs: int, on_event: _OnEvent, on_epoch: _OnEpoch = None
    ) -> Iterator[dict[str, Any]]:
        if not self.is_first:
            # One of several processes of a run: the first waits for it, and writes.
            yield from super().make_all(runs, jobs, on_event, on_epoch)
            return
        settled = [self.settled(planned) for planned in runs]
        for planned, entry in self.runner.make_all(settled, jobs, on_event=on_event, on_epoch=on_epoch):
            self.entries[planned.method.name, planned.seed] = entry
            yield entry

    def folder(self, planned: PlannedRun) -> Path | None:
        return self.runner.folder(planned)

    def runs(self) -> list[dict[str, Any]]:
        found = {(entry["method"], entry["seed"]): entry for entry in self.runner.results.content["runs"]}
        self.entries = found | self.entries
        return super().runs()

    def outcomes(self) -> Mapping[tuple[str, int], Outcome]:
        return {**self.runner.outcomes(), **self._outcomes} if self._outcomes else self.runner.outcomes()

"""Comparisons of methods over seeds: kept in results.json, continued where they stopped."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmfast.experiments.file_names import FILES
from mmfast.experiments.journal import clear_journals
from mmfast.experiments.outcomes import OUTCOME, OutcomeFiles
from mmfast.experiments.parallel import check_jobs, clear_scratch, sensible_jobs, side_by_side
from mmfast.experiments.results import FORMAT, METRICS, RESULTS, TUNING, Results
from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.runs import PlannedRun, diverged_entry, machine, make_run, num_gpus, versions
from mmfast.experiments.setup import Setup
from mmfast.experiments.subprocesses import run_in_subprocess
from mmfast.experiments.tuner import TrialListener, Tuner
from mmfast.experiments.tuning import TRIALS, Tuned, Tuning
from mmfast.files import locked, plain
from mmfast.methods import METHODS, Method
from mmfast.training import checkpoint
from mmfast.training.divergence import DivergedError
from mmfast.training.launchers import refuse_launcher
from mmfast.training.run_folder import LAST, MODEL, alone_in


@dataclass
class ComparisonRunner:
    """Runs of several methods with seeds 0, 1, ... that share everything else.

    Attributes:
        setup: data, model and settings of all runs.
        methods: what to compare.
        num_seeds: runs of each method.
        out: folder of results.json and the runs' checkpoints.
        wait: called with a sentence before this process waits for another one; None: nobody is told.
        tuning: how settings are found before the runs; None: they are as they are given.
        results: of the folder.
    """

    setup: RunSetup
    methods: Sequence[Method]
    num_seeds: int
    out: Path
    wait: Callable[[str], None] | None = print
    tuning: Tuning | None = None
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self._tuned: dict[str, Tuned] = {}
        self.results = Results(self.out, plain(described(self.setup, self.methods, self.tuning)))

    def __repr__(self) -> str:
        names = ", ".join(method.name for method in self.methods)
        done = len(self.results.content["runs"])
        lines = [f"ComparisonRunner({names}; {self.num_seeds} seeds, {done} runs done, out {self.out}"]
        return "\n  ".join([*lines, *repr(self.setup).splitlines()]) + ")"

    def prepare(self, *, overwrite: bool = False) -> list[PlannedRun]:
        """Check everything before any training, take in what `out` holds, and return what is left to make.

        Args:
            overwrite: drop what `out` holds of another comparison, or of an earlier state of this one.

        Raises:
            ValueError: data that do not fit a method, results.json of another configuration or not readable.
        """
        if self.num_seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.num_seeds}")
        refuse_launcher("mmfast compare", self.setup.num_nodes)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"out must be a folder, {self.out} is a file")
        epochs = {method.name: self.setup.check(method) for method in self.methods}
        if self.tuning is not None:
            self.tuning.check(self.setup, self.methods, self.num_seeds)
        # Raises where accelerator, devices or precision cannot be had.
        self.setup.trainer(self.methods[0], 0, None, loggers=())
        if overwrite:
            self.clear()
        self.results.open()
        return self.left(epochs)

    def left(self, epochs: Mapping[str, int]) -> list[PlannedRun]:
        """Return the runs that are still to be made.

        Args:
            epochs: of a run, by method.
        """
        # Seeds outermost: a comparison that stops early has all methods of its first seeds.
        runs = [
            PlannedRun(method, seed, epochs[method.name])
            for seed in range(self.num_seeds)
            for method in self.methods
        ]
        return [planned for planned in runs if not self._done(planned)]

    @property
    def tuner(self) -> Tuner:
        """What makes the trials."""
        assert self.tuning is not None
        return Tuner(self.setup, self.tuning, self.out)

    def num_trials(self, method: Method) -> int:
        """Return how many trials of a method are there by now, of those wanted."""
        tuner = self.tuner
        return tuner.tuning.trials if self.results.tuned(method.name) else tuner.num_made(method)

    def tune_all(self, jobs: int = 1, listener: TrialListener | None = None) -> list[Tuned]:
        """Make the trials of all methods, as far as they are not there, and return what they find.

        Runs have the settings that were found from then on.

        Args:
            jobs: how many methods at a time.
            listener: is told of trials that are made now.

        Raises:
            As `Tuner.tune_all`.
        """
        found = {}
        for method in self.methods:
            if told := self.results.tuned(method.name):
                found[method.name] = Tuned.of(method, self.setup.optimization, told)
        left = [method for method in self.methods if method.name not in found]
        self.check_jobs(jobs)
        for tuned in self.tuner.tune_all(left, jobs, listener) if left else ():
            found[tuned.method.name] = tuned
        in_order = [found[method.name] for method in self.methods]
        for tuned in in_order:
            self.note_tuned(tuned)
        return in_order

    def note_tuned(self, tuned: Tuned) -> None:
        """Let the runs of a method have the setting that was found, and results tell of it."""
        self.results.note_tuned(tuned.method.name, tuned.told())
        self._tuned[tuned.method.name] = tuned

    def settled(self, planned: PlannedRun) -> PlannedRun:
        """Return a run with the setting that was found for its method."""
        return self._tuned[planned.method.name].settled(planned)

    def make(
        self, planned: PlannedRun, on_epoch: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Make a run, or finish it, add its entry to results.json and return it.

        A run whose loss is NaN or infinite is one without figures, which says why under "diverged". One that
        another process makes at the time is waited for.
        """
        folder = self.folder(planned)
        name = f"{planned.method.name} with seed {planned.seed}"
        waiting = f"Waiting for another process, which makes {name} in {folder}."
        with locked(self._lock(folder), wait=lambda: self.wait and self.wait(waiting)):
            self.results.open()
            if self._done(planned):
                return self.results.find(planned.method.name, planned.seed) or {}
            setup = planned.settled(self.setup)
            try:
                if isinstance(setup, Setup) and not setup.is_made_here:
                    entry = run_in_subprocess(setup, planned, folder)
                else:
                    entry = make_run(setup, planned.method, planned.seed, folder, on_epoch=on_epoch)
            except DivergedError as error:
                entry = diverged_entry(planned.method, planned.seed, error)
            entry = planned.told_in(entry)
            self.results.add(entry, folder)
        return entry

    def make_all(
        self,
        runs: Sequence[PlannedRun],
        jobs: int = 1,
        *,
        on_event: Callable[[PlannedRun, int | None], None] | None = None,
        on_epoch: Callable[[dict[str, Any]], None] | None = None,
    ) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
        """Make runs as `make` does, several at a time, and yield each with its entry when it is done.

        Args:
            runs: of this comparison.
            jobs: at a time; see `parallel.side_by_side`.
            on_event: gets a run and None when it begins, and with it each epoch of its stages that is done.
            on_epoch: called with every epoch's entry of the history; with one job alone.

        Raises:
            As `make` and `side_by_side`.
        """

        def note(index: int, event: dict[str, Any]) -> None:
            if "waits" in event:
                if self.wait is not None:
                    self.wait(event["waits"])
            elif on_event is not None:
                on_event(runs[index], event.get("epoch"))

        self.check_jobs(jobs)
        calls = [(planned, on_epoch) for planned in runs]
        gpus = int(self.setup.devices) if jobs > 1 and self._num_gpus else 0
        options: dict[str, Any] = {"folder": self.out, "gpus": gpus, "on_event": note}
        for index, entry in side_by_side(_make, calls, jobs, shared=self, **options):
            self.results.open()
            yield runs[index], entry

    def check_jobs(self, jobs: int) -> None:
        """Raise ValueError where this machine cannot make so many of the runs at a time."""
        check_jobs(jobs, self.setup.devices, self._num_gpus if jobs > 1 else 0)

    def sensible_jobs(self, calls: int) -> int:
        """Return how many of some runs, or trials, to make at a time on this machine."""
        return sensible_jobs(torch.get_num_threads(), self._num_gpus, self.setup.devices, calls)

    @cached_property
    def _num_gpus(self) -> int:
        return num_gpus(self.setup, self.methods[0])

    def __getstate__(self) -> dict[str, Any]:
        # For other processes, which read what the folder holds, and print nothing.
        # They may have another working folder.
        out = self.out.absolute()
        return self.__dict__ | {"wait": None, "out": out, "results": Results(out, self.results.mine)}

    def folder(self, planned: PlannedRun) -> Path:
        """Return where the checkpoints of a run lie."""
        return self.out / "runs" / f"{planned.method.name}-seed{planned.seed}"

    def outcomes(self) -> OutcomeFiles:
        """Return what each run makes of the test samples."""
        runs = self.results.content["runs"]
        made = [PlannedRun(METHODS[entry["method"]](), entry["seed"], 0) for entry in runs]
        return OutcomeFiles({(run.method.name, run.seed): self.folder(run) for run in made})

    def _done(self, planned: PlannedRun) -> bool:
        entry = self.results.find(planned.method.name, planned.seed)
        if entry is None or "diverged" in entry:
            return entry is not None
        if "accuracy" not in entry["metrics"]:
            # Of other tasks than classes a run leaves its figures alone.
            return True
        # Results of before have neither; the run is tested again.
        return (self.folder(planned) / OUTCOME).exists() and (not self.setup.probe or "probe" in entry)

    def clear(self) -> None:
        """Remove what comparisons write, and nothing else.

        Raises:
            BlockingIOError: another process makes one of the runs.
        """
        runs = []
        for folder in (self.out / "runs").glob("*"):
            name, _, seed = folder.name.rpartition("-seed")
            if name in METHODS and re.fullmatch(r"\d+", seed):
                runs.append(folder)
        with contextlib.ExitStack() as locks:
            for folder in runs:
                try:
                    locks.enter_context(locked(self._lock(folder)))
                except BlockingIOError:
                    raise BlockingIOError(
                        f"another process makes a run in {folder}: wait for its end, or give another --out"
                    ) from None
            clear_journals(self.out / TRIALS)
            clear_scratch(self.out)
            for name in (RESULTS, f"{RESULTS}.damaged", *FILES):
                (self.out / name).unlink(missing_ok=True)
            for folder in runs:
                shutil.rmtree(folder)
        self.results = Results(self.out, self.results.mine)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.lock")


def described(setup: RunSetup, methods: Sequence[Method], tuning: Tuning | None) -> dict[str, Any]:
    """Return what results tell of a comparison besides its runs."""
    told = setup.description()
    told["configuration"]["methods"] = {method.name: method.config() for method in methods}
    if tuning is not None:
        told["configuration"][TUNING] = tuning.told(methods)
    return {"format": FORMAT, "versions": versions(), "machine": machine()} | told


def _make(
    comparison: ComparisonRunner,
    planned: PlannedRun,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    tell: Callable[[Any], None],
) -> dict[str, Any]:
    """Make a run of a comparison, and tell of its beginning, its epochs, and what it waits for."""
    tell({})
    if comparison.wait is None:
        # In another process, where it serves several runs.
        comparison = copy.copy(comparison)
        comparison.wait = lambda text: tell({"waits": text})
    return comparison.make(planned, teller_of_epochs(tell, on_epoch))


def teller_of_epochs(
    tell: Callable[[Any], None], on_epoch: Callable[[dict[str, Any]], None] | None
) -> Callable[[dict[str, Any]], None]:
    """Return what tells that an epoch is done by an event, and all of its entry to `on_epoch`, if given."""

    def note(entry: dict[str, Any]) -> None:
        tell({"epoch": entry["epoch"]})
        if on_epoch is not None:
            on_epoch(entry)

    return note


def has_run(folder: Path) -> bool:
    """Whether a run, finished or not, lies in `folder`."""
    return any((folder / name).exists() for name in (LAST, MODEL, METRICS))


def clear_run(folder: Path) -> None:
    """Remove the run in `folder`.

    Raises:
        BlockingIOError: another process trains there.
    """
    with alone_in(folder):
        for name in (LAST, MODEL):
            checkpoint.remove(folder / name)
        for name in (METRICS, OUTCOME):
            (folder / name).unlink(missing_ok=True)

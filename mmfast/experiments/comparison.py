"""Comparisons of methods over seeds: kept in results.json, continued where they stopped."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfast.experiments.outcomes import OUTCOME, OutcomeFiles
from mmfast.experiments.results import FORMAT, METRICS, RESULTS, Results
from mmfast.experiments.setup import (
    PlannedRun,
    RunSetup,
    Setup,
    diverged_entry,
    machine,
    make_run,
    versions,
)
from mmfast.experiments.subprocesses import run_in_subprocess
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
        wait: called with a sentence before this process waits for another one.
        results: of the folder.
    """

    setup: RunSetup
    methods: Sequence[Method]
    num_seeds: int
    out: Path
    wait: Callable[[str], None] = print
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.out, plain(self._description()))

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
        # Raises where accelerator, devices or precision cannot be had.
        self.setup.trainer(self.methods[0], 0, None)
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
        with locked(self._lock(folder), wait=lambda: self.wait(waiting)):
            self.results.open()
            if self._done(planned):
                return self.results.find(planned.method.name, planned.seed) or {}
            try:
                if isinstance(self.setup, Setup) and not self.setup.is_made_here:
                    entry = run_in_subprocess(self.setup, planned, folder)
                else:
                    entry = make_run(self.setup, planned.method, planned.seed, folder, on_epoch=on_epoch)
            except DivergedError as error:
                entry = diverged_entry(planned.method, planned.seed, error)
            self.results.add(entry, folder)
        return entry

    def folder(self, planned: PlannedRun) -> Path:
        """Return where the checkpoints of a run lie."""
        return self.out / "runs" / f"{planned.method.name}-seed{planned.seed}"

    def outcomes(self) -> OutcomeFiles:
        """Return what each run makes of the test samples."""
        runs = self.results.content["runs"]
        made = [PlannedRun(METHODS[entry["method"]](), entry["seed"], 0) for entry in runs]
        return OutcomeFiles({(run.method.name, run.seed): self.folder(run) for run in made})

    def _description(self) -> dict[str, Any]:
        told = self.setup.description()
        told["configuration"]["methods"] = {method.name: method.config() for method in self.methods}
        return {"format": FORMAT, "versions": versions(), "machine": machine()} | told

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
        from mmfast.experiments.pictures import PICTURES

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
            for name in (RESULTS, f"{RESULTS}.damaged", *PICTURES):
                (self.out / name).unlink(missing_ok=True)
            for folder in runs:
                shutil.rmtree(folder)
        self.results = Results(self.out, self.results.mine)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.lock")


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

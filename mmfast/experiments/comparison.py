"""Comparisons of methods over seeds: kept in results.json, continued where they stopped."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmfast.experiments.parallel import check_jobs, sensible_jobs, side_by_side
from mmfast.experiments.results import FORMAT, METRICS, RESULTS, Results
from mmfast.experiments.setup import (
    PlannedRun,
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
class Comparison:
    """Runs of several methods with seeds 0, 1, ... that share everything else.

    Attributes:
        setup: data, model and settings of all runs.
        methods: what to compare.
        num_seeds: runs of each method.
        out: folder of results.json and the runs' checkpoints.
        wait: called with a sentence before this process waits for another one; None: nobody is told.
        results: of the folder.
    """

    setup: Setup
    methods: Sequence[Method]
    num_seeds: int
    out: Path
    wait: Callable[[str], None] | None = print
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.out, plain(self._description()))

    def __repr__(self) -> str:
        names = ", ".join(method.name for method in self.methods)
        done = len(self.results.content["runs"])
        lines = [f"Comparison({names}; {self.num_seeds} seeds, {done} runs done, out {self.out}"]
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
            self._clear()
        self.results.open()
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
        with locked(self._lock(folder), wait=lambda: self.wait and self.wait(waiting)):
            self.results.open()
            if self._done(planned):
                return self.results.find(planned.method.name, planned.seed) or {}
            try:
                if self.setup.devices in (1, "1"):
                    entry = make_run(self.setup, planned.method, planned.seed, folder, on_epoch=on_epoch)
                else:
                    entry = run_in_subprocess(self.setup, planned, folder)
            except DivergedError as error:
                entry = diverged_entry(planned.method, planned.seed, error)
            self.results.add(entry, folder)
        return entry

    def make_all(
        self,
        runs: Sequence[PlannedRun],
        jobs: int = 1,
        *,
        on_event: Callable[[PlannedRun, int | None], None] | None = None,
    ) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
        """Make runs as `make` does, several at a time, and yield each with its entry when it is done.

        Args:
            runs: of this comparison.
            jobs: at a time; see `parallel.side_by_side`.
            on_event: gets a run and None when it begins, and with it each epoch of its stages that is done.

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
        calls = [(planned,) for planned in runs]
        gpus = int(self.setup.devices) if jobs > 1 and self._num_gpus else 0
        options: dict[str, Any] = {"folder": self.out, "gpus": gpus, "on_event": note}
        for index, entry in side_by_side(_make, calls, jobs, shared=self, **options):
            self.results.open()
            yield runs[index], entry

    def check_jobs(self, jobs: int) -> None:
        """Raise ValueError where this machine cannot make so many of the runs at a time."""
        check_jobs(jobs, self.setup.devices, self._num_gpus if jobs > 1 else 0)

    def sensible_jobs(self, runs: int) -> int:
        """Return how many of some runs to make at a time on this machine."""
        return sensible_jobs(torch.get_num_threads(), self._num_gpus, self.setup.devices, runs)

    @cached_property
    def _num_gpus(self) -> int:
        """GPUs of this machine that runs take."""
        kind = self.setup.trainer(self.methods[0], 0, None).fabric.device.type
        return torch.cuda.device_count() if kind == "cuda" else 0

    def __getstate__(self) -> dict[str, Any]:
        # For other processes, which read what the folder holds, and print nothing.
        return self.__dict__ | {"wait": None, "results": Results(self.out, self.results.mine)}

    def folder(self, planned: PlannedRun) -> Path:
        """Return where the checkpoints of a run lie."""
        return self.out / "runs" / f"{planned.method.name}-seed{planned.seed}"

    def _description(self) -> dict[str, Any]:
        setup, splits = self.setup, self.setup.splits
        return {
            "format": FORMAT,
            "versions": versions(),
            "machine": machine(),
            "data": {
                "name": splits.name,
                "source": setup.source,
                "description": splits.description,
                "sizes": {part: len(getattr(splits, part)) for part in ("train", "val", "test")},
                "shapes": splits.shapes,
                "classes": splits.class_names,
                "split_seed": splits.split_seed,
                "fingerprint": setup.fingerprint,
            },
            "configuration": {
                **setup.optimization.told(),
                **setup.learning,
                "dim": setup.dim,
                "fusion": setup.fusion,
                "precision": setup.precision,
                "encoders": setup.named_encoders or None,
                "methods": {method.name: method.config() for method in self.methods},
            },
        }

    def _done(self, planned: PlannedRun) -> bool:
        entry = self.results.find(planned.method.name, planned.seed)
        return entry is not None and (not self.setup.probe or "probe" in entry or "diverged" in entry)

    def _clear(self) -> None:
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


def _make(comparison: Comparison, planned: PlannedRun, tell: Callable[[Any], None]) -> dict[str, Any]:
    """Make a run of a comparison, and tell of its beginning, its epochs, and what it waits for."""
    tell({})
    if comparison.wait is None:
        # In another process, where it serves several runs.
        comparison = copy.copy(comparison)
        comparison.wait = lambda text: tell({"waits": text})
    return comparison.make(planned, lambda entry: tell({"epoch": entry["epoch"]}))


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
        (folder / METRICS).unlink(missing_ok=True)

"""Comparisons of methods over seeds: kept in results.json, continued where they stopped."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmfast.divergence import DivergedError
from mmfast.files import locked, plain
from mmfast.flags import DIVERGED, format_value
from mmfast.launchers import refuse_launcher
from mmfast.methods import METHODS, Method
from mmfast.results import FORMAT, METRICS, PICTURES, RESULTS, Results
from mmfast.runs import Setup, diverged_entry, fingerprint, machine, run, versions
from mmfast.trainer import LAST, MODEL, alone_in

# How the command's errors begin.
_SAYS = "mmfast: "


@dataclass(frozen=True)
class Run:
    """One run to make: a method with a seed, and the number of epochs it takes."""

    method: Method
    seed: int
    epochs: int


@dataclass
class Comparison:
    """Runs of several methods with seeds 0, 1, ... that share everything else.

    Attributes:
        setup: data, model and settings of all runs.
        methods: what to compare.
        num_seeds: runs of each method.
        out: folder of results.json and the runs' checkpoints.
        wait: called with a sentence before this process waits for another one.
        results: of the folder.
    """

    setup: Setup
    methods: Sequence[Method]
    num_seeds: int
    out: Path
    wait: Callable[[str], None] = print
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.results = Results(self.out, plain(self._description()))

    def prepare(self, *, overwrite: bool = False) -> list[Run]:
        """Check everything before any training, take in what `out` holds, and return what is left to make.

        Args:
            overwrite: drop what `out` holds of another comparison, or of an earlier state of this one.

        Raises:
            ValueError: data that do not fit a method, results.json of another configuration or not readable.
        """
        if self.num_seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.num_seeds}")
        refuse_launcher("mmfast compare")
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
            Run(method, seed, epochs[method.name])
            for seed in range(self.num_seeds)
            for method in self.methods
        ]
        return [item for item in runs if not self._done(item)]

    def make(self, item: Run, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Make a run, or finish it, add its entry to results.json and return it.

        A run whose loss is NaN or infinite is one without figures, which says why under "diverged". One that
        another process makes at the time is waited for.
        """
        folder = self.folder(item)
        name = f"{item.method.name} with seed {item.seed}"
        waiting = f"Waiting for another process, which makes {name} in {folder}."
        with locked(self._lock(folder), wait=lambda: self.wait(waiting)):
            self.results.open()
            if self._done(item):
                return self.results.find(item.method.name, item.seed) or {}
            try:
                if self.setup.devices in (1, "1"):
                    entry = run(self.setup, item.method, item.seed, folder, on_epoch=on_epoch)
                else:
                    entry = self._make_apart(item, folder)
            except DivergedError as error:
                entry = diverged_entry(item.method, item.seed, error)
            self.results.add(entry, folder)
        return entry

    def folder(self, item: Run) -> Path:
        """Return where the checkpoints of a run lie."""
        return self.out / "runs" / f"{item.method.name}-seed{item.seed}"

    def _make_apart(self, item: Run, folder: Path) -> dict[str, Any]:
        """Make a run on several devices in processes of its own: Fabric launches them once per program."""
        command = [sys.executable, "-m", "mmfast", *train_arguments(self.setup, item, folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            # Of several processes' lines, the one that says what is wrong.
            said = next((line for line in reversed(lines) if line.startswith(_SAYS)), done.stderr.strip())
            if done.returncode == DIVERGED:
                raise DivergedError(said.removeprefix(_SAYS), epoch=-1)
            kind = ValueError if done.returncode == 2 else RuntimeError
            raise kind(f"{item.method.name} with seed {item.seed} failed: {said.removeprefix(_SAYS)}")
        return json.loads((folder / METRICS).read_text())

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
                "fingerprint": fingerprint(splits),
            },
            "configuration": {
                **asdict(setup.optimization),
                "dim": setup.dim,
                "fusion": setup.fusion,
                "precision": setup.precision,
                "encoders": setup.named_encoders or None,
                "methods": {method.name: method.config() for method in self.methods},
            },
        }

    def _done(self, item: Run) -> bool:
        entry = self.results.find(item.method.name, item.seed)
        return entry is not None and (not self.setup.probe or "probe" in entry or "diverged" in entry)

    def _clear(self) -> None:
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
            for name in (RESULTS, f"{RESULTS}.damaged", *PICTURES):
                (self.out / name).unlink(missing_ok=True)
            for folder in runs:
                shutil.rmtree(folder)
        self.results = Results(self.out, self.results.mine)

    @staticmethod
    def _lock(folder: Path) -> Path:
        return folder.with_name(f".{folder.name}.lock")


def train_arguments(setup: Setup, item: Run, folder: Path) -> list[str]:
    """Return the arguments of `mmfast` that make a run and leave its entry in `folder`/metrics.json."""
    optimization = setup.optimization
    arguments = {
        "data": setup.source,
        "split-seed": setup.splits.split_seed or 0,
        "method": item.method.name,
        "seed": item.seed,
        "out": folder,
        "epochs": optimization.max_epochs,
        **{
            key.replace("_", "-"): value for key, value in asdict(optimization).items() if key != "max_epochs"
        },
        "dim": setup.dim,
        "fusion": setup.fusion,
        "accelerator": setup.accelerator,
        "devices": setup.devices,
        "precision": setup.precision,
    }
    words = ["train", "--resume"]
    words += ["--probe"] * setup.probe + ["--skip-unreadable"] * setup.skip_unreadable
    words += [f"--{key}={value}" for key, value in arguments.items()]
    words += [f"--encoder={name}={kind}" for name, kind in setup.encoders.items()]
    if setup.modalities is not None:
        words.append(f"--modalities={','.join(setup.modalities)}")
    return words + [f"--set={key}={format_value(value)}" for key, value in item.method.config().items()]


def has_run(folder: Path) -> bool:
    """Whether a run, finished or not, lies in `folder`."""
    return any((folder / name).exists() for name in (LAST, MODEL, METRICS))


def clear_run(folder: Path) -> None:
    """Remove the run in `folder`.

    Raises:
        BlockingIOError: another process trains there.
    """
    with alone_in(folder):
        for name in (LAST, MODEL, METRICS):
            (folder / name).unlink(missing_ok=True)

"""Comparisons of methods over seeds: kept in results.json, continued where they stopped."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmfast.files import plain, write_json
from mmfast.flags import format_value
from mmfast.methods import METHODS, Method
from mmfast.runs import Setup, fingerprint, machine, run, versions
from mmfast.trainer import LAST, MODEL

FORMAT = 1
RESULTS = "results.json"
METRICS = "metrics.json"  # of a single run, in its folder


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
        results: what results.json holds.
    """

    setup: Setup
    methods: Sequence[Method]
    num_seeds: int
    out: Path
    results: dict[str, Any] = field(default_factory=dict)

    def prepare(self, *, overwrite: bool = False) -> list[Run]:
        """Check everything before any training, open results.json, and return the runs that are left to make.

        Args:
            overwrite: drop what `out` holds of another comparison, or of an earlier state of this one.

        Raises:
            ValueError: data that do not fit a method, results.json of another configuration or not readable.
        """
        if self.num_seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.num_seeds}")
        epochs = {method.name: self.setup.check(method) for method in self.methods}
        # Raises where accelerator, devices or precision cannot be had.
        self.setup.trainer(self.methods[0], 0, None)
        mine = plain(self._description())
        found = None if overwrite else self._read()
        if found is None:
            if overwrite:
                self._clear()
            self.results = mine | {"runs": []}
        else:
            self._check_same(found, mine)
            of_all_methods = found["configuration"]["methods"] | mine["configuration"]["methods"]
            self.results = found | mine
            self.results["configuration"]["methods"] = of_all_methods
        self._write()
        # Seeds outermost: a comparison that stops early has all methods of its first seeds.
        runs = [
            Run(method, seed, epochs[method.name])
            for seed in range(self.num_seeds)
            for method in self.methods
        ]
        return [item for item in runs if not self._done(item)]

    def make(self, item: Run, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Make a run, or finish it, add its entry to results.json and return it."""
        folder = self.folder(item)
        if self.setup.devices in (1, "1"):
            entry = run(self.setup, item.method, item.seed, folder, on_epoch=on_epoch)
        else:
            entry = self._make_apart(item, folder)
        others = [
            e for e in self.results["runs"] if (e["method"], e["seed"]) != (item.method.name, item.seed)
        ]
        order = list(METHODS)
        self.results["runs"] = sorted([*others, entry], key=lambda e: (order.index(e["method"]), e["seed"]))
        self._write()
        return entry

    def folder(self, item: Run) -> Path:
        """Return where the checkpoints of a run lie."""
        return self.out / "runs" / f"{item.method.name}-seed{item.seed}"

    def _make_apart(self, item: Run, folder: Path) -> dict[str, Any]:
        """Make a run on several devices in processes of its own: Fabric launches them once per program."""
        command = [sys.executable, "-m", "mmfast", *train_arguments(self.setup, item, folder)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            kind = ValueError if done.returncode == 2 else RuntimeError
            raise kind(f"{item.method.name} with seed {item.seed} failed: {done.stderr.strip()}")
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

    def _read(self) -> dict[str, Any] | None:
        path = self.out / RESULTS
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
            whole = {"format", "data", "configuration", "runs"} <= set(found)
        except (ValueError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is not the results of a comparison; give another --out")
        if found["format"] != FORMAT:
            raise ValueError(f"{path} must have format {FORMAT}, got {found['format']}; give another --out")
        return found

    def _check_same(self, found: dict[str, Any], mine: dict[str, Any]) -> None:
        differ = []
        for part, ignored in (
            ("data", ("source", "description", "fingerprint")),
            ("configuration", ("methods",)),
        ):
            there, here = found[part], mine[part]
            for key in [key for key in here if key not in ignored and _differ(there.get(key), here[key])]:
                differ.append(f"{key} is {_short(there.get(key))} there, {_short(here[key])} here")
        for name, config in mine["configuration"]["methods"].items():
            there = found["configuration"]["methods"].get(name, config)
            for key in [key for key in config if there.get(key) != config[key]]:
                differ.append(f"{name}.{key} is {_short(there.get(key))} there, {_short(config[key])} here")
        if not differ and found["data"].get("fingerprint") != mine["data"]["fingerprint"]:
            differ = ["the samples or their split are others"]
        if differ:
            raise ValueError(
                f"{self.out / RESULTS} is of another configuration: {'; '.join(differ)}; "
                "give another --out, or --overwrite to start anew"
            )

    def _done(self, item: Run) -> bool:
        return any(
            (entry["method"], entry["seed"]) == (item.method.name, item.seed)
            and (not self.setup.probe or "probe" in entry)
            for entry in self.results["runs"]
        )

    def _clear(self) -> None:
        """Remove what comparisons write, and nothing else."""
        (self.out / RESULTS).unlink(missing_ok=True)
        for folder in (self.out / "runs").glob("*"):
            name, _, seed = folder.name.rpartition("-seed")
            if name in METHODS and re.fullmatch(r"\d+", seed):
                shutil.rmtree(folder)

    def _write(self) -> None:
        write_json(self.out / RESULTS, self.results)


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
    words = ["train", "--resume", *(["--probe"] if setup.probe else [])]
    words += [f"--{key}={value}" for key, value in arguments.items()]
    words += [f"--encoder={name}={kind}" for name, kind in setup.encoders.items()]
    if setup.modalities is not None:
        words.append(f"--modalities={','.join(setup.modalities)}")
    return words + [f"--set={key}={format_value(value)}" for key, value in item.method.config().items()]


def has_run(folder: Path) -> bool:
    """Whether a run, finished or not, lies in `folder`."""
    return any((folder / name).exists() for name in (LAST, MODEL, METRICS))


def clear_run(folder: Path) -> None:
    """Remove the run in `folder`."""
    for name in (LAST, MODEL, METRICS):
        (folder / name).unlink(missing_ok=True)


def _differ(one: Any, other: Any) -> bool:
    """Whether two values differ; the order of modalities is that of the coalition bits, and counts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one.items()) != list(other.items())
    return one != other


def _short(value: Any) -> str:
    if isinstance(value, dict):
        # Whole: which modality differs is what one looks for.
        return ", ".join(f"{name} {item}" for name, item in value.items())
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

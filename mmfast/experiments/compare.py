"""A comparison of methods from Python: any data sets, any model, the options of `mmfast.Trainer`."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mmfast import methods as _methods
from mmfast.data.arrays import LABEL
from mmfast.data.labels import told_labels
from mmfast.data.splits import PARTS
from mmfast.errors import describe
from mmfast.experiments.comparison import clear_run, has_run
from mmfast.experiments.results import FORMAT, RESULTS, Results
from mmfast.experiments.setup import diverged_entry, finished_entry, machine, versions
from mmfast.experiments.summary import Summary, summarize
from mmfast.experiments.tables import show, show_figures
from mmfast.experiments.verdict import diverged_sentence
from mmfast.files import plain
from mmfast.methods import Method
from mmfast.models import MultimodalModel
from mmfast.training.divergence import DivergedError
from mmfast.training.run_folder import as_lists
from mmfast.training.trainer import Trainer

# Labels of each part that tell one data set from another, where it does not tell all of them.
_LOOKED_AT = 16
# Arguments of Trainer that a comparison sets itself.
_OWN = ("method", "seed", "out_dir")


@dataclass(frozen=True, eq=False)
class Compared:
    """What a comparison has found; printed, it is the table with the sentences that it supports.

    Attributes:
        runs: one entry a run: "method", "seed", "metrics" on the test set, "history", seconds; "diverged",
            why, in place of figures where a loss was NaN or infinite.
        task: of the runs.
        data: description of the data.
        num_test: samples that were tested on.
        out: folder of results.json and the runs, None where nothing was written.
    """

    runs: list[dict[str, Any]]
    task: str
    data: str
    num_test: int
    out: Path | None

    @property
    def summaries(self) -> list[Summary]:
        """One a method, figures over seeds; of classes alone.

        Raises:
            ValueError: the task has no accuracies.
        """
        if self.task != "multiclass":
            raise ValueError(f"summaries are of task='multiclass', got {self.task!r}: see `runs`")
        return summarize(self.runs)

    def figures(self, name: str) -> dict[str, list[float]]:
        """Return a figure of the test set by method, one value a seed, such as "accuracy"."""
        found: dict[str, list[float]] = {}
        for entry in self.runs:
            values = found.setdefault(entry["method"], [])
            if "metrics" in entry:
                if not isinstance(entry["metrics"].get(name), int | float):
                    known = [key for key, value in entry["metrics"].items() if isinstance(value, int | float)]
                    raise KeyError(f"{name!r} is no figure of the runs, which are {', '.join(known)}")
                values.append(entry["metrics"][name])
        return found

    def table(self, width: int = 110) -> str:
        """Return the table for a terminal of some width."""
        text = StringIO()
        console = Console(file=text, width=width, highlight=False)
        if self.task == "multiclass":
            show(console, self.summaries, data=self.data, num_test=self.num_test)
        else:
            show_figures(console, self.runs)
            console.print()
            if lost := diverged_sentence(summarize([entry for entry in self.runs if "diverged" in entry])):
                console.print(lost)
            console.print(f"Data: {self.data}.", soft_wrap=True)
        if self.out is not None:
            console.print(f"Written to {self.out}: {RESULTS}, runs.", soft_wrap=True)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        counts = f"{len(self.runs)} runs of {', '.join(dict.fromkeys(e['method'] for e in self.runs))}"
        return f"Compared({counts}{'' if self.out is None else f', {str(self.out)!r}'})"


def compare(
    methods: Sequence[Method | str] | str,
    model: Callable[[], MultimodalModel],
    train: Any,
    val: Any,
    test: Any,
    *,
    seeds: int = 1,
    out_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_run: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> Compared:
    """Train methods with several seeds on the same data, test each once, and say what the figures support.

        found = mmfast.compare(["joint", "mla", "di-mml"], make_model, train, val, test, seeds=3, lr=1e-3)
        print(found)

    Every method begins with the same weights: before each run torch's generator is seeded and `model` called.

    Args:
        methods: methods of `mmfast.methods`, or their names; "all", or names separated by commas.
        model: returns the model to train, new each time.
        train, val, test: data sets as `mmfast.Trainer.fit` takes them; `val` may be None, too.
        seeds: runs of each method, with the seeds 0, 1, ...
        out_dir: folder for results.json and in runs/<method>-seed<seed> the checkpoints, from which
            `mmfast.load(..., model=model())` gives the learners; None keeps figures alone.
        resume: go on with what `out_dir` holds. Data and options must be those of then; of data only numbers
            of samples and labels are compared.
        overwrite: make anew what `out_dir` holds.
        on_run: called with the entry of every run.
        options: of `mmfast.Trainer`, the same for all runs, such as `max_epochs`, `lr`, `class_weights`,
            `metrics` and `collate_fn`.

    Raises:
        TypeError, ValueError: as `mmfast.Trainer` and its `fit`; no method, a model that is no function; or
            `out_dir` holds runs, and neither `resume` nor `overwrite` is given.
    """
    if not callable(model) or isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a function that returns a new model, got {describe(model)}")
    if not isinstance(seeds, int):
        raise TypeError(f"seeds must be an integer, got {describe(seeds)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if mine := [name for name in _OWN if name in options]:
        raise TypeError(f"{mine[0]} is the comparison's to give, and no option of it")
    chosen = _chosen(methods)
    parts = {"train": train, "val": val, "test": test}
    make = _Maker(model, len(chosen) * seeds)
    out = None if out_dir is None else Path(out_dir)
    # Before any run: what would end the last one ends the first.
    trainers = [Trainer(method, **options) for method in chosen]
    for trainer in trainers:
        trainer.check(make(0), train, val, test)
    make.check_new()
    results = None if out is None else _results(out, chosen, parts, trainers[0], resume, overwrite, seeds)
    runs = []
    for seed in range(seeds):
        for method in chosen:
            entry = None if results is None else results.find(method.name, seed)
            if entry is None:
                folder = None if out is None else _folder(out, method, seed)
                entry = _run(method, seed, make, parts, folder, resume=resume, options=options)
                if results is not None and folder is not None:
                    results.add(entry, folder)
                if on_run is not None:
                    on_run(entry)
            runs.append(entry)
    order = {method.name: place for place, method in enumerate(chosen)}
    runs.sort(key=lambda entry: (order[entry["method"]], entry["seed"]))
    return Compared(runs, trainers[0].objective.task, _sizes(parts), len(test), out)


def _run(
    method: Method,
    seed: int,
    make: _Maker,
    parts: dict[str, Any],
    folder: Path | None,
    *,
    resume: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    begun = time.perf_counter()
    trainer, made = Trainer(method, seed=seed, out_dir=folder, **options), make(seed)
    make.check_new()
    try:
        trainer.fit(made, parts["train"], parts["val"], resume=resume and folder is not None)
    except DivergedError as error:
        return diverged_entry(method, seed, error)
    entry = finished_entry(trainer, trainer.test(made, parts["test"]))
    return plain(entry | {"wall_seconds": time.perf_counter() - begun})


class _Maker:
    """Makes the models of runs: each anew, with the weights of its seed.

    Args:
        model: the function of the program.
        num_runs: that it makes models for.
    """

    def __init__(self, model: Callable[[], MultimodalModel], num_runs: int) -> None:
        self._model, self._num_runs = model, num_runs
        self._before: list[weakref.ref[torch.nn.Parameter]] = []
        self._is_new = True

    def __call__(self, seed: int) -> MultimodalModel:
        # What the program draws after a comparison is what it would have drawn without.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = self._model()
        if not isinstance(made, MultimodalModel):
            raise TypeError(f"model must return a mmfast.MultimodalModel, got {describe(made)}")
        trained = [p for p in made.parameters() if p.requires_grad]
        self._is_new &= not {id(p) for p in trained} & {id(before()) for before in self._before}
        self._before = [weakref.ref(p) for p in trained]
        return made

    def check_new(self) -> None:
        """Raise ValueError where a model had weights of the one before: a run would go on from another's."""
        if not self._is_new and self._num_runs > 1:
            raise ValueError(
                "model must return a new model each time, got one with weights of the one before"
            )


def _chosen(methods: Sequence[Method | str] | str) -> list[Method]:
    if isinstance(methods, str):
        names = _methods.METHODS if methods == "all" else [name.strip() for name in methods.split(",")]
        methods = list(names)
    chosen = [_methods.chosen(method) for method in methods]
    if not chosen:
        raise ValueError("methods must name at least one method, got none")
    twice = [method.name for method in chosen if sum(other.name == method.name for other in chosen) > 1]
    if twice:
        raise ValueError(f"methods must be given once each, got {twice[0]} {twice.count(twice[0])} times")
    return chosen


def _sizes(parts: dict[str, Any]) -> str:
    sizes = (f"{name} {len(part):,}" for name, part in parts.items() if part is not None)
    return f"samples {', '.join(sizes)}"


def _folder(out: Path, method: Method, seed: int) -> Path:
    return out / "runs" / f"{method.name}-seed{seed}"


def _results(
    out: Path,
    chosen: Sequence[Method],
    parts: dict[str, Any],
    trainer: Trainer,
    resume: bool,
    overwrite: bool,
    seeds: int,
) -> Results:
    """Return the results in a folder, of which those that stay are taken in."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, got both")
    folders = [_folder(out, method, seed) for method in chosen for seed in range(seeds)]
    found = [folder for folder in folders if has_run(folder)]
    if overwrite:
        for folder in found:
            clear_run(folder)
        (out / RESULTS).unlink(missing_ok=True)
    elif not resume and (found or (out / RESULTS).exists()):
        raise ValueError(f"{out} holds runs already: give resume=True, overwrite=True or another out_dir")
    description = {
        "format": FORMAT,
        "versions": versions(),
        "machine": machine(),
        "data": {
            "source": "data sets of a program",
            "description": _sizes(parts),
            "sizes": {name: len(part) for name, part in parts.items() if part is not None},
            "fingerprint": "-".join(_digest(parts[name]) for name in PARTS if parts[name] is not None),
        },
        "configuration": {
            **as_lists(asdict(trainer.optimization)),
            **trainer.objective.config(),
            **trainer.measures.config(),
            "precision": trainer.fabric.strategy.precision.precision,
            "methods": {method.name: method.config() for method in chosen},
        },
    }
    results = Results(out, plain(description))
    results.open()
    return results


def _digest(dataset: Any) -> str:
    """Return a digest of a data set's labels, of a few where it does not tell them all."""
    labels = told_labels(dataset)
    if labels is None:
        few = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
        labels = [np.asarray(dataset[i][LABEL]).tolist() for i in few]
    return hashlib.sha256(repr(np.asarray(labels).tolist()).encode()).hexdigest()[:16]

"""A comparison of methods from Python: any data, any model, the options of `mmfast.Trainer`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmfast.experiments.arguments import (
    Model,
    Reading,
    check_data,
    check_settings,
    chosen_methods,
    shared_by_runs,
    sorted_options,
)
from mmfast.experiments.compared import Comparison
from mmfast.experiments.comparison import ComparisonRunner, has_run
from mmfast.experiments.outcomes import Outcome
from mmfast.experiments.programs import Program
from mmfast.experiments.results import RESULTS
from mmfast.experiments.run_bar import run_bar
from mmfast.experiments.runs import PlannedRun, diverged_entry, make_whole_run
from mmfast.experiments.setup import RunSetup
from mmfast.methods import Method
from mmfast.training.divergence import DivergedError
from mmfast.training.launchers import is_first


def compare(
    data: Any,
    methods: Sequence[Method | str] | Method | str = "all",
    *more: Any,
    model: Model | None = None,
    seeds: int = 5,
    out_dir: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_run: Callable[[dict[str, Any]], None] | None = None,
    dim: int = 64,
    fusion: str = "concat",
    encoders: Mapping[str, str] | None = None,
    modalities: Sequence[str] | None = None,
    split_seed: int = 0,
    skip_unreadable: bool = False,
    probe: bool = True,
    data_on_device: str = "auto",
    progress: bool | None = None,
    **options: Any,
) -> Comparison:
    """Train methods with several seeds on the same data, test each once, and say what the figures support.

        found = mmfast.compare("my.npz", ["joint", "mla", "di-mml"], seeds=3)
        print(found)  # and found.table(), found.verdict, found.plot("contributions")

        found = mmfast.compare((train, val, test), model=make_model, max_epochs=20, collate_fn=pad)

    Every method begins with the same weights: before each run torch's generator is seeded and the model made.
    What the command `mmfast compare` reads, it trains to the same figures, bit for bit on the CPU.

    Args:
        data: "htad", a FILE.npz or a FOLDER, as `mmfast.data.load` takes them; `mmfast.data.Splits`; or data
            sets of your own as `mmfast.Trainer.fit` takes them, in a tuple (train, val, test) or a dict with
            these keys, of which val may be None.
        methods: methods of `mmfast.methods`, or their names; "all", those that the task takes, or names
            separated by commas.
        more: nothing: all that follows has a name.
        model: returns the model to train, new each time. It must be given for data sets of your own; for
            others one is built that fits them.
        seeds: runs of each method, with the seeds 0, 1, ...
        out_dir: folder for results.json and in runs/<method>-seed<seed> the checkpoints, from which
            `mmfast.load` gives the learners, with `model=model()` where a model was given; None keeps figures
            alone.
        resume: go on with what `out_dir` holds, of `mmfast compare`, too. Data and options must be those of
            then; of data sets of your own only numbers of samples and labels are compared.
        overwrite: make anew what `out_dir` holds.
        on_run: called with the entry of every run.
        dim: D of every encoder of the model that is built.
        fusion: name of its fusion head.
        encoders: what a modality is taken as, or the encoder that takes it, by name, as `mmfast.data.load`
            takes them; of Splits encoders alone.
        modalities: names of those to use; None: all.
        split_seed: seed of the split, where the data leave it open.
        skip_unreadable: leave out files of a folder that cannot be read.
        probe: measure every modality by a logistic regression on its frozen features, too; of classes alone.
        data_on_device: whether data in memory lie on the GPU: "auto", where they are small, "yes" or "no".
        progress: show a bar, and elsewhere a line a run; None: on a terminal or in a notebook alone.
        options: of `mmfast.Trainer`, the same for all runs, such as `max_epochs`, `lr`, `class_weights`,
            `metrics`, `collate_fn` and `accelerator`.

    Raises:
        TypeError, ValueError: as `mmfast.data.load`, `mmfast.Trainer` and its `fit`; no method, a model that
            is no function, an argument that would change nothing; or `out_dir` holds runs, and neither
            `resume` nor `overwrite` is given.
    """
    check_data(data, more)
    check_settings(seeds, progress, out_dir, resume=resume, overwrite=overwrite)
    own = inspect.signature(compare).parameters
    optimization, others = sorted_options(options, [name for name in own if name not in ("more", "options")])
    chosen = chosen_methods(methods, others.get("task", "multiclass"))
    reading = Reading(dim, fusion, modalities, encoders or {}, split_seed, skip_unreadable, data_on_device)
    on_epoch = others.pop("on_epoch", None)
    # What the program draws after a comparison is what it would have drawn without.
    with torch.random.fork_rng():
        setup = shared_by_runs(
            data,
            model,
            reading,
            num_runs=len(chosen) * seeds,
            probe=probe,
            optimization=optimization,
            options=others,
        )
        if on_epoch is not None and out_dir is not None and not getattr(setup, "is_made_here", True):
            raise ValueError(
                "on_epoch must be None with several devices and an out_dir, as each run is made by processes "
                "of its own"
            )
        # Before any run: what would end the last one ends the first.
        epochs = {method.name: setup.check(method) for method in chosen}
        if isinstance(setup, Program):
            setup.make.check_new()
        maker: _InMemory = _InMemory(setup, chosen, seeds)
        if out_dir is not None:
            maker = _InFolder(setup, chosen, seeds, Path(out_dir))
            maker.open(resume=resume, overwrite=overwrite)
        left = maker.left(epochs)
        with run_bar(left, wanted=progress) as bar:
            for planned in left:
                bar.begin(planned)
                entry = maker.make(planned, functools.partial(_tell, (bar.epoch, on_epoch)))
                bar.end(planned)
                if on_run is not None:
                    on_run(entry)
    task = others.get("task", "multiclass")
    return Comparison(maker.runs(), task, setup.data, setup.num_test, maker.out, maker.outcomes())


def _tell(listeners: Sequence[Callable[[dict[str, Any]], None] | None], entry: dict[str, Any]) -> None:
    for listener in listeners:
        if listener is not None:
            listener(entry)


class _InMemory:
    """Makes the runs of a comparison, and keeps in memory what they leave."""

    out: Path | None = None

    def __init__(self, setup: RunSetup, methods: Sequence[Method], seeds: int) -> None:
        self.setup, self.methods, self.seeds = setup, methods, seeds
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        self._outcomes: dict[tuple[str, int], Outcome] = {}

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

    def make(self, planned: PlannedRun, on_epoch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Make a run and return its entry, without figures where it diverges."""
        method, seed = planned.method, planned.seed
        try:
            entry, outcome = make_whole_run(self.setup, method, seed, self.folder(planned), on_epoch=on_epoch)
            if outcome is not None:
                self._outcomes[method.name, seed] = outcome
        except DivergedError as error:
            entry = diverged_entry(method, seed, error)
        self.entries[method.name, seed] = entry
        return entry

    def folder(self, planned: PlannedRun) -> Path | None:
        """Return where the checkpoints of a run go."""
        return None

    def runs(self) -> list[dict[str, Any]]:
        """Return the entries of all runs, methods in the order they were given."""
        return [self.entries[method.name, seed] for method in self.methods for seed in range(self.seeds)]

    def outcomes(self) -> Mapping[tuple[str, int], Outcome]:
        """Return what the runs make of each test sample."""
        return self._outcomes


class _InFolder(_InMemory):
    """Makes the runs of a comparison in a folder, as the command does."""

    def __init__(self, setup: RunSetup, methods: Sequence[Method], seeds: int, out: Path) -> None:
        super().__init__(setup, methods, seeds)
        self.out, self.is_first = out, is_first()
        self.runner = ComparisonRunner(setup, methods, seeds, out)

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
            not resume
            and self.is_first
            and ((out / RESULTS).exists() or any(map(has_run, (out / "runs").glob("*-seed*"))))
        ):
            raise ValueError(f"{out} holds runs already: give resume=True, overwrite=True or another out_dir")
        if resume or self.is_first:
            # What the first process clears, or has begun with, is no result that others go on with.
            runner.results.open()

    def left(self, epochs: Mapping[str, int]) -> list[PlannedRun]:
        return self.runner.left(epochs)

    def make(self, planned: PlannedRun, on_epoch: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        if not self.is_first:
            # One of several processes of a run: the first waits for it, and writes.
            return super().make(planned, on_epoch)
        return self.runner.make(planned, on_epoch)

    def folder(self, planned: PlannedRun) -> Path | None:
        return self.runner.folder(planned)

    def runs(self) -> list[dict[str, Any]]:
        found = {(entry["method"], entry["seed"]): entry for entry in self.runner.results.content["runs"]}
        self.entries = found | self.entries
        return super().runs()

    def outcomes(self) -> Mapping[tuple[str, int], Outcome]:
        return {**self.runner.outcomes(), **self._outcomes} if self._outcomes else self.runner.outcomes()

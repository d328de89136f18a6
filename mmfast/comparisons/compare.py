"""A comparison of methods from Python: any data, any model, the options of `mmfast.Trainer`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmfast.comparisons.arguments import (
    Model,
    Reading,
    check_data,
    check_number_of_jobs,
    check_settings,
    chosen_methods,
    shared_by_runs,
    sorted_options,
    tuning_of,
)
from mmfast.comparisons.compared import About, Comparison
from mmfast.comparisons.makers import InFolder, InMemory
from mmfast.comparisons.programs import Program
from mmfast.comparisons.run_bar import TrialBar, run_bar
from mmfast.data import overview
from mmfast.experiments.setup import Setup
from mmfast.methods import Method


def compare(
    data: Any,
    methods: Sequence[Method | str] | Method | str = "all",
    *more: Any,
    model: Model | None = None,
    seeds: int = 5,
    trials: int | None = None,
    tune_seeds: int = 1,
    jobs: int | str = 1,
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
        trials: first, try so many settings of each method, drawn from the ranges that `mmfast.ranges` finds
            beside fields, and take the best on validation data. What is set here, or of a method other than
            its default, is not drawn.
        tune_seeds: runs of a trial.
        jobs: runs, or methods that are tuned, at a time, each in a process of its own, to which data, model
            and options are sent: what a callback notes there, it notes in a copy. Threads and GPUs are
            divided. "auto": as many as suit the machine. Within `joblib.parallel_config(backend="dask")`, or
            "ray", that backend's machines make them; they must see `out_dir`.
        out_dir: folder for results.json and in runs/<method>-seed<seed> the checkpoints, from which
            `mmfast.load` gives the learners, with `model=model()` where a model was given; None keeps figures
            alone.
        resume: go on with what `out_dir` holds, of `mmfast compare`, too. Data and options must be those of
            then; of data sets of your own only numbers of samples and labels are compared.
        overwrite: make anew what `out_dir` holds.
        on_run: called with the entry of every run, when it is made.
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
            is no function, an argument that would change nothing; what cannot be sent to other processes; or
            `out_dir` holds runs, and neither `resume` nor `overwrite` is given.
    """
    check_data(data, more)
    check_settings(seeds, progress, out_dir, resume=resume, overwrite=overwrite)
    check_number_of_jobs(jobs)
    own = inspect.signature(compare).parameters
    optimization, others = sorted_options(options, [name for name in own if name not in ("more", "options")])
    chosen = chosen_methods(methods, others.get("task", "multiclass"))
    tuning = tuning_of(trials, tune_seeds, chosen, options)
    reading = Reading(dim, fusion, modalities, encoders or {}, split_seed, skip_unreadable, data_on_device)
    on_epoch = others.pop("on_epoch", None)
    # What the program draws after a comparison is what it would have drawn without.
    with torch.random.fork_rng():
        setup = shared_by_runs(
            data,
            model,
            reading,
            num_runs=len(chosen) * (seeds + (trials or 0)),
            probe=probe,
            optimization=optimization,
            options=others,
        )
        if on_epoch is not None and out_dir is not None and not setup.is_made_here:
            raise ValueError(
                "on_epoch must be None with several devices and an out_dir, as each run is made by processes "
                "of its own"
            )
        # Before any run: what would end the last one ends the first.
        epochs = {method.name: setup.check(method) for method in chosen}
        if isinstance(setup, Program):
            # Here: processes of several jobs would each see one model.
            setup.model(1)
        maker = InMemory(setup, chosen, seeds, tuning)
        if out_dir is not None:
            maker = folder = InFolder(setup, chosen, seeds, tuning, Path(out_dir))
        maker.check(jobs, on_epoch)
        if out_dir is not None:
            folder.open(resume=resume, overwrite=overwrite)
        left = maker.left(epochs)
        if tuning is not None:
            of_trial = {name: number * tuning.num_seeds for name, number in epochs.items()}
            number = maker.num_trials()
            with run_bar("trial", number, tuning.trials * sum(of_trial.values()), wanted=progress) as bar:
                maker.tune_all(maker.number_of(jobs, len(chosen)), TrialBar(bar, of_trial))
        with run_bar("run", len(left), sum(planned.epochs for planned in left), wanted=progress) as bar:
            for entry in maker.make_all(left, maker.number_of(jobs, len(left)), bar.event, on_epoch):
                bar.end(entry)
                if on_run is not None:
                    on_run(entry)
        task = others.get("task", "multiclass")
        about = About(
            maker.description(),
            setup.class_names if task == "multiclass" else (),
            setup.test_keys,
            overview(setup.splits, setup.model(0), seeds=seeds) if isinstance(setup, Setup) else None,
        )
    found = (maker.out, maker.outcomes(), maker.tuned, about)
    return Comparison(maker.runs(), task, setup.data, setup.sizes["test"], *found)

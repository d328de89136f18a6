"""From the arguments of `mmfast.compare` to what its runs share; what is wrong with them, in a sentence."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmfast import data as _data
from mmfast import methods as _methods
from mmfast.comparisons.programs import Maker, Program
from mmfast.data.splits import PARTS, Splits
from mmfast.errors import changed, describe, did_you_mean
from mmfast.experiments.setup import Setup
from mmfast.experiments.tuning import Tuning
from mmfast.methods import METHODS, Method
from mmfast.models import MultimodalModel
from mmfast.models.build import ENCODERS
from mmfast.ranges import ranges_of
from mmfast.training.optimization import Optimization, with_settings
from mmfast.training.trainer import Trainer

_DATA = '"htad", a FILE.npz, a FOLDER, mmfast.data.Splits, or a tuple (train, val, test) of data sets'
_HOW = "mmfast.compare((train, val, test), methods, model=make_model)"
# Arguments of Trainer that a comparison sets itself, and what it has in their place.
_OWN = {
    "method": "methods names what is compared",
    "seed": "seeds is the number of runs of each method",
    "metadata": "checkpoints tell of the comparison",
}
_TRAINER = tuple(inspect.signature(Trainer.__init__).parameters)[1:-1]
# Those that Setup has a field for; all others go to Trainer as they are.
_SETUP = (
    "accelerator",
    "devices",
    "num_nodes",
    "precision",
    "num_workers",
    "eval_batch_size",
    "compile",
    "deterministic",
    "class_weights",
    "label_smoothing",
    "select",
    "select_mode",
)
Model = Callable[[], MultimodalModel]


@dataclass(frozen=True)
class Reading:
    """How data are read and, where no model is given, what is built for them; as the options of the commands.

    Attributes:
        dim, fusion: of the model that is built.
        modalities, encoders: as `mmfast.data.load` takes them.
        split_seed: of a split that is drawn.
        skip_unreadable: leave out files of a folder that cannot be read.
        data_on_device: as `Setup` takes it.
    """

    dim: int = 64
    fusion: str = "concat"
    modalities: Sequence[str] | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)
    split_seed: int = 0
    skip_unreadable: bool = False
    data_on_device: str = "auto"

    def check(self) -> None:
        """Raise TypeError for names that are none."""
        if isinstance(self.modalities, str):
            raise TypeError(f"modalities must be a list of names, got {describe(self.modalities)}")
        if not isinstance(self.encoders, Mapping):
            raise TypeError(
                f"encoders must map modalities to encoders, such as {{'pose': 'gru'}}, got "
                f"{describe(self.encoders)}"
            )

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Raise ValueError where one of these was given: it would change nothing."""
        for name in names:
            if getattr(self, name) != getattr(Reading(), name):
                raise ValueError(f"{name} must be left out, as {why}, got {describe(getattr(self, name))}")


def chosen_methods(methods: Sequence[Method | str] | Method | str, task: str) -> list[Method]:
    """Return the methods to compare; "all" are those that the task takes.

    Raises:
        TypeError, ValueError: none, one twice, what is no method, or one that tables would leave out.
    """
    if isinstance(methods, str):
        every = [name for name, kind in METHODS.items() if task == "multiclass" or not kind.needs_classes]
        names = [name.strip() for name in methods.split(",") if name.strip()]
        methods = every if names == ["all"] else names
    elif isinstance(methods, Method):
        methods = [methods]
    elif not isinstance(methods, Sequence):
        raise TypeError(f"methods must be a list of methods or their names, got {describe(methods)}")
    chosen = [_methods.chosen(method) for method in methods]
    if not chosen:
        raise ValueError("methods must name at least one method, got none")
    twice = [method.name for method in chosen if sum(other.name == method.name for other in chosen) > 1]
    if twice:
        raise ValueError(f"methods must be given once each, got {twice[0]} {twice.count(twice[0])} times")
    for method in chosen:
        if METHODS.get(method.name) is not type(method):
            kind, name = type(method).__name__, method.name
            mend = f"name it there first, mmfast.methods.METHODS[{name!r}] = {kind}"
            if name in METHODS:
                mend = f"{name!r} is the name of {METHODS[name].__name__}, give it one of its own"
            raise ValueError(
                "methods must be those of mmfast.methods.METHODS, by which tables and tests go, "
                f"got {kind}: {mend}"
            )
    return chosen


def check_settings(seeds: Any, progress: Any, out_dir: Any, *, resume: bool, overwrite: bool) -> None:
    """Raise TypeError or ValueError for arguments of `mmfast.compare` that no runs can be made by."""
    if not isinstance(seeds, int) or isinstance(seeds, bool):
        raise TypeError(f"seeds must be an integer, got {describe(seeds)}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if progress not in (True, False, None):
        raise TypeError(f"progress must be True, False or None, got {describe(progress)}")
    if not isinstance(out_dir, str | os.PathLike | None):
        raise TypeError(f"out_dir must be a folder, got {describe(out_dir)}")
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, got both")
    for name, wanted in (("resume", resume), ("overwrite", overwrite)):
        if wanted and out_dir is None:
            raise ValueError(f"out_dir must be given to {name}, got None")


def tuning_of(
    trials: Any, tune_seeds: Any, methods: Sequence[Method], options: Mapping[str, Any]
) -> Tuning | None:
    """Return how a comparison tunes its methods, None where it does not.

    Args:
        trials: of each method, None where there are none.
        tune_seeds: runs of a trial.
        methods: of the comparison; what of one is not its default is not drawn.
        options: given to the comparison; settings of optimization among them are not drawn.

    Raises:
        TypeError, ValueError: numbers that are none.
    """
    for name, value in (("trials", 1 if trials is None else trials), ("tune_seeds", tune_seeds)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if trials is None:
        if tune_seeds != 1:
            raise ValueError(f"tune_seeds must be given with trials, got {tune_seeds} without")
        return None
    base = options.get("optimization")
    given = {*options, *(changed(base) if isinstance(base, Optimization) else ())}
    given &= set(ranges_of(Optimization))
    fixed = {method.name: sorted(given | set(changed(method))) for method in methods}
    return Tuning(trials, tune_seeds, fixed)


def check_number_of_jobs(jobs: Any) -> None:
    """Raise TypeError or ValueError for what is neither a number of jobs nor "auto"."""
    if jobs == "auto":
        return
    if not isinstance(jobs, int) or isinstance(jobs, bool):
        raise TypeError(f'jobs must be an integer or "auto", got {describe(jobs)}')
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")


def sorted_options(options: Mapping[str, Any], own: Sequence[str]) -> tuple[Optimization, dict[str, Any]]:
    """Return the settings of optimization among options, and the others, which `Trainer` takes.

    Args:
        options: by name.
        own: names of the comparison's own arguments, one of which may be meant.

    Raises:
        TypeError, ValueError: an option that is the comparison's to give, or one that there is not.
    """
    for name in options:
        if name in _OWN:
            raise TypeError(f"{name} is the comparison's to give, and no option of it: {_OWN[name]}")
    others = {name: value for name, value in options.items() if name in _TRAINER}
    settings = {name: value for name, value in options.items() if name not in _TRAINER}
    base = others.pop("optimization", None)
    meant = [*own, *(name for name in _TRAINER if name not in _OWN)]
    return with_settings("mmfast.compare", base, settings, others=meant), others


def shared_by_runs(
    data: Any,
    model: Model | None,
    reading: Reading,
    *,
    num_runs: int,
    probe: bool,
    optimization: Optimization,
    options: Mapping[str, Any],
) -> Setup | Program:
    """Return what the runs of a comparison share, its data loaded.

    Args:
        data: as `mmfast.compare` takes them, and checked by `check_data`.
        model: the program's function; None: the model is built for the data.
        reading: how data are read.
        num_runs: of the comparison.
        probe: measure modalities by probes, too.
        optimization: settings.
        options: further ones of `Trainer`.

    Raises:
        TypeError, ValueError: data or model of another kind, a setting that would change nothing, and what
            `mmfast.data.load` refuses.
    """
    reading.check()
    if (
        model is MultimodalModel
        or isinstance(model, torch.nn.Module)
        or not (model is None or callable(model))
    ):
        raise TypeError(f"model must be a function that returns a new model, got {describe(model)}")
    if model is not None:
        reading.refuse(("dim", "fusion"), "the model is given")
        if named := [name for name, encoder in reading.encoders.items() if encoder in ENCODERS]:
            raise ValueError(
                f"encoders must not name an encoder, as the model is given, got "
                f"{reading.encoders[named[0]]!r} for {named[0]}"
            )
    if isinstance(data, tuple | list | Mapping):
        return _own_data(data, model, reading, num_runs, probe, optimization, options)
    splits = data if isinstance(data, Splits) else _loaded(data, reading, options)
    if isinstance(data, Splits):
        _check_splits(reading)
    if model is not None:
        parts = {part: getattr(splits, part) for part in PARTS}
        told = (splits.description, splits.class_names)
        return Program(parts, Maker(model, num_runs), optimization, options, probe, *told)
    return Setup(
        None if isinstance(data, Splits) else str(data),
        splits,
        optimization,
        dim=reading.dim,
        fusion=reading.fusion,
        probe=probe,
        skip_unreadable=reading.skip_unreadable,
        modalities=None if reading.modalities is None else tuple(reading.modalities),
        encoders=dict(reading.encoders),
        data_on_device=reading.data_on_device,
        others={name: value for name, value in options.items() if name not in _SETUP},
        **_plain({name: value for name, value in options.items() if name in _SETUP}),
    )


def _own_data(
    data: Any,
    model: Model | None,
    reading: Reading,
    num_runs: int,
    probe: bool,
    optimization: Optimization,
    options: Mapping[str, Any],
) -> Program:
    parts = _parts(data)
    if model is None:
        raise ValueError(
            "model must be given for data sets of your own, a function that returns a new model, such as "
            "lambda: mmfast.models.build_model(shapes, num_classes), got None"
        )
    reading.refuse(
        ("modalities", "encoders", "split_seed", "skip_unreadable", "data_on_device"),
        "data sets of your own are taken as they are",
    )
    return Program(parts, Maker(model, num_runs), optimization, options, probe)


def _loaded(data: Any, reading: Reading, options: Mapping[str, Any]) -> Splits:
    return _data.load(
        data if isinstance(data, str) else str(data),
        seed=reading.split_seed,
        skip_unreadable=reading.skip_unreadable,
        modalities=reading.modalities,
        encoders=reading.encoders,
        num_workers=options.get("num_workers", 0),
    )


def _check_splits(reading: Reading) -> None:
    """Raise ValueError where splits are to be read otherwise than they were."""
    reading.refuse(("modalities", "split_seed", "skip_unreadable"), "Splits are taken as they are")
    for name, encoder in reading.encoders.items():
        if encoder not in ENCODERS:
            raise ValueError(
                f"encoders must be among {', '.join(ENCODERS)}, as Splits are taken as they are, got "
                f"{describe(encoder)} for {name}: mmfast.data.load(..., encoders=) takes it"
            )


def _parts(data: Any) -> dict[str, Any]:
    """Return the data sets of a program by the names of PARTS."""
    if isinstance(data, Mapping):
        for name in data:
            if name not in PARTS:
                hint = did_you_mean(str(name), PARTS)
                raise ValueError(f"data must have the keys train, val and test, got {describe(name)}{hint}")
        parts = dict.fromkeys(PARTS) | dict(data)
    elif len(data) == len(PARTS):
        parts = dict(zip(PARTS, data, strict=True))
    else:
        raise ValueError(f"data must be (train, val, test), of which val may be None, got {describe(data)}")
    for name in ("train", "test"):
        if parts[name] is None:
            raise ValueError(f"data must hold a data set for {name}, got None")
    return parts


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with weights of classes as numbers, which results tell."""
    weights = options.get("class_weights")
    if weights is None or isinstance(weights, str):
        return dict(options)
    return {**options, "class_weights": tuple(torch.as_tensor(weights).tolist())}


def check_data(data: Any, more: Sequence[Any]) -> None:
    """Raise TypeError where the arguments that need no name are not data and methods."""
    if _are_methods(data):
        raise TypeError(f"data must come first and methods after them, got methods: {_HOW}")
    if more:
        raise TypeError(
            f"data must be one argument, and what comes after methods have a name, got {2 + len(more)} "
            f"arguments without one: {_HOW}"
        )
    if not isinstance(data, str | os.PathLike | Splits | tuple | list | Mapping):
        raise TypeError(f"data must be {_DATA}, got {describe(data)}")


def _are_methods(data: Any) -> bool:
    """Whether methods were given for data."""
    if isinstance(data, str):
        data = [] if Path(data).exists() else list(METHODS) if data == "all" else data.split(",")
    if not isinstance(data, list | tuple):
        return isinstance(data, Method)
    names = (each.strip() in METHODS for each in data if isinstance(each, str))
    return any(names) or any(isinstance(each, Method) for each in data)

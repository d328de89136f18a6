"""One run of one method: made, tested, told of in results, and read back from a checkpoint."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mmfast
from mmfast import data
from mmfast.data import Splits
from mmfast.data.views import choose
from mmfast.experiments.loading import open_run
from mmfast.experiments.outcomes import OUTCOME, Outcome, outcome_of
from mmfast.experiments.run_setup import RunSetup
from mmfast.experiments.setup import Setup
from mmfast.files import plain
from mmfast.methods import Method
from mmfast.models import MultimodalModel
from mmfast.training.divergence import DivergedError
from mmfast.training.metrics import AnyMetrics
from mmfast.training.optimization import Optimization
from mmfast.training.selection import kept_epochs
from mmfast.training.trainer import Trainer


@dataclass(frozen=True)
class PlannedRun:
    """One run to make: a method with a seed, and the number of epochs it takes.

    Attributes:
        optimization: settings of its own, where they are not those of the setup.
    """

    method: Method
    seed: int
    epochs: int
    optimization: Optimization | None = None

    def settled(self, setup: RunSetup) -> RunSetup:
        """Return what runs share, with this one's own settings."""
        if self.optimization is None:
            return setup
        return setup.with_settings(optimization=self.optimization)

    def told_in(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Return an entry for results that tells of its own settings, too."""
        if self.optimization is None:
            return entry
        return entry | {"optimization": plain(self.optimization.told())}


def make_run(
    setup: RunSetup,
    method: Method,
    seed: int,
    out_dir: Path,
    *,
    resume: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train a method with a seed, or finish what is in `out_dir`, test it once, return its entry for results.

    The arguments are those of `make_whole_run`.
    """
    return make_whole_run(setup, method, seed, out_dir, resume=resume, **options)[0]


def make_whole_run(
    setup: RunSetup,
    method: Method,
    seed: int,
    out_dir: Path | None,
    *,
    resume: bool = True,
    **options: Any,
) -> tuple[dict[str, Any], Outcome | None]:
    """Make a run; return its entry for results, and what it makes of each test sample.

    Args:
        setup: data, model and settings.
        method: what to train by.
        seed: of the model, the order of samples and the method's draws.
        out_dir: folder of the checkpoints and of the outcome; None keeps none.
        resume: go on from the checkpoint in `out_dir`, if there is one.
        options: of `Trainer`, such as `on_epoch`, `loggers` and `progress`.
    """
    begun = time.perf_counter()
    trainer = setup.trainer(method, seed, out_dir, **options)
    model = setup.model(seed)
    trainer.launch()
    parts = setup.parts_on(trainer.fabric.device)
    trainer.fit(model, parts["train"], parts["val"], resume=resume and out_dir is not None)
    entry, outcome = finished(trainer, model, parts["train"], parts["test"], probe=setup.probe)
    if outcome is not None and out_dir is not None and trainer.fabric.is_global_zero:
        outcome.save(out_dir / OUTCOME)
    return plain(entry | {"wall_seconds": time.perf_counter() - begun}), outcome


def finished(
    trainer: Trainer, model: MultimodalModel, train: Any, test: Any, *, probe: bool
) -> tuple[dict[str, Any], Outcome | None]:
    """Test a run that is finished; return its entry for results, and what it makes of each test sample.

    Args:
        trainer: has fitted `model`.
        model: of the run.
        train, test: data sets.
        probe: ask a probe of each modality, too.
    """
    entry, learner = finished_entry(trainer, trainer.test(model, test)), trainer.learner
    assert learner is not None
    with learner.objective.for_any_labels():
        outcome = outcome_of(learner, train, test, trainer.fabric, probe=probe)
    if outcome is not None:
        entry |= outcome.figures(learner.modalities)
    return entry, outcome


def finished_entry(trainer: Trainer, metrics: AnyMetrics) -> dict[str, Any]:
    """Return the entry for results of a run that is finished and tested."""
    assert trainer.learner is not None
    seconds = sum(entry["seconds"] for entry in trainer.history)
    return {
        "method": trainer.method.name,
        "seed": trainer.seed,
        "config": trainer.method.config(),
        "metrics": metrics.as_dict(),
        "protocol": trainer.learner.protocol,
        "epochs": len(trainer.history),
        # Training alone, in all processes that worked on the run; wall_seconds is all the last one took.
        "seconds": seconds,
        "seconds_per_epoch": seconds / len(trainer.history),
        "versions": versions(),
        "devices": trainer.fabric.world_size,
        "accelerator": trainer.fabric.device.type,
        "kept_epochs": kept_epochs(trainer.learner, trainer.history, trainer.measures),
        "history": trainer.history,
    }


def diverged_entry(method: Method, seed: int, error: DivergedError) -> dict[str, Any]:
    """Return the entry for results of a run that has no figures."""
    return plain(
        {
            "method": method.name,
            "seed": seed,
            "config": method.config(),
            "diverged": str(error),
            "versions": versions(),
        }
    )


def restore(
    path: Path,
    source: str | None = None,
    *,
    skip_unreadable: bool = False,
    **options: Any,
) -> tuple[Trainer, Splits, dict[str, Any]]:
    """Return the trainer of a checkpoint with its learner, its data, and what the checkpoint tells.

    Args:
        path: `model.ckpt`, or the folder it lies in.
        source: other data than the model was trained on, of the same modalities and classes.
        skip_unreadable: leave out files of a folder that cannot be read, which is done for a model trained
            so in any case.
        options: further fields of Setup, such as `accelerator` and `devices`.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: the checkpoint cannot be read, is not of these commands, or the data do not fit it.
    """
    run = open_run(path)
    run.check_commands(source)
    state, facts = run.state, run.facts
    # Checkpoints of before know nothing of it.
    skip_unreadable = skip_unreadable or facts.get("skip_unreadable", False)
    splits = data.load(
        source or facts["source"],
        seed=facts["split_seed"] or 0,
        standardize=False,
        skip_unreadable=skip_unreadable,
        num_workers=options.get("num_workers", 0),
    )
    chosen, encoders = facts.get("modalities"), run.encoders
    # Where some are missing the shapes below say which.
    if set(splits.modalities) >= {*(chosen or ()), *encoders}:
        splits = choose(splits, chosen, encoders)
    if splits.shapes != run.shapes:
        raise ValueError(f"data must have modalities {_shapes(run.shapes)}, got {_shapes(splits.shapes)}")
    if list(splits.class_names) != facts["classes"]:
        raise ValueError(
            f"data must have classes {', '.join(facts['classes'])}, got {', '.join(splits.class_names)}"
        )
    if facts["scaling"] is not None:
        splits = splits.standardize(facts["scaling"], in_place=True)
    setup = Setup(
        source or facts["source"],
        splits,
        Optimization(**state["optimization"]),
        facts["dim"],
        facts["fusion"],
        skip_unreadable=skip_unreadable,
        modalities=None if chosen is None else tuple(chosen),
        encoders=encoders,
        **run.precision | options,
    )
    trainer = setup.trainer(run.method(), state["seed"], None)
    trainer.launch()
    trainer.restore(setup.model(state["seed"]), run.file)
    return trainer, splits, state


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"mmfast": mmfast.__version__, "torch": torch.__version__, "python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Return what the runs of this process are made on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def num_gpus(setup: RunSetup, method: Method) -> int:
    """Return how many GPUs of this machine runs may take, 0 where they take none."""
    kind = setup.trainer(method, 0, None, loggers=()).fabric.device.type
    return torch.cuda.device_count() if kind == "cuda" else 0

"""Finished runs read back from their folders: what a checkpoint tells, and the learner in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import mmfast
from mmfast import methods, models
from mmfast.errors import describe
from mmfast.methods import Learner, Method
from mmfast.models import MultimodalModel
from mmfast.models.build import ENCODERS
from mmfast.objectives import Loss
from mmfast.training import checkpoint
from mmfast.training.run_folder import LAST, MODEL
from mmfast.training.state import load_trained, objective_of

# What metadata must hold for a model to be built from them, and for data to be loaded as in training.
_MODEL = ("shapes", "classes", "dim", "fusion")
_DATA = ("source", *_MODEL, "scaling")
# Runs of a comparison that an error names.
_NAMED = 12
_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Run:
    """What lies in the folder of a finished run.

    Attributes:
        file: its model.ckpt.
        state: what that holds.
    """

    file: Path
    state: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What whoever started the run noted of data and model."""
        return self.state.get("metadata") or {}

    @property
    def encoders(self) -> dict[str, str]:
        """What modalities are taken as, or by, where that was given."""
        return dict(self.facts.get("encoders", {}))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a sample, as the model takes it."""
        return {name: tuple(shape) for name, shape in self.facts["shapes"].items()}

    @property
    def precision(self) -> dict[str, str]:
        """The precision of a run that is one of its passes alone; weights come as they are in any case."""
        precision = self.state.get("precision", "")
        return {"precision": precision} if str(precision).endswith("-mixed") else {}

    def method(self) -> Method:
        """Return the method with the options of the run."""
        with self.of_another_version():
            config = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in self.state["config"].items()
            }
            return methods.make(self.state["method"], **config)

    def model(self) -> MultimodalModel:
        """Return the model of a run of commands, not trained.

        Raises:
            ValueError: the checkpoint does not tell how to build it.
        """
        if missing := [key for key in _MODEL if key not in self.facts]:
            raise ValueError(
                f"model must be given, built as it was for training: {self.file} is of a run of "
                f"mmfast.Trainer with a model of its own, and does not tell its {', '.join(missing)}"
            )
        named = {name: encoder for name, encoder in self.encoders.items() if encoder in ENCODERS}
        with self.of_another_version():
            return models.build_model(
                self.shapes,
                len(self.facts["classes"]),
                dim=self.facts["dim"],
                fusion=self.facts["fusion"],
                encoders=named,
            )

    def check_commands(self, source: str | None = None) -> None:
        """Raise ValueError unless data can be loaded as for the run, and it is finished.

        Args:
            source: where the data come from; None: whence they came in training.
        """
        missing = [key for key in _DATA if key not in self.facts]
        if missing == ["source"] and source is not None:
            missing = []
        if missing == ["source"]:
            raise ValueError(
                f"data must be given, as {self.file} is of a program with data of its own, got none: --data"
            )
        if missing and "learner" in self.state:
            raise ValueError(
                f"{self.file} is of a program with data or a model of its own, of which it does not tell "
                f"{', '.join(missing)}: in Python mmfast.load(..., model=) takes it"
            )
        if missing or "learner" not in self.state:
            raise ValueError(
                f"{self.file} must be the {MODEL} of mmfast train or compare, got one without "
                f"{', '.join(missing) or 'selected weights'}"
            )

    @contextlib.contextmanager
    def of_another_version(self) -> Iterator[None]:
        """Say of an error that another version of mmfast wrote the checkpoint, where that is so."""
        theirs = self.state.get("mmfast")
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            if theirs in (None, mmfast.__version__):
                raise
            text = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.file} was written by mmfast {theirs} and does not fit this version, "
                f"{mmfast.__version__}: {text}; load it with that version"
            ) from error


def open_run(path: str | Path) -> Run:
    """Return the run in a folder, or of a model.ckpt.

    Raises:
        FileNotFoundError: there is no finished run; of a folder of a comparison the runs are named.
        ValueError: the checkpoint cannot be read, or has another format.
    """
    path = Path(path)
    file = path / MODEL if path.is_dir() else path
    if path.is_dir() and not file.exists() and (runs := _finished_runs(path)):
        raise FileNotFoundError(
            f"{path} holds a comparison of several runs: give one of them, such as {runs[0]}{_others(runs)}"
        )
    if path.is_dir() and not file.exists() and (path / LAST).exists():
        raise FileNotFoundError(f"{path} holds an unfinished run: finish it with mmfast train --resume")
    return Run(file, checkpoint.load(file))


def load(
    run: str | Path,
    *,
    model: MultimodalModel | None = None,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
) -> Learner:
    """Return the learner of a finished run, in eval mode and ready to predict; no data are read.

        learner = mmfast.load("run")
        learner.predict(dataset).to_csv("predictions.csv")

    It computes in the mixed precision of its training, where that had one. What it was trained on is told by
    `learner.modalities`, `learner.class_names` (None where the training data did not tell them) and
    `learner.scaling`, by which `learner.predict` standardises data that are raw.

    Args:
        run: folder of `mmfast train`, of one of the runs of `mmfast compare`, or of a Trainer's `out_dir`; or
            the model.ckpt in it.
        model: for a run of `mmfast.Trainer` with a model of one's own: that model, built as it was for
            training. It gets the weights of the run.
        loss: for a run with a loss of one's own: that loss, if it is to be measured; predictions need none.
        device: where the learner goes.

    Raises:
        FileNotFoundError: there is no finished run.
        TypeError: `model` is none.
        ValueError: the checkpoint cannot be read, was written by another version that does not fit, or is of
            another model; the model must be given and is not; there is no loss of one's own; or the device
            cannot be used.
    """
    if model is not None and not isinstance(model, MultimodalModel):
        raise TypeError(f"model must be a mmfast.MultimodalModel, got {describe(model)}")
    place = _device(device)
    found = open_run(run)
    state = found.state
    if missing := [
        key for key in ("method", "config", "optimization", "seed", "learner") if key not in state
    ]:
        raise ValueError(f"{found.file} must be the {MODEL} of a finished run, got one without {missing[0]}")
    if model is None:
        model = found.model()
    with found.of_another_version():
        objective = objective_of(state, loss).for_data(None, model.num_classes)
        learner = found.method().bind(model, seed=state["seed"], objective=objective)
        load_trained(learner, state, state["optimization"]["max_epochs"])
    learner.to(place)
    learner.objective.to(place)
    if (dtype := _MIXED.get(found.precision.get("precision", ""))) is not None:
        learner.autocast = functools.partial(torch.autocast, place.type, dtype=dtype)
    return learner


def device_of(accelerator: str) -> torch.device:
    """Return the first device of an accelerator as Lightning Fabric takes it: auto, cpu, cuda or another.

    Raises:
        ValueError: the machine lacks it.
    """
    try:
        return Fabric(accelerator=accelerator, devices=1).device
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"accelerator {accelerator!r} cannot be used: {error}") from error


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return found


def _finished_runs(path: Path) -> list[Path]:
    """Return the folders of the finished runs of a comparison."""
    return sorted(file.parent for runs in (path / "runs", path) for file in runs.glob(f"*-seed*/{MODEL}"))


def _others(runs: Sequence[Path]) -> str:
    """Return what else there is beside the first run, as the end of a sentence."""
    if len(runs) == 1:
        return ""
    names = [run.name for run in runs[1:]]
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f", beside which there are {', '.join(names[:_NAMED])}{more}"

"""What a run goes on from: a learner's state in parts, random state, and epochs stopped within."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.data.origins import names_of_classes, shapes_of_samples, told_scaling
from mmfast.distributed import gather_objects
from mmfast.errors import describe
from mmfast.files import plain
from mmfast.methods._state import EXTRA
from mmfast.methods.base import Learner
from mmfast.objectives import Loss, Objective
from mmfast.training.checkpoint import Parted

# The prefixes of the entries of a state dict that are selected together.
Part = tuple[str, ...]


def weights_of(learner: Learner) -> dict[str, Any]:
    """Return the state dict without the state of training: what predictions need."""
    weights = learner.state_dict()
    weights.pop(EXTRA, None)
    return weights


def groups_of(learner: Learner, parts: Collection[Part]) -> list[list[str]]:
    """Return the keys of `weights_of` by part, and in each those that train now and those that do not."""
    frozen = {name for name, p in learner.named_parameters(remove_duplicate=False) if not p.requires_grad}
    groups: dict[Any, list[str]] = {}
    for key in weights_of(learner):
        part = next((part for part in parts if key.startswith(part)), None)
        groups.setdefault((part, key in frozen), []).append(key)
    return list(groups.values())


def learner_state(learner: Learner, parts: Collection[Part]) -> Parted:
    """Return the state dict for a checkpoint: `parts` apart, and what of the extra state is large."""
    state = learner.state_dict()
    if "method" in (extra := state.get(EXTRA, {})):
        method = Parted(extra["method"], [[key] for key in extra["method"]])
        state[EXTRA] = {**extra, "method": method}
    return Parted(state, groups_of(learner, parts))


def load_state(learner: Learner, state: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict that a checkpoint or model selection has kept, as plain entries."""
    whole = learner.state_dict()
    # Modules look there for the version of what they get.
    entries = type(whole)(state)
    entries._metadata = whole._metadata  # type: ignore[attr-defined]
    learner.load_state_dict(entries, strict=strict)


def note_data(learner: Learner, train: Any) -> None:
    """Let a learner know what its training data tell of themselves."""
    learner.class_names = names_of_classes(train, learner.num_classes)
    learner.scaling = told_scaling(train)
    learner.shapes = shapes_of_samples(train)


def data_facts(learner: Learner) -> dict[str, Any]:
    """Return what a learner knows of its training data, as a checkpoint holds it."""
    return {
        "modalities": list(learner.modalities),
        "classes": None if learner.class_names is None else list(learner.class_names),
        "scaling": plain(learner.scaling),
        "shapes": plain(learner.shapes),
        # Balanced ones are found from data that nobody has later.
        "class_weights": learner.objective.config()["class_weights"],
    }


def objective_of(state: Mapping[str, Any], loss: Loss | None = None) -> Objective:
    """Return the objective that a checkpoint tells of, weights of classes as they were found.

    Args:
        state: what the checkpoint holds.
        loss: of the run, where that had one of its own; without it the objective has one that raises
            ValueError, as the checkpoint knows no more than its name.

    Raises:
        ValueError: a loss for a run that had none of its own.
    """
    told = state.get("objective") or {}
    task, name = told.get("task", "multiclass"), told.get("loss")
    if loss is not None and name is None:
        raise ValueError(f"loss must be None, as the run had none of its own, got {describe(loss)}")
    if name is not None:
        return Objective(task, loss=loss or _LostLoss(name))
    weights = found_weights(state, told.get("class_weights"))
    return Objective(task, class_weights=weights, label_smoothing=told.get("label_smoothing", 0.0))


def found_weights(state: Mapping[str, Any], weights: Any) -> Any:
    """Return weights of classes; in place of balanced ones those that a run has found, where it tells."""
    return (state.get("data") or {}).get("class_weights") if isinstance(weights, str) else weights


class _LostLoss:
    """Stands for a loss of which the name alone is known."""

    def __init__(self, name: str) -> None:
        self.__qualname__ = name

    def __call__(
        self,
        outputs: Tensor,  # [N, C]
        target: Tensor,  # [N] or [N, C]
    ) -> Tensor:  # [N]
        raise ValueError(
            f"loss of the run must be given to be measured, mmfast.load(..., loss={self.__qualname__}): "
            "the checkpoint tells its name alone"
        )


def load_trained(learner: Learner, state: Mapping[str, Any], max_epochs: int) -> None:
    """Load the selected weights of a checkpoint into a learner that was just bound, for predictions.

    Args:
        learner: of the method and the model of the checkpoint.
        state: what the checkpoint holds.
        max_epochs: of the run.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    facts = state.get("data")
    if facts is None:
        # Those of before tell of data where they are of a command alone; other metadata are the user's own.
        noted = state.get("metadata") or {}
        facts = noted if {"source", "shapes", "classes", "scaling"} <= set(noted) else {}
    names = facts.get("modalities")
    if names is not None and list(names) != list(learner.modalities):
        raise ValueError(
            f"model must have the modalities of the checkpoint, {', '.join(names)}, "
            f"got {', '.join(learner.modalities)}"
        )
    learner.start_stage(learner.stages(max_epochs)[-1])
    try:
        learner.load_state_dict(state["learner"])
    except RuntimeError as error:
        learner.abandon()
        raise ValueError(f"the checkpoint does not fit the model: {error}") from error
    learner.unfreeze()
    learner.eval()
    if (classes := facts.get("classes")) is not None:
        learner.class_names = tuple(classes)
    if "scaling" in facts:
        # Commands note None for data that were not standardised.
        learner.scaling = facts["scaling"] if "data" in state else facts["scaling"] or {}
    if (shapes := facts.get("shapes")) is not None:
        learner.shapes = {name: tuple(shape) for name, shape in shapes.items()}


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all that draws in this process, as plain values and tensors on the CPU.

    That is torch here and on `device`, numpy's and Python's own.
    """
    # What data sets and transforms draw from.
    of_numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    inner = {
        key: torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value
        for key, value in of_numpy["state"].items()
    }
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {**of_numpy, "state": inner},
        "python": list(random.getstate()),
    }
    if device.type != "cpu":
        module, *arguments = _drawing(device)
        state[device.type] = module.get_rng_state(*arguments)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Let all draw what they would have drawn when `random_state` gave this."""
    torch.set_rng_state(state["torch"])
    inner = {
        key: value.numpy() if isinstance(value, Tensor) else value
        for key, value in state["numpy"]["state"].items()
    }
    np.random.set_state({**state["numpy"], "state": inner})  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type in state:
        module, *arguments = _drawing(device)
        module.set_rng_state(state[device.type], *arguments)


def _drawing(device: torch.device) -> tuple[Any, ...]:
    """Return the module that draws on a device, and what it must be told."""
    module = torch.get_device_module(device)
    # There is one of Apple's.
    return (module,) if device.type == "mps" else (module, device)


@dataclass(frozen=True)
class Cut:
    """An epoch that was stopped within: what its rest needs of its beginning.

    Attributes:
        batch: how many batches are done.
        num_batches: of the epoch.
        losses: of each process the losses of its steps so far, scaled by its share of the batch.
        random: of each process `random_state`.
        seconds: so far.
    """

    batch: int
    num_batches: int
    losses: list[Tensor]  # W x [steps]
    random: list[dict[str, Any]]
    seconds: float

    @classmethod
    def after(
        cls,
        batch: int,
        num_batches: int,
        losses: Tensor,  # [steps]
        seconds: float,
    ) -> Cut:
        """Return the cut after a batch; all processes ask for it."""
        mine = losses.cpu(), random_state(losses.device)
        all_losses, states = zip(*gather_objects(mine), strict=True)
        return cls(batch, num_batches, list(all_losses), list(states), seconds)

    def check(self, num_batches: int) -> None:
        """Raise ValueError if the epoch has another number of batches by now."""
        if num_batches != self.num_batches:
            raise ValueError(
                f"the checkpoint must be of an epoch of {num_batches} batches, as the data give, "
                f"got one of {self.num_batches}: resume with the data of then"
            )

    def losses_of(self, rank: int, world_size: int) -> Tensor:  # [steps]
        """Return a process's losses; of another number of processes than then, their mean over those."""
        if world_size == len(self.losses):
            return self.losses[rank]
        return torch.stack(self.losses).mean(0)

    def set_random_state(self, rank: int, device: torch.device) -> None:
        """Let a process draw on; one that was not there then keeps its state of the epoch's beginning."""
        if rank < len(self.random):
            set_random_state(self.random[rank], device)

"""Parameters and modules by name: which rate and weight decay they have, and which stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmfast.errors import did_you_mean
from mmfast.methods.base import Learner, Stage
from mmfast.models import MultimodalModel
from mmfast.training.optimization import Optimization

_MODEL = "model."
# How classes of norm layers are named, also those of other libraries: BatchNorm2d, LlamaRMSNorm.
_NORM = re.compile(r"Norm(Act)?(\dd)?$")


def parameter_groups(learner: Learner, settings: Optimization) -> list[nn.Parameter] | list[dict[str, Any]]:
    """Return what of a learner trains now, in groups where settings tell parameters apart."""
    if not (settings.lr_scale or settings.no_decay_norms_and_biases):
        return learner.trainable_parameters()
    undecayed = _undecayed(learner) if settings.no_decay_norms_and_biases else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            kind = _scale(name.removeprefix(_MODEL), settings.lr_scale), name in undecayed
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": settings.lr * scale,
            "weight_decay": 0.0 if is_free else settings.weight_decay,
        }
        for (scale, is_free), parameters in groups.items()
    ]


def check_scales(learner: Learner, patterns: Iterable[str]) -> None:
    """Raise ValueError unless each name or pattern of `lr_scale` fits a parameter of the learner."""
    names = [name.removeprefix(_MODEL) for name, _ in learner.named_parameters()]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            known = {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}
            raise ValueError(
                f"lr_scale must name parameters or modules of the learner, got {pattern!r}"
                f"{did_you_mean(pattern, sorted(known))}"
            )


def trains_in(learner: Learner, stage: Stage, held: Sequence[nn.Module]) -> bool:
    """Whether anything trains in a stage of a learner that was just bound, with modules held as they are."""
    before, learner.stage = learner.stage, stage
    still = {id(p) for module in (*learner.frozen(), *held) for p in module.parameters()}
    learner.stage = before
    return any(p.requires_grad and id(p) not in still for p in learner.parameters())


def modules_named(model: MultimodalModel, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """Return the modules of a model by the names of `freeze`.

    Raises:
        ValueError: a name is none of them; the message has the nearest ones.
    """
    known = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    for name in names:
        if name not in known:
            raise ValueError(
                f"freeze must name modules of the model, such as encoders.{model.modalities[0]}, got "
                f"{name!r}{did_you_mean(name, known)}"
            )
    return tuple(known[name] for name in names)


def _scale(name: str, scales: Any) -> float:
    """Return the factor of the longest name or pattern that fits a parameter, or 1."""
    fitting = [pattern for pattern in scales if _fits(name, pattern)]
    return float(scales[max(fitting, key=len)]) if fitting else 1.0


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _undecayed(learner: Learner) -> set[str]:
    """Return the names of all parameters of norm layers, biases and parameters of one dimension."""
    found = set()
    for prefix, module in learner.named_modules():
        is_norm = _NORM.search(type(module).__name__) is not None
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if is_norm or parameter.ndim <= 1 or name.endswith("bias"):
                found.add(name)
    return found

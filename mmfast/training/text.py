"""What a trainer is, in a few lines."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmfast.errors import changed, is_same, shown

# Settings that are shown whatever they are, and arguments that are told in words, or by the settings.
ALWAYS_SHOWN = ("max_epochs", "batch_size", "optimizer", "lr")
IN_WORDS = ("method", "optimization", "settings", "seed", "accelerator", "devices", "precision", "out_dir")


def trainer_text(trainer: Any, given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> str:
    """Return the repr of a trainer: its method, settings, devices, and what is not as it is by default.

    Args:
        trainer: what it is of.
        given: the arguments it was made with.
        parameters: of its class, with their defaults; what `given` holds besides is not shown.
    """
    settings = {name: getattr(trainer.optimization, name) for name in ALWAYS_SHOWN}
    options = {
        name: value
        for name, value in given.items()
        if name in parameters and name not in IN_WORDS and not is_same(value, parameters[name].default)
    }
    devices, kind = trainer.fabric.world_size, trainer.fabric.device.type
    lines = [
        f"Trainer({type(trainer.method).__name__}({shown(changed(trainer.method))})",
        shown(settings | changed(trainer.optimization)),
        f"on {kind if devices == 1 else f'{devices} x {kind}'}, "
        f"precision {trainer.fabric.strategy.precision.precision}, seed {trainer.seed}",
    ]
    if trainer.out_dir is not None:
        lines.append(f"out_dir {trainer.out_dir}")
    if options:
        lines.append(shown(options))
    if trainer.history:
        lines.append(f"epochs trained: {len(trainer.history)}")
    return "\n  ".join(lines) + ")"

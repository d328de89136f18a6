"""Options about how a run trains, the same for `mmfast compare` and `mmfast train`: one table for both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from mmfast.errors import either
from mmfast.training.optimization import CLIPPINGS, OPTIMIZERS, SCHEDULES, Optimization

# What the help says of options that are left out.
_DEFAULTS = Optimization()
_PANEL = "Training"


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, rich_help_panel=_PANEL, **more)


# By parameter, which is named as its field of Optimization or of Setup: all are None where not given.
TRAINING: dict[str, Any] = {
    "epochs": Annotated[
        int | None, _option(f"Epochs of a method's first stage; {_DEFAULTS.max_epochs} by default.", min=1)
    ],
    "batch_size": Annotated[
        int | None,
        _option(f"Samples of a batch, over all devices; {_DEFAULTS.batch_size} by default.", min=1),
    ],
    "accumulate_grad_batches": Annotated[
        int | None,
        _option(f"Batches of a step; {_DEFAULTS.accumulate_grad_batches} by default.", min=1),
    ],
    "optimizer": Annotated[str | None, _option(f"{either(OPTIMIZERS)}; {_DEFAULTS.optimizer} by default.")],
    "lr": Annotated[float | None, _option(f"Learning rate; {_DEFAULTS.lr} by default.")],
    "lr_scale": Annotated[
        list[str] | None,
        _option(
            "Scale the learning rate of parameters or modules, by name or pattern, such as "
            "encoders.text=0.1; may be given several times.",
            metavar="NAME=FACTOR",
        ),
    ],
    "momentum": Annotated[float | None, _option(f"Momentum of sgd; {_DEFAULTS.momentum} by default.")],
    "weight_decay": Annotated[float | None, _option(f"Weight decay; {_DEFAULTS.weight_decay} by default.")],
    "no_decay_norms_and_biases": Annotated[
        bool | None,
        _option("Let norm layers and biases not decay.", "--no-decay-norms-and-biases"),
    ],
    "schedule": Annotated[
        str | None,
        _option(f"How the learning rate falls: {either(SCHEDULES)}; {_DEFAULTS.schedule} by default."),
    ],
    "lr_step": Annotated[
        int | None,
        _option(
            "Epochs after which schedule step lets the learning rate fall by --lr-gamma; "
            + ("0, the default, keeps it." if _DEFAULTS.lr_step == 0 else f"{_DEFAULTS.lr_step} by default.")
        ),
    ],
    "lr_gamma": Annotated[float | None, _option(f"Factor of such a step; {_DEFAULTS.lr_gamma} by default.")],
    "warmup_epochs": Annotated[
        int | None, _option("Epochs in which the learning rate rises first; none by default.", min=0)
    ],
    "warmup_steps": Annotated[int | None, _option("The same in optimizer steps; none by default.", min=0)],
    "gradient_clip_val": Annotated[
        float | None, _option("What gradients are clipped to; they are not by default.")
    ],
    "gradient_clip_algorithm": Annotated[
        str | None,
        _option(f"By what: {either(CLIPPINGS)}; {_DEFAULTS.gradient_clip_algorithm} by default."),
    ],
    "ema_decay": Annotated[
        float | None,
        _option("Keep a moving average of the weights with this decay, such as 0.999; none by default."),
    ],
    "patience": Annotated[
        int | None,
        _option(
            "End a stage after so many epochs without improvement on validation data; it goes on by default.",
            min=0,
        ),
    ],
    "freeze": Annotated[
        list[str] | None,
        _option(
            "Leave a module of the model as it is, such as encoders.text; may be given several times.",
            metavar="NAME",
        ),
    ],
    "class_weights": Annotated[
        str | None,
        _option(
            "balanced, or a number for each class in the order of their names: what its samples count in the "
            "loss; the same by default.",
            metavar="balanced|W,W,...",
        ),
    ],
    "label_smoothing": Annotated[
        float | None, _option("Label smoothing of the cross-entropy; none by default.")
    ],
    "select": Annotated[
        str | None,
        _option("Figure by which the best epoch is kept, such as val/loss; val/accuracy by default."),
    ],
    "select_mode": Annotated[str | None, _option("max or min; by default what is better for the figure.")],
    "compile": Annotated[
        bool | None, _option("Compile the training steps of encoders and head.", "--compile")
    ],
    "deterministic": Annotated[
        bool | None,
        _option("Run deterministic algorithms alone, an error where there is none.", "--deterministic"),
    ],
}


def with_training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes all of TRAINING besides its own options, in its context's `params`."""

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**{name: value for name, value in given.items() if name not in TRAINING})

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in TRAINING.items()
    ]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.parameters.values()]
    # Typer reads it.
    wrapped.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    return wrapped

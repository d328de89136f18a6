"""How parameters are moved: optimizer, learning rate, what a step is made of, batch and epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from mmfast.errors import check_one_of, describe, did_you_mean
from mmfast.ranges import tuned

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("step", "cosine", "none")
CLIPPINGS = ("norm", "value")
# What results tell in any case; of the other settings they tell those that are set, so that results of before
# these settings are the same as results without them.
_ALWAYS_TOLD = (
    "max_epochs",
    "batch_size",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "lr_step",
    "lr_gamma",
)
# What other trainers call the settings of this one.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "wd": "weight_decay",
    "max_grad_norm": "gradient_clip_val",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "early_stopping_patience": "patience",
    "torch_compile": "compile",
}


@dataclass(frozen=True)
class Optimization:
    """Settings of a run; the defaults suit data sets of hundreds to thousands of samples.

    All hold for each stage of a method anew: its optimizer, schedule, patience and average are its own.

    Attributes:
        max_epochs: epochs of a method's first stage.
        batch_size: samples of a batch over all devices.
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate.
        momentum: of SGD.
        weight_decay: as the optimizer defines it.
        lr_step: of schedule "step": epochs after which the learning rate falls by `lr_gamma`; 0 keeps it.
        lr_gamma: factor of a step.
        schedule: "step"; "cosine", from `lr` to 0 along half a cosine over the epochs of a stage; or "none".
        warmup_epochs: epochs in which the learning rate rises linearly, in epoch e, from 0, to
            (e + 1) / (warmup_epochs + 1) of `lr`; the schedule begins after them.
        warmup_steps: the same by optimizer steps, of which mla makes one per modality in each batch. The
            schedule goes on by epochs meanwhile, and both factors multiply. Not with `warmup_epochs`.
        gradient_clip_val: what gradients are clipped to before each step; None leaves them. It comes after
            what a method does with them.
        gradient_clip_algorithm: "norm": all gradients of a step together are scaled to this norm at most;
            "value": each element lies in [-val, val].
        accumulate_grad_batches: batches of a step, fewer at the end of an epoch; their mean losses count by
            their samples, also where fewer of one batch have a label or a modality, or classes weigh more. A
            method of several steps a batch takes each of them with all these batches, as with one large
            batch, so they are held on the device. Batch norm, and losses that compare the samples of a batch,
            see the batches one by one.
        no_decay_norms_and_biases: no weight decay for norm layers, biases and other parameters of one
            dimension.
        lr_scale: factors of the learning rate, by the name of parameters or modules of the learner, "model."
            left out: {"encoders.text": 0.1}, or patterns, {"encoders.*.bias": 2}. The longest that fits
            counts.
        patience: end a stage after so many epochs in which nothing that is selected has improved on
            validation data; 0 never does. Epochs before a stage's first selectable one do not count.
        freeze: modules of the model that stay as they are in all stages, such as "encoders.text": their
            parameters do not train, and batch-norm statistics and dropout are those of eval mode.
        ema_decay: of the exponential moving average, over optimizer steps, of the parameters that train and
            of the model's batch-norm statistics. The average is what is validated, selected and kept at the
            end of a stage, and what the next one begins with. Methods' own passes over the data between
            epochs see the weights that train. None: no average.

    Raises:
        TypeError, ValueError: a setting out of its range, or two that exclude each other.
    """

    max_epochs: int = 50
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = tuned(1e-3, 1e-4, 1e-2, log=True)
    momentum: float = 0.9
    weight_decay: float = tuned(1e-4, 1e-6, 1e-2, log=True)
    lr_step: int = 0
    lr_gamma: float = 0.1
    schedule: str = "step"
    warmup_epochs: int = 0
    warmup_steps: int = 0
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    accumulate_grad_batches: int = 1
    no_decay_norms_and_biases: bool = False
    lr_scale: Mapping[str, float] = field(default_factory=dict, hash=False)
    patience: int = 0
    freeze: tuple[str, ...] = ()
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        check_one_of("schedule", self.schedule, SCHEDULES, suggest=True)
        check_one_of("gradient_clip_algorithm", self.gradient_clip_algorithm, CLIPPINGS, suggest=True)
        for name in ("max_epochs", "batch_size", "lr", "lr_gamma", "momentum", "weight_decay", "lr_step"):
            if not isinstance(getattr(self, name), int | float):
                raise TypeError(f"{name} must be a number, got {describe(getattr(self, name))}")
        for name in ("max_epochs", "batch_size", "lr", "lr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {describe(getattr(self, name))}")
        for name in ("momentum", "weight_decay", "lr_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {describe(getattr(self, name))}")
        for name, least in (
            ("warmup_epochs", 0),
            ("warmup_steps", 0),
            ("patience", 0),
            ("accumulate_grad_batches", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {describe(value)}")
        _check_number("gradient_clip_val", self.gradient_clip_val)
        _check_number("ema_decay", self.ema_decay, below=1)
        self._check_schedule()
        self._check_names()

    def _check_schedule(self) -> None:
        if self.lr_step and self.schedule != "step":
            raise ValueError(
                f"lr_step must be 0 with schedule={self.schedule!r}, as it is of schedule='step' alone, "
                f"got {self.lr_step}"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"warmup_epochs and warmup_steps exclude each other, got {self.warmup_epochs} and "
                f"{self.warmup_steps}"
            )
        if self.warmup_epochs >= self.max_epochs:
            raise ValueError(
                f"warmup_epochs must be below max_epochs = {self.max_epochs}, got {self.warmup_epochs}"
            )

    def _check_names(self) -> None:
        if isinstance(self.freeze, str) or not all(isinstance(name, str) for name in self.freeze):
            raise TypeError(
                f"freeze must be a tuple of names, such as ('encoders.text',), got {describe(self.freeze)}"
            )
        # As JSON and checkpoints give it back.
        object.__setattr__(self, "freeze", tuple(self.freeze))
        if not isinstance(self.lr_scale, Mapping):
            raise TypeError(
                "lr_scale must map names to factors, such as {'encoders.text': 0.1}, got "
                f"{describe(self.lr_scale)}"
            )
        for name, factor in self.lr_scale.items():
            if not isinstance(name, str):
                raise TypeError(f"lr_scale must map names to factors, got the name {describe(name)}")
            _check_number(f"lr_scale[{name!r}]", factor, optional=False)
        object.__setattr__(self, "lr_scale", dict(self.lr_scale))

    def told(self) -> dict[str, Any]:
        """Return what results tell of these settings, as plain values."""
        plain = Optimization()
        return {
            name: value
            for name, value in asdict(self).items()
            if name in _ALWAYS_TOLD or getattr(self, name) != getattr(plain, name)
        }

    def make_optimizer(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        precision: str = "32-true",
    ) -> torch.optim.Optimizer:
        """Return the optimizer of these settings, for parameters or groups of them.

        Adam and AdamW are torch's fused ones where all parameters are float32 on a CPU or of CUDA: the same
        but for rounding, and a step of a small model takes a fifth of the time. SGD never is: fused, it fails
        where a parameter has its first gradient after others have had theirs, as where modalities take turns.

        Args:
            parameters: what it moves.
            precision: of the run. With a mixed one it is never fused, as Lightning's clipping refuses that.
        """
        groups: list[Any] = list(parameters)
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        is_fused = not str(precision).endswith("mixed") and _can_fuse(groups)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        made = kind(groups, self.lr, weight_decay=self.weight_decay, fused=is_fused or None)
        if not is_fused:
            made.register_load_state_dict_post_hook(_part)
        return made


def _can_fuse(groups: list[Any]) -> bool:
    """Whether fused optimizers take all of these parameters, or groups of them."""
    each = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    return all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in each)


def _part(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that cannot be fused not be so by what a checkpoint of another device tells."""
    for group in optimizer.param_groups:
        group["fused"] = None


def with_settings(
    what: str,
    optimization: Optimization | None,
    settings: Mapping[str, Any],
    names: Sequence[str] | None = None,
    others: Sequence[str] = (),
) -> Optimization:
    """Return the settings of a run with some set on top.

    Args:
        what: takes them, as the sentence begins: "Trainer".
        optimization: None stands for the defaults.
        settings: fields by name.
        names: of the fields that are offered; None: all.
        others: names of arguments that are no fields, which a misspelled one may mean, too.

    Raises:
        ValueError: there is no field of a name; the nearest ones are given.
    """
    known = [field.name for field in fields(Optimization)]
    offered = known if names is None else names
    meant = {word: own for word, own in _OTHER_NAMES.items() if names is None or own in names}
    for name in settings:
        if name not in known:
            near = did_you_mean(name, [*offered, *others], meant)
            raise ValueError(f"{what} has no setting {name!r}{near}; it has {', '.join(offered)}")
    return replace(optimization or Optimization(), **settings)


def _check_number(name: str, value: Any, *, below: float | None = None, optional: bool = True) -> None:
    """Raise unless a value is a positive number, or None where that is allowed."""
    if value is None and optional:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and value > 0 and (below is None or value < below):
        return
    span = "be positive" if below is None else f"lie between 0 and {below}"
    raise ValueError(f"{name} must {span}{' or None' * optional}, got {describe(value)}")

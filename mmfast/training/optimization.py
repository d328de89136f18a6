"""How parameters are moved: optimizer, schedule, batch and epochs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mmfast.errors import check_one_of, describe

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Optimization:
    """Settings of a run; the defaults suit data sets of hundreds to thousands of samples.

    Attributes:
        max_epochs: epochs of a method's first stage.
        batch_size: samples of a batch over all devices.
        optimizer: "adam", "adamw" or "sgd".
        lr: learning rate.
        momentum: of SGD.
        weight_decay: as the optimizer defines it.
        lr_step: epochs after which the learning rate falls by `lr_gamma`; 0 keeps it.
        lr_gamma: factor of a step.
    """

    max_epochs: int = 50
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_step: int = 0
    lr_gamma: float = 0.1

    def __post_init__(self) -> None:
        check_one_of("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("max_epochs", "batch_size", "lr", "lr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {describe(getattr(self, name))}")
        for name in ("momentum", "weight_decay", "lr_step"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {describe(getattr(self, name))}")

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of these settings."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule of these settings, stepped once an epoch."""
        return torch.optim.lr_scheduler.StepLR(optimizer, self.lr_step or 10**9, self.lr_gamma)

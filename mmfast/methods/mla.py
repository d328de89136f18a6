"""MLA: modalities take turns on one shared head, whose gradient spares what the previous modality uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mmfast import ops
from mmfast.data.batches import presence
from mmfast.distributed import sum_over_processes
from mmfast.errors import check_one_of
from mmfast.methods._late_fusion import LateFusionLearner
from mmfast.methods.base import Method, check_numbers
from mmfast.ranges import tuned

RESETS = ("never", "epoch", "step")


class _MLALearner(LateFusionLearner):
    projector: Tensor  # P, [D, D]
    previous: Tensor  # mean features of the step before, [D]
    current: Tensor  # mean features of this step, [D]

    def build(self) -> None:
        dim = self.model.dims[0]
        self.shared_head = nn.Linear(dim, self.num_classes)  # V, c
        self.steps_per_batch = len(self.modalities)
        self.register_buffer("projector", torch.eye(dim))  # P
        # Mean features of the previous step and of this one; zero removes nothing, so the first step is
        # unmodified.
        self.register_buffer("previous", torch.zeros(dim))
        self.register_buffer("current", torch.zeros(dim))
        # Of a step that adds up the gradients of several batches: its number, and the sums so far, [D + 1].
        self._seen: tuple[int, Tensor] | None = None

    def frozen(self):
        return (self.model.head,)

    def own_logits(self, features):
        return torch.stack([self.shared_head(h) for h in features])

    def _apply(self, fn, recurse=True):
        # What turns the whole module to half precision leaves too few digits for P: these only move.
        kept = {name: getattr(self, name) for name in ("projector", "previous", "current")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            setattr(self, name, before.to(getattr(self, name).device))
        return self

    def start_epoch(self, epoch, train):
        if self.method.reset == "epoch":
            self._reset_projector()
            self.previous.zero_()
        return train

    def _reset_projector(self) -> None:
        self.projector.copy_(torch.eye(len(self.projector)))

    def forward(self, batch, step=0):
        name = self.modalities[step]
        h = self.model.encode_modality(batch, name)
        present = presence(batch, self.modalities)
        present = None if present is None else present[step : step + 1]
        self._remember_mean(h.detach(), present, step)
        return self.unimodal_loss(self.shared_head(h)[None], batch["label"], present)

    @torch.no_grad()
    def _remember_mean(self, h, present, step=0) -> None:
        h = h.float()
        keep = torch.ones_like(h[:, 0]) if present is None else present[0].float()
        # The sum of the features and their number, [D + 1], in one message.
        found = sum_over_processes(torch.cat([keep @ h, keep.sum()[None]]))
        if self.training:
            if self._seen is not None and self._seen[0] == step:
                found = found + self._seen[1]
            self._seen = step, found
        self.current.copy_(found[:-1] / found[-1].clamp(min=1))

    @torch.no_grad()
    def edit_gradients(self, step, progress):
        self._seen = None
        if self.method.released:
            return
        if self.method.reset == "step":
            self._reset_projector()
        weight = self.shared_head.weight
        assert weight.grad is not None
        alpha = self.method.alpha * 0.1**progress
        weight.grad.copy_(ops.update_and_project_(self.projector, self.previous, weight.grad, alpha=alpha))
        self.previous.copy_(self.current)

    def combine(self, logits, present):
        weights = self.method.weights
        if weights is None:
            return ops.entropy_fusion(logits, present=present)[0]
        if len(weights) != len(logits):
            raise ValueError(f"weights must hold one number per modality = {len(logits)}, got {len(weights)}")
        fixed = torch.tensor(weights, dtype=logits.dtype, device=logits.device)[:, None]
        fixed = fixed.expand(logits.shape[:2]) if present is None else fixed * present
        return (fixed[..., None] * logits).sum(0)


@dataclass(frozen=True)
class MLA(Method):
    """Train modality after modality in every batch, each by its own cross-entropy through one shared head.

    Before each step the gradient of the shared head V is multiplied by the projector P, from which the mean
    feature of the step before has been removed. Predictions weight the modalities by softmax(-entropy) per
    sample.

    Attributes:
        alpha: a of the projector's update at the start of an epoch; it falls to a tenth by the end.
        reset: when P is set back to I: "never" (published, and no worse on validation data), "epoch" or
            "step".
        weights: fixed fusion weights, one per modality, in place of the entropies.
        released: follow the public code, in which the projector is never applied.

    Source: Zhang et al., "Multimodal representation learning by alternating unimodal adaptation", CVPR 2024,
    arXiv 2311.10707.
    """

    name: ClassVar[str] = "mla"
    title: ClassVar[str] = "MLA"
    needs_equal_dims: ClassVar[bool] = True
    needs_classes: ClassVar[str] = "it weights modalities by the entropy of their class probabilities"
    learner = _MLALearner

    alpha: float = tuned(0.1, 0.01, 1.0, log=True)
    reset: str = "never"
    weights: tuple[float, ...] | None = None
    released: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(math.ulp(0.0), math.inf))
        check_one_of("reset", self.reset, RESETS)

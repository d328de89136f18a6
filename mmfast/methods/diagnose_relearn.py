"""Diagnosing and re-learning: encoders that memorise are pulled back towards their initial weights."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast import ops
from mmfast.distributed import broadcast_from_first, rank_and_size, world
from mmfast.methods.base import Learner, Method, check_numbers
from mmfast.models import MultimodalModel
from mmfast.ranges import tuned, tuned_epochs


def scale_to_unit(
    features: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return every dimension scaled to [-1, 1] by its own minimum and maximum; a constant one becomes 0."""
    low, high = torch.aminmax(features, dim=0)
    span = high - low
    return torch.where(span > 0, 2 * (features - low) / torch.where(span > 0, span, 1.0) - 1, 0.0)


class _DiagnoseRelearnLearner(Learner):
    def build(self) -> None:
        _check_apart(self.model)
        self.theta_0 = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.buffers_0 = {name: b.detach().clone() for name, b in self.model.encoders.named_buffers()}
        self._optimizer_reset = False
        # By prefix: what is pulled where, and the plan for it.
        self._plans: dict[str, tuple[list[Tensor], list[Tensor], ops.ReinitPlan]] = {}

    def reads_again(self, epoch):
        return self._diagnoses(epoch)

    def _diagnoses(self, epoch: int) -> bool:
        return epoch in sorted(set(self.method.epochs))[: self.method.max_times] and not self.is_last(epoch)

    def end_epoch(self, epoch, train, val):
        if not self._diagnoses(epoch):
            return {}
        if val is None:
            raise ValueError(
                "diagnose-relearn needs a validation split: its gap is between training and validation"
            )
        purity = {split: self._purities(data, epoch) for split, data in (("train", train), ("val", val))}
        self.forget()
        figures: dict[str, float] = {}
        gaps = [
            abs(of_train - of_val) for of_train, of_val in zip(purity["train"], purity["val"], strict=True)
        ]
        for name, gap in zip(self.modalities, broadcast_from_first(gaps), strict=True):
            alpha = math.tanh(self.method.lam * gap)
            self._relearn(f"encoders.{name}.", alpha)
            figures |= {f"gap_{name}": gap, f"alpha_{name}": alpha}
        self._reset_options()
        return figures

    def _purities(self, dataset, epoch) -> list[float]:
        """Return the purity of the clusters of each modality's features, P^m.

        Processes share encoding and clustering; the samples lie in the order of the data, so that K-means
        begins where that of one process does.
        """
        if self.takes_kept:
            self.keep(dataset, whole=True)
        rank, world_size = rank_and_size()
        purities = []
        for m, name in enumerate(self.modalities):
            found = [(h, y) for own, h, y in self.modality_features(dataset) if own == m]
            if not found:
                raise ValueError(
                    f"diagnose-relearn needs samples with {name} in training and validation, got none"
                )
            h, y = (torch.cat(parts) for parts in zip(*found, strict=True))
            clusters = ops.kmeans(
                scale_to_unit(h).tensor_split(world_size)[rank],
                min(self.num_classes, len(h)),
                num_init=self.method.num_init,
                seed=self.seed + epoch,
                group=world(),
            )
            labels = y.tensor_split(world_size)[rank]
            purities.append(ops.cluster_purity(clusters.assignments, labels, group=world()))
        return purities

    def _relearn(self, prefix: str, alpha: float) -> None:
        # What the user froze never moved, and keeps its bits.
        moved = {n: p for n, p in self.model.named_parameters() if n.startswith(prefix) and p.requires_grad}
        params: list[Tensor] = list(moved.values())
        theta_0 = [self.theta_0[name] for name in moved]
        inits = [of_start.to(p) for p, of_start in zip(params, theta_0, strict=True)]
        if not _are_same(inits, theta_0):
            # Kept, copies on another device would take memory that training needs.
            ops.partial_reinit_(params, inits, alpha)
            return
        of, at, plan = self._plans.get(prefix, ([], [], None))
        if plan is None or not (_are_same(of, params) and _are_same(at, theta_0)):
            plan = ops.ReinitPlan(params, theta_0)
            self._plans[prefix] = (params, theta_0, plan)
        plan.apply_(alpha)

    def _reset_options(self) -> None:
        if self.method.reset_head:
            self._relearn("head.", 1.0)
        if self.method.reset_running_stats:
            for name, buffer in self.model.encoders.named_buffers():
                buffer.copy_(self.buffers_0[name])
        self._optimizer_reset = self.method.reset_optimizer

    def optimizer_reset_due(self):
        due, self._optimizer_reset = self._optimizer_reset, False
        return due

    def extra_state(self):
        return {"theta_0": self.theta_0, "buffers_0": self.buffers_0}

    def load_extra_state(self, state):
        self.theta_0, self.buffers_0 = state["theta_0"], state["buffers_0"]


def _are_same(tensors: list[Tensor], others: list[Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(operator.is_, tensors, others))


def _check_apart(model: MultimodalModel) -> None:
    """Raise ValueError if encoders share a parameter: each is pulled back by an alpha of its own."""
    owner: dict[int, str] = {}
    for name, encoder in model.encoders.items():
        for key, p in encoder.named_parameters():
            if (other := owner.setdefault(id(p), name)) != name:
                raise ValueError(
                    "diagnose-relearn needs encoders that share no parameters, as each has an alpha of its "
                    f"own, got {key} in {other} and {name}"
                )


@dataclass(frozen=True)
class DiagnoseRelearn(Method):
    """Train jointly; at set epochs pull each encoder back by how much purer its training clusters are.

    At a diagnosis, P is the purity of K-means clusters (K = C) of the features of one modality and split, and
    `theta^m <- (1 - alpha) theta^m + alpha theta_0^m` with `alpha = tanh(lam |P_train - P_val|)` for the
    parameters of encoder m.

    Attributes:
        lam: lambda in alpha = tanh(lam gap).
        epochs: epochs, from 0, after which a diagnosis takes place.
        max_times: at most so many of them.
        num_init: restarts of K-means, the tightest clustering is kept.
        reset_head: also restore the fusion head at a diagnosis.
        reset_running_stats: also restore batch-norm statistics.
        reset_optimizer: also drop the optimizer's state.

    Source: Wei et al., "Diagnosing and re-learning for balanced multimodal learning", ECCV 2024, arXiv
    2407.09705.
    """

    name: ClassVar[str] = "diagnose-relearn"
    title: ClassVar[str] = "Diagnose & re-learn"
    needs_validation: ClassVar[bool] = True
    needs_classes: ClassVar[str] = "it clusters features and asks how pure in classes the clusters are"
    learner = _DiagnoseRelearnLearner

    lam: float = tuned(3.0, 0.3, 10.0, log=True)
    epochs: tuple[int, ...] = tuned_epochs((20, 40, 60), 0.1, 0.5)
    max_times: int = 3
    num_init: int = 10
    reset_head: bool = False
    reset_running_stats: bool = False
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, lam=(0, math.inf), max_times=(0, math.inf), num_init=(1, math.inf))

    @property
    def joint_epochs(self) -> float:
        return min(self.epochs) + 1 if self.epochs and self.max_times else math.inf

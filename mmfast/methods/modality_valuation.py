"""Modality-level valuation: the modality that contributes least is trained on alone more often."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from mmfast.data.batches import Entries
from mmfast.errors import check_one_of
from mmfast.methods._resampling import ResamplingLearner
from mmfast.methods.base import Method, check_numbers
from mmfast.ranges import tuned, tuned_among, tuned_epoch
from mmfast.valuation import mean_contributions

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": float,
    "tanh": math.tanh,
    "power": lambda gap: gap**1.5,
}


class _ModalityValuationLearner(ResamplingLearner):
    def end_epoch(self, epoch, train, val):
        method = self.method
        if epoch + 1 < method.warmup or self.is_last(epoch):
            return {}
        draw = self.generator(epoch)
        num_drawn = max(1, int(method.fraction * len(train)))
        subset = torch.randint(len(train), (num_drawn,), generator=draw, device="cpu")
        # Who is drawn more than once counts as often, and is read once.
        drawn, position = subset.unique(return_inverse=True)
        # Of the data set itself, whose workers and marks are kept: its plain form may be new each time.
        values, present = self.contributions(Entries(train, drawn))
        phi = mean_contributions(values[position], None if present is None else present[position])  # [M]
        # A modality that no drawn sample has cannot be compared.
        known = phi[~phi.isnan()]
        gap = float(known.max() - known.min())
        share = 2 / 3 * method.alpha * SHAPES[method.shape](gap)
        indices = torch.randint(len(train), (int(share * len(train)),), generator=draw, device="cpu")
        lowest = int(phi.nan_to_num(nan=torch.inf).argmin())
        counts = torch.zeros(len(train), len(self.modalities), dtype=torch.int64, device="cpu")
        counts[:, lowest] = torch.bincount(indices, minlength=len(train))
        self.add_copies(counts, self.presence_of(train, indices))
        return self.figures(phi)


@dataclass(frozen=True)
class ModalityValuation(Method):
    """Train on every sample plus random samples that show only the modality of least mean contribution.

    After `warmup` epochs, and after every epoch from then on, mean contributions phibar^m are taken on
    int(fraction N) training samples drawn with replacement; the next epoch adds int(p N) samples drawn with
    replacement, p = 2/3 alpha f(largest phibar - smallest), every other modality zero.

    Attributes:
        alpha: strength of the re-sampling.
        fraction: part of the training set that is valuated.
        shape: f, "linear", "tanh" or "power" (exponent 1.5).
        warmup: epochs before the first valuation.
        released: follow the field's benchmark toolkit, which leaves the factor `|S|` out of v; v(none)
            stays 0.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024,
    modality-level; M >= 3 is our extension.
    """

    name: ClassVar[str] = "modality-valuation"
    title: ClassVar[str] = "Modality-level valuation"
    needs_classes: ClassVar[str] = "a coalition is worth its size where the predicted class is right"
    learner = _ModalityValuationLearner

    alpha: float = tuned(1.0, 0.25, 4.0, log=True)
    fraction: float = 0.2
    shape: str = tuned_among("linear", *SHAPES)
    warmup: int = tuned_epoch(5, 0.02, 0.5)
    released: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, alpha=(0, math.inf), fraction=(0, 1), warmup=(0, math.inf))
        check_one_of("shape", self.shape, SHAPES)

    @property
    def joint_epochs(self) -> float:
        return max(1, self.warmup)

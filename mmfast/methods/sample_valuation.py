"""Sample-level valuation: samples that a modality contributes little to are shown with it alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmfast.methods._resampling import ResamplingLearner
from mmfast.methods.base import Method, check_numbers
from mmfast.ranges import tuned, tuned_epoch
from mmfast.valuation import mean_contributions


def copy_counts(
    phi: Tensor,  # [N, M]
    kappa: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # [N, M] int64
    """Return how many copies of each sample show modality m alone: kappa (1 - phi)_+, rounded stochastically.

    With two modalities, kappa = 2 and `cardinality` contributions the counts are whole and nothing is drawn.
    """
    # 1e-4 absorbs the rounding of phi in float32; it is far below the grid of 1 / M! that phi lies on for
    # small M.
    exact = (kappa * (1 - phi.double())).clamp(min=0)
    whole = (exact + 1e-4).floor()
    chance = (exact - whole).clamp(min=0)
    chance = torch.where(chance < 1e-4, 0.0, chance)
    draws = torch.rand(phi.shape, generator=generator, dtype=torch.float64, device="cpu")
    return (whole + (draws < chance)).long()


class _SampleValuationLearner(ResamplingLearner):
    def end_epoch(self, epoch, train, val):
        if epoch + 1 < self.method.warmup or self.is_last(epoch):
            return {}
        phi, present = self.contributions(train)  # [N, M]
        self.add_copies(copy_counts(phi, self.method.kappa, self.generator(epoch)), present)
        return self.figures(mean_contributions(phi, present))


@dataclass(frozen=True)
class SampleValuation(Method):
    """Train on every sample plus copies that show only the modality whose contribution phi is below 1.

    After `warmup` epochs, and after every epoch from then on, phi_i^m is the Shapley value of modality m for
    training sample i under v(S) = |S| [correct], taken in eval mode; the next epoch adds kappa (1 -
    phi_i^m)_+ copies of sample i in which every other modality is zero.

    Attributes:
        kappa: copies per unit of missing contribution; 2 gives the published table for two modalities.
        warmup: epochs before the first valuation.
        released: follow the field's benchmark toolkit, which leaves the factor |S| out of v; v(none) stays 0.

    Source: Wei et al., "Enhancing multimodal cooperation via sample-level modality valuation", CVPR 2024,
    sample-level; M >= 3 is our extension.
    """

    name: ClassVar[str] = "sample-valuation"
    title: ClassVar[str] = "Sample-level valuation"
    needs_classes: ClassVar[str] = "a coalition is worth its size where the predicted class is right"
    learner = _SampleValuationLearner

    kappa: float = tuned(2.0, 0.25, 4.0, log=True)
    warmup: int = tuned_epoch(5, 0.02, 0.5)
    released: bool = False

    def __post_init__(self) -> None:
        check_numbers(self, kappa=(0, math.inf), warmup=(0, math.inf))

"""What a model and a learner have in common: predictions from any coalition of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Predictor(Protocol):
    """A module that can be valuated: a MultimodalModel, or a learner, which predicts by its method's rule."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities."""

    @property
    def num_classes(self) -> int:
        """C."""

    @property
    def additive(self) -> bool:
        """Whether the logits of a coalition are the bias plus its members' partial logits."""

    @property
    def bias(self) -> Tensor:  # [C]
        """The part of the logits that no feature enters."""

    def encode(self, batch: Mapping[str, Tensor]) -> list[Tensor]:  # M x [N, D]
        """Return the features of all modalities."""

    def fuse(
        self,
        features: Sequence[Tensor],  # M x [N, D]
        *,
        coalition: int | None = None,
        present: Tensor | None = None,  # bool [M, N]
    ) -> Tensor:  # [N, C]
        """Return the logits of the modalities that are present."""

    def partial_logits(self, features: Sequence[Tensor]) -> Tensor:  # M x [N, D] -> [M, N, C]
        """Return each modality's addend to the logits; only where `additive`."""

    def coalition_logits(
        self,
        features: Sequence[Tensor],  # M x [N, D]
        coalitions: Tensor,  # [L] int64
    ) -> Tensor:  # [N, L, C]
        """Return the logits under each of the given coalitions."""

"""Model selection on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmfast.methods.base import Learner


class Selection:
    """The best weights so far, whole or part by part where the learner selects its parts separately.

    Attributes:
        best: by the prefixes of a part's entries in the state dict, its {"score", "epoch", "weights"} at the
            earliest epoch of the highest score.
    """

    def __init__(self, best: dict[tuple[str, ...], dict[str, Any]] | None = None) -> None:
        self.best = best or {}

    def update(
        self, learner: Learner, accuracy: float, own_accuracy: Sequence[float | None], epoch: int
    ) -> None:
        """Keep the weights of parts that score above their best."""
        for part, score in learner.selection_scores(accuracy, own_accuracy).items():
            if part in self.best and score <= self.best[part]["score"]:
                continue
            weights = {
                key: value.detach().clone()
                for key, value in learner.state_dict().items()
                if key.startswith(part)
            }
            self.best[part] = {"score": score, "epoch": epoch, "weights": weights}

    def load_best(self, learner: Learner) -> None:
        """Put the best weights back; without any, the learner stays as it is."""
        for kept in self.best.values():
            learner.load_state_dict(kept["weights"], strict=False)

"""Model selection on validation data: the best weights so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmfast.methods.base import Learner


class BestWeights:
    """The best weights so far, whole or part by part where the learner selects its parts separately.

    Attributes:
        parts: by the prefixes of a part's entries in the state dict, its {"score", "epoch", "weights"} at the
            earliest epoch of the highest score.
    """

    def __init__(self, parts: dict[tuple[str, ...], dict[str, Any]] | None = None) -> None:
        self.parts = parts or {}

    def update(
        self, learner: Learner, accuracy: float, unimodal_accuracy: Sequence[float | None], epoch: int
    ) -> None:
        """Keep the weights of parts that score above their best."""
        for part, score in _apart(learner, learner.selection_scores(accuracy, unimodal_accuracy)).items():
            if part in self.parts and score <= self.parts[part]["score"]:
                continue
            weights = {
                key: value.detach().clone()
                for key, value in learner.state_dict().items()
                if key.startswith(part)
            }
            self.parts[part] = {"score": score, "epoch": epoch, "weights": weights}

    def epoch_of(self, prefix: str) -> int | None:
        """Return the epoch of the best weights under a prefix; None: the last ones stay."""
        epochs = (kept["epoch"] for part, kept in self.parts.items() if prefix.startswith(part))
        return next(epochs, None)

    def restore(self, learner: Learner) -> None:
        """Put the best weights back; without any, the learner stays as it is."""
        for kept in self.parts.values():
            learner.load_state_dict(kept["weights"], strict=False)


def _apart(learner: Learner, scores: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """Return the scores with parts that share weights taken as one, by the mean of their scores.

    Of a layer that two encoders share, each would put back its own best epoch over the other's.
    """
    if len(scores) < 2:
        return scores
    groups: list[tuple[list[tuple[str, ...]], set[int]]] = []
    entries = learner.state_dict(keep_vars=True)
    for part in scores:
        mine = {id(value) for key, value in entries.items() if key.startswith(part)}
        together = [part]
        for other in [group for group in groups if group[1] & mine]:
            groups.remove(other)
            together, mine = [*other[0], *together], other[1] | mine
        groups.append((together, mine))
    return {
        tuple(prefix for part in parts for prefix in part): sum(scores[part] for part in parts) / len(parts)
        for parts, _ in groups
    }

"""Model selection on validation data: the best weights so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfast.methods.base import Learner
from mmfast.training.checkpoint import Parted
from mmfast.training.metrics import Measures
from mmfast.training.state import Part, groups_of, load_state, weights_of
from mmfast.training.writing import snapshot


class BestWeights:
    """The best weights so far, whole or part by part where the learner selects its parts separately.

    Attributes:
        parts: by the prefixes of a part's entries in the state dict, its {"score", "epoch", "weights"} at the
            earliest epoch of the highest score. Weights lie on the CPU, as what a checkpoint keeps apart.
    """

    def __init__(self) -> None:
        self.parts: dict[Part, dict[str, Any]] = {}

    @classmethod
    def of(cls, learner: Learner, parts: Mapping[Part, Mapping[str, Any]]) -> BestWeights:
        """Return the best weights of a learner that a checkpoint holds, in which they are plain dicts."""
        found = cls()
        for part, kept in parts.items():
            found.parts[part] = {**kept, "weights": _parted(learner, part, kept["weights"])}
        return found

    def update(
        self, learner: Learner, accuracy: float, unimodal_accuracy: Sequence[float | None], epoch: int
    ) -> None:
        """Keep the weights of parts that score above their best."""
        for part, score in _apart(learner, learner.selection_scores(accuracy, unimodal_accuracy)).items():
            if part in self.parts and score <= self.parts[part]["score"]:
                continue
            weights = {key: value for key, value in weights_of(learner).items() if key.startswith(part)}
            self.parts[part] = {
                "score": score,
                "epoch": epoch,
                "weights": _parted(learner, part, snapshot(weights)),
            }

    def unimodal_accuracy(
        self, learner: Learner, entries: Sequence[Mapping[str, Any]], measures: Measures | None = None
    ) -> dict[str, float | None] | None:
        """Return each modality's accuracy alone with the best weights, None where no epoch has measured it.

        Args:
            learner: whose the weights are.
            entries: of the history, one for each epoch of the stage, which validate.
            measures: what of them stands for accuracy; None: accuracy.
        """
        measures = measures or Measures()
        own = type(learner).selection_scores.__module__.startswith("mmfast.")
        if not self.parts or not (own or len({kept["epoch"] for kept in self.parts.values()}) == 1):
            return None
        found = {}
        for name in learner.modalities:
            prefix = f"model.encoders.{name}."
            epochs = (kept["epoch"] for part, kept in self.parts.items() if prefix.startswith(part))
            # An encoder that was never selected keeps its last weights.
            found[name] = measures.of_modalities(entries[next(epochs, -1)]["val"])[name]
        return found

    def restore(self, learner: Learner) -> None:
        """Put the best weights back; without any, the learner stays as it is."""
        for kept in self.parts.values():
            load_state(learner, kept["weights"].entries, strict=False)


def _parted(learner: Learner, part: Part, weights: dict[str, Any]) -> Parted:
    groups = [[key for key in group if key in weights] for group in groups_of(learner, [part])]
    return Parted(weights, groups, fixed=True)


def _apart(learner: Learner, scores: dict[Part, float]) -> dict[Part, float]:
    """Return the scores with parts that share weights taken as one, by the mean of their scores.

    Of a layer that two encoders share, each would put back its own best epoch over the other's.
    """
    if len(scores) < 2:
        return scores
    groups: list[tuple[list[Part], set[int]]] = []
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

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

    @property
    def last_improved(self) -> int | None:
        """The last epoch in which any part has improved, None before there is one."""
        return max((kept["epoch"] for kept in self.parts.values()), default=None)

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


def kept_epochs(learner: Learner, history: Sequence[Mapping[str, Any]], measures: Measures) -> dict[str, int]:
    """Return for each modality the epoch whose weights are kept, counted from 1 over all stages.

    That of the last stage: of the encoder where encoders are selected apart, else of the whole. {} where an
    epoch was not validated, or the learner's selection is not one of mmfast's, which may have a state.

    Args:
        learner: at the end of training.
        history: of the run.
        measures: by which it selected.
    """
    begun = max((i for i, entry in enumerate(history) if entry["epoch"] == 0), default=0)
    is_ours = type(learner).selection_scores.__module__.startswith("mmfast.")
    if not is_ours or any("val" not in entry for entry in history[begun:]):
        return {}
    best: dict[Part, tuple[float, int]] = {}
    for epoch, entry in enumerate(history[begun:], begun + 1):
        for part, score in _apart(learner, learner.selection_scores(*measures.score(entry["val"]))).items():
            if part not in best or score > best[part][0]:
                best[part] = score, epoch
    if not best:
        return {}
    found = {}
    for name in learner.modalities:
        prefix = f"model.encoders.{name}."
        own = [epoch for part, (_, epoch) in best.items() if prefix.startswith(part)]
        found[name] = own[0] if own else max(epoch for _, epoch in best.values())
    return found


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

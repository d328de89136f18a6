"""What a run makes of each test sample: kept beside its figures, for what is said of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from mmfast.data.batches import evaluating, marks_of, presence
from mmfast.data.threads import fitting_threads
from mmfast.files import replacing
from mmfast.methods.base import Learner
from mmfast.objectives import IGNORED
from mmfast.training.probes import probe_answers
from mmfast.valuation import batch_contributions

# Beside a run's figures, in its folder.
OUTCOME = "test.npz"
# Of equal width, for the calibration error.
_BINS = 15
# Probabilities that are kept of a run: 32 MiB, such as of 20,000 samples and 400 classes.
MOST = 2**23
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Outcome:
    """The answers of one run to all test samples, in the order of the data set.

    Attributes:
        probabilities: float32 [N, C], NaN where the logits are; None where they are more than 2^23.
        predicted: int64 [N], the class of the largest logit, -1 where they hold NaN.
        labels: int64 [N], negative where a sample has none.
        contributions: float32 [N, M], Shapley values under `cardinality`, NaN without label.
        present: bool [N, M], which samples have which modality.
        without: bool [M, N], which are classified right when modality m is missing.
        probed: bool [M, N], which are classified right by the probe of modality m, False where it is absent;
            None where no probe was asked.
        confidence: float32 [N], the largest probability; None where `probabilities` tell it.
        likelihood: float32 [N], the probability of the label, NaN without one; None as above.
        gains: float32 [N, M], Shapley values under `correct`, NaN without label: what each modality adds to
            the accuracy, 0 where it changes no prediction. None in files of before.
    """

    probabilities: np.ndarray | None
    predicted: np.ndarray
    labels: np.ndarray
    contributions: np.ndarray
    present: np.ndarray
    without: np.ndarray
    probed: np.ndarray | None = None
    confidence: np.ndarray | None = None
    likelihood: np.ndarray | None = None
    gains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        probed = "" if self.probed is None else ", probed"
        classes = "many" if self.probabilities is None else self.probabilities.shape[1]
        return f"Outcome({len(self)} samples, {classes} classes{probed})"

    @property
    def labelled(self) -> np.ndarray:  # bool [N]
        """Which samples have a label: figures are over these."""
        return self.labels >= 0

    @property
    def correct(self) -> np.ndarray:  # bool [N]
        """Which samples are classified right."""
        return self.labelled & (self.predicted == self.labels)

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error over 15 bins of equal width (Guo et al., ICML 2017); None with NaN."""
        sure, right = self.pair()[0][self.labelled].astype(np.float64), self.correct[self.labelled]
        if not len(right) or np.isnan(sure).any():
            return None
        bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
        gap = np.bincount(bins, right - sure, _BINS)
        return float(np.abs(gap).sum() / len(right))

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Return `confidence` and `likelihood`, both [N], from all probabilities where these were kept."""
        if self.probabilities is None:
            assert self.confidence is not None
            assert self.likelihood is not None
            return self.confidence, self.likelihood
        of_label = self.probabilities[np.arange(len(self)), np.maximum(self.labels, 0)]
        return self.probabilities.max(1), np.where(self.labelled, of_label, np.float32(np.nan))

    def accuracy_without(self) -> list[float]:
        """Return the accuracy with each modality missing, M figures."""
        return self.without[:, self.labelled].mean(1).tolist()

    def probe_of(self, m: int) -> np.ndarray | None:  # float64 [N]
        """Return whether the probe of modality m is right, NaN for samples without it or without label."""
        if self.probed is None:
            return None
        return np.where(self.present[:, m] & self.labelled, self.probed[m].astype(np.float64), np.nan)

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        with replacing(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Return what `save` has written.

        Raises:
            ValueError: the file is not whole.
        """
        try:
            with np.load(path) as arrays:
                return cls(**{"probabilities": None, **arrays})
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, and the run is tested again") from error

    def figures(self, modalities: tuple[str, ...]) -> dict[str, Any]:
        """Return what results tell of it besides the metrics of the run."""
        found: dict[str, Any] = {
            "ece": self.calibration_error,
            "missing": dict(zip(modalities, self.accuracy_without(), strict=True)),
        }
        if self.probed is not None:
            probes = [self.probe_of(m) for m in range(len(modalities))]
            found["probe"] = {
                name: None if right is None or np.isnan(right).all() else float(np.nanmean(right))
                for name, right in zip(modalities, probes, strict=True)
            }
        return found


class OutcomeFiles(Mapping[tuple[str, int], Outcome]):
    """The outcomes in the folders of runs, by method and seed; each is read when it is asked for.

    Args:
        folders: of the runs; those without one are left out.
    """

    def __init__(self, folders: Mapping[tuple[str, int], Path]) -> None:
        self._paths = {
            key: folder / OUTCOME for key, folder in folders.items() if (folder / OUTCOME).exists()
        }

    def __getitem__(self, key: tuple[str, int]) -> Outcome:
        return Outcome.load(self._paths[key])

    def __contains__(self, key: object) -> bool:
        return key in self._paths

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def outcome_of(learner: Learner, train: Any, test: Any, fabric: Fabric, *, probe: bool) -> Outcome | None:
    """Return what a learner makes of each sample of `test`; None for other tasks than classes.

    Args:
        learner: trained.
        train: what probes are fitted to.
        test: map-style; every process reads all of it.
        fabric: of the run.
        probe: ask a probe of each modality, too.
    """
    if learner.objective.task != "multiclass":
        return None
    size = learner.reader.batch_size
    with fitting_threads(learner, test, size), evaluating(learner), fabric.autocast():
        rows = [_answered(learner, batch, len(test)) for batch in learner.batches(test, size)]
    arrays = {name: torch.cat([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
    probabilities, without = arrays.pop("probabilities", None), arrays.pop("without")
    found = Outcome(probabilities, without=np.ascontiguousarray(without.T), **arrays)
    if not probe:
        return found
    probed = np.zeros_like(found.without)
    for m, right in enumerate(probe_answers(learner, train, test, fabric).values()):
        probed[m, found.present[:, m] & found.labelled] = right
    return replace(found, probed=probed)


def _answered(learner: Learner, batch: Any, num_samples: int) -> dict[str, Tensor]:
    """Return a batch's rows of the fields of Outcome; of `without` they are columns.

    Args:
        learner: trained.
        batch: of samples.
        num_samples: of all batches.
    """
    target, present = batch["label"], presence(batch, learner.modalities)
    features, counted = learner.encode(batch), learner.objective.counted(target)
    labels = torch.where(counted, learner.objective.classes(target), IGNORED)
    logits = learner.fuse(features, present=present).float()
    phi, gains = (
        batch_contributions(learner, features, target, present, utility=utility).float()
        for utility in ("cardinality", "correct")
    )
    marks = marks_of(present, labels, len(features)).T  # [M, N]
    right = []
    for m in range(len(features)):
        rest = marks.clone()
        rest[m] = False
        right.append(_classes(learner.fuse(features, present=rest)) == labels)
    # Infinite logits have a class, and so they have probabilities.
    probabilities = logits.clamp(-_LARGEST, _LARGEST).softmax(1)
    return {
        **_kept(probabilities, labels, num_samples),
        "predicted": _classes(logits),
        "labels": labels,
        "contributions": phi.masked_fill(~counted[:, None], torch.nan),
        "gains": gains.masked_fill(~counted[:, None], torch.nan),
        "present": marks.T,
        "without": torch.stack(right, 1),
    }


def _kept(
    probabilities: Tensor,  # [B, C]
    labels: Tensor,  # [B]
    num_samples: int,
) -> dict[str, Tensor]:
    """Return probabilities of all classes, or of two where those of all samples would be too many."""
    if num_samples * probabilities.shape[1] <= MOST:
        return {"probabilities": probabilities}
    of_label = probabilities.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return {
        "confidence": probabilities.amax(1),
        "likelihood": of_label.masked_fill(labels < 0, torch.nan),
    }


def _classes(
    logits: Tensor,  # [N, C]
) -> Tensor:  # [N] int64
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)

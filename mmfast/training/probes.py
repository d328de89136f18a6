"""Linear probes: what a logistic regression reads out of the frozen features of one modality's encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from mmfast.distributed import broadcast_from_first, rank_and_size
from mmfast.methods.base import Learner

# Samples that a regression is fitted to at most; more change it less than seeds do, and take minutes.
_FITTED = 20_000


def probe_answers(learner: Learner, train: Any, test: Any, fabric: Fabric) -> dict[str, np.ndarray]:
    """Return for each modality which test samples its probe classifies right, bool [n].

    A probe is a logistic regression (L2, C = 1) on features that are standardised by the training part, of
    which it sees 20,000 samples at most. Samples that lack the modality, or a label, are left out of both
    parts; n are those of the test part that are left, in order. One whose features are NaN or infinite is
    answered wrong, and not fitted to. Several processes share the encoding, and the first fits.
    """
    parts = []
    for dataset in (train, test):
        with fabric.autocast():
            if learner.takes_kept:
                learner.keep(dataset, whole=True)
            found: list[list[Any]] = [[] for _ in learner.modalities]
            for m, h, labels in learner.modality_features(dataset):
                found[m].append((h.cpu(), labels.cpu()))
        learner.forget()
        parts.append([_joined(pairs) for pairs in found])
    answers = None
    if rank_and_size()[0] == 0:
        pairs = zip(*parts, strict=True)
        answers = {name: _answers(*pair) for name, pair in zip(learner.modalities, pairs, strict=True)}
    return broadcast_from_first(answers)


def probe(learner: Learner, train: Any, test: Any, fabric: Fabric) -> dict[str, float | None]:
    """Return each modality's test accuracy by `probe_answers`, None where no sample has the modality."""
    return accuracies(probe_answers(learner, train, test, fabric))


def accuracies(answers: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Return the share that is right of each modality's answers."""
    return {name: float(right.mean()) if len(right) else None for name, right in answers.items()}


def _joined(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Return features [n, D] and labels [n] of all batches."""
    if not pairs:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    features, labels = (torch.cat(each).numpy() for each in zip(*pairs, strict=True))
    return features, labels


def _answers(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (features, labels), (asked, expected) = train, test
    # NaN and infinite features are of no class, as their logits are.
    usable, sound = np.isfinite(features).all(1), np.isfinite(asked).all(1)
    features, labels = features[usable], labels[usable]
    if len(labels) > _FITTED:
        # The same samples for every method and seed.
        rows = np.sort(np.random.default_rng(0).choice(len(labels), _FITTED, replace=False))
        features, labels = features[rows], labels[rows]
    if len(np.unique(labels)) < 2 or not len(expected):
        # Of one class, or of none, there is nothing to learn.
        return sound & np.isin(expected, labels)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(features, labels)
    right = np.zeros(len(expected), dtype=bool)
    if sound.any():
        right[sound] = classifier.predict(asked[sound]) == expected[sound]
    return right

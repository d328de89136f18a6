"""Samples held out of training: the draws are those of scikit-learn."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

from mmfast.data.drawing import hold_out
from mmfast.data.splits import TEST_SHARE, VAL_SHARE

SHARES = (TEST_SHARE, VAL_SHARE / (1 - TEST_SHARE), 0.4)


def samples(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return what scikit-learn holds out of the classes that have two samples."""
    from sklearn.model_selection import train_test_split

    rows = np.flatnonzero(np.bincount(labels)[labels] > 1)
    size = max(round(share * len(rows)), len(np.unique(labels[rows])))
    return np.sort(train_test_split(rows, test_size=size, stratify=labels[rows], random_state=seed)[1])


def folds(labels: np.ndarray, group: np.ndarray, share: float, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(round(1 / share), len(np.unique(group)), np.bincount(labels).max())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        made = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
        return [held for _, held in made.split(labels[:, None], labels, group)]


def best(labels: np.ndarray, share: float, held: list[np.ndarray]) -> np.ndarray:
    """Return the fold with the classes' shares that leaves a sample of each in training."""
    counts = np.bincount(labels)

    def gap(rows: np.ndarray) -> float:
        found = np.bincount(labels[rows], minlength=len(counts))
        usable = len(rows) and not ((found == counts) & (counts > 0)).any()
        return np.abs(found - share * counts).sum() if usable else np.inf

    return min(held, key=gap)


def test_samples_are_drawn_as_scikit_learn_draws_them():
    rng = np.random.default_rng(0)
    for seed in range(40):
        num_classes = rng.integers(1, 12)
        labels = rng.choice(num_classes, rng.integers(60, 500), p=rng.dirichlet(np.ones(num_classes)))
        for share in SHARES:
            found = np.sort(hold_out(labels, None, share, seed, "test"))
            np.testing.assert_array_equal(found, samples(labels, share, seed))


@pytest.mark.parametrize("names", [int, str])
def test_groups_are_drawn_as_scikit_learn_draws_them(names):
    rng = np.random.default_rng(1)
    for seed in range(20):
        size = rng.integers(100, 300)
        labels = rng.integers(0, rng.integers(2, 12), size)
        group = rng.integers(0, rng.integers(10, 60), size).astype(names)
        for share in SHARES:
            expected = best(labels, share, folds(labels, group, share, seed))
            np.testing.assert_array_equal(hold_out(labels, group, share, seed, "val"), expected)


def test_groups_of_many_classes_are_looked_at_in_pieces(monkeypatch):
    rng = np.random.default_rng(2)
    labels, group = rng.integers(0, 9, 400), rng.integers(0, 70, 400)
    whole = hold_out(labels, group, 0.15, 3, "test")
    monkeypatch.setattr("mmfast.data.drawing._COUNTS", 30)
    np.testing.assert_array_equal(hold_out(labels, group, 0.15, 3, "test"), whole)


@pytest.mark.parametrize("group", [None, np.arange(60) // 3])
@pytest.mark.parametrize("seed", [-1, 2**32, "one"])
def test_a_seed_that_is_none(seed, group):
    with pytest.raises(
        ValueError, match=re.escape(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    ):
        hold_out(np.arange(60) % 3, group, 0.15, seed, "test")


def test_a_split_is_drawn_without_scikit_learn():
    code = (
        "import sys, numpy as np; from mmfast.data.splits import stratified_split;"
        "labels, group = np.arange(90) % 3, np.arange(90) // 3;"
        "stratified_split(labels); stratified_split(labels, group=group);"
        "print([name for name in ('sklearn', 'scipy', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

"""Which samples are held out of training: drawn by a seed, with the classes' shares, groups kept together.

The draws are those of scikit-learn's `train_test_split` and `StratifiedGroupKFold`, number by number: a seed
means the same split whatever version of it is installed, and none need be. They are made of arrays, where
scikit-learn goes through the samples one by one.
"""

from __future__ import annotations

import numpy as np

# Counts of classes that are looked at together, of some groups.
_COUNTS = 2**20


def hold_out(
    labels: np.ndarray,  # [N] from 0
    group: np.ndarray | None,  # [N]
    share: float,
    seed: int,
    part: str,
) -> np.ndarray:  # [held]
    """Return the rows held out for a part: about `share` of every class, of none all.

    Raises:
        ValueError: too few samples or groups.
    """
    rng = _generator(seed)
    return _samples(labels, share, rng, part) if group is None else _groups(labels, group, share, rng, part)


def _generator(seed: int) -> np.random.RandomState:
    try:
        return np.random.RandomState(seed)
    except (TypeError, ValueError):
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}") from None


def _samples(
    labels: np.ndarray,  # [N]
    share: float,
    rng: np.random.RandomState,
    part: str,
) -> np.ndarray:  # [held]
    counts = np.bincount(labels)  # [C]
    rows = np.flatnonzero((counts > 1)[labels])
    num_classes = int((counts > 1).sum())
    num_held = max(round(share * len(rows)), num_classes)
    if num_classes == 0 or len(rows) - num_held < num_classes:
        raise ValueError(
            f"split cannot be drawn: {len(labels)} samples of {np.count_nonzero(counts)} classes are too few "
            f"for a {part} part beside train; give a split"
        )
    counts = counts[counts > 1]
    kept = _divided(counts, len(rows) - num_held, rng)
    held = _divided(counts - kept, num_held, rng)
    by_class = np.split(rows[np.argsort(labels[rows], kind="stable")], np.cumsum(counts)[:-1])
    drawn = []
    for own, first, number in zip(by_class, kept, held, strict=True):
        order = rng.permutation(len(own))
        drawn.append(own[order[first : first + number]])
    return np.concatenate(drawn)


def _divided(
    counts: np.ndarray,  # [C]
    total: int,
    rng: np.random.RandomState,
) -> np.ndarray:  # [C]
    """Return how many of each class make `total`; what rounding leaves goes to the largest remainders."""
    exact = counts / counts.sum() * total
    found = np.floor(exact)
    left = int(total - found.sum())
    if left > 0:
        remainders = exact - found
        for value in np.unique(remainders)[::-1]:
            alike = np.flatnonzero(remainders == value)
            chosen = rng.choice(alike, size=min(len(alike), left), replace=False)
            found[chosen] += 1
            left -= len(chosen)
            if left == 0:
                break
    return found.astype(int)


def _groups(
    labels: np.ndarray,  # [N]
    group: np.ndarray,  # [N]
    share: float,
    rng: np.random.RandomState,
    part: str,
) -> np.ndarray:  # [held]
    """Return the fold whose classes come nearest to their shares."""
    names, group = np.unique(group, return_inverse=True)
    counts = np.bincount(labels)  # [C]
    num_folds = min(round(1 / share), len(names), counts.max())
    if num_folds < 2:
        raise ValueError(
            f"split cannot be drawn: {len(names)} group(s), at most {counts.max()} samples a class, are too "
            f"few for a {part} part beside train; give a split"
        )
    fold = _folds(np.unique(labels, return_inverse=True)[1], group, num_folds, rng)[group]  # [N]
    best, best_gap = None, np.inf
    for number in range(num_folds):
        rows = np.flatnonzero(fold == number)
        held = np.bincount(labels[rows], minlength=len(counts))
        if len(rows) == 0 or ((held == counts) & (counts > 0)).any():
            continue
        gap = np.abs(held - share * counts).sum()
        if gap < best_gap:
            best, best_gap = rows, gap
    if best is None:
        raise ValueError(
            f"split cannot be drawn: whichever groups of the {len(names)} go to {part}, a class loses "
            "its last training sample; give a split"
        )
    return best


def _folds(
    labels: np.ndarray,  # [N] from 0 to C - 1, each of which occurs
    group: np.ndarray,  # [N] from 0 to G - 1
    num_folds: int,  # F
    rng: np.random.RandomState,
) -> np.ndarray:  # [G]
    """Give each group in turn to the fold that leaves the classes most evenly spread over folds.

    Groups whose classes are least even come first.
    """
    sizes = np.bincount(group)  # [G]
    num_groups, num_classes = len(sizes), int(labels.max()) + 1
    order = np.arange(num_groups)
    rng.shuffle(order)
    ends = np.cumsum(sizes)
    own = labels[np.argsort(group, kind="stable")]  # group by group
    uneven = np.empty(num_groups)
    step = max(1, _COUNTS // num_classes)
    for start in range(0, num_groups, step):
        chosen = np.arange(start, min(num_groups, start + step))
        low, high = ends[start] - sizes[start], ends[chosen[-1]]
        cell = np.repeat(chosen - start, sizes[chosen]) * num_classes + own[low:high]
        table = np.bincount(cell, minlength=len(chosen) * num_classes).reshape(-1, num_classes)
        uneven[chosen] = table.astype(float).std(1)
    found = np.empty(num_groups, dtype=np.int64)
    counts, totals = np.zeros((num_folds, num_classes)), np.bincount(labels)
    tried = np.empty((num_folds, num_folds, num_classes))
    for g in order[np.argsort(-uneven[order], kind="stable")]:
        added = np.bincount(own[ends[g] - sizes[g] : ends[g]], minlength=num_classes)
        best = _best_fold(counts, added, totals, tried)
        counts[best] += added
        found[g] = best
    return found


def _best_fold(
    counts: np.ndarray,  # [F, C] samples so far
    added: np.ndarray,  # [C]
    totals: np.ndarray,  # [C]
    tried: np.ndarray,  # [F, F, C], to compute in
) -> int:
    num_folds = len(counts)
    tried[:] = counts
    each = np.arange(num_folds)
    tried[each, each] += added
    tried /= totals
    # As numpy's std takes it, without what it does around that.
    tried -= np.add.reduce(tried, axis=1, keepdims=True) / num_folds
    np.multiply(tried, tried, out=tried)
    spread = np.sqrt(np.add.reduce(tried, axis=1) / num_folds)  # [F, C]
    values = np.add.reduce(spread, axis=1) / spread.shape[1]  # [F]
    best, least, fewest = 0, np.inf, np.inf
    for fold, (value, size) in enumerate(zip(values.tolist(), counts.sum(1).tolist(), strict=True)):
        # Of folds that are as good the one with fewer samples.
        alike = abs(value - least) <= 1e-8 + 1e-5 * least if least < np.inf else False
        if value < least or (alike and size < fewest):
            best, least, fewest = fold, value, size
    return best

"""Train, validation and test parts of one data set, and how they are made."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfast.data.array_checks import as_classes
from mmfast.data.arrays import ArrayDataset, Checked, check
from mmfast.data.standardize import Scaling, scale, scaling_of
from mmfast.objectives import IGNORED

PARTS = ("train", "val", "test")
VAL_SHARE = TEST_SHARE = 0.15
# Classes that a repr names.
_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set: fit on `train`, select on `val`, report `test` once.

    `split_seed` is the seed of the split where one was drawn, and None where it was given or made by block.
    `scaling` is what the features were standardised by, None where they were not. `sound` tells of recordings
    how many samples a second they have, and how many samples of each are taken.
    """

    train: ArrayDataset
    val: ArrayDataset
    test: ArrayDataset
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    split_seed: int | None
    description: str
    scaling: Scaling | None = None
    sound: tuple[int, int] | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities; their order is the bit order of coalitions."""
        return self.train.modalities

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Feature shape of one sample per modality."""
        return self.train.shapes

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(getattr(self, part)):,}" for part in PARTS)
        names = ", ".join(self.class_names[:_SHOWN_CLASSES])
        if len(self.class_names) > _SHOWN_CLASSES:
            names += ", ..."
        # How it was made is told by the description alone, which begins with what is shown before.
        seed = "split as given" if self.split_seed is None else f"split drawn with seed {self.split_seed}"
        how = self.description.partition(f"{sizes}; ")[2] or seed
        lines = [
            f"Splits({self.name!r}, {describe_shapes(self.shapes)}",
            f"{sizes}; {how}",
            f"{self.num_classes} classes: {names}",
            "not standardized" if self.scaling is None else "standardized by the training part",
        ]
        return "\n  ".join(lines) + ")"

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],  # [N, ...] each
        labels: Any,  # [N]
        *,
        split: Any | None = None,  # [N]
        group: Any | None = None,  # [N]
        present: Mapping[str, Any] | None = None,  # [N] each
        class_names: Sequence[str] | None = None,
        seed: int = 0,
        standardize: bool = True,
        name: str = "arrays",
        split_note: str = "split as given",
        sample_keys: Any | None = None,  # [N]
    ) -> Splits:
        """Split arrays in memory into train, validation and test, each in float32 and memory of its own.

        Args:
            arrays: One array per modality name, shapes as in `ArrayDataset`.
            labels: `[N]` integers or strings, whole numbers as floats, too; mapped to 0 .. C - 1 in sorted
                order.
            split: `[N]` of "train", "val", "test". Without it 70/15/15% are drawn, stratified by class;
                without any "val" 15% of train are drawn for it.
            group: `[N]` integers or strings; samples of one group stay in one part.
            present: bool `[N]` for any modality, False where a sample lacks it.
            class_names: Names of the classes where `labels` are already 0 .. C - 1.
            seed: Seed of what is drawn.
            standardize: Scale features by statistics of the training part; see `Splits.standardize`.
            name: What to call the data set in reports.
            split_note: How a given `split` was made, for the description.
            sample_keys: `[N]` integers or strings by which tables tell the samples; by default their row.

        Raises:
            ValueError: what `ArrayDataset` refuses, unknown or missing parts, a group in two parts, classes
                or modalities without a training sample.
        """
        encoded, names = _encode_labels(labels, class_names)
        data = check(
            arrays,
            encoded,
            present=present,
            group=group,
            num_classes=len(names),
            sample_keys=np.arange(len(encoded)) if sample_keys is None else sample_keys,
            class_names=names,
        )
        given = None if split is None else _check_split(split, len(encoded))
        if given is not None and data.group is not None:
            _check_groups(given, data.group)
        parts, drawn = _complete_split(given, encoded, data.group, seed)
        rows = [np.flatnonzero(parts == part) for part in PARTS]
        _check_training_part(data, rows[0], names)
        train, val, test = data.parts(rows)
        sizes = ", ".join(f"{part} {len(own):,}" for part, own in zip(PARTS, rows, strict=True))
        shapes = describe_shapes(train.shapes)
        splits = cls(
            train=train,
            val=val,
            test=test,
            num_classes=len(names),
            class_names=names,
            name=name,
            split_seed=seed if drawn else None,
            description=f"{name}: {len(encoded):,} samples, {shapes}, {len(names)} classes; {sizes}; "
            + (drawn or split_note),
        )
        return splits.standardize(in_place=True) if standardize else splits

    def with_notes(self, notes: Iterable[str]) -> Splits:
        """Return these splits with remarks on how the data were read added to the description."""
        return replace(self, description="; ".join([self.description, *notes]))

    def standardize(self, scaling: Scaling | None = None, *, in_place: bool = False) -> Splits:
        """Return these splits with features scaled to mean 0 and standard deviation 1 over the training part.

        Per feature for vectors and sequences, per channel for images and video. What is constant in training
        becomes 0 everywhere; absent samples stay 0 and do not count.

        Args:
            scaling: That of other splits, as a model that was trained on those needs it.
            in_place: Write over the features of these splits, which takes no second copy of the data: for
                splits that nothing else uses, and that are not used afterwards.
        """
        scaling = scaling_of(self.train) if scaling is None else scaling
        parts = (self.train, self.val, self.test)
        train, val, test = (scale(part, scaling, in_place=in_place) for part in parts)
        return replace(self, train=train, val=val, test=test, scaling=scaling)


def describe_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return the modalities with their shapes, or their number where they would bury a sentence."""
    if len(shapes) > 6:
        return f"{len(shapes)} modalities"
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def stratified_split(
    labels: np.ndarray,  # [N]
    *,
    group: np.ndarray | None = None,  # [N]
    seed: int = 0,
) -> np.ndarray:  # [N] of PARTS
    """Draw 70% train, 15% val and 15% test, stratified by class, samples of one group together."""
    parts = np.full(len(labels), "train", dtype="<U5")
    parts[_hold_out(labels, group, TEST_SHARE, seed, "test")] = "test"
    return _carve_val(parts, labels, group, VAL_SHARE / (1 - TEST_SHARE), seed)


def block_split(labels: np.ndarray) -> np.ndarray:  # [N] -> [N] of PARTS
    """Give the first 70% of each class in order to train, the next 15% to val and the rest to test.

    For samples that follow each other in time: drawn at random, near copies would lie on both sides.
    """
    parts = np.full(len(labels), "test", dtype="<U5")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        # In integers: 0.7 + 0.15 of 100 rows is 84.99..., which would lose one.
        train_end, val_end = len(rows) * 70 // 100, len(rows) * 85 // 100
        parts[rows[:train_end]], parts[rows[train_end:val_end]] = "train", "val"
    return parts


def _complete_split(
    given: np.ndarray | None, labels: np.ndarray, group: np.ndarray | None, seed: int
) -> tuple[np.ndarray, str]:
    """Return the parts `[N]` and how what was missing was drawn ("" where nothing was)."""
    how = f"stratified by class{', by group' if group is not None else ''}, drawn with seed {seed}"
    if given is None:
        return stratified_split(labels, group=group, seed=seed), f"split 70/15/15%, {how}"
    if "val" in given:
        return given, ""
    carved = _carve_val(given.copy(), labels, group, VAL_SHARE, seed)
    return carved, f"val is {VAL_SHARE:.0%} of the given train, {how}"


def _carve_val(
    parts: np.ndarray, labels: np.ndarray, group: np.ndarray | None, share: float, seed: int
) -> np.ndarray:
    rows = np.flatnonzero(parts == "train")
    held = _hold_out(labels[rows], None if group is None else group[rows], share, seed, "val")
    parts[rows[held]] = "val"
    return parts


def _hold_out(
    labels: np.ndarray,  # [N]
    group: np.ndarray | None,  # [N]
    share: float,
    seed: int,
    part: str,
) -> np.ndarray:  # [held]
    """Return the rows held out: about `share` of every class, never the only sample or group of one."""
    try:
        from sklearn.model_selection import StratifiedGroupKFold, train_test_split
    except ImportError as error:
        raise ImportError('making a split needs scikit-learn: pip install "mmfast[train]"') from error
    if group is None:
        classes, counts = np.unique(labels, return_counts=True)
        rows = np.flatnonzero(np.isin(labels, classes[counts > 1]))
        num_classes = int((counts > 1).sum())
        num_held = max(round(share * len(rows)), num_classes)
        if num_classes == 0 or len(rows) - num_held < num_classes:
            raise ValueError(
                f"split cannot be drawn: {len(labels)} samples of {len(classes)} classes are too few "
                f"for a {part} part beside train; give a split"
            )
        return train_test_split(rows, test_size=num_held, stratify=labels[rows], random_state=seed)[1]

    num_groups, counts = len(np.unique(group)), np.bincount(labels)
    num_folds = min(round(1 / share), num_groups, counts.max())
    if num_folds < 2:
        raise ValueError(
            f"split cannot be drawn: {num_groups} group(s), at most {counts.max()} samples a class, are too "
            f"few for a {part} part beside train; give a split"
        )
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    best, best_gap = None, np.inf
    with warnings.catch_warnings():
        # A class with fewer samples than folds is no error here: the fold is chosen below.
        warnings.simplefilter("ignore", UserWarning)
        pairs = list(folds.split(np.zeros((len(labels), 1)), labels, group))
    for rest, held in pairs:
        if len(held) == 0 or len(np.unique(labels[rest])) < np.count_nonzero(counts):
            continue
        gap = np.abs(np.bincount(labels[held], minlength=len(counts)) - share * counts).sum()
        if gap < best_gap:
            best, best_gap = held, gap
    if best is None:
        raise ValueError(
            f"split cannot be drawn: whichever groups of the {num_groups} go to {part}, a class loses "
            "its last training sample; give a split"
        )
    return best


def _encode_labels(labels: Any, class_names: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    array = as_classes(labels)
    if array.ndim != 1:
        expected = f"[N] = [{len(array)}]" if array.ndim else "[N]"
        raise ValueError(f"labels must have shape {expected}, got {list(array.shape)}")
    if len(array) == 0:
        raise ValueError("labels must hold at least one sample, got shape [0]")
    if array.dtype.kind == "i" and (lack := int((array == IGNORED).sum())):
        # As a class of its own it would be learned.
        raise ValueError(
            f"labels must be those of all samples, got {IGNORED} for {lack:,} of {len(array):,}: leave these "
            "out, or give ArrayDataset parts"
        )
    if class_names is None:
        names, encoded = np.unique(array, return_inverse=True)
        return encoded.astype(np.int64), tuple(str(name) for name in names)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers where class_names are given, got {array.dtype}")
    # The range is checked against C by ArrayDataset.
    return array.astype(np.int64), tuple(class_names)


def _check_split(split: Any, size: int) -> np.ndarray:  # [N] of PARTS
    parts = np.asarray(split)
    if parts.dtype.kind not in "SU":
        raise TypeError(f"split must hold strings, got {parts.dtype}")
    if parts.shape != (size,):
        raise ValueError(f"split must have shape [N] = [{size}], got {list(parts.shape)}")
    parts = parts.astype(str)
    others = parts[~np.isin(parts, PARTS)]
    if len(others):
        unknown = [str(part) for part in np.unique(others)]
        raise ValueError(f"split must hold only train, val and test, got {', '.join(map(repr, unknown[:5]))}")
    missing = [part for part in ("train", "test") if part not in parts]
    if missing:
        raise ValueError(f"split must hold train and test samples, got none of {' and '.join(missing)}")
    return parts.astype("<U5")


def _check_groups(parts: np.ndarray, group: np.ndarray) -> None:
    ids, rows = np.unique(group, return_inverse=True)
    held = np.stack(
        [np.bincount(rows[parts == part], minlength=len(ids)) > 0 for part in PARTS]
    )  # [3, groups]
    names = ids[held.sum(0) > 1]
    if len(names):
        shown = ", ".join(str(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(f"each group must lie in one split, got {len(names)} in several: {shown}")


def _check_training_part(
    data: Checked,
    rows: np.ndarray,  # of the training part
    class_names: Sequence[str],
) -> None:
    counts = np.bincount(data.labels.numpy()[rows], minlength=len(class_names))
    absent = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if absent:
        raise ValueError(f"every class must have training samples, got none of {', '.join(absent)}")
    for name, mask in data.present.items():
        if not mask.numpy()[rows].any():
            raise ValueError(f"every modality must be present in a training sample, got none with {name}")

"""What is wrong with a data set that is given in Python, found before any work and said in its own terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mmfast.coalitions import present_key
from mmfast.data.arrays import LABEL, ArrayDataset
from mmfast.data.collate import arrays_of, as_array, is_array, name_of
from mmfast.data.labels import check_label, check_labels, told_labels
from mmfast.data.splits import Splits
from mmfast.errors import describe

_FEW = 4  # samples read from a data set that may take long to read
_EXPECTED = "dicts {<modality>: array, 'label': int}"


def check_samples(
    modalities: Sequence[str],
    num_classes: int,
    name: str,
    dataset: Any,
    *,
    whole: bool = False,
    collate_fn: Callable | None = None,
    task: str | None = "multiclass",
    need_labels: bool = True,
) -> Tensor | None:  # [N] or [N, C]
    """Return all labels if the data set tells them; raise unless it holds labelled samples of the modalities.

    A modality of a sample is an array of numbers, or a nest of such: dicts, tuples and lists, with None where
    there is nothing. What else a sample holds is its own matter.

    Args:
        modalities: that every sample must have.
        num_classes: C, or K numbers.
        name: what errors call the data set.
        dataset: map-style data set. All its labels are checked where it has them as an attribute `labels`,
            those of its first samples otherwise.
        whole: every class and every modality must occur, as in a training set.
        collate_fn: what makes batches of samples. With one they may differ in shape, a modality may hold what
            is no array for it to turn into one, and nothing is asked of what samples lack.
        task: what labels must be; None: anything.
        need_labels: False lets samples have none; what they have is checked.

    Raises:
        TypeError: no data set of dicts, or one that is read in its own order alone, labels of another kind
            than the task's, features that are no numbers.
        ValueError: no samples, a missing modality, labels out of range or of another length, samples that
            differ in shape, NaN or infinite numbers, an absent class.
    """
    _check_kind(name, dataset)
    size = len(dataset)
    if size == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    first: dict[str, tuple[int, dict[str, list[int]]]] = {}
    for index in range(1 if isinstance(dataset, ArrayDataset) else min(_FEW, size)):
        sample = dataset[index]
        _check_keys((*modalities, LABEL) if need_labels else modalities, name, sample)
        for key in modalities:
            found = _check_modality(key, name, index, sample, is_free=collate_fn is not None)
            if collate_fn is None and found:
                _check_alike(key, name, first.setdefault(key, (index, found)), (index, found))
        if task is not None and LABEL in sample:
            check_label(task, num_classes, name, index, sample[LABEL])
    masks = getattr(dataset, "present", None)
    for key, mask in masks.items() if isinstance(masks, Mapping) else ():
        if whole and key in modalities and not bool(torch.as_tensor(mask, device="cpu").any()):
            raise ValueError(f"{name} must hold samples with {key}, got none of {size}")
    labels = told_labels(dataset)
    if labels is None or task is None:
        return None
    return check_labels(task, num_classes, name, labels, size, whole=whole, needed=need_labels)


def check_finite(
    name: str,
    value: Tensor,  # any shape
) -> None:
    """Raise ValueError for NaN or infinite elements, with their count."""
    bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {value.numel()} values")


def _check_kind(name: str, dataset: Any) -> None:
    if isinstance(dataset, DataLoader):
        raise TypeError(
            f"{name} must be a data set, got a DataLoader: give the data set itself, batches are made here"
        )
    if isinstance(dataset, Splits):
        part = name if name in ("train", "val", "test") else "test"
        raise TypeError(f"{name} must be one data set, got Splits of three: give splits.{part}")
    if isinstance(dataset, Mapping | Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be a data set of samples, got {describe(dataset)}: "
            "mmfast.data.ArrayDataset({<modality>: array}, labels) makes one"
        )
    is_stream = isinstance(dataset, IterableDataset)
    if is_stream or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        text = f"{name} must be a data set with len({name}) and {name}[index], got {describe(dataset)}"
        if is_stream or hasattr(dataset, "__iter__"):
            text += (
                ", which gives samples in its own order alone; they are read by index, again and again: in "
                "the seed's order, as copies, for valuation. Read it into a list, or write a class with "
                "__len__ and __getitem__"
            )
        raise TypeError(text)


def _check_keys(keys: Sequence[str], name: str, sample: Any) -> None:
    if not isinstance(sample, Mapping):
        raise TypeError(f"samples of {name} must be {_EXPECTED}, got {describe(sample)}")
    for key in keys:
        if key not in sample:
            raise ValueError(f"samples of {name} must have {key!r}, got {', '.join(map(repr, sample))}")


def _check_modality(
    key: str,
    name: str,
    index: int,
    sample: Mapping[str, Any],
    *,
    is_free: bool,  # to hold what is no array
) -> dict[str, list[int]]:
    """Return the shapes of a sample's arrays of a modality, by their names; none where it lacks it."""
    is_present = bool(torch.as_tensor(sample.get(present_key(key), True), device="cpu"))
    shapes: dict[str, list[int]] = {}
    if not is_present and (is_free or not is_array(sample[key])):
        return shapes
    for place, value in arrays_of((key,), sample[key]):
        where = f"{name_of(place)} of sample {index} of {name}"
        if not is_array(value):
            if is_free or (value is None and len(place) > 1):
                continue
            raise TypeError(f"{where} must be an array of numbers, got {describe(value)}")
        array = as_array(where, value)
        if is_present:
            check_finite(where, array)
        shapes[name_of(place)] = list(array.shape)
    if not shapes and not is_free:
        raise TypeError(
            f"{key} of sample {index} of {name} must hold an array of numbers, got {describe(sample[key])}"
        )
    return shapes


def _check_alike(
    key: str,
    name: str,
    first: tuple[int, Mapping[str, list[int]]],  # a sample and the shapes of its arrays, by their names
    other: tuple[int, Mapping[str, list[int]]],
) -> None:
    (one, expected), (index, found) = first, other
    if set(found) != set(expected):
        raise ValueError(
            f"{key} must hold the same arrays in all samples of {name}, got {', '.join(expected)} in "
            f"sample {one} and {', '.join(found)} in sample {index}"
        )
    for array, shape in found.items():
        if shape != expected[array]:
            raise ValueError(
                f"{array} must have one shape in all samples of {name}, got {expected[array]} in sample "
                f"{one} and {shape} in sample {index}: cut them, or give collate_fn=mmfast.data.pad"
            )

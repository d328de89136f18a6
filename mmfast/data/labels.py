"""What labels a task takes: one of a sample, or those of a whole data set, and what is wrong with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from mmfast.data.array_checks import ENCODE
from mmfast.data.collate import as_array, is_array
from mmfast.errors import describe
from mmfast.objectives import IGNORED, check_targets, expected


def told_labels(dataset: Any) -> Any:
    """Return the labels of all samples, of a Subset its part; None where a data set does not tell."""
    if not isinstance(dataset, Subset):
        return getattr(dataset, "labels", None)
    whole = told_labels(dataset.dataset)
    return None if whole is None else _as_numpy("the whole", whole)[np.asarray(dataset.indices)]


def check_label(task: str, num_classes: int, name: str, index: int, label: Any) -> None:
    """Raise TypeError or ValueError unless a sample's label is one of the task's.

    Args:
        task: one of `mmfast.objectives.TASKS`.
        num_classes: C, or K numbers.
        name: what errors call the data set.
        index: of the sample.
        label: of the sample.
    """
    where = f"label of sample {index} of {name}"
    if isinstance(label, str | bytes):
        wanted = "numbers" if task == "regression" else "an integer"
        raise TypeError(f"{where} must be {wanted}, got a string" + (f": {ENCODE}" * (task == "multiclass")))
    if task == "multiclass" and not _is_probabilities(label):
        _check_class(num_classes, where, label)
        return
    if not is_array(label):
        raise TypeError(f"{where} must be {expected(task, num_classes)}, got {describe(label)}")
    check_targets(task, num_classes, where, as_array(where, label)[None], lambda row: where)


def check_labels(
    task: str, num_classes: int, name: str, labels: Any, size: int, *, whole: bool, needed: bool = True
) -> Tensor:  # [N] or [N, C]
    """Return the labels that a data set has as its attribute, or raise TypeError or ValueError.

    Args:
        task, num_classes, name: as for `check_label`.
        labels: the attribute.
        size: N.
        whole: every class must occur, as in a training set.
        needed: some sample must have a label.
    """
    array = _as_numpy(name, labels)
    if task == "multiclass" and not (array.dtype.kind == "f" and array.ndim == 2):
        found = _classes(name, labels, array, size)
        _check_range(num_classes, name, found, whole, needed)
        return found
    where = f"labels of {name}"
    if array.dtype.kind not in "biuf":
        got = describe(labels) if array.dtype.kind == "O" else array.dtype
        raise TypeError(f"{where} must be {expected(task, num_classes)} each, got {got}")
    if len(array) != size:
        raise ValueError(f"{where} must be those of N = {size} samples, got {len(array)}")
    found = torch.from_numpy(np.ascontiguousarray(array))
    check_targets(task, num_classes, where, found, lambda row: f"label of sample {row} of {name}")
    if task == "multiclass" and whole:
        _check_all_there(num_classes, name, found.argmax(1))
    return found


def _is_probabilities(label: Any) -> bool:
    """Whether a sample's label is a row of real numbers, which one class is not."""
    if isinstance(label, list | tuple):
        return len(label) > 0 and all(isinstance(value, float) for value in label)
    shape = getattr(label, "shape", ())
    if isinstance(label, Tensor):
        return len(shape) == 1 and label.is_floating_point()
    return len(shape) == 1 and getattr(label.dtype, "kind", "") == "f"


def _check_class(num_classes: int, where: str, label: Any) -> None:
    shape = getattr(label, "shape", ())
    if len(shape) or isinstance(label, bool) or not _is_integer(label):
        raise TypeError(f"{where} must be one integer, got {describe(label)}")
    if not 0 <= int(label) < num_classes and int(label) != IGNORED:
        raise ValueError(f"{where} must lie in [0, C) = [0, {num_classes}), got {int(label)}")


def _is_integer(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dtype != torch.bool and not (value.is_floating_point() or value.is_complex())
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return isinstance(value, int) or kind in ("i", "u")


def _as_numpy(name: str, labels: Any) -> np.ndarray:  # [N, ...]
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy() if labels.dtype != torch.bfloat16 else labels.float().numpy()
    try:
        array = np.asarray(labels)
    except ValueError:
        raise ValueError(f"labels of {name} must be one array [N], got rows of unequal length") from None
    if array.dtype.kind in "SUOT" and array.size and isinstance(array.flat[0], str | bytes):
        raise TypeError(f"labels of {name} must be integers, got strings: {ENCODE}")
    return array


def _classes(name: str, labels: Any, array: np.ndarray, size: int) -> Tensor:  # [N] int64
    if array.dtype.kind not in "iu":
        got = describe(labels) if array.dtype.kind == "O" else array.dtype
        raise TypeError(f"labels of {name} must be integers [N] from 0 to C - 1, got {got}")
    if array.shape != (size,):
        hint = ""
        if array.shape == (size, 1):
            hint = ": labels.reshape(-1) makes them so"
        elif array.ndim == 2 and len(array) == size:
            hint = ": labels.argmax(1) is the class of one-hot rows"
        raise ValueError(f"labels of {name} must have shape [N] = [{size}], got {list(array.shape)}{hint}")
    return torch.from_numpy(array.astype(np.int64))


def _check_range(
    num_classes: int,
    name: str,
    labels: Tensor,  # [N]
    whole: bool,
    needed: bool,
) -> None:
    known = labels[labels != IGNORED]
    if len(known) == 0:
        if not needed:
            return
        raise ValueError(f"{name} must hold a sample with a label, got {IGNORED} for all {len(labels)}")
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels of {name} must lie in [0, C) = [0, {num_classes}), got values from {low} to {high}"
        )
    if whole:
        _check_all_there(num_classes, name, known)


def _check_all_there(
    num_classes: int,
    name: str,
    labels: Tensor,  # [N]
) -> None:
    absent = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if absent:
        shown = absent if len(absent) <= 10 else f"{len(absent)} classes, {absent[0]} among them"
        raise ValueError(f"{name} must hold every class of C = {num_classes}, got no sample of {shown}")

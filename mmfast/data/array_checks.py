"""What arrays in memory must be to make a data set: names, labels, marks of presence, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.coalitions import PRESENT_SUFFIX, RESERVED, is_reserved, nearly_reserved, present_key
from mmfast.data.features import as_array, as_tensor
from mmfast.errors import check_one_of, describe, did_you_mean, unknown_modalities
from mmfast.objectives import IGNORED, TASKS, check_targets

ENCODE = "np.unique(labels, return_inverse=True)[1] makes integers of names"


def check_labels_fit(labels: Tensor, arrays: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise ValueError for labels of another N than two or more arrays, which have the same."""
    told = {name: np.shape(array)[:1] for name, array in arrays.items() if _has_rows(array)}
    told |= {present_key(name): np.shape(mask)[:1] for name, mask in present.items() if _has_rows(mask)}
    if len(told) > 1 and len(sizes := set(told.values())) == 1 and (size := sizes.pop()[0]) != len(labels):
        names = ", ".join(told) if len(told) <= 6 else f"all {len(told)} arrays"
        form = "[N]" if labels.ndim == 1 else "[N, ...]"
        raise ValueError(
            f"labels must have shape {form} with N = {size} as {names}, got {list(labels.shape)}"
        )


def _has_rows(array: Any) -> bool:
    return len(getattr(array, "shape", ())) > 0


def check_class_names(class_names: Sequence[str] | None, num_classes: int | None) -> int | None:
    """Return C, where it is told by either."""
    if class_names is None:
        return num_classes
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names must be strings, one a class, got {describe(class_names)}")
    if num_classes not in (None, len(class_names)):
        raise ValueError(f"class_names must name C = {num_classes} classes, got {len(class_names)}")
    return len(class_names)


def check_labels_of(labels: Any, num_classes: int | None, task: str) -> tuple[Tensor, int]:  # [N] or [N, C]
    """Return labels as losses take them, and C."""
    check_one_of("task", task, TASKS, suggest=True)
    if task != "multiclass" or _is_soft(labels):
        array = as_array("labels", labels, "biuf", "numbers")
        is_real = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
        found = as_tensor(array, torch.float32 if is_real else torch.int64)
        if found.ndim not in ((1, 2) if task == "regression" else (2,)):
            form = "[N] or [N, K]" if task == "regression" else "[N, C]"
            raise ValueError(f"labels must have shape {form}, got {list(found.shape)}")
        found_classes = found.shape[1] if found.ndim == 2 else 1
        check_targets(task, num_classes or found_classes, "labels", found, lambda row: f"label {row}")
        return found, found_classes
    try:
        tensor = as_tensor(as_array("labels", labels, "iu", "integers"), torch.int64)
    except TypeError as error:
        if not isinstance(labels, Tensor) and np.asarray(labels).dtype.kind in "SU":
            raise TypeError(f"{error}: {ENCODE}") from None
        raise TypeError(f"{error}: task='regression' takes numbers") from None
    if tensor.ndim != 1:
        expected = f"[N] = [{len(tensor)}]" if tensor.ndim else "[N]"
        hint = ": task='multilabel' takes 0 and 1 for each label" * (tensor.ndim == 2 and tensor.shape[1] > 1)
        raise ValueError(f"labels must have shape {expected}, got {list(tensor.shape)}{hint}")
    upper = "C - 1" if num_classes is None else str(num_classes - 1)
    outside = tensor < 0 if num_classes is None else (tensor < 0) | (tensor >= num_classes)
    outside &= tensor != IGNORED
    if outside.any():
        raise ValueError(f"labels must lie in 0 .. {upper}, got {tensor[outside][0].item()}")
    if num_classes is None:
        num_classes = max(0, int(tensor.max()) + 1) if len(tensor) else 0
    return tensor, num_classes


def _is_soft(labels: Any) -> bool:
    """Whether labels are rows of real numbers, one probability a class."""
    if isinstance(labels, Tensor):
        return labels.ndim == 2 and labels.is_floating_point()
    try:
        array = np.asarray(labels)
    except ValueError:
        return False
    return array.ndim == 2 and array.dtype.kind == "f"


def check_name(name: str, arrays: Mapping[str, Any]) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"modality names must be non-empty strings, got {describe(name)}")
    if is_reserved(name):
        raise ValueError(
            f"modality name must not be {', '.join(RESERVED)}, end in {PRESENT_SUFFIX} or hold a dot, "
            f"got {name!r}"
        )
    refuse_misspelled(name, arrays)
    shape = getattr(arrays[name], "shape", ())
    if len(shape) == 1 and (hint := did_you_mean(name, RESERVED, cutoff=0.75)):
        raise ValueError(f"{name} must have two axes or more, or another name, got {list(shape)}{hint}")


def refuse_misspelled(name: str, arrays: Mapping[str, Any]) -> None:
    """Raise ValueError for an array whose name is nearly that of a mark of presence."""
    is_mark = len(getattr(arrays[name], "shape", ())) == 1
    if meant := nearly_reserved(name, arrays if is_mark else ()):
        raise ValueError(
            f"modality name must not end in what is nearly {PRESENT_SUFFIX}, got {name!r}; did you mean "
            f"{meant}?"
        )


def check_present(
    present: Mapping[str, Any], modalities: Sequence[str], size: int
) -> dict[str, Tensor]:  # [N] each
    unknown = [name for name in present if name not in modalities]
    if unknown:
        hint = did_you_mean(unknown[0], modalities)
        raise unknown_modalities("present", ", ".join(unknown) + hint, modalities)
    masks = {}
    for name in modalities:
        if name in present:
            given = as_array(f"present[{name!r}]", present[name], "b", "bool")
            mask = as_tensor(given, torch.bool)
            if tuple(mask.shape) != (size,):
                raise ValueError(f"present[{name!r}] must have shape [N] = [{size}], got {list(mask.shape)}")
            masks[name] = mask
    return masks


def as_classes(labels: Any) -> np.ndarray:  # [N] integers or strings
    """Return what files and tables hold for classes as integers or strings, or raise TypeError.

    NumPy and pandas read the whole numbers of a text file as floats, and keep strings as objects.
    """
    array = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    kind, got = array.dtype.kind, str(array.dtype)
    if kind == "S":
        return array.astype(str)
    if kind in "biuU":
        return array.astype(str) if kind == "b" else array
    if kind == "f":
        whole_numbers = np.isfinite(array) & (np.trunc(array) == array)
        part = array[~whole_numbers | (np.abs(array.astype(np.float64)) >= 2.0**53)]
        if part.size == 0:
            return array.astype(np.int64)
        got += f" with {part.flat[0]}"
    elif kind in "OT" and array.size:
        first = array.flat[0]
        accepted = str if isinstance(first, str) else (int, np.integer)
        other = [value for value in array.flat if not isinstance(value, accepted) or isinstance(value, bool)]
        if not other:
            return array.astype(str if accepted is str else np.int64)
        got = f"{describe(other[0])} among them"
    raise TypeError(f"labels must be integers or strings, got {got}")


def check_ids(name: str, values: Any, size: int) -> np.ndarray:  # [N]
    array = np.asarray(values)
    if array.dtype.kind not in "iuSU":
        raise TypeError(f"{name} must hold integers or strings, got dtype {array.dtype}")
    if array.shape != (size,):
        raise ValueError(f"{name} must have shape [N] = [{size}], got {list(array.shape)}")
    return array

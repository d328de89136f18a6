"""Samples of several modalities held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfast.coalitions import present_key
from mmfast.data.array_checks import (
    check_class_names,
    check_ids,
    check_labels_fit,
    check_labels_of,
    check_name,
    check_present,
)
from mmfast.data.features import Features, check_shape, features_of, gather, whole

LABEL = "label"


def as_label(
    value: Tensor,  # any shape
) -> Tensor:  # same shape
    """Return labels as losses take them: real numbers in float32, others in int64."""
    return value.float() if value.is_floating_point() else value.long()


class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Samples of M modalities in memory, read one by one or gathered as a batch.

    Args:
        arrays: One array per modality name: `[N, D]` vectors, `[N, T, F]` sequences, `[N, C, H, W]` images or
            `[N, T, C, H, W]` video; any real dtype, kept as float32. A shape that looks like channels last is
            taken as it is, with a `UserWarning`.
        labels: `[N]` integers from 0 to C - 1, or -100 for a sample without label; or what `task` takes. None
            for data to be predicted, whose samples have no label.
        present: bool `[N]` for any of the modalities: False marks samples without that modality. Their
            features are set to zero and may hold NaN.
        group: `[N]` integers or strings; samples of one group belong together when the data are split.
        num_classes: C, where it is known; the largest label + 1 otherwise, 0 without labels.
        task: "multiclass": labels as above, or probabilities `[N, C]`; "multilabel": 0 and 1 for each of C
            labels, `[N, C]`; "regression": numbers `[N]`, or K of them, `[N, K]`, and K stands for C.
        sample_keys: `[N]` integers or strings, such as the rows of a file or the names of files, by which
            tables tell the samples. A subset of samples without any has their numbers here.
        class_names: of the C classes, where they are known.

    Attributes:
        scaling: what the features were standardised by, as `Splits.standardize` does it; None where they are
            as they were given.

    Raises:
        ValueError: lengths, ranks, label range or non-finite features, with the modality named.
        TypeError: labels that are not integers, features that are not real, presence that is not bool.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],  # [N, ...] each
        labels: Any | None = None,  # [N]
        *,
        present: Mapping[str, Any] | None = None,  # [N] each
        group: Any | None = None,  # [N]
        num_classes: int | None = None,
        task: str = "multiclass",
        sample_keys: Any | None = None,  # [N]
        class_names: Sequence[str] | None = None,
    ) -> None:
        found = check(
            arrays,
            labels,
            present=present,
            group=group,
            num_classes=num_classes,
            task=task,
            sample_keys=sample_keys,
            class_names=class_names,
        )
        self.labels: Any = found.labels  # [N] or [N, C], or None
        self.task = task
        self.num_classes = found.num_classes
        self.present = found.present  # [N] each
        self.arrays = {
            name: whole(name, features, self.present.get(name)) for name, features in found.features.items()
        }  # [N, ...] each
        self.group = found.group  # [N]
        self.sample_keys = found.sample_keys  # [N], or None
        self.class_names = found.class_names
        self.scaling: dict[str, tuple[list[float], list[float]]] | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities; their order is the bit order of coalitions."""
        return tuple(self.arrays)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Feature shape of one sample per modality."""
        return {name: tuple(array.shape[1:]) for name, array in self.arrays.items()}

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        outputs = {"multiclass": "classes", "multilabel": "labels", "regression": "numbers"}[self.task]
        told = "no labels" if self.labels is None else f"{self.num_classes} {outputs}"
        return f"ArrayDataset({len(self)} samples, {shapes}, {told})"

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return next(iter(self.arrays.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return torch.float32

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's features."""
        return sum(array[:1].nbytes for array in self.arrays.values())

    def to(self, device: torch.device | str) -> ArrayDataset:
        """Return the data set with its samples on a device, where batches are then made without any copy."""
        return self._with(
            arrays={name: array.to(device) for name, array in self.arrays.items()},
            present={name: mask.to(device) for name, mask in self.present.items()},
            labels=None if self.labels is None else self.labels.to(device),
        )

    def gather(
        self,
        index: Tensor,  # [B] int64
        modalities: Sequence[str] | None = None,
        *,
        labels: bool = True,
    ) -> dict[str, Tensor]:
        """Return the batch at indices that lie on the data set's device and are known to be in [0, N).

        Args:
            index: of the samples.
            modalities: those to gather; None: all.
            labels: with labels, and with the marks of which samples have which modality.
        """
        names = self.arrays if modalities is None else modalities
        batch = {name: self.arrays[name].index_select(0, index) for name in names}
        if labels:
            batch |= {present_key(name): mask.index_select(0, index) for name, mask in self.present.items()}
            if self.labels is not None:
                batch[LABEL] = self.labels.index_select(0, index)
        return batch

    def get(self, index: Any, modalities: Sequence[str]) -> dict[str, Tensor]:
        """Return what `data[index]` holds of some modalities, with the label; the others are not touched."""
        key = index if isinstance(index, slice) else self._as_index(index)
        return self._taken(key, modalities)

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """Return one sample for an int, a batch `[B, ...]` for a slice or a list or 1-D array of ints."""
        key = index if isinstance(index, slice) else self._as_index(index)
        return self._taken(key, self.modalities)

    def _taken(self, key: Tensor | slice, modalities: Sequence[str]) -> dict[str, Tensor]:
        sample = {name: _take(self.arrays[name], key) for name in modalities}
        for name, mask in self.present.items():
            if name in modalities:
                sample[present_key(name)] = _take(mask, key)
        if self.labels is not None:
            sample[LABEL] = _take(self.labels, key)
        return sample

    def subset(self, indices: Any) -> ArrayDataset:
        """Return the samples at `indices` (ints `[B]`, or a slice) as a data set of their own."""
        key = (
            torch.arange(len(self), device="cpu")[indices]
            if isinstance(indices, slice)
            else self._as_index(indices)
        )
        if key.ndim != 1:
            raise TypeError("indices must be a list, a 1-D array or a slice, got one integer")
        return self._with(
            arrays={name: _take(array, key) for name, array in self.arrays.items()},
            present={name: _take(mask, key) for name, mask in self.present.items()},
            labels=None if self.labels is None else _take(self.labels, key),
            group=None if self.group is None else self.group[key.numpy()],
            sample_keys=key.numpy() if self.sample_keys is None else self.sample_keys[key.numpy()],
        )

    def _with(self, **changes: Any) -> ArrayDataset:
        """Return a copy with attributes that are known to be valid replaced, without checking them again."""
        return ArrayDataset._of(**{**self.__dict__, **changes})

    @staticmethod
    def _of(**attributes: Any) -> ArrayDataset:
        """Return the data set with attributes that are known to be valid."""
        made = object.__new__(ArrayDataset)
        made.__dict__.update(attributes)
        return made

    def _as_index(self, index: Any) -> Tensor:  # [] or [B]
        key = torch.as_tensor(index, device="cpu")
        # An empty list has no dtype of its own.
        real = key.is_floating_point() and key.numel() > 0
        if key.ndim > 1 or real or key.is_complex() or key.dtype == torch.bool:
            raise TypeError(
                f"index must be an int, a slice or a 1-D list of ints, got {key.dtype} {list(key.shape)}"
            )
        key, size = key.long(), len(self)
        if key.numel() == 0:
            return key
        low, high = (int(end) for end in key.aminmax())
        if low < -size or high >= size:
            raise IndexError(f"index must lie in [-{size}, {size}), got {low if low < -size else high}")
        return torch.where(key < 0, key + size, key) if low < 0 else key


def _take(array: Tensor, key: Tensor | slice) -> Tensor:
    if isinstance(key, slice):
        # torch slices know no negative step.
        start, stop, step = key.indices(len(array))
        return array[start:stop:step] if step > 0 else array[list(range(start, stop, step))]
    return array.index_select(0, key.to(array.device)) if key.ndim else array[int(key)]


@dataclass(frozen=True)
class Checked:
    """Samples that fit together, before their features are read.

    Attributes:
        features: [N, ...] of each modality.
        labels: int64 [N], or what the task takes, or None.
        present: bool [N] of some modalities.
        group: [N], or None.
        num_classes: C.
        task: what labels are.
        sample_keys: [N], or None.
        class_names: of the C classes, or None.
    """

    features: Mapping[str, Features]
    labels: Any  # [N] or [N, C]
    present: Mapping[str, Tensor]  # [N] each
    group: np.ndarray | None  # [N]
    num_classes: int
    task: str = "multiclass"
    sample_keys: np.ndarray | None = None  # [N]
    class_names: tuple[str, ...] | None = None

    def parts(self, rows: Sequence[np.ndarray]) -> list[ArrayDataset]:  # [n] each, ascending
        """Return the samples at each of some lists of rows, in memory of their own; features are read once.

        Raises:
            ValueError: features that are NaN or infinite.
        """
        arrays = {
            name: gather(name, features, self.present.get(name), rows)
            for name, features in self.features.items()
        }
        parts = []
        for index, own in enumerate(rows):
            key = torch.from_numpy(own)
            part = ArrayDataset._of(
                labels=None if self.labels is None else self.labels[key],
                num_classes=self.num_classes,
                task=self.task,
                present={name: mask[key] for name, mask in self.present.items()},
                arrays={name: gathered[index] for name, gathered in arrays.items()},
                group=None if self.group is None else self.group[own],
                sample_keys=None if self.sample_keys is None else self.sample_keys[own],
                class_names=self.class_names,
                scaling=None,
            )
            parts.append(part)
        return parts


def check(
    arrays: Mapping[str, Any],  # [N, ...] each
    labels: Any | None,  # [N]
    *,
    present: Mapping[str, Any] | None,  # [N] each
    group: Any | None,  # [N]
    num_classes: int | None,
    task: str = "multiclass",
    sample_keys: Any | None = None,  # [N]
    class_names: Sequence[str] | None = None,
) -> Checked:
    """Return what `ArrayDataset` is given, or raise as it does; what features hold is seen later.

    To be called by what users call: warnings go to the caller of that.
    """
    num_classes = check_class_names(class_names, num_classes)
    found = None
    if labels is not None:
        found, num_classes = check_labels_of(labels, num_classes, task)
    if not arrays:
        raise ValueError("arrays must hold at least one modality, got none")
    for name in arrays:
        check_name(name, arrays)
    first = next(iter(arrays))
    size = _num_samples(first, arrays[first]) if found is None else len(found)
    if found is not None:
        check_labels_fit(found, arrays, present or {})
    masks = check_present(present or {}, tuple(arrays), size)
    features = {}
    for name, array in arrays.items():
        features[name] = features_of(name, array)
        check_shape(name, features[name], size, first if found is None else "labels")
    return Checked(
        features,
        found,
        masks,
        None if group is None else check_ids("group", group, size),
        num_classes or 0,
        task,
        None if sample_keys is None else check_ids("sample_keys", sample_keys, size),
        None if class_names is None else tuple(class_names),
    )


def _num_samples(name: str, array: Any) -> int:
    shape = features_of(name, array).shape
    if not shape:
        raise ValueError(f"{name} must have shape [N, ...], got a scalar")
    return shape[0]

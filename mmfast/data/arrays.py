"""Samples of several modalities held in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfast.coalitions import PRESENT_SUFFIX, RESERVED, is_reserved, present_key
from mmfast.data.channels import is_channels_last, permutation
from mmfast.errors import describe, unknown_modalities

LABEL = "label"
_RANKS = "[N, D], [N, T, F], [N, C, H, W] or [N, T, C, H, W]"
# Samples looked at together where a whole-array temporary would double the memory.
CHUNK = 4096
ENCODE = "np.unique(labels, return_inverse=True)[1] makes integers of names"
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}


class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Labelled samples of M modalities in memory, read one by one or gathered as a batch.

    Args:
        arrays: One array per modality name: `[N, D]` vectors, `[N, T, F]` sequences, `[N, C, H, W]` images or
            `[N, T, C, H, W]` video; any real dtype, kept as float32. A shape that looks like channels last is
            taken as it is, with a `UserWarning`.
        labels: `[N]` integers from 0 to C - 1.
        present: bool `[N]` for any of the modalities: False marks samples without that modality. Their
            features are set to zero and may hold NaN.
        group: `[N]` integers or strings; samples of one group belong together when the data are split.
        num_classes: C, where it is known; the largest label + 1 otherwise.

    Raises:
        ValueError: lengths, ranks, label range or non-finite features, with the modality named.
        TypeError: labels that are not integers, features that are not real, presence that is not bool.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],  # [N, ...] each
        labels: Any,  # [N]
        *,
        present: Mapping[str, Any] | None = None,  # [N] each
        group: Any | None = None,  # [N]
        num_classes: int | None = None,
    ) -> None:
        self.labels = _check_labels(labels, num_classes)  # [N]
        size = len(self.labels)
        largest = int(self.labels.max()) if size else -1
        self.num_classes: int = largest + 1 if num_classes is None else num_classes
        if not arrays:
            raise ValueError("arrays must hold at least one modality, got none")
        for name in arrays:
            _check_name(name)
        self.present = _check_present(present or {}, tuple(arrays), size)
        self.arrays = {
            name: _check_features(name, array, size, self.present.get(name)) for name, array in arrays.items()
        }
        self.group = None if group is None else _check_group(group, size)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the M modalities; their order is the bit order of coalitions."""
        return tuple(self.arrays)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Feature shape of one sample per modality."""
        return {name: tuple(array.shape[1:]) for name, array in self.arrays.items()}

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.shapes.items())
        return f"ArrayDataset({len(self)} samples, {shapes}, {self.num_classes} classes)"

    @property
    def device(self) -> torch.device:
        """Where the samples lie."""
        return self.labels.device

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
            labels=self.labels.to(device),
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
            labels=_take(self.labels, key),
            group=None if self.group is None else self.group[key.numpy()],
        )

    def _with(self, **changes: Any) -> ArrayDataset:
        """Return a copy with attributes that are known to be valid replaced, without checking them again."""
        other = object.__new__(ArrayDataset)
        other.__dict__.update(self.__dict__, **changes)
        return other

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


def _to_tensor(name: str, value: Any, kinds: str, expected: str, dtype: torch.dtype) -> Tensor:
    """Convert to `dtype` on the CPU, refusing kinds (numpy's letters) that would change meaning."""
    if isinstance(value, Tensor):
        source: Tensor | np.ndarray = value.detach().cpu()
        kind = "b" if value.dtype == torch.bool else "c" if value.is_complex() else "i"
        kind = "f" if value.is_floating_point() else kind
    else:
        try:
            source = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be one array, got rows of unequal shape") from error
        kind = source.dtype.kind
    # An empty list has no dtype of its own.
    if kind not in kinds and 0 not in source.shape:
        raise TypeError(f"{name} must be {expected}, got {source.dtype}")
    if isinstance(source, np.ndarray):
        # torch warns about memory it must not write: a read-only array is copied. Overflow is counted later.
        with np.errstate(over="ignore"):
            source = torch.from_numpy(np.require(source, _NUMPY[dtype], ["C", "W"]))
    return source.to(dtype).contiguous()


def _check_labels(labels: Any, num_classes: int | None) -> Tensor:  # [N]
    try:
        tensor = _to_tensor("labels", labels, "iu", "integers", torch.int64)
    except TypeError as error:
        if not isinstance(labels, Tensor) and np.asarray(labels).dtype.kind in "SU":
            raise TypeError(f"{error}: {ENCODE}") from None
        raise
    if tensor.ndim != 1:
        expected = f"[N] = [{len(tensor)}]" if tensor.ndim else "[N]"
        raise ValueError(f"labels must have shape {expected}, got {list(tensor.shape)}")
    upper = "C - 1" if num_classes is None else str(num_classes - 1)
    outside = tensor < 0 if num_classes is None else (tensor < 0) | (tensor >= num_classes)
    if outside.any():
        raise ValueError(f"labels must lie in 0 .. {upper}, got {tensor[outside][0].item()}")
    return tensor


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise TypeError(f"modality names must be non-empty strings, got {describe(name)}")
    if is_reserved(name):
        raise ValueError(
            f"modality name must not be {', '.join(RESERVED)}, end in {PRESENT_SUFFIX} or hold a dot, "
            f"got {name!r}"
        )


def _check_features(name: str, array: Any, size: int, mask: Tensor | None) -> Tensor:  # [N, ...]
    tensor = _to_tensor(name, array, "biuf", "real numbers", torch.float32)
    if not 2 <= tensor.ndim <= 5:
        raise ValueError(f"{name} must have shape {_RANKS}, got {list(tensor.shape)}")
    if len(tensor) != size:
        raise ValueError(
            f"{name} must have shape [N, ...] with N = {size} as labels, got {list(tensor.shape)}"
        )
    if 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must have at least one feature, got shape {list(tensor.shape)}")
    if is_channels_last(tensor.shape):
        shape, axes = list(tensor.shape), permutation(tensor.ndim)
        warnings.warn(
            f"{name} should have its channels before height and width, got shape {shape}, which looks like "
            f"channels last; if it is, give numpy.transpose({name}, {axes}) or {name}.permute{axes}",
            UserWarning,
            stacklevel=4,
        )
    if mask is not None and not mask.all():
        # Makes a copy: the caller's memory is not ours to write.
        tensor = torch.where(mask.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0.0)
    bad = sum(int((~torch.isfinite(chunk)).sum()) for chunk in tensor.split(CHUNK))
    if bad:
        raise ValueError(
            f"{name} must be finite in float32, got {bad} NaN or infinite of {tensor.numel()} values"
        )
    return tensor


def _check_present(
    present: Mapping[str, Any], modalities: Sequence[str], size: int
) -> dict[str, Tensor]:  # [N] each
    unknown = [name for name in present if name not in modalities]
    if unknown:
        raise unknown_modalities("present", ", ".join(unknown), modalities)
    masks = {}
    for name in modalities:
        if name in present:
            mask = _to_tensor(f"present[{name!r}]", present[name], "b", "bool", torch.bool)
            if tuple(mask.shape) != (size,):
                raise ValueError(f"present[{name!r}] must have shape [N] = [{size}], got {list(mask.shape)}")
            masks[name] = mask
    return masks


def _check_group(group: Any, size: int) -> np.ndarray:  # [N]
    array = np.asarray(group)
    if array.dtype.kind not in "iuSU":
        raise TypeError(f"group must hold integers or strings, got dtype {array.dtype}")
    if array.shape != (size,):
        raise ValueError(f"group must have shape [N] = [{size}], got {list(array.shape)}")
    return array

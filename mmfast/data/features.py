"""Features on their way to float32: checked by their shape, then gathered part by part, block by block.

Data of a modality lie in memory once, as the tensors that training reads: whatever holds them before, an
array of another dtype or a file, is read in blocks of a few megabytes, whose samples go to their places.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.coalitions import present_key
from mmfast.data.channels import is_channels_last, permutation

# Samples looked at together where a whole-array temporary would double the memory.
CHUNK = 4096
# Bytes of samples that are read and converted at a time.
BLOCK = 2**22
_RANKS = "[N, D], [N, T, F], [N, C, H, W] or [N, T, C, H, W]"
_NUMPY = {torch.int64: np.int64, torch.float32: np.float32, torch.bool: np.bool_}

# Samples from one index to another, the index of a block of them among the other axes, and its numbers.
Block = tuple[slice, tuple[Any, ...], "np.ndarray | Tensor"]


class Features:
    """Real numbers `[N, ...]` of one modality, which can be read in blocks.

    Args:
        shape: [N, ...].
        dtype: as errors name it.
    """

    def __init__(self, shape: Sequence[int], dtype: Any) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def blocks(self) -> Iterator[Block]:
        """Yield all numbers once, in blocks of samples that follow each other."""
        raise NotImplementedError


class Held(Features):
    """Features in an array or a tensor on the CPU."""

    def __init__(self, array: np.ndarray | Tensor) -> None:  # [N, ...]
        super().__init__(array.shape, array.dtype)
        self.array = array

    def blocks(self) -> Iterator[Block]:
        """Yield slices of the array, no copies."""
        per_sample = self.array.dtype.itemsize * int(np.prod(self.shape[1:]))
        for rows in row_blocks(self.shape[0], per_sample):
            yield rows, (), self.array[rows]


def row_blocks(
    size: int,  # N
    per_sample: int,  # bytes
    at_once: int | None = None,  # bytes
) -> Iterator[slice]:
    """Yield slices of N samples, each of as many as `at_once` bytes hold (by default BLOCK), or of one."""
    step = max(1, (at_once or BLOCK) // max(1, per_sample))
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def features_of(name: str, value: Any) -> Features:
    """Return the features of modality `name`; raise for what is no array of real numbers."""
    return value if isinstance(value, Features) else Held(as_array(name, value, "biuf", "real numbers"))


def as_array(name: str, value: Any, kinds: str, expected: str) -> np.ndarray | Tensor:
    """Return an array, or a tensor on the CPU, refusing kinds (numpy's letters) that would change meaning."""
    if isinstance(value, Tensor):
        array: Tensor | np.ndarray = value.detach().cpu()
        kind = "b" if value.dtype == torch.bool else "c" if value.is_complex() else "i"
        kind = "f" if value.is_floating_point() else kind
    else:
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be one array, got rows of unequal shape") from error
        kind = array.dtype.kind
    # An empty list has no dtype of its own.
    if kind not in kinds and 0 not in array.shape:
        raise TypeError(f"{name} must be {expected}, got {array.dtype}")
    return array


def as_tensor(array: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
    """Return an array as a contiguous tensor, which shares its memory where that can be."""
    if isinstance(array, np.ndarray):
        # torch warns about memory it must not write: a read-only array is copied. Overflow is counted later.
        with np.errstate(over="ignore"):
            array = torch.from_numpy(np.require(array, _NUMPY[dtype], ["C", "W"]))
    return array.to(dtype).contiguous()


def check_shape(
    name: str,
    features: Features,
    size: int,  # N
    told_by: str = "labels",
) -> None:
    """Raise for features that do not fit the N samples of `told_by`; warn of channels that seem last."""
    shape = list(features.shape)
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"{name} must have shape {_RANKS}, got {shape}")
    if shape[0] != size:
        raise ValueError(f"{name} must have shape [N, ...] with N = {size} as {told_by}, got {shape}")
    if 0 in shape[1:]:
        raise ValueError(f"{name} must have at least one feature, got shape {shape}")
    if is_channels_last(shape):
        axes = permutation(len(shape))
        warnings.warn(
            f"{name} should have its channels before height and width, got shape {shape}, which looks like "
            f"channels last; if it is, give numpy.transpose({name}, {axes}) or {name}.permute{axes}",
            UserWarning,
            # Who called what called `arrays.check`.
            stacklevel=4,
        )


def whole(
    name: str,
    features: Features,  # [N, ...]
    mask: Tensor | None,  # bool [N]
) -> Tensor:  # [N, ...]
    """Return all samples, in the caller's memory where they are float32 and none is absent."""
    if isinstance(features, Held) and (mask is None or bool(mask.all())):
        tensor = as_tensor(features.array, torch.float32)
        check_finite(name, [tensor], [np.arange(len(tensor))])
        return tensor
    return gather(name, features, mask, [np.arange(features.shape[0])])[0]


def gather(
    name: str,
    features: Features,  # [N, ...]
    mask: Tensor | None,  # bool [N]
    rows: Sequence[np.ndarray],  # [n] each, ascending
) -> list[Tensor]:  # [n, ...] each
    """Return the samples at each of some lists of rows, in memory of their own; what is absent becomes 0.

    Raises:
        ValueError: NaN or infinite numbers of samples that have the modality.
    """
    parts = [torch.empty(len(own), *features.shape[1:], dtype=torch.float32, device="cpu") for own in rows]
    for span, rest, block in features.blocks():
        for part, own in zip(parts, rows, strict=True):
            low, high = np.searchsorted(own, [span.start, span.stop])
            part[(slice(low, high), *rest)] = _picked(block, own[low:high] - span.start)
    if mask is not None and not mask.all():
        for part, own in zip(parts, rows, strict=True):
            absent = ~mask[torch.from_numpy(own)]
            part.masked_fill_(absent.view(-1, *[1] * (part.ndim - 1)), 0)
    check_finite(name, parts, rows)
    return parts


def _picked(
    block: np.ndarray | Tensor,  # [R, ...]
    rows: np.ndarray,  # [n]
) -> Tensor:  # [n, ...]
    if isinstance(block, Tensor):
        return block[torch.from_numpy(rows)].float()
    with np.errstate(over="ignore"):
        return torch.from_numpy(block.take(rows, axis=0).astype(np.float32, copy=False))


def check_finite(
    name: str,
    parts: Sequence[Tensor],  # [n, ...] each
    rows: Sequence[np.ndarray],  # [n] each
) -> None:
    """Raise ValueError for NaN or infinite elements: how many in all parts, the first one, what to do."""
    bad, samples = 0, 0
    places = []
    for part, own in zip(parts, rows, strict=True):
        for span in row_blocks(len(part), part[:1].nbytes):
            # A sum is finite only where every addend is, and needs no memory.
            if bool(part[span].sum().isfinite()):
                continue
            wrong = ~part[span].isfinite().flatten(1)
            if len(found := wrong.any(1).nonzero().flatten()):
                bad, samples = bad + int(wrong.sum()), samples + len(found)
                column = int(wrong[found[0]].nonzero()[0])
                places.append((int(own[span][int(found[0])]), column))
    if bad:
        total, (row, column) = sum(part.numel() for part in parts), min(places)
        where = f"sample {row}" + f", column {column}" * (parts[0].ndim == 2)
        raise ValueError(
            f"{name} must be finite in float32, got {bad} NaN or infinite of {total} values, in {samples} of "
            f"{sum(map(len, parts))} samples, first in {where}, counted from 0: impute them, or mark the "
            f"samples that lack {name}, by {present_key(name)} in a file, by present in Python"
        )

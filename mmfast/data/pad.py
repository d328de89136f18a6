"""Sequences of different lengths in one batch: values padded at the end, and a mask of what is a value."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmfast.coalitions import is_reserved
from mmfast.data.collate import (
    arrays_of,
    as_array,
    assemble,
    is_array,
    joined,
    name_of,
    stacked,
    without_absent,
)
from mmfast.errors import describe

_VALUES, _MASK = "values", "mask"


def pad(
    samples: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    value: Any = 0,
    multiple_of: int = 1,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Return the batch of samples whose sequences differ in length: a `collate_fn`.

        trainer = mmfast.Trainer("joint", collate_fn=mmfast.data.pad)
        pad = functools.partial(mmfast.data.pad, names=("text", "audio"), max_length=512)
        trainer = mmfast.Trainer("joint", collate_fn=pad)

    A sequence is an array [t, ...], with its length first; of a padded modality the encoder gets

        {"values": [N, T, ...], "mask": bool [N, T]}

    with T the largest t of the batch and the mask True where there is a value. A sample that is a dict of
    sequences of one length, {"ids": [t], "types": [t]}, gives {"ids": [N, T], "types": [N, T], "mask":
    [N, T]}; if it has a mask of its own, that is padded with False and kept. Tuples and lists stand under
    "values". All else is as in a batch without `collate_fn`: arrays stacked, strings and other values as
    lists, labels int64.

    Of samples that lack a modality, since `<modality>__present` is False, a batch holds no values, and
    `<modality>.rows`, int64 [n], names those whose values it holds: the encoder never sees them, nor a mask
    that is False throughout. A sequence of length 0 gives such a mask; let the encoder take it (a mean over
    positions divides by `mask.sum(1).clamp(min=1)`), or mark the sample as absent.

    Args:
        samples: N dicts.
        names: the keys to pad; their form is then the same in all batches, also where all lengths agree.
            None: those with one-dimensional arrays of integers, as token ids are, alone or within a dict. No
            other is padded without being named: of [t, F] nothing tells whether t is a length.
        value: what is padded with; or a dict of such numbers by key, nested as the samples are,
            {"text": {"ids": 1, "types": 0}}: 0 for what is not in it.
        multiple_of: T is rounded up to a multiple of this, but not above `max_length`.
        max_length: of longer sequences the first so many values are taken.

    Raises:
        TypeError, ValueError: sequences of a nest that differ in length within a sample; arrays that differ
            in shape and are not padded; options of another kind.
    """
    _check_options(names, multiple_of, max_length)

    def join(key: str, values: list[Any]) -> Any:
        if not _is_padded(key, values, names):
            known = (*(names or ()), key)
            return joined((key,), values, functools.partial(stacked, hint=f"pad needs names={known}"))
        lengths = [_length(key, each) for each in values]
        if max_length is not None:
            lengths = [min(length, max_length) for length in lengths]
        size = -(-max(*lengths, 1) // multiple_of) * multiple_of
        size = size if max_length is None else min(size, max_length)
        nest = joined((key,), values, functools.partial(_pad_arrays, lengths=lengths, size=size, value=value))
        mask = torch.arange(size, device="cpu") < torch.tensor(lengths, device="cpu")[:, None]
        if not isinstance(nest, Mapping):
            return {_VALUES: nest, _MASK: mask}
        return {**nest, _MASK: nest[_MASK].bool() if _MASK in nest else mask}

    return assemble(without_absent(samples, arrays=True), join)


pad.takes_parts = True  # type: ignore[attr-defined]


def _check_options(names: Any, multiple_of: Any, max_length: Any) -> None:
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of keys, got the string: names=({names!r},)")
    for option, given in (("multiple_of", multiple_of), ("max_length", max_length)):
        if given is None and option == "max_length":
            continue
        if isinstance(given, bool) or not isinstance(given, int):
            raise TypeError(f"{option} must be an int, got {describe(given)}")
        if given < 1:
            raise ValueError(f"{option} must be at least 1, got {given}")


def _is_padded(key: str, values: Sequence[Any], names: Sequence[str] | None) -> bool:
    if names is not None:
        return key in names
    if is_reserved(key):
        return False
    for value in values:
        arrays = [array for _, array in arrays_of((key,), value)]
        # An empty list may be one of ids or of anything: another sample tells.
        if not any(isinstance(array, list | tuple) and len(array) == 0 for array in arrays):
            return any(map(_is_ids, arrays))
    return True


def _is_ids(value: Any) -> bool:
    """Whether an array is a one-dimensional one of integers."""
    if isinstance(value, list | tuple):
        return isinstance(value[0], int) and not isinstance(value[0], bool)
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    if isinstance(dtype, torch.dtype):
        return len(shape) == 1 and dtype != torch.bool and not dtype.is_floating_point
    return len(shape) == 1 and getattr(dtype, "kind", None) in ("i", "u")


def _length(key: str, value: Any) -> int:
    """Return the length of a sample's sequences, which is one in a nest."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.shape[0]
    found = [(place, _size(array)) for place, array in arrays_of((key,), value)]
    lengths = {size for _, size in found if size is not None}
    if len(lengths) == 1:
        return lengths.pop()
    if is_array(value):
        raise ValueError(f"{key} must have shape [T, ...] to be padded, got {describe(value)}")
    sizes = [f"{size} of {name_of(place)}" for place, size in found if size is not None]
    got = ", ".join(sizes) or describe(value)
    raise ValueError(f"{key} must hold sequences of one length in a sample to be padded, got {got}")


def _size(array: Any) -> int | None:
    """Return the first dimension of an array; None of a number and of what is no array."""
    if isinstance(array, list | tuple):
        return len(array)
    shape: Any = getattr(array, "shape", ())
    return shape[0] if len(shape) else None


def _pad_arrays(
    place: tuple[Any, ...],
    values: list[Any],  # n arrays [t, ...], or n numbers
    *,
    lengths: Sequence[int],
    size: int,  # T
    value: Any,
) -> Tensor:  # [n, T, ...], or [n]
    arrays = [as_array(name_of(place), each) for each in values]
    if any(array.dim() == 0 for array in arrays):
        return stacked(place, arrays)
    for i, length in enumerate(lengths):
        if len(arrays[i]) > length:
            arrays[i] = arrays[i][:length]
    if len({(array.dtype, array.shape[1:]) for array in arrays}) > 1 or isinstance(values[0], list | tuple):
        arrays = _alike(place, arrays, values)
    filler = False if place[1:] == (_MASK,) else _value_at(value, place)
    padded = pad_sequence(arrays, batch_first=True, padding_value=filler)
    return F.pad(padded, (0, 0) * (padded.dim() - 2) + (0, size - padded.shape[1]), value=filler)


def _alike(
    place: tuple[Any, ...],
    arrays: list[Tensor],  # [t, ...] each
    values: list[Any],  # that they were made of
) -> list[Tensor]:  # [t, ...] each
    """Return sequences in one dtype, with the same dimensions after the first; an empty one may lack them."""
    first = next((array for array in arrays if len(array)), arrays[0])
    if len(first) == 0 and isinstance(values[0], list | tuple):
        # Nothing tells what lists are of where all are empty: more often ids than numbers.
        first = first.long()
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in arrays if len(each)), first.dtype)
    found = []
    for array in arrays:
        if len(array) == 0:
            array = first.new_empty((0, *first.shape[1:]))
        if array.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{name_of(place)} must have the same dimensions after the first in all samples of a batch, "
                f"got {list(first.shape)} and {list(array.shape)}"
            )
        found.append(array.to(dtype))
    return found


def _value_at(value: Any, place: tuple[Any, ...]) -> float:
    """Return what the arrays at a place are padded with."""
    for key in place:
        if not isinstance(value, Mapping):
            break
        value = value.get(key, 0)
    # A dict that goes deeper than the samples says nothing of this place.
    if isinstance(value, Mapping):
        return 0
    if not isinstance(value, int | float):
        raise TypeError(f"value must be a number, or a dict of numbers by key, got {describe(value)}")
    return value

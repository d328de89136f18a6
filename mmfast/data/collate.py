"""From samples to a batch: values stacked, nests leaf by leaf, samples that lack a modality told by rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from mmfast.coalitions import PRESENT_SUFFIX, present_key, rows_key
from mmfast.data.arrays import LABEL, as_label
from mmfast.errors import describe

# Kinds of numpy's dtypes that torch has, too: bool, integers, floats.
_KINDS = "biuf"
_ARRAYS = {Tensor, np.ndarray}
# What becomes of n arrays at a place of a nest, such as ("text", "ids"): a tensor [n, ...].
Join = Callable[[tuple[Any, ...], list[Any]], Any]


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the batch of some samples: what the loader makes unless it is given a `collate_fn`.

    Equivalent to, where all samples have the same keys and hold tensors:

        batch = torch.utils.data.default_collate(samples)
        batch["label"] = batch["label"].long()  # real numbers: .float()

    Args:
        samples: N dicts; some may lack modalities that others have.

    Returns:
        By key: tensors, arrays, numbers and lists of numbers stacked to [N, ...]; dicts, tuples and lists of
        such as the same nest with stacked leaves, None where a leaf is None in all samples; strings and
        other values as a list of N. `label` is int64 [N], float32
        or of more dimensions as the samples' labels are, `<modality>__present` bool [N].
        A key that some samples lack holds the values of n others, and `<key>.rows` says of which, int64 [n].
        So does a modality that `<modality>__present` marks as absent where a sample holds no array in its
        place, but None or a nest: the encoder sees no zeros there, of which a mean over a mask would make
        NaN. Where no sample has it `<modality>.rows` of n = 0 stands alone.

    Raises:
        TypeError, ValueError: values that differ in shape, nests that differ in keys or length, a sample
            without label.
    """
    return assemble(without_absent(samples, arrays=False), lambda key, values: joined((key,), values))


# The loader hands samples that lack modalities to such a function alone.
collate.takes_parts = True  # type: ignore[attr-defined]


def takes_parts(collate_fn: Any) -> bool:
    """Whether a function, or `functools.partial` of one, takes samples that lack modalities of others."""
    while isinstance(collate_fn, functools.partial):
        collate_fn = collate_fn.func
    return bool(getattr(collate_fn, "takes_parts", False))


def without_absent(samples: Sequence[Mapping[str, Any]], *, arrays: bool) -> Sequence[Mapping[str, Any]]:
    """Return samples without what stands for modalities that they lack; arrays stay unless `arrays`."""
    # Samples of as many keys have the same ones, but for parts of samples that others read whole.
    told_by = samples[:1] if len(set(map(len, samples))) == 1 else samples
    names = {key.removesuffix(PRESENT_SUFFIX) for sample in told_by for key in sample if _is_flag(key)}
    if not arrays:
        names = {name for name in names if not {type(sample.get(name)) for sample in samples} <= _ARRAYS}
    if not names:
        return samples

    def kept(sample: Mapping[str, Any]) -> Mapping[str, Any]:
        absent = {name for name in names if not sample.get(present_key(name), True)}
        gone = {name for name in absent if name in sample and (arrays or not is_array(sample[name]))}
        return {key: value for key, value in sample.items() if key not in gone} if gone else sample

    return [kept(sample) for sample in samples]


def assemble(
    samples: Sequence[Mapping[str, Any]],
    join: Callable[[str, list[Any]], Any],
) -> dict[str, Any]:
    """Return the batch of some samples as `collate` does, with `join(key, values)` for values of a key."""
    try:
        alike = len(set(map(len, samples))) == 1
        columns = {key: [sample[key] for sample in samples] for key in samples[0]} if alike else None
    except KeyError:
        columns = None
    if columns is None:
        batch = _assemble_parts(samples, join)
    else:
        batch = {key: _joined_key(key, values, join) for key, values in columns.items()}
    for key in list(batch):
        if _is_flag(key) and (name := key.removesuffix(PRESENT_SUFFIX)) not in batch:
            batch[rows_key(name)] = _rows([])
    return batch


def joined(place: tuple[Any, ...], values: list[Any], join: Join | None = None) -> Any:
    """Return the values that n >= 1 samples have of one key as one: [n, ...], a nest of such, or a list.

    Args:
        place: of the values: the key, and what leads into the nest.
        values: of the samples.
        join: of arrays; None stacks them.
    """
    first, join = values[0], join or stacked
    if is_array(first):
        return join(place, values)
    if len(place) > 1 and first is None and all(value is None for value in values):
        return None
    if not isinstance(first, Mapping | list | tuple):
        return values
    _check_alike(place, values)
    if isinstance(first, Mapping):
        return {key: joined((*place, key), [value[key] for value in values], join) for key in first}
    items = [joined((*place, i), list(each), join) for i, each in enumerate(zip(*values, strict=True))]
    return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)


def stacked(
    place: tuple[Any, ...],
    values: list[Any],  # n arrays of one shape
    *,
    hint: str = "cut them, or give collate_fn=mmfast.data.pad",
) -> Tensor:  # [n, ...]
    """Return arrays as one tensor.

    Raises:
        TypeError, ValueError: what is no array; arrays of several shapes, with what may be done about it.
    """
    if all(isinstance(value, int | float) for value in values):
        # On the CPU, whatever torch's default device is.
        dtype = torch.float64 if any(isinstance(value, float) for value in values) else None
        return torch.tensor(values, dtype=dtype, device="cpu")
    if not isinstance(values[0], Tensor):
        # Of lists torch would make a list of tensors, one for each position.
        values = [as_array(name_of(place), value) for value in values]
    try:
        # In a worker it stacks into memory that processes share.
        return default_collate(values)
    except (TypeError, ValueError, RuntimeError):
        # Numbers beside arrays, or other shapes: which, torch's own words name by no key.
        arrays = [as_array(name_of(place), value) for value in values]
        shape = list(arrays[0].shape)
        other = next((list(array.shape) for array in arrays if list(array.shape) != shape), None)
        if other is None:
            return torch.stack(arrays)
        raise ValueError(
            f"{name_of(place)} must have one shape in all samples of a batch, got {shape} and {other}: {hint}"
        ) from None


def is_array(value: Any) -> bool:
    """Whether a sample's value is one array: a tensor, an array of numbers, a number, a list of numbers."""
    if isinstance(value, Tensor | int | float):
        return True
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in _KINDS
    # A named tuple is a nest, whatever it holds.
    while isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        if len(value) == 0:
            return True
        value = value[0]
    return isinstance(value, int | float) or (isinstance(value, np.generic) and value.dtype.kind in _KINDS)


def as_array(
    name: str,
    value: Any,
) -> Tensor:  # any shape
    """Return an array of a sample as a tensor on the CPU.

    Raises:
        TypeError: `value` is no array of numbers.
    """
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return value
    try:
        return torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an array of numbers, got {describe(value)}") from None


def arrays_of(place: tuple[Any, ...], value: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield place and value of a sample's arrays and of what is none; lists of numbers stay whole."""
    if is_array(value) or not isinstance(value, Mapping | list | tuple):
        yield place, value
        return
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, inner in items:
        yield from arrays_of((*place, key), inner)


def name_of(place: tuple[Any, ...]) -> str:
    """Return a place as errors print it: `text`, `text['ids']`, `text[0]`."""
    return str(place[0]) + "".join(f"[{key!r}]" for key in place[1:])


def _assemble_parts(
    samples: Sequence[Mapping[str, Any]],
    join: Callable[[str, list[Any]], Any],
) -> dict[str, Any]:
    """Return the batch of samples that differ in their keys."""
    batch = {}
    for key in dict.fromkeys(key for sample in samples for key in sample):
        if _is_flag(key):
            # Without the flag a sample has the modality if it holds its values.
            name = key.removesuffix(PRESENT_SUFFIX)
            batch[key] = _joined_key(key, [sample.get(key, name in sample) for sample in samples], join)
            continue
        rows = [row for row, sample in enumerate(samples) if key in sample]
        if key == LABEL and len(rows) < len(samples):
            raise ValueError(f"all samples must have {LABEL!r}, got {len(samples) - len(rows)} without")
        batch[key] = _joined_key(key, [samples[row][key] for row in rows], join)
        if len(rows) < len(samples):
            batch[rows_key(key)] = _rows(rows)
    return batch


def _is_flag(key: str) -> bool:
    return key.endswith(PRESENT_SUFFIX)


def _rows(rows: list[int]) -> Tensor:  # [n] int64
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _joined_key(key: str, values: list[Any], join: Callable[[str, list[Any]], Any]) -> Any:
    if key == LABEL:
        return as_label(stacked((key,), values))
    if _is_flag(key):
        return stacked((key,), values).bool()
    return join(key, values)


def _check_alike(place: tuple[Any, ...], values: Sequence[Any]) -> None:
    """Raise ValueError unless all nests have the keys of the first, or as many items."""
    first, name = values[0], name_of(place)
    kind, form = (Mapping, set) if isinstance(first, Mapping) else (list | tuple, len)
    for value in values:
        if not isinstance(value, kind) or is_array(value):
            got = f"{describe(first)} and {describe(value)}"
            raise ValueError(f"{name} must be the same nest in all samples of a batch, got {got}")
        if form(value) != form(first):
            what = "the same keys" if kind is Mapping else "as many items"
            got = " and ".join(str(list(each) if kind is Mapping else len(each)) for each in (first, value))
            raise ValueError(f"{name} must have {what} in all samples of a batch, got {got}")

"""Scaling of features by statistics of the training part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmfast.data.arrays import ArrayDataset
from mmfast.data.features import CHUNK
from mmfast.errors import describe

# The axis with statistics of its own, by rank: D of [N, D], F of [N, T, F], C of [N, (T,) C, H, W].
_CHANNEL_AXIS = {2: 1, 3: 2, 4: 1, 5: 2}
# A standard deviation below this share of the mean is float32 rounding of a constant.
_CONSTANT = 1e-6


# Per modality the mean and the inverse standard deviation of every channel, as plain lists.
Scaling = dict[str, tuple[list[float], list[float]]]


def scaling_of(train: ArrayDataset) -> Scaling:
    """Return the statistics of the samples of `train` that have the modality."""
    return {name: _moments(array, train.present.get(name)) for name, array in train.arrays.items()}


def scale(part: ArrayDataset, scaling: Scaling, *, in_place: bool = False) -> ArrayDataset:
    """Return the data set with every channel shifted by its mean and divided by its standard deviation.

    `in_place` writes over the features of `part`.
    """
    arrays = {}
    for name, array in part.arrays.items():
        out = array if in_place else torch.empty_like(array)
        _scale(array, *scaling[name], part.present.get(name), out)
        arrays[name] = out
    return part._with(arrays=arrays, scaling=scaling)


def factors(
    rank: int,  # of [N, ...]
    mean: list[float],
    inverse: list[float],
) -> tuple[Tensor, Tensor]:  # [1, ..., channels, ..., 1] each
    """Return what is taken from features of so many axes, and what the rest is multiplied by, in float32."""
    shape = [1] * rank
    shape[_CHANNEL_AXIS[rank]] = -1
    shift, factor = (torch.tensor(x, dtype=torch.float32, device="cpu").view(shape) for x in (mean, inverse))
    return shift, factor


def scaled(
    name: str,
    array: Tensor,  # [N, ...]
    mean: list[float],
    inverse: list[float],
) -> Tensor:  # [N, ...]
    """Return the features of a batch as `scale` makes them, in float32.

    Raises:
        TypeError: no tensor.
        ValueError: features of another rank, or of another number of channels.
    """
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a tensor to be standardised, got {describe(array)}")
    axis = _CHANNEL_AXIS.get(array.ndim)
    if axis is None or array.shape[axis] != len(mean):
        raise ValueError(
            f"{name} must have {len(mean)} features or channels, as the statistics have by which it is "
            f"standardised, got shape {list(array.shape)}"
        )
    shift, factor = (x.to(array.device) for x in factors(array.ndim, mean, inverse))
    return (array.float() - shift) * factor


def _moments(
    array: Tensor,  # [N, ...]
    mask: Tensor | None,  # bool [N]
) -> tuple[list[float], list[float]]:  # twice [channels]
    """Return the mean and the inverse standard deviation per channel, 0 for a constant one."""
    size = len(array) if mask is None else int(mask.sum())
    axis = _CHANNEL_AXIS[array.ndim]
    dims = [dim for dim in range(array.ndim) if dim != axis]
    count = size * (array[0].numel() // array.shape[axis])
    total, square = torch.zeros(2, 1, dtype=torch.float64, device="cpu")
    for chunk in _chunks(array, mask):
        total = total + chunk.double().sum(dims, keepdim=True)
    mean = total / count
    for chunk in _chunks(array, mask):
        square = square + (chunk.double() - mean).square().sum(dims, keepdim=True)
    std = (square / count).sqrt()
    inverse = torch.where(std > _CONSTANT * mean.abs(), 1 / std, 0.0)
    return mean.view(-1).tolist(), inverse.view(-1).tolist()


def _chunks(
    array: Tensor,  # [N, ...]
    mask: Tensor | None,  # bool [N]
) -> Iterator[Tensor]:  # [n, ...] each
    """Yield the samples that have the modality; the size of a chunk decides how sums are rounded."""
    if mask is None:
        yield from array.split(CHUNK)
        return
    for rows in mask.nonzero().view(-1).split(CHUNK):
        yield array[rows]


def _scale(
    array: Tensor,  # [N, ...]
    mean: list[float],
    inverse: list[float],
    mask: Tensor | None,  # bool [N]
    out: Tensor,  # [N, ...]
) -> None:
    """Write the scaled features into `out`, which may be `array`."""
    shift, factor = factors(array.ndim, mean, inverse)
    for chunk, scaled in zip(array.split(CHUNK), out.split(CHUNK), strict=True):
        torch.sub(chunk, shift, out=scaled).mul_(factor)
    if mask is not None:
        out.masked_fill_(~mask.view(-1, *[1] * (out.ndim - 1)), 0)

"""Scaling of features by statistics of the training part."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.data.arrays import CHUNK, ArrayDataset

# The axis with statistics of its own, by rank: D of [N, D], F of [N, T, F], C of [N, (T,) C, H, W].
_CHANNEL_AXIS = {2: 1, 3: 2, 4: 1, 5: 2}
# A standard deviation below this share of the mean is float32 rounding of a constant.
_CONSTANT = 1e-6


# Per modality the mean and the inverse standard deviation of every channel, as plain lists.
Scaling = dict[str, tuple[list[float], list[float]]]


def scaling_of(train: ArrayDataset) -> Scaling:
    """Return the statistics of the samples of `train` that have the modality."""
    return {name: _moments(array, train.present.get(name)) for name, array in train.arrays.items()}


def scale(part: ArrayDataset, scaling: Scaling) -> ArrayDataset:
    """Return the data set with every channel shifted by its mean and divided by its standard deviation."""
    return part._with(
        arrays={
            name: _scale(array, *scaling[name], part.present.get(name)) for name, array in part.arrays.items()
        }
    )


def _moments(
    array: Tensor,  # [N, ...]
    mask: Tensor | None,  # [N]
) -> tuple[list[float], list[float]]:  # twice [channels]
    """Return the mean and the inverse standard deviation per channel, 0 for a constant one."""
    rows = torch.arange(len(array), device="cpu") if mask is None else mask.nonzero().view(-1)
    axis = _CHANNEL_AXIS[array.ndim]
    dims = [dim for dim in range(array.ndim) if dim != axis]
    count = len(rows) * (array[0].numel() // array.shape[axis])
    total, square = torch.zeros(2, 1, dtype=torch.float64, device="cpu")
    for chunk in rows.split(CHUNK):
        total = total + array[chunk].double().sum(dims, keepdim=True)
    mean = total / count
    for chunk in rows.split(CHUNK):
        square = square + (array[chunk].double() - mean).square().sum(dims, keepdim=True)
    std = (square / count).sqrt()
    inverse = torch.where(std > _CONSTANT * mean.abs(), 1 / std, 0.0)
    return mean.view(-1).tolist(), inverse.view(-1).tolist()


def _scale(
    array: Tensor,  # [N, ...]
    mean: list[float],
    inverse: list[float],
    mask: Tensor | None,  # bool [N]
) -> Tensor:  # [N, ...]
    shape = [1] * array.ndim
    shape[_CHANNEL_AXIS[array.ndim]] = -1
    shift, factor = (torch.tensor(x, dtype=array.dtype, device="cpu").view(shape) for x in (mean, inverse))
    scaled = (array - shift) * factor
    if mask is not None:
        scaled[~mask] = 0
    return scaled

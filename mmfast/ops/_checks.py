"""Checks of the ops' arguments: errors name the argument, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from mmfast.errors import check_one_of, describe, dtype_name
from mmfast.ops import _autograd

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# float first, which most numbers are. A tensor is compared as one.
_REAL = (float, int, Real, Tensor, torch.SymFloat, torch.SymInt)
_NUMPY = (np.generic, np.ndarray)
# What rounds to a float32 between these has a reciprocal that is neither infinite nor 0.
_LEAST_SCALE, _GREATEST_SCALE = 2.0**-128 + 2.0**-150, 2.0**128 - 2.0**103


def shape_text(shape) -> str:
    """Return a shape as errors print it: [2, 3]."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_float(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a tensor of a floating dtype the ops compute in."""
    check_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must have dtype float32, float64, bfloat16 or float16, got {dtype_name(value.dtype)}"
        )


def check_bool(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a tensor of bool."""
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype bool, got {dtype_name(value.dtype)}")


def check_shape(name: str, value: Tensor, letters: str, sizes: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `value` has shape `sizes`, named by `letters` ("N, C"); None fits any."""
    shape = value.shape
    if len(shape) == len(sizes):
        for want, got in zip(sizes, shape):
            if want is not None and want != got:
                break
        else:
            return
    expected = f"[{letters}]"
    if any(size is not None for size in sizes):
        names = [letter.strip() for letter in letters.split(",")]
        known = [name if size is None else str(size) for name, size in zip(names, sizes, strict=True)]
        expected += f" = [{', '.join(known)}]"
    raise ValueError(f"{name} must have shape {expected}, got {shape_text(shape)}")


def check_labels(name: str, value: Tensor, num_samples: int) -> None:
    """Raise unless `value` holds one integer label per sample, [N]."""
    check_tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} must have an integer dtype, got {dtype_name(value.dtype)}")
    check_shape(name, value, "N", (num_samples,))


def check_label_range(name: str, value: Tensor, num_classes: int) -> None:
    """Raise ValueError for a label outside [0, C); labels on a GPU are not read, that would wait for it.

    The C++ kernels do the same by themselves (csrc/cpu/labels.h).
    """
    if value.device.type != "cpu" or value.numel() == 0:
        return
    low, high = torch.aminmax(value)
    if int(low) < 0 or int(high) >= num_classes:
        raise ValueError(
            f"{name} must lie in [0, C) = [0, {num_classes}), got values from {int(low)} to {int(high)}"
        )


def check_apart(name: str, value: Tensor) -> None:
    """Raise ValueError if elements of a tensor that is written share memory, as an expanded one's do."""
    if not value.is_contiguous() and overlaps_itself(value.shape, value.stride()):
        shape, strides = shape_text(value.shape), shape_text(value.stride())
        raise ValueError(
            f"{name} must hold its elements apart in memory, got shape {shape} with strides {strides}"
        )


def overlaps_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether two elements of a tensor share memory."""
    if 0 in shape:
        return False
    reach, places = 0, [(stride, size) for size, stride in zip(shape, strides) if size > 1]
    for stride, size in sorted(places):
        if stride == 0:
            return True
        if stride <= reach:
            # Neither dimension lies within the other's steps: only all places together tell.
            offsets = np.zeros(1, dtype=np.int64)
            for step, count in places:
                offsets = (offsets[:, None] + step * np.arange(count)).ravel()
            return len(np.unique(offsets)) < len(offsets)
        reach += (size - 1) * stride
    return False


def check_same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors lie on one device."""
    first = None
    for tensor in tensors.values():
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
            raise ValueError(f"tensors must lie on one device, got {found}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        check_one_of(name, value, choices, quoted=True)


def check_integer(name: str, value: object) -> None:
    """Raise TypeError unless `value` is an integer, Python's or NumPy's; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")


def check_positive(name: str, value: float) -> None:
    """Raise unless `value` is a positive number that float32 can hold and divide by.

    Kernels take it in the dtype they compute in, often float32, where a smaller number's reciprocal is
    infinite and a greater number is.
    """
    if isinstance(value, _NUMPY) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if _LEAST_SCALE < value < _GREATEST_SCALE:
        return
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    raise ValueError(
        f"{name} must lie between 2.938737e-39 and 3.4028235e+38, within which float32 holds it and its "
        f"reciprocal, got {value}"
    )


def check_shift(name: str, value: float) -> None:
    """Raise unless `value` is a number that float32 can hold and add to what is not out of its range."""
    if isinstance(value, _NUMPY) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not -1e30 <= value <= 1e30:
        raise ValueError(f"{name} must lie between -1e+30 and 1e+30, got {value}")


def check_scale_tensor(name: str, value: Tensor) -> None:
    """Raise unless `value` is one real number, positive and finite; one on a GPU is not read."""
    if _is_known_number(name, value):
        check_positive(name, float(value.detach()))


def check_shift_tensor(name: str, value: Tensor) -> None:
    """Raise unless `value` is one real number within reach of scores; one on a GPU is not read."""
    if _is_known_number(name, value):
        check_shift(name, float(value.detach()))


def _is_known_number(name: str, value: Tensor) -> bool:
    """Raise unless `value` is one floating number; return whether it can be read without a wait."""
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {shape_text(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {dtype_name(value.dtype)}")
    return value.is_cpu and not torch.compiler.is_compiling() and not _autograd.is_transformed()

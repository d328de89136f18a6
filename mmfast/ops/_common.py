"""What several ops share: registration with torch.library and the checks of their arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmfast.errors import describe
from mmfast.ops import _autograd

_LIBRARY = torch.library.Library("mmfast", "FRAGMENT")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The compiled modules know dtypes by these codes.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(FLOATS)}

# float first, which most numbers are. A tensor is compared as one.
_REAL = (float, int, Real, Tensor, torch.SymFloat, torch.SymInt)
_NUMPY = (np.generic, np.ndarray)
# What rounds to a float32 between these has a reciprocal that is neither infinite nor 0.
_LEAST_SCALE, _GREATEST_SCALE = 2.0**-128 + 2.0**-150, 2.0**128 - 2.0**103


def register(
    schema: str,  # "name(Tensor x, str backend) -> Tensor"
    impl: Callable,
    fake: Callable,
) -> torch._ops.OpOverload:
    """Define the raw op `torch.ops.mmfast.<name>`: `impl` runs it on every device, `fake` gives its shapes.

    Raw ops carry no autograd formula: the public function wraps them in an autograd.Function, which costs
    about half of what `torch.library.register_autograd` does per call. What is returned is called in less
    time than what torch.ops looks up.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.mmfast, name).default

    written = [argument.alias_info is not None for argument in op._schema.arguments]

    def of_batch(info, in_dims, *args):
        for is_written, dims in zip(written, in_dims):
            # One tensor for all members would be changed by one after the other.
            if is_written and any(dim is None for dim in pytree.tree_flatten(dims)[0]):
                raise RuntimeError(f"vmap: what {name} changes in place must have a batch dimension, too")
        return _autograd.looped(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(f"mmfast::{name}", of_batch, lib=_LIBRARY)
    return op


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
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have dtype float32, float64, bfloat16 or float16, got {got}")


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
        raise TypeError(f"{name} must have an integer dtype, got {str(value.dtype).removeprefix('torch.')}")
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
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}")


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


def check_scale_tensor(name: str, value: Tensor) -> None:
    """Raise unless `value` is one real number, positive and finite; one on a GPU is not read."""
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {shape_text(value.shape)}")
    if not value.is_floating_point():
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have a floating dtype, got {got}")
    is_known = value.is_cpu and not torch.compiler.is_compiling() and not _autograd.is_transformed()
    if is_known:
        check_positive(name, float(value.detach()))


def outside_autocast(impl: Callable) -> Callable:
    """Return `impl` with autocast off inside: a raw op chose its dtypes, its matrix products keep them."""

    @functools.wraps(impl)
    def run(*args, **options):
        tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        device_type = tensor.device.type
        if not torch.is_autocast_enabled(device_type):
            return impl(*args, **options)
        with torch.autocast(device_type, enabled=False):
            return impl(*args, **options)

    return run


def cast(
    x: Tensor,  # any shape
    dtype: torch.dtype,
) -> Tensor:  # like `x`
    """Return `x.to(dtype)`, without the 0.7 microseconds that this takes to find that nothing is to do."""
    return x if x.dtype == dtype else x.to(dtype)


def whole_labels(
    labels: Tensor,  # [N] of any integer dtype and stride
) -> Tensor:  # int64 [N], contiguous
    """Return labels as compiled kernels take them; most often as they are, in less time than two calls."""
    if labels.dtype == torch.int64 and labels.is_contiguous():
        return labels
    return labels.long().contiguous()


def unbroken_rows(
    matrix: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return the matrix, or a copy, with every row in one piece; rows may lie any distance apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# Numbers copied at a time, at most, of an input that a kernel cannot read as it lies. Expanded by a stride
# of 0, a few numbers may stand for more than the memory holds.
_MOST_PACKED = 2**26


def columns_at_a_time(
    matrix: Tensor,  # [N, D]
) -> int:
    """Return how many columns of a matrix may be copied at a time."""
    num_rows, num_columns = matrix.shape
    return min(num_columns, max(1, _MOST_PACKED // max(1, num_rows)))


def large_parts(
    x: Tensor,  # [..., D], at least one number
) -> list[Tensor]:
    """Return `x`, or parts of it one after the other where a matrix of all its rows would be a large copy."""
    if x.dim() <= 2 or x.numel() <= _MOST_PACKED:
        return [x]
    with contextlib.suppress(RuntimeError):
        x.view(-1, x.shape[-1])
        return [x]
    length = x.numel() // len(x)
    if length > _MOST_PACKED:
        return [matrix for part in x for matrix in large_parts(part)]
    return list(x.split(_MOST_PACKED // length))


def promoted(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors in their common dtype, as autocast can hand over a mixture."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        return list(tensors)
    wide = functools.reduce(torch.promote_types, dtypes)
    return [tensor.to(wide) for tensor in tensors]

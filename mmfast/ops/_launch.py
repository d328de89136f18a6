"""From tensors to a kernel's arguments: addresses, strides, codes, copies of what it cannot read in place."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.ops._checks import FLOATS

# Kernels know dtypes by these codes; csrc/codes.h has the same.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(FLOATS)}


def strided(
    x: Tensor,  # any shape
) -> tuple[int, ...]:
    """Return a tensor as `Strided<rank>` of csrc/registry.h takes it: address, sizes, strides in elements."""
    return (x.data_ptr(), *x.shape, *x.stride())


def address(
    x: Tensor | None,  # any shape
) -> int:
    """Return where a tensor begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


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


def as_int64(
    labels: Tensor,  # [N] of any integer dtype and stride
) -> Tensor:  # int64 [N], contiguous
    """Return labels as compiled kernels take them; most often as they are, in less time than two calls."""
    if labels.dtype == torch.int64 and labels.is_contiguous():
        return labels
    return labels.long().contiguous()


def with_contiguous_rows(
    matrix: Tensor,  # [N, D]
) -> Tensor:  # [N, D]
    """Return the matrix, or a copy, with every row in one piece; rows may lie any distance apart."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# Elements copied at a time, at most, of an input that a kernel cannot read as it lies. Expanded by a stride
# of 0, a few elements may stand for more than the memory holds.
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

"""What several references share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one temporary: on a CPU few enough to stay in the cache, on a GPU enough to fill the device.
_CHUNK_NUMEL_CPU = 2**20
_CHUNK_NUMEL_GPU = 2**26


# Asked at every call: looked up in a tenth of the time that torch takes to say it.
_WIDE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: the widest of `dtypes`, at least float32."""
    if len(dtypes) == 1 and dtypes[0] in _WIDE:
        return _WIDE[dtypes[0]]
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def row_chunks(like: Tensor, num_rows: int, row_numel: int) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows, each of so few that `row_numel` elements a row stay small."""
    budget = _CHUNK_NUMEL_CPU if like.device.type == "cpu" else _CHUNK_NUMEL_GPU
    step = max(1, budget // max(1, row_numel))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))

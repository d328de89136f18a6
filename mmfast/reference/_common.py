"""What several references share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
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


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of gradients before their factors, which float16 alone has not the range for."""
    return torch.float32 if dtype == torch.float16 else dtype


def gather_keys(
    features: Tensor,  # [M, N, D]
    group: dist.ProcessGroup,
) -> tuple[Tensor, int]:  # [M, K, D], the position of this process's first sample among the K
    """Return the features of all processes of `group`, in order of rank; nothing flows back through them."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    num_modalities, num_samples, num_dims = features.shape
    sizes = features.new_empty(world_size, dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.full_like(sizes[:1], num_samples), group=group)
    counts = sizes.tolist()
    # Collectives want equal shapes: shorter batches are padded, and the padding cut off again.
    mine = features.new_zeros(num_modalities, max(counts), num_dims)
    mine[:, :num_samples] = features.detach()
    gathered = mine.new_empty(world_size, *mine.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), mine, group=group)
    keys = torch.cat([part[:, :count] for part, count in zip(gathered, counts, strict=True)], dim=1)
    return keys, sum(counts[:rank])


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """Return the mean or the sum of the samples' losses, or the losses themselves."""
    return losses.mean() if reduction == "mean" else losses.sum() if reduction == "sum" else losses

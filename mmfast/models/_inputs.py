"""What a batch holds of each modality: nests of tensors, of all samples or of some, a part of them absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.coalitions import SHOWN, present_key, rows_key
from mmfast.errors import describe, dtype_name, nearest_names
from mmfast.nests import mapped, named_leaves

_LABEL = "label"


def check_batch(
    batch: Mapping[str, Any],
    modalities: Sequence[str],
    needed: Sequence[str],  # modalities that are to be encoded
) -> int:
    """Return N; raise unless a batch holds tensors of N samples, or of its rows, for what is encoded.

    N is that of the first of these which the batch has: a modality without rows, those that are encoded
    before the others; `label`; a modality's `<modality>__present`; `coalition`.

    Raises:
        TypeError, ValueError: a modality is missing or holds no tensor, tensors or rows of other samples or
            dtypes, nothing that tells N.
    """
    for name in needed:
        if name not in batch and not _is_empty(batch.get(rows_key(name))):
            raise ValueError(
                f"batch must hold {', '.join(map(repr, modalities))}, but {name!r} is missing; "
                f"its keys are {nearest_names(name, batch) or 'none'}"
            )
    size, by = _num_samples(batch, modalities, needed)
    for name in needed:
        count, told = size, f"N = {size} samples as {by} does"
        if (key := rows_key(name)) in batch:
            count = _check_rows(key, batch[key], size)
            told = f"n = {count} samples as {key} does"
        # With no rows there may be no values.
        for leaf, value in _tensors(name, batch[name]) if name in batch else ():
            if value.shape[0] != count:
                raise ValueError(f"{leaf} must hold {told}, got {value.shape[0]}")
    return size


def without_absent(
    nest: Any,  # tensors [N, ...]
    present: Tensor,  # bool [N]
) -> Any:
    """Return a modality with zeros, in bool tensors False, for the samples that lack it."""

    def zeroed(
        x: Tensor,  # [N, ...]
    ) -> Tensor:  # [N, ...]
        return x.masked_fill(~present.view(-1, *[1] * (x.dim() - 1)), 0)

    return mapped(zeroed, nest)


def encoded(
    encoder: nn.Module,
    nest: Any,  # tensors [n, ...]
    is_part: bool,  # of a batch: one sample may be all that this process holds of it
) -> Any:
    """Return what an encoder makes of a modality; a lone row is encoded twice where batch norm refuses it."""
    if is_part and all(len(x) == 1 for _, x in _tensors("", nest)) and _has_batch_norm(encoder):
        h = encoder(mapped(lambda x: torch.cat([x, x]), nest))
        return h[:1] if isinstance(h, Tensor) else h
    return encoder(nest)


def _has_batch_norm(encoder: nn.Module) -> bool:
    """Whether an encoder takes statistics of its batch, for which one sample may be too few."""
    norm = nn.modules.batchnorm._BatchNorm
    return any(isinstance(module, norm) and module.training for module in encoder.modules())


def _num_samples(
    batch: Mapping[str, Any], modalities: Sequence[str], needed: Sequence[str]
) -> tuple[int, str]:
    """Return N and what errors say has told it."""
    for name in (*needed, *modalities):
        if name in batch and rows_key(name) not in batch:
            leaf, value = _tensors(name, batch[name])[0]
            return value.shape[0], leaf
    for key in (_LABEL, *map(present_key, modalities), SHOWN):
        if isinstance(batch.get(key), Tensor) and batch[key].dim() > 0:
            return batch[key].shape[0], key
    raise ValueError(
        f"batch must tell N by {_LABEL!r}, or by the values of all samples of {', '.join(modalities)}, "
        f"got {', '.join(map(repr, batch)) or 'no key'}"
    )


def _tensors(name: str, nest: Any) -> list[tuple[str, Tensor]]:  # [..., ...] each, at least one
    """Return the tensors of a modality with their names; raise for what no encoder's input may hold."""
    if isinstance(nest, Tensor):
        found = [(name, nest)]
    else:
        found = []
        for leaf, value in named_leaves(nest, name):
            if isinstance(value, Tensor):
                found.append((leaf, value))
            elif leaf != name and not (value is None or isinstance(value, int | float)):
                raise TypeError(f"{leaf} must be a torch.Tensor, a number or None, got {describe(value)}")
        if not found:
            raise TypeError(f"{name} must be a torch.Tensor, got {type(nest).__name__}")
    for leaf, value in found:
        if value.dim() == 0:
            raise ValueError(f"{leaf} must have shape [N, ...], got a scalar")
    return found


def _is_empty(rows: Any) -> bool:
    return isinstance(rows, Tensor) and rows.dim() == 1 and rows.shape[0] == 0


def _check_rows(
    key: str,
    rows: Any,  # [n]
    size: int,
) -> int:
    """Return n; raise unless these can be samples of a batch."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{key} must be a torch.Tensor, got {type(rows).__name__}")
    if rows.dtype != torch.int64:
        raise TypeError(f"{key} must have dtype int64, got {dtype_name(rows.dtype)}")
    if rows.dim() != 1:
        raise ValueError(f"{key} must have shape [n], got {list(rows.shape)}")
    count = rows.shape[0]
    if count > size:
        raise ValueError(f"{key} must hold at most N = {size} samples, got {count}")
    # On a GPU a look at them would wait for it.
    if count and rows.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(end) for end in rows.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"{key} must lie in [0, N) = [0, {size}), got {low if low < 0 else high}")
    return count

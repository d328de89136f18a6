"""The dimension-decoupled unidirectional contrastive loss, as its formula is written and in one sweep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.reference._common import accumulation_dtype, gather_keys, reduced, residual_dtype, row_chunks


def unidirectional_info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [N, D]
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] or [N]
    """Return logsumexp_j(q_i . k_j / temperature) - q_i . k_i / temperature, with the keys as constants."""
    keys, offset = (key.detach()[None], 0) if group is None else gather_keys(key[None], group)
    dtype = accumulation_dtype(query.dtype, key.dtype)
    scores = query.to(dtype) @ keys[0].to(dtype).T / temperature
    return reduced(scores.logsumexp(1) - scores.diagonal(offset), reduction)


def duc_loss(
    features: Sequence[Tensor] | Tensor,  # M of [N, D]
    effective: Tensor,  # bool [M, D]
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] or [N]
    """Return the sum over ordered pairs (m, n) of InfoNCE of n against m in the columns D^m - D^n."""
    dtype = accumulation_dtype(*(feature.dtype for feature in features))
    loss = reduced(torch.stack([0 * feature.to(dtype).sum(1) for feature in features]).sum(0), reduction)
    for teacher, key in enumerate(features):
        for student, query in enumerate(features):
            dims = effective[teacher] & ~effective[student]
            if dims.any():
                loss = loss + unidirectional_info_nce(
                    query[:, dims], key[:, dims], temperature=temperature, reduction=reduction, group=group
                )
    return loss


def info_nce_fwd(
    query: Tensor,  # [N, d]
    key: Tensor,  # [K, d]
    *,
    temperature: float,
    offset: int,  # sample i of the queries is sample offset + i of the keys
    with_residual: bool,
) -> tuple[Tensor, Tensor | None]:  # [N], [N, d], both in at least float32
    """Return each sample's loss and temperature times its gradient, sum_j p_ij k_j - k_i, with no [N, K]."""
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    num_samples = query.shape[0]
    losses = query.new_empty(num_samples)
    residual = torch.empty_like(query, memory_format=torch.contiguous_format) if with_residual else None
    for rows in row_chunks(query, num_samples, key.shape[0]):
        # log_softmax subtracts the maximum first and the logarithm last: large scores do not cancel.
        log_p = (query[rows] @ key.T).div_(temperature).log_softmax(1)
        torch.neg(log_p.diagonal(offset + rows.start), out=losses[rows])
        if residual is not None:
            positive = key[offset + rows.start : offset + rows.stop]
            torch.addmm(positive, log_p.exp_(), key, beta=-1, out=residual[rows])
    return losses, residual


def split_dims(
    effective: Tensor,  # bool [M, D]
) -> tuple[Tensor, list[int]]:
    """Return the columns of D^m - D^n, pair (m, n) after pair with n fastest, and their M^2 numbers."""
    exclusive = effective[:, None] & ~effective[None]
    return exclusive.nonzero()[:, 2].contiguous(), exclusive.sum(-1).flatten().tolist()


def duc_loss_fwd(
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    columns: Tensor,  # [sum of sizes], from split_dims
    sizes: Sequence[int],  # M^2
    *,
    temperature: float,
    offset: int,
    reduction: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor]:  # [] or [N] in at least float32; [M, N, D] in `residual_dtype`, or [0]
    """Return the loss and, per feature, temperature times the gradient of the sum of all samples' losses."""
    num_modalities, feature = len(features), features[0]
    losses = feature.new_zeros(feature.shape[0], dtype=accumulation_dtype(feature.dtype))
    residuals = losses.new_zeros((num_modalities, *feature.shape) if with_residual else 0)
    for pair, dims in enumerate(columns.split(list(sizes))):
        if sizes[pair] == 0:
            continue
        teacher, student = divmod(pair, num_modalities)
        query, key = features[student].index_select(1, dims), keys[teacher].index_select(1, dims)
        loss, residual = info_nce_fwd(
            query, key, temperature=temperature, offset=offset, with_residual=with_residual
        )
        losses += loss
        if residual is not None:
            residuals[student].index_add_(1, dims, residual)
    return reduced(losses, reduction), residuals.to(residual_dtype(feature.dtype))


def info_nce_bwd(
    dloss: Tensor,  # [] or [N]
    query: Tensor,  # [N, d]
    key: Tensor,  # [K, d]
    *,
    temperature: float,
    offset: int,
    reduction: str,
) -> Tensor:  # [N, d] in at least float32
    """Return dloss times the gradient for the queries, in one piece: to be differentiated itself."""
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    num_samples = query.shape[0]
    p = (query @ key.T / temperature).softmax(1)
    residual = p @ key - key[offset : offset + num_samples]
    divisor = temperature * num_samples if reduction == "mean" else temperature
    return residual * (dloss.to(dtype) / divisor).reshape(-1, 1)


def duc_loss_bwd(
    dloss: Tensor,  # [] or [N]
    features: Sequence[Tensor],  # M of [N, D]
    keys: Sequence[Tensor],  # M of [K, D]
    effective: Tensor,  # bool [M, D]
    *,
    temperature: float,
    offset: int,
    reduction: str,
) -> list[Tensor]:  # M of [N, D]
    """Return dloss times the gradient for every feature, to be differentiated itself."""
    gradients = [torch.zeros_like(feature, dtype=dloss.dtype) for feature in features]
    for teacher, key in enumerate(keys):
        for student, query in enumerate(features):
            # A mask instead of a list of columns asks the device nothing; other columns add nothing.
            others = ~effective[teacher] | effective[student]
            found = info_nce_bwd(
                dloss,
                query.masked_fill(others, 0),
                key.masked_fill(others, 0),
                temperature=temperature,
                offset=offset,
                reduction=reduction,
            )
            if teacher != student:
                gradients[student] = gradients[student] + found.masked_fill(others, 0)
    return [g.to(x.dtype) for g, x in zip(gradients, features, strict=True)]

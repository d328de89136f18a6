"""SigLIP's pairwise sigmoid loss with constant keys, as its formula is written and in one sweep."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmfast.reference._common import accumulation_dtype, gather_keys, reduced, row_chunks


def _own(
    scores: Tensor,  # [N, K]
    offset: int,
) -> Tensor:  # bool [N, K]
    """Return which pairs belong together: sample i of the queries is sample offset + i of the keys."""
    rows, columns = (torch.arange(size, device=scores.device) for size in scores.shape)
    return (rows + offset)[:, None] == columns


def unidirectional_sigmoid_loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [N, D]
    *,
    temperature: float | Tensor = 0.1,
    bias: float | Tensor = -10.0,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:  # [] or [N]
    """Return -sum_j log sigmoid(+-s_ij), + for i = j alone, s_ij = q_i . k_j / temperature + bias."""
    keys, offset = (key.detach()[None], 0) if group is None else gather_keys(key[None], group)
    dtype = accumulation_dtype(query.dtype, key.dtype)
    scores = query.to(dtype) @ keys[0].to(dtype).T / temperature + bias
    return reduced(-F.logsigmoid(torch.where(_own(scores, offset), scores, -scores)).sum(1), reduction)


def sigmoid_loss_fwd(
    query: Tensor,  # [N, d]
    key: Tensor,  # [K, d]
    *,
    temperature: float | Tensor,  # []
    bias: float | Tensor,  # []
    offset: int,  # sample i of the queries is sample offset + i of the keys
    with_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # [N], [N, d], [2, N], all in at least float32
    """Return each sample's loss, temperature times its gradient for the query, and for the two numbers.

    With g_ij the gradient for s_ij, a row's residual is sum_j g_ij k_j, its sums are sum_j g_ij and
    sum_j g_ij q_i . k_j / temperature: the gradient for the bias, and -temperature times that for the
    temperature. There is no [N, K].
    """
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    num_samples = query.shape[0]
    losses, sums = query.new_empty(num_samples), query.new_empty(2, num_samples)
    residual = torch.empty_like(query, memory_format=torch.contiguous_format) if with_residual else None
    for rows in row_chunks(query, num_samples, key.shape[0]):
        products = (query[rows] @ key.T).div_(temperature)
        # The loss of a pair is log(1 + exp(t)), t the score of a pair that is none, less that of one that is.
        t = products + bias
        t.diagonal(offset + rows.start).neg_()
        torch.sum(-F.logsigmoid(-t), 1, out=losses[rows])
        weights = t.sigmoid_()
        weights.diagonal(offset + rows.start).neg_()
        if residual is not None:
            torch.mm(weights, key, out=residual[rows])
        torch.sum(weights, 1, out=sums[0, rows])
        torch.sum(products.mul_(weights), 1, out=sums[1, rows])
    return losses, residual, sums


def sigmoid_loss_bwd(
    dloss: Tensor,  # [] or [N]
    query: Tensor,  # [N, d]
    key: Tensor,  # [K, d]
    temperature: float | Tensor,  # []
    bias: float | Tensor,  # []
    *,
    offset: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [N, d], [], [], in at least float32
    """Return dloss times the gradients for queries, temperature and bias, to be differentiated itself."""
    dtype = accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    products = query @ key.T / temperature
    scores = products + bias
    weights = torch.where(_own(scores, offset), -(-scores).sigmoid(), scores.sigmoid())
    factor = dloss.to(dtype) / query.shape[0] if reduction == "mean" else dloss.to(dtype)
    weights = weights * factor.reshape(-1, 1)
    return weights @ key / temperature, -(weights * products).sum() / temperature, weights.sum()

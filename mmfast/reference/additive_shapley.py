"""Utilities of coalitions, and Shapley values where logits add up, as the formulas are written."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype
from mmfast.reference.shapley_values import coalition_sizes, shapley_values, shapley_values_bwd


def _runner_up(
    logits: Tensor,  # [N, S, C]
    target: Tensor,  # [N, S, 1] the label of each row
) -> Tensor:  # [N, S, 1]
    """Return the lowest class of the largest logit among the other classes."""
    runner_up = logits.scatter(-1, target, -torch.inf).argmax(-1, keepdim=True)
    # Where all others are -inf, too, class 0 is found; where that is the label, class 1 is meant.
    return torch.where(runner_up == target, 1, runner_up)


def coalition_utilities(
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    *,
    utility: str = "cardinality",
) -> Tensor:  # [N, S]
    """Return the utility of every coalition's logits for the true class."""
    z = logits.to(accumulation_dtype(logits.dtype))
    num_coalitions = z.shape[1]
    labels = labels.long()
    target = labels[:, None, None].expand(-1, num_coalitions, 1)
    if utility == "correct" or utility == "cardinality":
        values = (z.argmax(-1) == labels[:, None]).to(z.dtype)
        if utility == "cardinality":
            values *= coalition_sizes(num_coalitions, z.device)
    elif utility == "probability":
        values = z.softmax(-1).gather(-1, target).squeeze(-1)
    elif utility == "log_probability":
        values = z.log_softmax(-1).gather(-1, target).squeeze(-1)
    else:
        # Not what the runner-up's index holds: where all others are -inf that index is the label's.
        values = z.gather(-1, target).squeeze(-1) - z.scatter(-1, target, -torch.inf).amax(-1)
    return values.to(logits.dtype)


def coalition_utilities_bwd(
    dutilities: Tensor,  # [N, S]
    logits: Tensor,  # [N, S, C]
    labels: Tensor,  # [N]
    *,
    utility: str,  # a smooth one
) -> Tensor:  # [N, S, C]
    """Return the gradient of a smooth utility with respect to the logits."""
    z = logits.to(accumulation_dtype(logits.dtype))
    target = labels.long()[:, None, None].expand(-1, z.shape[1], 1)
    du = dutilities.to(z.dtype)[..., None]
    if utility == "margin":
        dlogits = torch.zeros_like(z).scatter_add_(-1, _runner_up(z, target), -du)
    else:
        p = z.softmax(-1)
        if utility == "probability":
            du = du * p.gather(-1, target)
        dlogits = -du * p
    return dlogits.scatter_add_(-1, target, du).to(logits.dtype)


def coalition_logits(
    partial_logits: Tensor,  # [M, N, C]
    bias: Tensor | None = None,  # [C]
) -> Tensor:  # [N, S, C] in at least float32
    """Return z_s = bias + sum of the partial logits of the modalities in s, for every coalition s."""
    _, num_samples, num_classes = partial_logits.shape
    dtype = accumulation_dtype(partial_logits.dtype, torch.float32 if bias is None else bias.dtype)
    if bias is None:
        bias = partial_logits.new_zeros(num_classes)
    logits = bias.to(dtype).expand(num_samples, 1, num_classes)
    for partial in partial_logits.to(dtype):
        # Every modality doubles the table: the coalitions so far, then the same ones joined by it.
        logits = torch.cat([logits, logits + partial[:, None]], dim=1)
    return logits


def additive_shapley(
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None = None,  # [C]
    *,
    utility: str = "cardinality",
) -> Tensor:  # [N, M]
    """Return the Shapley value of each modality from the utilities of all sums of partial logits."""
    logits = coalition_logits(partial_logits, bias)
    return shapley_values(coalition_utilities(logits, labels, utility=utility)).to(partial_logits.dtype)


def additive_shapley_bwd(
    dphi: Tensor,  # [N, M]
    partial_logits: Tensor,  # [M, N, C]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [C]
    *,
    utility: str,  # a smooth one
) -> tuple[Tensor, Tensor]:  # [M, N, C], [C], both in at least float32
    """Return the gradients with respect to the partial logits and to the bias."""
    logits = coalition_logits(partial_logits, bias)
    dutilities = shapley_values_bwd(dphi.to(logits.dtype))
    dlogits = coalition_utilities_bwd(dutilities, logits, labels, utility=utility)
    dpartials = [
        dlogits.unflatten(1, (-1, 2, 2**modality))[:, :, 1].sum((1, 2))
        for modality in range(len(partial_logits))
    ]
    return torch.stack(dpartials), dlogits.sum((0, 1))

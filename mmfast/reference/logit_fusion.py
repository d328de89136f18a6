"""Sums of unimodal logits weighted by how sure each modality is, as the formulas are written."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.reference._common import accumulation_dtype


def entropy_fusion(
    logits: Tensor,  # [M, N, C]
    *,
    present: Tensor | None = None,  # bool [M, N]
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return sum_m w_m z^m and w = softmax_m(-entropy(softmax(z^m))), modality by modality of each sample."""
    return logit_fusion(logits, present=present, score="entropy", temperature=1.0)


def certainty_fusion(
    logits: Tensor,  # [M, N, C]
    *,
    temperature: float = 1.0,
    present: Tensor | None = None,  # bool [M, N]
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return sum_m w_m z^m and w = softmax_m(max_c softmax(z^m)_c / temperature)."""
    return logit_fusion(logits, present=present, score="certainty", temperature=temperature)


def _visible(
    logits: Tensor,  # [M, N, C]
    present: Tensor | None,  # bool [M, N]
) -> Tensor:  # [M, N, C] in at least float32
    """Return the logits with those of absent modalities, whatever they hold, set to zero."""
    z = logits.to(accumulation_dtype(logits.dtype))
    return z if present is None else z.masked_fill(~present[..., None], 0)


def _weights(
    scores: Tensor,  # [M, N]
    present: Tensor | None,  # bool [M, N]
) -> Tensor:  # [M, N]
    """Return the softmax of the scores over the modalities that are present; all 0 where none is."""
    if present is None:
        return scores.softmax(0)
    # A sample without any modality has a softmax of NaN, which the second mask replaces.
    return scores.masked_fill(~present, -torch.inf).softmax(0).masked_fill(~present, 0)


def logit_fusion(
    logits: Tensor,  # [M, N, C]
    *,
    present: Tensor | None,  # bool [M, N]
    score: str,  # "entropy" or "certainty"
    temperature: float | Tensor,  # or []
) -> tuple[Tensor, Tensor]:  # [N, C], [M, N]
    """Return the fused logits and the weights, for either score."""
    z = _visible(logits, present)
    if score == "entropy":
        scores = -torch.special.entr(z.softmax(-1)).sum(-1)
    else:
        scores = z.softmax(-1).gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1)
    weights = _weights(scores / temperature, present)
    is_excluded = z == -torch.inf
    weighted = weights[..., None] * z.masked_fill(is_excluded, 0)
    # A weight underflows to 0 at a low temperature; times an excluded class's logit it is to be -inf. What
    # has no weight, as all logits of a modality are -inf, keeps its NaN.
    fused = weighted.masked_fill(is_excluded & ~weights.isnan()[..., None], -torch.inf).sum(0)
    return fused.to(logits.dtype).contiguous(), weights.to(logits.dtype).contiguous()


def logit_fusion_bwd(
    dfused: Tensor,  # [N, C]
    dweights: Tensor,  # [M, N]
    logits: Tensor,  # [M, N, C]
    *,
    present: Tensor | None,  # bool [M, N]
    score: str,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor]:  # [M, N, C], []
    """Return the gradients with respect to the logits and to the temperature."""
    z = _visible(logits, present)
    p = z.softmax(-1)
    if score == "entropy":
        surprise = torch.special.entr(p)
        entropy = surprise.sum(-1, keepdim=True)
        scores = -entropy
        dscores_dz = p * entropy - surprise
    else:
        top = z.argmax(-1, keepdim=True)
        scores = p.gather(-1, top)
        dscores_dz = scores * (-p).scatter_add_(-1, top, torch.ones_like(scores))
    weights = _weights(scores.squeeze(-1) / temperature, present)[..., None]
    dfused = dfused.to(z.dtype)
    # Where a class is excluded the fused logit is -inf whatever the weights are.
    finite = z.masked_fill(z == -torch.inf, 0)
    dweight = dweights.to(z.dtype)[..., None] + (dfused * finite).sum(-1, keepdim=True)
    dscores = weights * (dweight - (weights * dweight).sum(0)) / temperature
    dscored = dscores if present is None else dscores.masked_fill(~present[..., None], 0)
    dtemperature = -(dscored * scores).sum() / temperature
    dz = weights * dfused + dscores * dscores_dz
    # Where a gradient or a neighbour is NaN, 0 times it would be.
    dz = dz if present is None else dz.masked_fill(~present[..., None], 0)
    return dz.to(logits.dtype).contiguous(), dtemperature

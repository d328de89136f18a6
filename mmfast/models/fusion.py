"""Fusion heads: from the features of M modalities to the logits of C classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.errors import check_one_of
from mmfast.models._checks import check_dropout, check_size


class FusionHead(nn.Module):
    """Base of the heads: maps features of `dims` = (D_1, ..., D_M) to `num_classes` = C logits.

    A head treats every sample on its own, because coalitions are evaluated stacked along the batch. An absent
    modality is one whose features are zero; no head is told of absence in another way. A subclass whose
    logits are `bias + sum of one term per modality`, each zero for zero features, sets `additive` and gives
    those terms in `partial_logits`.

    Args:
        dims: feature dimension D_m of each modality; M >= 1.
        num_classes: C.

    Raises:
        TypeError, ValueError: a size is no integer or below 1; `dims` is empty.
    """

    additive: ClassVar[bool] = False

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if len(dims) == 0:
            raise ValueError("dims must hold M >= 1 feature dimensions, got none")
        self.dims = tuple(check_size(f"dims[{m}]", dim) for m, dim in enumerate(dims))
        self.num_classes = check_size("num_classes", num_classes)

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    @property
    def bias(self) -> Tensor:  # [C]
        """The part of the logits that no feature enters; zeros unless the head has such a bias."""
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
        return like.new_zeros(self.num_classes)

    def partial_logits(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [M, N, C]
        """Return each modality's term of the logits, without the bias; a ValueError where there is none."""
        additive = ", ".join(repr(name) for name, head in FUSION_HEADS.items() if head.additive)
        raise ValueError(
            f"partial_logits needs an additive fusion head ({additive}), got {type(self).__name__}, "
            "whose logits are no sum over modalities"
        )


class ConcatHead(FusionHead):
    """One linear layer over the concatenated features.

    Equivalent to:

        logits = linear(torch.cat(features, dim=1))
        partial_logits[m] = features[m] @ linear.weight[:, offset[m]:offset[m + 1]].T
    """

    additive = True

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__(dims, num_classes)
        self.linear = nn.Linear(sum(self.dims), num_classes)

    @property
    def bias(self) -> Tensor:  # [C]
        return self.linear.bias

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        return self.linear(torch.cat(list(features), dim=1))

    def partial_logits(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [M, N, C]
        weights = self.linear.weight.split(self.dims, dim=1)
        return torch.stack([F.linear(h, weight) for h, weight in zip(features, weights, strict=True)])


class SumHead(FusionHead):
    """The sum of one linear layer per modality; their biases add up to the head's.

    Equivalent to:

        logits = sum(linear(h) for linear, h in zip(linears, features))
    """

    additive = True

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__(dims, num_classes)
        self.linears = nn.ModuleList(nn.Linear(dim, num_classes) for dim in self.dims)

    @property
    def bias(self) -> Tensor:  # [C]
        return torch.stack([linear.get_parameter("bias") for linear in self.linears]).sum(0)

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        return torch.stack([linear(h) for linear, h in zip(self.linears, features, strict=True)]).sum(0)

    def partial_logits(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [M, N, C]
        weights = [linear.get_parameter("weight") for linear in self.linears]
        return torch.stack([F.linear(h, weight) for h, weight in zip(features, weights, strict=True)])


class GatedHead(FusionHead):
    """Gated multimodal unit: gates that see all modalities weigh the hidden features of each.

    Equivalent to:

        hidden = [torch.tanh(project[m](h)) for m, h in enumerate(features)]
        gates = torch.sigmoid(gate(torch.cat(features, dim=1))).chunk(M, dim=1)
        logits = linear(sum(g * h for g, h in zip(gates, hidden)))

    The projections have no bias, so an absent modality adds nothing and acts on the logits through the gates
    only.

    Args:
        dims: feature dimension D_m of each modality; M >= 1.
        num_classes: C.
        width: hidden features per modality; None takes the largest D_m.

    Source: Arevalo et al., "Gated multimodal units for information fusion", arXiv 1702.01992, 2017, in
    its form for any number of modalities.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, *, width: int | None = None) -> None:
        super().__init__(dims, num_classes)
        width = max(self.dims) if width is None else check_size("width", width)
        self.project = nn.ModuleList(nn.Linear(dim, width, bias=False) for dim in self.dims)
        self.gate = nn.Linear(sum(self.dims), len(self.dims) * width)
        self.linear = nn.Linear(width, num_classes)

    @property
    def bias(self) -> Tensor:  # [C]
        return self.linear.bias

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        hidden = torch.stack(
            [torch.tanh(project(h)) for project, h in zip(self.project, features, strict=True)], dim=1
        )
        gates = torch.sigmoid(self.gate(torch.cat(list(features), dim=1))).unflatten(1, hidden.shape[1:])
        return self.linear((gates * hidden).sum(1))


class FiLMHead(FusionHead):
    """Feature-wise linear modulation: the first modality scales and shifts the features of all others.

    Equivalent to, with `others` the concatenated features of modalities 2 to M:

        scale, shift = film(features[0]).chunk(2, dim=1)
        logits = linear((1 + scale) * others + shift)

    The shift carries the first modality to the logits where the others are absent, and the others pass
    unscaled but for the layer's bias where the first is. With M = 1 nothing is left to modulate: logits =
    linear(features[0]).

    Source: Perez et al., "FiLM: visual reasoning with a general conditioning layer", AAAI 2018, equations 1
    and 2, with the scale predicted as its difference from 1.
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__(dims, num_classes)
        width = sum(self.dims[1:])
        self.film = nn.Linear(self.dims[0], 2 * width) if width else None
        self.linear = nn.Linear(width or self.dims[0], num_classes)

    @property
    def bias(self) -> Tensor:  # [C]
        return self.linear.bias

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        if self.film is None:
            return self.linear(features[0])
        scale, shift = self.film(features[0]).chunk(2, dim=1)
        return self.linear((1 + scale) * torch.cat(list(features[1:]), dim=1) + shift)


class AttentionHead(FusionHead):
    """A learned query attends over one token per modality.

    Equivalent to:

        tokens = torch.stack([project[m](h) for m, h in enumerate(features)], dim=1)
        pooled = attention(query.expand(N, 1, width), tokens, tokens)[0][:, 0]
        logits = linear(pooled)

    Each modality has a projection of its own, whose bias tells modalities apart and is the whole token of an
    absent one; it is learned wherever the training data or the method leaves modalities out.

    Args:
        dims: feature dimension D_m of each modality; M >= 1.
        num_classes: C.
        width: token width, a multiple of `num_heads`; None takes the largest D_m, rounded up to one.
        num_heads: attention heads.
        dropout: dropout of the attention weights in training.

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.2.2; the learned query is the seed
    vector of Lee et al., "Set transformer", ICML 2019, section 3.2.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        width: int | None = None,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dims, num_classes)
        check_size("num_heads", num_heads)
        check_dropout(dropout)
        width = -(-max(self.dims) // num_heads) * num_heads if width is None else check_size("width", width)
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        self.project = nn.ModuleList(nn.Linear(dim, width) for dim in self.dims)
        self.query = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.attention = nn.MultiheadAttention(width, num_heads, dropout=dropout, batch_first=True)
        self.linear = nn.Linear(width, num_classes)

    @property
    def bias(self) -> Tensor:  # [C]
        return self.linear.bias

    def forward(
        self,
        features: Sequence[Tensor],  # M tensors [N, D_m]
    ) -> Tensor:  # [N, C]
        tokens = torch.stack([project(h) for project, h in zip(self.project, features, strict=True)], dim=1)
        query = self.query.expand(tokens.shape[0], -1, -1)
        pooled, _ = self.attention(query, tokens, tokens, need_weights=False)
        return self.linear(pooled[:, 0])


FUSION_HEADS: dict[str, type[FusionHead]] = {
    "concat": ConcatHead,
    "sum": SumHead,
    "gated": GatedHead,
    "film": FiLMHead,
    "attention": AttentionHead,
}


def fusion_head(fusion: str | FusionHead, dims: Sequence[int], num_classes: int) -> FusionHead:
    """Return the head of that name, made for `dims` and `num_classes`, or the given head, its sizes checked.

    Raises:
        TypeError: `fusion` is neither a name nor a FusionHead.
        ValueError: no head has that name, or the head was made for other sizes.
    """
    if isinstance(fusion, FusionHead):
        if fusion.dims != tuple(dims) or fusion.num_classes != num_classes:
            raise ValueError(
                f"fusion must be a head of dims {list(dims)} and C = {num_classes}, "
                f"got dims {list(fusion.dims)} and C = {fusion.num_classes}"
            )
        return fusion
    if not isinstance(fusion, str):
        raise TypeError(f"fusion must be a str or a FusionHead, got {type(fusion).__name__}")
    check_one_of("fusion", fusion, FUSION_HEADS, nearest_first=True)
    return FUSION_HEADS[fusion](dims, num_classes)

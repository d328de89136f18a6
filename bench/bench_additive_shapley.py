"""Shapley values of modalities whose logits add up: against the table of all coalitions' logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmfast import ops
from mmfast.reference import additive_shapley as reference
from mmfast.reference import shapley_values as shapley_reference

from .harness import Case, Options, Work
from .peers import DIRECTIONS, bind_all, check_against, compiled, optional

SIZE = "Logits of all coalitions N S C"
# M, N, C; the materialised table has 13 to 100 million logits.
SHAPES = (
    (2, 100_000, 31),
    (2, 20_000, 309),
    (3, 100_000, 6),
    (4, 50_000, 31),
    (6, 10_000, 31),
    (8, 2_000, 101),
    (10, 500, 31),
)
QUICK = ((2, 500, 31), (4, 2_000, 31))
# Shapes at which the passes of the true class's probability are measured, too, and of the other utilities
# that have a gradient.
SMOOTH = ((2, 100_000, 31), (2, 30_000, 101), (2, 20_000, 309), (3, 100_000, 6), (4, 50_000, 31))
OTHER = ((2, 100_000, 31), (3, 100_000, 6))


def cases(options: Options) -> Iterator[Case]:
    """Yield the published utility, which has no gradient, and all passes of those that have one."""
    for shape in QUICK if options.quick else SHAPES:
        yield from _passes("cardinality", *shape, options, ("forward",))
    for shape in QUICK if options.quick else SMOOTH:
        yield from _passes("probability", *shape, options, DIRECTIONS)
    for utility in ("log_probability", "margin"):
        for shape in QUICK[:1] if options.quick else OTHER:
            yield from _passes(utility, *shape, options, DIRECTIONS)
    # One that walks all orders of the modalities, a call of the model for each step.
    yield from _passes("probability", 3, 1_000, 31, options, ("forward",), with_captum=True)


def _passes(
    utility: str,
    num_modalities: int,
    num_samples: int,
    num_classes: int,
    options: Options,
    directions: tuple[str, ...],
    with_captum: bool = False,
) -> Iterator[Case]:
    device = options.device
    partials = torch.randn(num_modalities, num_samples, num_classes, device=device)
    partials.requires_grad_(utility != "cardinality")
    labels = torch.randint(num_classes, (num_samples,), device=device)

    def ours(partials: Tensor) -> Tensor:
        return ops.additive_shapley(partials, labels, utility=utility)

    def plain(partials: Tensor) -> Tensor:
        return reference.additive_shapley(partials, labels[: partials.shape[1]], utility=utility)

    weights = shapley_reference.shapley_values(torch.eye(2**num_modalities, device=device))  # [S, M]
    materialised = _make_materialised(labels, weights, utility)
    peers: dict[str, Any] = {
        "eager": materialised,
        "torch.compile": compiled(materialised, options.quick),
    }
    if with_captum:
        peers = {"captum": optional("captum.attr", "captum", lambda module: _captum(module, labels))}
    values = 4 * num_samples * num_modalities
    read = partials.nbytes + labels.nbytes
    sums = num_samples * num_classes * 2**num_modalities
    # Coalitions' exponentials are products of the modalities'.
    count = partials.numel() if utility in ("probability", "log_probability") else 0
    logarithms = num_samples * 2**num_modalities if utility == "log_probability" else 0
    work = {
        "forward": Work(read, values, sums, count, logarithms),
        "backward": Work(read + values, partials.nbytes, 2 * sums, count),
        "both": Work(2 * read + values, partials.nbytes + values, 3 * sums, 2 * count, logarithms),
    }
    for direction in directions:
        yield Case(
            name=f"{utility} M={num_modalities} N={num_samples:,} C={num_classes}",
            size=sums,
            panel="1,000 samples of 3 modalities" if with_captum else utility,
            check=check_against(plain, (partials,), direction, num_samples),
            work=work[direction],
            **bind_all(ours, peers, (partials,), direction),
        )


def _make_materialised(
    labels: Tensor,  # [N]
    weights: Tensor,  # [S, M]
    utility: str,
) -> Callable[[Tensor], Tensor]:
    num_coalitions, num_modalities = weights.shape
    bits = torch.arange(num_modalities, device=labels.device)
    present = (torch.arange(num_coalitions, device=labels.device)[:, None] >> bits & 1).float()  # [S, M]
    sizes, own = present.sum(1), labels[:, None, None].expand(-1, num_coalitions, 1)

    def materialised(
        partials: Tensor,  # [M, N, C]
    ) -> Tensor:  # [N, M]
        logits = torch.einsum("sm,mnc->nsc", present, partials)
        if utility == "cardinality":
            values = sizes * (logits.argmax(-1) == labels[:, None])
        elif utility == "margin":
            label = logits.gather(-1, own).squeeze(-1)
            values = label - logits.scatter(-1, own, -torch.inf).amax(-1)
        else:
            values = logits.log_softmax(-1) if utility == "log_probability" else logits.softmax(-1)
            values = values.gather(-1, own).squeeze(-1)
        return torch.mm(values, weights)

    return materialised


def _captum(
    module: Any,
    labels: Tensor,  # [N]
) -> Callable[[Tensor], Tensor]:
    def attributions(
        partials: Tensor,  # [M, N, C]
    ) -> Tensor:  # [N, M C]
        num_modalities, _, num_classes = partials.shape

        def probability(
            flat: Tensor,  # [N, M C]
        ) -> Tensor:  # [N]
            logits = flat.unflatten(1, (num_modalities, num_classes)).sum(1)
            return logits.softmax(-1).gather(1, labels[:, None]).squeeze(1)

        players = torch.arange(num_modalities, device=labels.device).repeat_interleave(num_classes)
        flat = partials.transpose(0, 1).flatten(1)
        return module.ShapleyValues(probability).attribute(flat, feature_mask=players[None])

    return attributions

"""One call of every op with few samples, where the launch is all: ours by backend, beside eager torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import ops
from mmfast.backend import BACKENDS
from mmfast.reference import kmeans as clustering
from mmfast.reference import logit_fusion as fusion
from mmfast.reference import shapley_values as shapley

# N samples, M modalities, C classes, D dimensions, K clusters.
N, M, C, D, K = 64, 3, 7, 64, 4


@dataclass(frozen=True)
class HostCase:
    """A call at a size where the host's time is all there is.

    Attributes:
        stem: of the op's files.
        name: of the public function.
        ours: takes the inputs and the backend's name.
        eager: takes the inputs; what a user would write without mmfast.
        inputs: tensors of the call that may have gradients.
        is_smooth: whether the result has a gradient.
    """

    stem: str
    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    is_smooth: bool = True


def host_cases(device: str) -> Iterator[HostCase]:
    """Yield a case for every public op, some with two sizes."""
    yield from _valuation(device)
    yield from _losses(device)
    yield from _separability(device)
    yield from _updates(device)
    logits = torch.randn(M, N, C, device=device)
    for name in ("entropy_fusion", "certainty_fusion"):
        op, plain = getattr(ops, name), getattr(fusion, name)
        yield HostCase("logit_fusion", name, _keyword(op), plain, (logits,))


def _keyword(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: op(*given[:-1], backend=given[-1])


def _valuation(device: str) -> Iterator[HostCase]:
    weights = shapley.shapley_values(torch.eye(2**M, device=device))  # [S, M]
    labels = torch.randint(C, (N,), device=device)
    sizes = torch.tensor([s.bit_count() for s in range(2**M)], device=device)
    present = (torch.arange(2**M, device=device)[:, None] >> torch.arange(M, device=device) & 1).float()

    def right(logits: Tensor) -> Tensor:
        return sizes * (logits.argmax(-1) == labels[:, None])

    def probability(logits: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, labels[:, None, None].expand(-1, 2**M, 1)).squeeze(-1)

    def added(partials: Tensor) -> Tensor:
        return torch.einsum("sm,mnc->nsc", present, partials)

    table = torch.randn(N, 2**M, device=device)
    yield HostCase(
        "shapley_values", "shapley_values", _keyword(ops.shapley_values), lambda v: v @ weights, (table,)
    )
    logits, partials = torch.randn(N, 2**M, C, device=device), torch.randn(M, N, C, device=device)
    for utility, value in (("cardinality", right), ("probability", probability)):
        is_smooth = utility == "probability"

        def utilities(logits: Tensor, backend: str, utility: str = utility) -> Tensor:
            return ops.coalition_utilities(logits, labels, utility=utility, backend=backend)

        def additive(partials: Tensor, backend: str, utility: str = utility) -> Tensor:
            return ops.additive_shapley(partials, labels, utility=utility, backend=backend)

        def materialised(partials: Tensor, value: Callable[[Tensor], Tensor] = value) -> Tensor:
            return value(added(partials)).float() @ weights

        name = f"coalition_utilities, {utility}"
        yield HostCase("additive_shapley", name, utilities, value, (logits,), is_smooth)
        name = f"additive_shapley, {utility}"
        yield HostCase("additive_shapley", name, additive, materialised, (partials,), is_smooth)


def _losses(device: str) -> Iterator[HostCase]:
    labels = torch.arange(N, device=device)

    def info_nce(query: Tensor, key: Tensor) -> Tensor:
        return F.cross_entropy(query @ key.T, labels)

    features = [torch.randn(N, D, device=device) for _ in range(M)]
    key = features[1]
    yield HostCase(
        "duc_loss",
        "unidirectional_info_nce",
        lambda query, backend: ops.unidirectional_info_nce(query, key, backend=backend),
        lambda query: info_nce(query, key),
        (features[0],),
    )

    def sigmoid(query: Tensor, temperature: Tensor, bias: Tensor) -> Tensor:
        signs = 2 * torch.eye(N, device=device) - 1
        return -F.logsigmoid(signs * (query @ key.T / temperature + bias)).sum(1).mean()

    def ours_of(query: Tensor, temperature: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.unidirectional_sigmoid_loss(
            query, key, temperature=temperature, bias=bias, backend=backend
        )

    numbers = tuple(torch.tensor(number, device=device) for number in (0.1, -10.0))
    yield HostCase("sigmoid_loss", "unidirectional_sigmoid_loss", ours_of, sigmoid, (features[0], *numbers))
    for num_modalities in (2, M):
        # Prepared on the CPU, which knows how many columns there are.
        effective = torch.arange(D) % num_modalities == torch.arange(num_modalities)[:, None]
        dims = ops.DucDims(effective).to(device)
        pairs = [
            (m, n, dims.dims(m, n)) for m in range(num_modalities) for n in range(num_modalities) if m != n
        ]

        def ours(*given: Any, dims: ops.DucDims = dims) -> Tensor:
            return ops.duc_loss(given[:-1], dims, backend=given[-1])

        def by_pairs(*given: Tensor, pairs: list = pairs) -> Tensor:
            losses = [info_nce(given[n][:, d], given[m].detach()[:, d]) for m, n, d in pairs]
            return torch.stack(losses).sum()

        yield HostCase(
            "duc_loss", f"duc_loss, M={num_modalities}", ours, by_pairs, tuple(features[:num_modalities])
        )


def _separability(device: str) -> Iterator[HostCase]:
    labels = torch.arange(N, device=device) % C
    features, centroids = torch.randn(N, D, device=device), torch.randn(C, D, device=device)

    def moments(features: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.bincount(labels, minlength=C)[:, None]
        zero = features.new_zeros(C, D)
        mean = zero.index_add(0, labels, features) / count
        squares = (features - mean.index_select(0, labels)).square()
        return mean, zero.index_add(0, labels, squares) / count

    def accuracy(features: Tensor, centroids: Tensor) -> Tensor:
        distance = (features[:, None] - centroids).abs()
        return (distance.argmin(1) == labels[:, None]).float().mean(0)

    def effective(features: Tensor) -> Tensor:
        found = accuracy(features, moments(features)[0])
        return found > found.mean()

    yield HostCase(
        "class_separability",
        "class_moments",
        lambda features, backend: ops.class_moments(features, labels, C, backend=backend)[1:],
        moments,
        (features,),
    )
    yield HostCase(
        "class_separability",
        "dimension_accuracy",
        lambda features, backend: ops.dimension_accuracy(features, labels, centroids, backend=backend),
        lambda features: accuracy(features, centroids),
        (features,),
        is_smooth=False,
    )
    yield HostCase(
        "class_separability",
        "effective_dimensions",
        lambda features, backend: ops.effective_dimensions(features, labels, C, backend=backend),
        effective,
        (features,),
        is_smooth=False,
    )
    start = features[:K].clone()
    yield HostCase(
        "kmeans",
        "kmeans, 2 iterations (waits)",
        lambda features, backend: ops.kmeans(features, K, init=start, max_iter=2, tol=0.0, backend=backend),
        lambda features: clustering.lloyd(features, start, 2, 0.0),
        (features,),
        is_smooth=False,
    )


def _updates(device: str) -> Iterator[HostCase]:
    params, inits = ([torch.randn(N, device=device) for _ in range(20)] for _ in range(2))
    yield HostCase(
        "partial_reinit",
        "partial_reinit_, 20 tensors",
        lambda *given: ops.partial_reinit_(given[:-1], inits, 0.3, backend=given[-1]),
        lambda *given: torch._foreach_lerp_(given, inits, 0.3),
        tuple(params),
        is_smooth=False,
    )
    plans = {name: ops.ReinitPlan(params, inits, backend=name) for name in ("auto", *BACKENDS)}
    yield HostCase(
        "partial_reinit",
        "partial_reinit_, a plan of 20 tensors",
        lambda *given: plans[given[-1]].apply_(0.3),
        lambda *given: torch._foreach_lerp_(given, inits, 0.3),
        tuple(params),
        is_smooth=False,
    )
    feature, grad = torch.randn(D, device=device), torch.randn(C, D, device=device)
    projector = torch.eye(D, device=device)

    def update(feature: Tensor) -> None:
        ph = projector @ feature
        projector.sub_(torch.outer(ph / (0.1 + feature @ ph), ph))

    yield HostCase(
        "gradient_projection",
        "update_projector_",
        lambda feature, backend: ops.update_projector_(projector, feature, alpha=0.1, backend=backend),
        update,
        (feature,),
        is_smooth=False,
    )
    yield HostCase(
        "gradient_projection",
        "project_gradient",
        lambda grad, backend: ops.project_gradient(grad, projector, backend=backend),
        lambda grad: grad @ projector,
        (grad,),
        is_smooth=False,
    )

    def step(feature: Tensor, grad: Tensor) -> Tensor:
        update(feature)
        return grad @ projector

    yield HostCase(
        "gradient_projection",
        "update_and_project_",
        lambda feature, grad, backend: ops.update_and_project_(
            projector, feature, grad, alpha=0.1, backend=backend
        ),
        step,
        (feature, grad),
        is_smooth=False,
    )

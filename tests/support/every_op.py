"""One call of every op on seeded data, forward and, where there is one, backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmfast import ops

# Takes the device, the dtype and the backend; returns the call's inputs, and the call, which returns tensors.
Make = Callable[[torch.device, torch.dtype, str], tuple[list[Tensor], Callable[[], list[Tensor]]]]
CALLS: dict[str, list[Make]] = {}
N, D, C, M = 1500, 48, 7, 3
# Which read the device to decide what comes next, or return a Python number: nothing to capture in a graph.
READING = ("kmeans", "cluster_purity")


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether both hold the same bits; NaN counts as a number."""
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(first, second, strict=True))


def replayed(inputs: list[Tensor], call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Capture a call in a CUDA graph, change its inputs, and return what the graph's replay gives."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for x in inputs:
            x.mul_(-0.5)
    graph.replay()
    results = [x.clone() for x in captured]
    torch.cuda.synchronize()
    return results


def call_of(stem: str) -> Callable[[Make], Make]:
    """Register a call under the stem of its op's files."""

    def add(make: Make) -> Make:
        CALLS.setdefault(stem, []).append(make)
        return make

    return add


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def _labels(device: torch.device, *shape: int) -> Tensor:
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(0)).to(device)


def _with_gradient(inputs: list[Tensor], op: Callable[..., Tensor | tuple[Tensor, ...]]):
    for x in inputs:
        x.requires_grad_()

    def call() -> list[Tensor]:
        out = op(*inputs)
        results = [out] if isinstance(out, Tensor) else list(out)
        smooth = [result for result in results if result.requires_grad]
        # Not ones: the gradient of a sum of Shapley values or of weights is zero in places.
        seeds = [torch.linspace(1, 2, y.numel(), device=y.device, dtype=y.dtype).view_as(y) for y in smooth]
        return [y.detach() for y in results] + list(torch.autograd.grad(smooth, inputs, seeds))

    return inputs, call


@call_of("shapley_values")
def shapley_values(device, dtype, backend):
    tables = _random(N, 2**M, device=device, dtype=dtype)
    return _with_gradient([tables], lambda v: ops.shapley_values(v, backend=backend))


@call_of("additive_shapley")
def additive_shapley(device, dtype, backend):
    partial, labels = _random(M, N, C, device=device, dtype=dtype), _labels(device, N)
    bias = _random(C, device=device, dtype=dtype)
    return _with_gradient(
        [partial, bias],
        lambda z, b: ops.additive_shapley(z, labels, b, utility="log_probability", backend=backend),
    )


@call_of("additive_shapley")
def coalition_utilities(device, dtype, backend):
    logits, labels = _random(N, 2**M, C, device=device, dtype=dtype), _labels(device, N)
    return _with_gradient(
        [logits], lambda z: ops.coalition_utilities(z, labels, utility="probability", backend=backend)
    )


@call_of("duc_loss")
def duc_loss(device, dtype, backend):
    features = [_random(N // 5, D + m, device=device, dtype=dtype)[:, :D].contiguous() for m in range(M)]
    effective = torch.arange(M * D, device=device).view(M, D) % 3 == 0
    effective[:, :1] = False
    effective[:1, :1] = True
    return _with_gradient(features, lambda *x: ops.duc_loss(x, effective, temperature=2.0, backend=backend))


@call_of("duc_loss")
def unidirectional_info_nce(device, dtype, backend):
    query, key = (_random(N // 5, D, device=device, dtype=dtype) for _ in range(2))
    return _with_gradient(
        [query], lambda q: ops.unidirectional_info_nce(q, key, temperature=2.0, backend=backend)
    )


@call_of("sigmoid_loss")
def unidirectional_sigmoid_loss(device, dtype, backend):
    query, key = (_random(N // 5, D, device=device, dtype=dtype) for _ in range(2))
    numbers = [torch.tensor(number, device=device) for number in (2.0, -1.0)]
    return _with_gradient(
        [query, *numbers],
        lambda q, t, b: ops.unidirectional_sigmoid_loss(q, key, temperature=t, bias=b, backend=backend),
    )


@call_of("class_separability")
def class_moments(device, dtype, backend):
    features, labels = _random(N, D, device=device, dtype=dtype), _labels(device, N)
    return _with_gradient([features], lambda x: ops.class_moments(x, labels, C, backend=backend)[1:])


@call_of("class_separability")
def dimension_accuracy(device, dtype, backend):
    features, labels = _random(N, D, device=device, dtype=dtype), _labels(device, N)
    centroids = _random(C, D, device=device, dtype=dtype)
    return [features], lambda: [ops.dimension_accuracy(features, labels, centroids, backend=backend)]


@call_of("class_separability")
def effective_dimensions(device, dtype, backend):
    features, labels = _random(N, D, device=device, dtype=dtype), _labels(device, N)
    return [features], lambda: [ops.effective_dimensions(features, labels, C, backend=backend)]


@call_of("kmeans")
def kmeans(device, dtype, backend):
    features = _random(N, D, device=device, dtype=dtype)
    return [features], lambda: list(ops.kmeans(features, 5, max_iter=8, backend=backend)[:3])


@call_of("kmeans")
def kmeans_assign(device, dtype, backend):
    """What kmeans calls over a group alone."""
    features = _random(N, D, device=device, dtype=dtype)
    wide = features[:5].to(torch.promote_types(dtype, torch.float32))
    offset = wide.mean(0)
    centroids = wide - offset
    return [features], lambda: list(torch.ops.mmfast.kmeans_assign(features, offset, centroids, backend))


@call_of("kmeans")
def cluster_purity(device, dtype, backend):
    labels, clusters = _labels(device, N), _labels(device, N).flip(0)

    def call() -> list[Tensor]:
        purity = ops.cluster_purity(clusters, labels, backend=backend)
        return [torch.tensor(purity, dtype=torch.float64, device="cpu")]

    return [], call


@call_of("partial_reinit")
def partial_reinit(device, dtype, backend):
    params = [_random(size, 9, device=device, dtype=dtype) for size in (1, 40, 3)]
    initial = [torch.zeros_like(x) for x in params]
    start = [x.clone() for x in params]

    def call() -> list[Tensor]:
        for x, before in zip(params, start, strict=True):
            x.copy_(before)
        ops.partial_reinit_(params, initial, 0.25, backend=backend)
        return params

    return start, call


@call_of("partial_reinit")
def reinit_plan(device, dtype, backend):
    params = [_random(size, 9, device=device, dtype=dtype) for size in (1, 40, 3)]
    initial = [torch.zeros_like(x) for x in params]
    start = [x.clone() for x in params]
    plan = ops.ReinitPlan(params, initial, backend=backend)

    def call() -> list[Tensor]:
        for x, before in zip(params, start, strict=True):
            x.copy_(before)
        plan.apply_(0.25)
        return params

    return start, call


@call_of("gradient_projection")
def gradient_projection(device, dtype, backend):
    # The projector is kept in at least float32.
    wide = torch.promote_types(dtype, torch.float32)
    start, projector = (torch.eye(D, device=device, dtype=wide) for _ in range(2))
    feature = _random(D, device=device, dtype=dtype)
    grad = _random(C, D, device=device, dtype=wide)

    def call() -> list[Tensor]:
        projector.copy_(start)
        ops.update_projector_(projector, feature, alpha=0.5, backend=backend)
        return [projector, ops.project_gradient(grad, projector, backend=backend)]

    return [feature, grad], call


@call_of("gradient_projection")
def update_and_project(device, dtype, backend):
    wide = torch.promote_types(dtype, torch.float32)
    start, projector = (torch.eye(D, device=device, dtype=wide) for _ in range(2))
    feature = _random(D, device=device, dtype=dtype)
    grad = _random(C, D, device=device, dtype=dtype)

    def call() -> list[Tensor]:
        projector.copy_(start)
        return [projector, ops.update_and_project_(projector, feature, grad, alpha=0.5, backend=backend)]

    return [feature, grad], call


@call_of("logit_fusion")
def entropy_fusion(device, dtype, backend):
    logits = _random(M, N, C, device=device, dtype=dtype)
    return _with_gradient([logits], lambda z: ops.entropy_fusion(z, backend=backend))


@call_of("logit_fusion")
def certainty_fusion(device, dtype, backend):
    logits, present = _random(M, N, C, device=device, dtype=dtype), _labels(device, M, N) > 2
    return _with_gradient(
        [logits], lambda z: ops.certainty_fusion(z, temperature=0.5, present=present, backend=backend)
    )

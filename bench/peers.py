"""Peers that may be missing, and calls made of a function: forward, backward or both."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .accuracy import allowed_error, error_against

DIRECTIONS = ("forward", "backward", "both")


class Missing(str):
    """Why a peer takes no part."""


def optional(module: str, package: str, make: Callable[[Any], Any]) -> Any:
    """Return make(module), or why the peer is missing: `package` is its name on the package index."""
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        if error.name == module.partition(".")[0]:
            return Missing(f"not installed (pip install {package})")
        return Missing(f"{package} does not import: {' '.join(str(error).split())[:120]}")
    return make(imported)


def compiled(call: Callable[..., Any], quick: bool) -> Any:
    """Return the call under torch.compile, or, where time is short, why it is left out."""
    if quick:
        return Missing("compiling takes longer than --quick lasts")
    # Every size is compiled anew; torch would give up after a few without this.
    torch.compiler.reset()
    # A backward that runs many times on one graph must not take the graph's memory for its own.
    torch._functorch.config.donated_buffer = False
    return torch.compile(call, dynamic=False)


def bind(
    call: Callable[..., Tensor] | Missing,
    inputs: Sequence[Tensor],  # those to differentiate by require gradients
    direction: str,
) -> Callable[[], Any] | Missing:
    """Return a call without arguments that runs `call(*inputs)` in one of the directions.

    "forward" runs without gradients, "backward" returns the gradients from a graph kept from the first call,
    "both" returns the result and the gradients.
    """
    if isinstance(call, Missing):
        return call
    wanted = [x for x in inputs if x.requires_grad]
    if direction == "forward":
        return lambda: _without_gradients(call, inputs)
    seeds: list[Tensor] = []
    if direction == "both":
        return lambda: _both(call, inputs, wanted, seeds)
    graph: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(call(*inputs))
        return torch.autograd.grad(graph[0], wanted, _seed(graph[0], seeds), retain_graph=True)

    return backward


def _seed(out: Tensor, seeds: list[Tensor]) -> Tensor:
    """Return the gradient to begin with: ones, made once."""
    if not seeds:
        seeds.append(torch.ones_like(out))
    return seeds[0]


@torch.no_grad()
def _without_gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    return call(*inputs)


def _both(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: list[Tensor], seeds: list[Tensor]
) -> tuple[Tensor, ...]:
    out = call(*inputs)
    return out.detach(), *torch.autograd.grad(out, wanted, _seed(out, seeds))


def bind_all(
    ours: Callable[..., Tensor],
    peers: dict[str, Any],
    inputs: Sequence[Tensor],
    direction: str,
) -> dict[str, Any]:
    """Return the fields `ours`, `peers` and `direction` of a case."""
    bound = {name: bind(peer, inputs, direction) for name, peer in peers.items()}
    return {"ours": bind(ours, inputs, direction), "peers": bound, "direction": direction}


def assert_close(found: Any, truth: Any, plain: Any) -> None:
    """Assert that `found` errs at most twice as far as `plain`, plus a constant; tensors or tuples of them.

    Errors are against `truth`, in float64, relative to its largest magnitude where that exceeds 1.
    """
    if isinstance(found, Tensor):
        found, truth, plain = (found,), (truth,), (plain,)
    for mine, right, usual in zip(found, truth, plain, strict=True):
        assert mine.shape == right.shape, f"shape {list(mine.shape)}, expected {list(right.shape)}"
        limit, error = allowed_error(right, usual, mine.dtype), error_against(right, mine)
        assert error <= limit, f"error {error:.1e} against float64, at most {limit:.1e} allowed"


def check_against(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    direction: str,
    num_samples: int | None = None,
) -> Callable[[Any], None]:
    """Return a check of a result against `reference` in float64, by the rule of `assert_close`.

    Where `num_samples` is given no sample depends on another, and the first thousand are compared.
    """

    def check(found: Any) -> None:
        found = _first_samples((found,) if isinstance(found, Tensor) else found, num_samples)
        given = _first_samples(inputs, num_samples)
        wide = [x.double() if x.is_floating_point() else x for x in given]
        results = []
        for tensors in (wide, given):
            leaves = [
                x.detach().requires_grad_(like.requires_grad) for x, like in zip(tensors, inputs, strict=True)
            ]
            call = bind(reference, leaves, direction)
            assert not isinstance(call, Missing)
            result = call()
            results.append((result,) if isinstance(result, Tensor) else result)
        assert_close(found, *results)

    return check


def _first_samples(tensors: Sequence[Tensor], num_samples: int | None) -> tuple[Tensor, ...]:
    """Return the part of every tensor that belongs to the first thousand samples, in any dimension."""
    if num_samples is None:
        return tuple(tensors)
    dims = [next((d for d, size in enumerate(x.shape) if size == num_samples), None) for x in tensors]
    return tuple(
        x if d is None else x.narrow(d, 0, min(num_samples, 1000)) for x, d in zip(tensors, dims, strict=True)
    )


def on_gpu(device: str, module: str, package: str, make: Callable[[Any], Any]) -> Any:
    """Return `optional` on a GPU; elsewhere that the peer has GPU kernels only."""
    return optional(module, package, make) if device == "cuda" else Missing(f"{package} has GPU kernels only")

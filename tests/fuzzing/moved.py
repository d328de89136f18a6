"""Calls of the public ops on another device: tensors travel with the memory around them, results come back.

Cases draw on the CPU, and their oracles judge there; so one case serves a GPU, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mmfast import ops

# What is changed in place, by its place among the arguments.
_CHANGED = {"partial_reinit_": 0, "update_projector_": 0, "update_and_project_": 0}
_devices = [torch.device("cpu")]


class _There(torch.autograd.Function):
    """A tensor on the other device, with the same strides and offset in a copy of the whole memory."""

    @staticmethod
    def forward(ctx, x: Tensor, device: torch.device) -> Tensor:
        return _copy(x, device)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient.cpu(), None


def _copy(x: Tensor, device: torch.device) -> Tensor:
    memory = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).to(device, copy=True)
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def is_on_gpu() -> bool:
    """Whether ops run on a GPU now, where nothing is refused that only a look at the numbers tells."""
    return _devices[-1].type == "cuda"


@contextlib.contextmanager
def moved_to(device: torch.device) -> Iterator[None]:
    """Let every public op run on `device` while cases keep their tensors on the CPU."""
    _devices.append(device)
    before = {name: getattr(ops, name) for name in ops.__all__ if name[0].islower()}
    try:
        for name, op in before.items():
            setattr(ops, name, _moved(op, _CHANGED.get(name), device))
        yield
    finally:
        for name, op in before.items():
            setattr(ops, name, op)
        _devices.pop()


def _moved(op: Callable, changed: int | None, device: torch.device) -> Callable:
    def call(*args, **kwargs):
        there: dict[int, tuple[Tensor, Tensor]] = {}

        def move(x: Tensor) -> Tensor:
            y = _There.apply(x, device) if x.requires_grad else _copy(x, device)
            there[id(x)] = x, y
            return y

        def move_any(value):
            return value.to(device) if isinstance(value, ops.DucDims) else tree_map_only(Tensor, move, value)

        found = op(*map(move_any, args), **{key: move_any(value) for key, value in kwargs.items()})
        if changed is not None:
            for x in [args[changed]] if isinstance(args[changed], Tensor) else args[changed]:
                # All of the memory, so that what was written beside the tensor shows.
                mine, theirs = (y.detach().untyped_storage() for y in there[id(x)])
                mine.copy_(theirs)
        return _back(found)

    return call


def _back(found):
    """Return results on the CPU; fields of named tuples one by one, for the methods these have."""
    if isinstance(found, Tensor):
        return found.cpu()
    if isinstance(found, tuple):
        values = [_back(value) for value in found]
        return type(found)(*values) if hasattr(found, "_fields") else tuple(values)
    return found

"""Nests of tensors: a modality may be one tensor, or a dict, tuple or list of such."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(nest: Any) -> Iterator[Any]:
    """Yield what is no dict, list or tuple, in order."""
    if isinstance(nest, Mapping):
        for value in nest.values():
            yield from leaves(value)
    elif isinstance(nest, list | tuple):
        for value in nest:
            yield from leaves(value)
    else:
        yield nest


def named_leaves(nest: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what `leaves` does, each with what errors call it: `text`, `text['mask']`, `text[0]`."""
    if isinstance(nest, Mapping):
        for key, value in nest.items():
            yield from named_leaves(value, f"{name}[{key!r}]")
    elif isinstance(nest, list | tuple):
        for i, value in enumerate(nest):
            yield from named_leaves(value, f"{name}[{i}]")
    else:
        yield name, nest


def tensors(nest: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest, in order."""
    return (leaf for leaf in leaves(nest) if isinstance(leaf, Tensor))


def mapped(function: Callable[[Tensor], Any], nest: Any) -> Any:
    """Return a nest of the same kind with `function` of each tensor in its place; other leaves stay."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, Mapping):
        return {key: mapped(function, value) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(mapped(function, value) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(mapped(function, value) for value in nest)
    return nest

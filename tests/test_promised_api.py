"""Names and arguments that users may rely on, held to the list in promised_api.txt.

A line that goes, or an argument that changes its name, place or default, breaks programs; how that is done,
docs/about/stability.md says. What is new is added by `python tests/test_promised_api.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).parent / "promised_api.txt"
# Promised by their pages, in rooms that promise no more.
MORE = (
    "mmfast.backend.BackendUnavailableError",
    "mmfast.methods.presets.PUBLISHED",
    "mmfast.training.callbacks.Callback",
    "mmfast.training.divergence.DivergedError",
    "mmfast.training.optimization.Optimization",
    "mmfast.training.stopping.Stopped",
)
ROOMS = ("mmfast", "mmfast.ops", "mmfast.methods", "mmfast.models", "mmfast.data")


def arguments(function: Any) -> str:
    """Return names, kinds and defaults; types, which are wording, are left out."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
        if name not in ("self", "cls")
    ]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    # Of objects without a name of their own, as a dataclass's default factory.
    return re.sub(r"<(factory|function|class)[^>]*>", "...", text)


def members(owner: type, public: set[type]) -> Iterator[tuple[str, Any]]:
    """Yield the methods and properties of a class that stand in no other public class."""
    for name in sorted(dir(owner)):
        home = next((base for base in owner.__mro__ if name in vars(base)), object)
        is_ours = home.__module__.startswith("mmfast") and home not in public - {owner}
        if is_ours and not name.startswith("_"):
            yield name, inspect.getattr_static(owner, name)


def attributes(owner: type) -> Iterator[str]:
    """Yield what the docstring's "Attributes" names, which instances must have: no signature tells of it."""
    _, _, after = (inspect.getdoc(owner) or "").partition("Attributes:\n")
    sources = [inspect.getsource(base) for base in owner.__mro__ if base.__module__.startswith("mmfast")]
    for line in after.splitlines():
        if line and not line.startswith(" "):
            break
        if named := re.match(r"    (\w+(?:, \w+)*):", line):
            for name in named[1].split(", "):
                is_set = re.compile(rf"^    {name}: |\bself\.{name}\b[^=\n]*= ", re.MULTILINE)
                assert hasattr(owner, name) or any(map(is_set.search, sources)), f"{owner.__name__}.{name}"
                yield name


def lines_of(path: str, value: Any, public: set[type]) -> Iterator[str]:
    """Yield a line for a function, and for a class one more for each method and property."""
    if inspect.ismodule(value):
        return
    if not inspect.isclass(value):
        yield f"{path}{arguments(value)}" if callable(value) else path
        return
    # An error that takes what every exception takes has no signature.
    is_plain_error = issubclass(value, Exception) and value.__init__ is RuntimeError.__init__
    yield path if is_plain_error else f"{path}{arguments(value)}"
    for name, member in members(value, public):
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function):
            yield f"{path}.{name}{arguments(function)}"
        elif isinstance(member, property) or dataclasses.is_dataclass(value):
            yield f"{path}.{name}"
    yield from (f"{path}.{name}" for name in attributes(value))


def promised() -> list[str]:
    modules = [importlib.import_module(room) for room in ROOMS]
    named = {
        f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__
    }
    for path in MORE:
        room, _, name = path.rpartition(".")
        named[path] = getattr(importlib.import_module(room), name)
    public = {value for value in named.values() if inspect.isclass(value)}
    return sorted({line for path, value in named.items() for line in lines_of(path, value, public)})


def test_signatures_are_those_promised() -> None:
    for package in ("lightning_fabric", "typer"):
        pytest.importorskip(package)
    listed, found = LIST.read_text().splitlines(), promised()
    gone, new = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
    assert not gone, "promised, and no longer there:\n" + "\n".join(gone)
    assert not new, "not yet promised (python tests/test_promised_api.py adds it):\n" + "\n".join(new)


if __name__ == "__main__":
    LIST.write_text("\n".join(promised()) + "\n")

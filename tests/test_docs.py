"""The documentation's Python runs as it stands, page by page, as a reader would paste it.

No page of an op or method is missing, and no public name.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("lightning_fabric")

from mmfast.methods import METHODS
from support.stems import ROOT, STEMS

DOCS = ROOT / "docs"
# Packages that `mmfast` names beside its own functions and classes.
ROOMS = ("data", "methods", "models", "ops", "training")
# Code of notebooks' cells runs while the site is built.
BLOCK = re.compile(r"^( *)(```+|~~~+|:::+)python\n(.*?)^\1\2", flags=re.M | re.S)


def blocks(path: Path) -> list[str]:
    """Return the Python of a page."""
    found = []
    for indent, _, code in BLOCK.findall(path.read_text()):
        found.append("".join(line.removeprefix(indent) for line in code.splitlines(keepends=True)))
    return found


PAGES = sorted(path for path in DOCS.rglob("*.md") if blocks(path))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_code_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Some write files.
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__page__"}
    # Some name methods of their own.
    with mock.patch.dict(METHODS):
        for block in blocks(path):
            # Without the annotations of this file's future.
            code = compile(block, str(path.relative_to(ROOT)), "exec", dont_inherit=True)
            exec(code, namespace)


def test_every_op_has_its_page() -> None:
    assert {path.stem for path in (DOCS / "ops").glob("*.md")} - {"index"} == STEMS


def test_every_method_has_its_page() -> None:
    index = (DOCS / "methods/index.md").read_text()
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index", "own"} == set(METHODS)
    rows = re.findall(r"^\| \[`([\w-]+)`\]\(\1\.md\) \| .*`~mmfast\.methods\.(\w+)`", index, flags=re.M)
    assert dict(rows) == {name: method.__name__ for name, method in METHODS.items()}


# What autodoc, or a page itself, describes: "mmfast.ops.kmeans".
DESCRIBED = re.compile(r"^\.\. (?:auto\w+|py:\w+):: (mmfast[\w.]*)", flags=re.M)


def named(name: str) -> object:
    """Return what a dotted name stands for; of an attribute and a module of one name the attribute."""
    root, *parts = name.split(".")
    found, path = importlib.import_module(root), root
    for part in parts:
        path = f"{path}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
    return found


@pytest.mark.parametrize("package", ["mmfast", *(f"mmfast.{name}" for name in ROOMS)])
def test_every_public_name_is_on_one_page(package: str) -> None:
    described = [named(name) for path in DOCS.rglob("*.md") for name in DESCRIBED.findall(path.read_text())]
    module = importlib.import_module(package)
    for name in module.__all__:
        public = getattr(module, name)
        # A package stands for its section's pages, where its names are.
        if name not in ROOMS:
            count = sum(each is public for each in described)
            assert count == 1, f"{package}.{name} must be described on one page of docs, is {count} times"


def test_pages_of_methods_name_all_options_and_defaults() -> None:
    for name, method in METHODS.items():
        text = (DOCS / "methods" / f"{name}.md").read_text()
        for field in fields(method):
            assert f" | `{field.name}` | `{field.default!r}` | " in text, f"{name}: {field.name}"

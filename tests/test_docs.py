"""The documentation's Python runs as it stands, page by page, as a reader would paste it; no page is missing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.stems import ROOT, STEMS

DOCS = ROOT / "docs"
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
    for block in blocks(path):
        # Not with this file's own `from __future__`.
        exec(compile(block, str(path.relative_to(ROOT)), "exec", dont_inherit=True), namespace)


def test_every_op_has_its_page() -> None:
    assert {path.stem for path in (DOCS / "ops").glob("*.md")} - {"index"} == STEMS


def test_every_method_has_its_page() -> None:
    from mmfast.methods import METHODS

    assert {path.stem for path in (DOCS / "methods").glob("*.md")} - {"index"} == set(METHODS)

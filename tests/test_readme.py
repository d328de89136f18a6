"""README's Python snippets run as they stand, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def snippets() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def test_snippets_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(snippets()) >= 2
    # Some write files.
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for snippet in snippets():
        exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "accuracy=0." in printed
    assert namespace["values"].shape == (1000, 2)


def test_two_screens_are_enough() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 100


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    here = [link for link in links if "://" not in link]
    assert len(here) >= 10
    assert [link for link in here if not (ROOT / link).exists()] == []

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
    assert len(snippets()) >= 3
    # Some write files.
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for snippet in snippets():
        exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    # As the comment beside it says: fusion beats its parts.
    assert "accuracy=0.94" in printed
    assert "torch.Size([90, 2])" in printed


def test_methods_table_is_complete() -> None:
    from mmfast.methods import METHODS

    rows = re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", (ROOT / "README.md").read_text(), flags=re.M)
    assert {command: METHODS[command].__name__ for command in METHODS} == {c: name for name, c in rows}

"""Docstrings as they are written for `help()`: an indented block after a blank line is code, or a list."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


# An argument that is told by its letter alone, "num_classes: C.", which would begin a list.
LETTER = re.compile(r"^( +\w+: )([A-Z])\.$")


def mark_code(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Give an indented block the two colons before it that reStructuredText wants there."""
    marked: list[str] = []
    for number, line in enumerate(lines):
        marked.append(line)
        if number + 2 >= len(lines) or not line.strip() or lines[number + 1].strip():
            continue
        after = lines[number + 2]
        is_deeper = bool(after.strip()) and indent_of(after) > indent_of(line)
        if not is_deeper or after.lstrip().startswith("- ") or line.rstrip().endswith("::"):
            continue
        if line.rstrip().endswith(":"):
            marked[-1] = line.rstrip() + ":"
        else:
            marked += ["", " " * indent_of(line) + "::"]
    lines[:] = [LETTER.sub(r"\1`\2`.", line) for line in marked]


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, which rewrites sections.
    app.connect("autodoc-process-docstring", mark_code, priority=100)
    return {"parallel_read_safe": True}

"""Docstrings as they are written for `help()`: indented code that follows a colon and a blank line is code."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def indent_of(line: str) -> int:
    return len(line) - len(line.lstrip())


def mark_code(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn the colon before an indented block into the two that reStructuredText wants there."""
    for number in range(len(lines) - 2):
        line, between, after = lines[number : number + 3]
        is_code = line.rstrip().endswith(":") and not line.rstrip().endswith("::")
        if is_code and not between.strip() and after.strip() and indent_of(after) > indent_of(line):
            lines[number] = line.rstrip() + ":"


def setup(app: Sphinx) -> dict[str, bool]:
    # Before napoleon, which rewrites sections.
    app.connect("autodoc-process-docstring", mark_code, priority=100)
    return {"parallel_read_safe": True}

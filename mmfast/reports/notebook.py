"""Tables and sentences of a comparison as HTML, which a notebook shows in place of a repr."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text


def as_html(tables: Sequence[Table], notes: Sequence[str], sentences: Sequence[str]) -> str:
    """Return tables, notes on them in small letters, and sentences; all that is text is escaped."""
    parts = [_table(table) for table in tables]
    parts += [f'<p style="opacity: 0.7; font-size: 85%">{html.escape(text)}</p>' for text in notes]
    parts += [f"<p>{html.escape(text)}</p>" for text in sentences]
    return f'<div style="max-width: 60em">{"".join(parts)}</div>'


def _table(table: Table) -> str:
    header = "".join(_cell("th", column.header, column.justify) for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = (
        "".join(_cell("td", cell, column.justify) for cell, column in zip(row, table.columns, strict=True))
        for row in rows
    )
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(tag: str, content: Any, justify: str) -> str:
    text = html.escape(str(content)).replace("\n", "<br>")
    if isinstance(content, Text) and "bold" in str(content.style):
        text = f"<b>{text}</b>"
    return f'<{tag} style="text-align: {justify}; white-space: nowrap">{text}</{tag}>'

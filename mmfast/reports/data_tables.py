"""How the data were read, as a table with warnings for a terminal of any width."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmfast.data.overview import Overview
from mmfast.reports.tables import hyphenate

# Width at which modality names go over to another line, from wide to narrow; at None nothing is broken.
_LAYOUTS = (None, 24, 14, 9)
OVERVIEW_NOTE = (
    "Absent: samples of all parts without it. Constant: features or channels that never vary in train."
)


def show_overview(console: Console, overview: Overview) -> None:
    """Print how each modality was read, and what a result on the data will not show."""
    unbounded = Console(width=10_000)
    tables = [overview_table(overview, wrap) for wrap in _LAYOUTS]
    fitting = [table for table in tables if unbounded.measure(table).maximum <= console.width]
    console.print(fitting[0] if fitting else tables[-1])
    if any(modality.lacking or modality.constant for modality in overview.modalities):
        console.print(Text(OVERVIEW_NOTE, style="dim"))
    for sentence in overview.warnings:
        console.print(Text(f"Warning: {sentence}", style="yellow"))
    console.print()


def overview_table(overview: Overview, wrap: int | None) -> Table:
    """Return how each modality was read; names go over to another line at a width, at None nothing does."""
    wide = wrap is None
    table = Table(box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold", pad_edge=False)
    above = "" if wide else "\n"
    for header in ("Modality", "Shape"):
        table.add_column(above + header, overflow="fold")
    for header in ("Taken as", "Encoder"):
        table.add_column(above + header, no_wrap=True)
    for header in (
        ("Parameters", "Absent", "Constant") if wide else ("Param-\neters", "Ab-\nsent", "Con-\nstant")
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for modality in overview.modalities:
        shape, encoder = str(list(modality.shape)), modality.encoder or "–"
        if not wide:
            shape, encoder = _halved(shape), encoder.replace(" ", "\n", 1)
        table.add_row(
            hyphenate(modality.name, wrap),
            shape,
            modality.kind,
            encoder,
            "–" if modality.parameters is None else _short(modality.parameters),
            f"{modality.lacking:,}",
            f"{modality.constant}/{modality.features}" if modality.constant else "0",
        )
    return table


def _halved(shape: str) -> str:
    """Return a shape of three or more sizes on two lines."""
    sizes = shape.split(" ")
    if len(sizes) < 3:
        return shape
    return " ".join(sizes[:2]) + "\n" + " ".join(sizes[2:])


def _short(count: int) -> str:
    """Return a number in at most six characters."""
    if count < 10_000:
        return f"{count:,}"
    unit, letter = (1_000, "k") if count < 999_950 else (1_000_000, "M")
    return f"{count / unit:.1f}{letter}"

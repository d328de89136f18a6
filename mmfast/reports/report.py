"""A comparison as one page of HTML: no server, no network, no script; pictures lie in it."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from mmfast.data.overview import Overview
from mmfast.experiments.findings import Findings
from mmfast.experiments.results import TUNING
from mmfast.experiments.summary import Summary
from mmfast.files import replacing
from mmfast.methods import METHODS
from mmfast.plots import DPI
from mmfast.reports.confusions import Confusion
from mmfast.reports.data_tables import OVERVIEW_NOTE, overview_table
from mmfast.reports.pictures import Picture
from mmfast.reports.tables import note, tables
from mmfast.reports.tuning_tables import score_text
from mmfast.reports.verdict import (
    EXPLANATION,
    diverged_sentence,
    early_sentence,
    gap_sentence,
    idle_sentence,
    ranking,
    verdict,
)

# Columns of a terminal for which tables are laid out: a page can be wider than any, and scrolls.
_WIDTH = 1000
# Pixels of CSS to an inch.
_CSS_DPI = 96
# Columns of a table that fit a page.
_MOST_COLUMNS = 12
# Letters of a cell from which on it goes over lines.
_LONG = 30


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    is_bold: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of the page.

    Attributes:
        caption: what it shows.
        headers: of the columns.
        rows: cells by column.
        is_number: which columns hold numbers.
        heading: the column that names a row.
    """

    caption: str
    headers: list[str]
    rows: list[list[Cell]]
    is_number: list[bool]
    heading: int = 0

    @property
    def kinds(self) -> list[Markup]:
        """What columns are, as attributes of HTML: numbers, long texts that go over lines, or neither."""
        longest = [
            max((len(row[place].text) for row in self.rows), default=0) for place in range(len(self.headers))
        ]
        return [
            Markup(' class="number"' if number else ' class="text"' if size > _LONG else "")
            for number, size in zip(self.is_number, longest, strict=True)
        ]


def grid_of(table: Table, caption: str) -> Grid:
    """Return a table of the terminal as one of the page, with its marks."""
    headers = [_cell(column.header).text for column in table.columns]
    rows = [list(map(_cell, row)) for row in zip(*(column.cells for column in table.columns), strict=True)]
    numbers = [column.justify == "right" for column in table.columns]
    # Before the names of rows stand their numbers, where columns elsewhere are told by these.
    return Grid(caption, headers, rows, numbers, heading=0 if headers[0] else 1)


def _cell(value: Any) -> Cell:
    if isinstance(value, Text):
        return Cell(value.plain, "bold" in str(value.style))
    return Cell(str(value))


def write_report(
    path: Path,
    summaries: Sequence[Summary],
    findings: Findings,
    content: Mapping[str, Any],
    *,
    pictures: Sequence[Picture],
    confusions: Sequence[tuple[Confusion, Picture]] = (),
    overview: Overview | None = None,
    warnings: Sequence[str] = (),
    command: str | None = None,
) -> None:
    """Write the page.

    Args:
        path: of the file; pictures lie beside it.
        summaries: one a method.
        findings: what they support.
        content: of results.json.
        pictures: of the comparison.
        confusions: of chosen methods, each with its picture.
        overview: how each modality was read, and what the data will not show.
        warnings: sentences besides those of `overview`.
        command: that made it, as it is typed.
    """
    # What `tables` and `grid_of` give is escaped by Jinja as everything else.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    data, machine = content["data"], content["machine"]
    text = environment.get_template("report.html").render(
        name=data.get("name", "data sets of a program"),
        versions=content["versions"],
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        verdict=verdict(summaries, findings),
        explanation=EXPLANATION,
        sentences=[
            diverged_sentence(summaries),
            ranking(summaries, findings),
            idle_sentence(summaries),
            early_sentence(summaries),
            gap_sentence(summaries),
        ],
        warnings=[*(overview.warnings if overview else ()), *warnings],
        tables=_result_grids(summaries, findings),
        note=note(summaries, findings, content["configuration"].get(TUNING, {}).get("trials", 0)),
        pictures=[_embedded(picture, path.parent) for picture in pictures],
        confusions=[_confusion(confusion, picture, path.parent) for confusion, picture in confusions],
        recall=_recall_grid([confusion for confusion, _ in confusions]) if confusions else None,
        data=data["description"],
        modalities=None if overview is None else _overview_grid(overview),
        command=command,
        settings=[
            *_settings_grids(content["configuration"]),
            _pairs("Versions", content["versions"]),
            _pairs("Machine", machine),
        ],
    )
    with replacing(path, "wb") as file:
        # Names of files may hold bytes that are no text.
        file.write(text.encode(errors="backslashreplace"))


def _result_grids(summaries: Sequence[Summary], findings: Findings) -> list[Grid]:
    made = tables(summaries, _WIDTH, findings)
    grids = _parts(grid_of(made[0], "The test set, one row a method"))
    for table in made[1:]:
        header = str(table.columns[0].header)
        grids.append(grid_of(table, "Modalities" if header == "Method" else f"{header}, one row a modality"))
    return grids


def _parts(grid: Grid) -> list[Grid]:
    """Return a table in parts that fit a page, where it has many columns: columns of one kind stay together.

    Headers of a modality's columns are its name and, in another line, the kind of figure.
    """
    if len(grid.headers) <= _MOST_COLUMNS:
        return [grid]
    parts: list[list[int]] = [[0]]
    kind = ""
    for place, header in enumerate(grid.headers[1:], 1):
        new = header.rpartition("\n")[2] if "\n" in header else kind
        if new != kind:
            kind, size = new, sum(h.endswith(f"\n{new}") for h in grid.headers)
            # What all modalities reach stays for itself.
            if len(parts) == 1 or len(parts[-1]) + size > _MOST_COLUMNS - 2:
                parts.append([0])
        parts[-1].append(place)
    captions = [grid.caption, *["Each modality on the test set"] * (len(parts) - 1)]
    return [_columns(grid, part, caption) for part, caption in zip(parts, captions, strict=True)]


def _columns(grid: Grid, places: Sequence[int], caption: str) -> Grid:
    rows = [[row[place] for place in places] for row in grid.rows]
    numbers = [grid.is_number[place] for place in places]
    return Grid(caption, [grid.headers[place] for place in places], rows, numbers, grid.heading)


def _overview_grid(overview: Overview) -> Grid:
    return grid_of(overview_table(overview, None), f"How each modality was read. {OVERVIEW_NOTE}")


def _confusion(confusion: Confusion, picture: Picture, folder: Path) -> dict[str, Any]:
    names, shares = confusion.class_names, confusion.shares
    rows = [
        [names[y], names[z], f"{100 * shares[y, z]:.1f}", f"{confusion.counts[y, z]:,}"]
        for y, z in confusion.worst()
    ]
    headers = ["Label", "Taken for", "Of the label (%)", "Samples, all seeds"]
    worst = Grid(
        f"{confusion.title}: most frequent mistakes",
        headers,
        [list(map(Cell, row)) for row in rows],
        [False, False, True, True],
    )
    return {
        "title": confusion.title,
        "picture": _embedded(picture, folder),
        "worst": worst if rows else None,
    }


def _recall_grid(confusions: Sequence[Confusion]) -> Grid:
    first = confusions[0]
    rows = [
        [Cell(name), Cell(f"{first.support[c]:,}"), *(Cell(each.recall_text(c)) for each in confusions)]
        for c, name in enumerate(first.class_names)
    ]
    seeds = max(len(each.recall) for each in confusions)
    spread = ", mean ± standard deviation over seeds" if seeds > 1 else ""
    headers = ["Class", "Test samples", *(each.title for each in confusions)]
    caption = f"Recall by class: share of its test samples that is predicted right (%){spread}"
    return Grid(caption, headers, rows, [False, *[True] * (len(headers) - 1)])


def _settings_grids(configuration: Mapping[str, Any]) -> list[Grid]:
    """Return settings of all runs, those of methods, and those that trials have found."""
    apart = ("methods", TUNING)
    given = ", as given before the trials" if TUNING in configuration else ""
    shared = {name: value for name, value in configuration.items() if name not in apart}
    grids = [_pairs(f"Settings of all runs{given}", shared)]
    methods = configuration["methods"]
    rows = [[Cell(METHODS[name].title), Cell(_listed(config) or "–")] for name, config in methods.items()]
    grids.append(Grid(f"Options of methods{given}", ["Method", "Options"], rows, [False, False]))
    if tuning := configuration.get(TUNING):
        rows = [
            [
                Cell(METHODS[name].title),
                Cell(_listed(told["settings"])),
                Cell(f"{told['select']} {score_text(told['score'], told['select'])}"),
            ]
            for name, told in tuning["methods"].items()
        ]
        caption = f"Settings chosen by {tuning['trials']} trials each, on validation data"
        grids.append(Grid(caption, ["Method", "Chosen", "Score"], rows, [False, False, True]))
    return grids


def _pairs(caption: str, values: Mapping[str, Any]) -> Grid:
    rows = [[Cell(str(name)), Cell(_plain(value))] for name, value in values.items()]
    return Grid(caption, ["Name", "Value"], rows, [False, False])


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Any) -> str:
    """Return a value of results.json as text."""
    if isinstance(value, Mapping):
        return _listed(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _embedded(picture: Picture, folder: Path) -> dict[str, Any]:
    content = (folder / picture.name).read_bytes()
    # Of a PNG's first chunk, so that the page does not move while it is shown.
    width, height = struct.unpack(">II", content[16:24])
    return {
        "data": base64.b64encode(content).decode(),
        "width": round(width * _CSS_DPI / DPI),
        "height": round(height * _CSS_DPI / DPI),
        "title": picture.title,
        "text": picture.text,
    }

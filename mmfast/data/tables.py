"""What to do with a single table or array: a line of Python to start from, as it names no part of it."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfast.errors import either

# Suffixes of tables, and what separates their columns.
TABLES = {".csv": ",", ".tsv": "\t"}
ARRAY = ".npy"
_SOURCES = 'data must be "htad", a FILE.npz or a FOLDER'
# Lines that are looked at.
_LINES = 1000
_LACKING = ("", "na", "n/a", "nan", "null", "none", "?")
# Rows from which a column that hardly repeats itself numbers or names the samples.
_FEW = 10


def is_single(path: Path) -> bool:
    """Whether a path is a file that holds one table or array."""
    return path.is_file() and path.suffix.lower() in (*TABLES, ARRAY)


def how_to_convert(path: Path) -> str:
    """Return what to do with a table or array of which a data set with labels is to be made."""
    if path.suffix.lower() == ARRAY:
        return (
            f"{_SOURCES}, got the single array {str(path)!r}; put it beside its labels, under a name of your "
            f"own: import numpy as np; a = np.load({str(path)!r}); {_saved(path, 'label=labels, sensor=a')}"
        )
    table = _look(path)
    why, others = table.doubts()
    if why:
        which = f"here LABEL, which you replace by that of labels (0 is the first, but it {why}),"
        arrays = f"label=table[:, LABEL], sensor=np.delete(table, {others}, 1).astype(float)"
    else:
        which = "here the first the label"
        arrays = "label=table[:, 0], sensor=table[:, 1:].astype(float)"
    return (
        f"{_SOURCES}, got the table {str(path)!r}; name its columns, {which} and the others one modality: "
        f"import numpy as np; {table.reading(path)}; {_saved(path, arrays)}"
    )


def how_to_convert_new(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return what to do with a table or array of which a model is to predict the labels.

    Args:
        path: of the file.
        shapes: of a sample of each modality of the model.
    """
    names = either(shapes)
    if path.suffix.lower() == ARRAY:
        arrays = _named({next(iter(shapes)): "a"})
        return (
            f"{_SOURCES}, got the single array {str(path)!r}; give it the name of its modality, {names}: "
            f"import numpy as np; a = np.load({str(path)!r}); {_saved(path, arrays)}"
        )
    table = _look(path)
    sizes = [math.prod(shape) for shape in shapes.values()]
    bounds = list(itertools.accumulate(sizes, initial=table.first_column(sum(sizes))))
    slices = {
        name: f"table[:, {low}:{high}].astype(float)" + f".reshape{(-1, *shape)}" * (len(shape) > 1)
        for (name, shape), low, high in zip(shapes.items(), bounds, bounds[1:])
    }
    return (
        f"{_SOURCES}, got the table {str(path)!r}; say which columns are which of the model's "
        f"modalities, {names}, here one after the other: import numpy as np; {table.reading(path)}; "
        + _saved(path, _named(slices))
    )


@dataclass(frozen=True)
class _Table:
    """What the beginning of a table shows.

    Attributes:
        mark: what separates columns.
        skipped: lines that are not data, those of a header, before the first row.
        is_quoted: whether cells stand in quotes.
        rows: cells of the rows that were looked at.
    """

    mark: str
    skipped: int
    is_quoted: bool
    rows: list[list[str]]

    def reading(self, path: Path) -> str:
        """Return the statement that reads the table as strings."""
        options = f", skiprows={self.skipped}" * (self.skipped > 0) + ", quotechar='\"'" * self.is_quoted
        return f"table = np.loadtxt({str(path)!r}, str, delimiter={self.mark!r}{options})"

    def doubts(self) -> tuple[str, str]:
        """Return why the first column is hardly that of labels, "" if it may be, and what is no feature."""
        column = [row[0] for row in self.rows]
        if any(_is_number(cell) and not float(cell).is_integer() for cell in column):
            return "holds real numbers", "LABEL"
        if len(column) >= _FEW and len(set(column)) > len(column) / 2:
            return "seems to number or name the samples", "[0, LABEL]"
        return "", ""

    def first_column(self, size: int) -> int:
        """Return where the first feature of `size` lies: behind a column of other things, if there is one."""
        return int(any(len(row) == size + 1 or not _is_value(row[0]) for row in self.rows[:1]))


def _look(path: Path) -> _Table:
    mark, lines = TABLES[path.suffix.lower()], []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(itertools.islice(file, _LINES), 1):
            # As np.loadtxt leaves them out.
            if (text := line.partition("#")[0].strip("\r\n")).strip():
                lines.append((number, text))
    if lines and mark == "," and "," not in lines[0][1]:
        mark = max(",;\t", key=lines[0][1].count)
    texts = [text for _, text in lines]
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(texts, delimiter=mark)]
    except csv.Error:
        rows = []
    has_header = not rows or _is_header(rows)
    skipped = (lines[0][0] if lines else 1) if has_header else 0
    return _Table(mark, skipped, any('"' in text for text in texts), rows[has_header:])


def _is_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names columns: it holds words where the others hold numbers, or nothing else."""
    first, rest = rows[0], rows[1:]
    if not any(map(_is_number, first)):
        return True
    if _is_numbered(first) and not any(map(_is_numbered, rest[:1])):
        return True
    columns = zip(first, *(row for row in rest if len(row) == len(first)))
    return bool(rest) and any(
        not _is_value(cell) and any(map(_is_number, column)) and all(map(_is_value, column))
        for cell, *column in columns
    )


def _is_numbered(row: Sequence[str]) -> bool:
    """Whether a row numbers columns from 0 or 1 on, as tables without names are written."""
    numbers = [float(cell) for cell in row if _is_number(cell)]
    return len(numbers) > 1 and numbers in [list(range(start, start + len(numbers))) for start in (0, 1)]


def _is_value(cell: str) -> bool:
    """Whether a cell holds a number, or says that it lacks one."""
    return cell.lower() in _LACKING or _is_number(cell)


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def _named(arrays: Mapping[str, str]) -> str:
    """Return arguments by name, also by names that Python's own arguments cannot have."""
    if all(name.isidentifier() and name != "file" for name in arrays):
        return ", ".join(f"{name}={text}" for name, text in arrays.items())
    return "**{" + ", ".join(f"{name!r}: {text}" for name, text in arrays.items()) + "}"


def _saved(path: Path, arrays: str) -> str:
    return f"np.savez({str(path.with_suffix('.npz'))!r}, {arrays})"

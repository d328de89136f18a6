"""Tables of many rows, written a part at a time: as CSV and as Parquet."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.errors import needs_train


@dataclass(frozen=True)
class Cells:
    """A part of a column of which no tensor can be made: texts, and what some rows do not have (None).

    Attributes:
        kind: str, bool, int or float.
        values: of the rows.
    """

    kind: type
    values: Sequence[Any]

    def tolist(self) -> list[Any]:
        """Return the values, as a tensor does."""
        return list(self.values)


# Bytes that are no text are written as their numbers.
_ERRORS = "backslashreplace"
# A part of a column: int64, float64 or bool [n], or cells.
Column = Tensor | Cells
# From the numbers of a first row and of the one after the last to these rows, by column.
Rows = Callable[[int, int], Mapping[str, Column]]


def write_csv(path: str | Path, rows: Rows, size: int, at_once: int) -> None:
    """Write a table as CSV; what a row does not have is left empty.

    Args:
        path: of the file.
        rows: gives parts of the table.
        size: number of rows.
        at_once: rows that are held at a time.
    """
    # Names of files may hold bytes that are no text.
    with open(path, "w", newline="", encoding="utf-8", errors=_ERRORS) as file:
        writer = csv.writer(file)
        writer.writerow(rows(0, 0))
        for columns in _parts(rows, size, at_once):
            writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def write_parquet(path: str | Path, rows: Rows, size: int, at_once: int) -> None:
    """Write a table as Parquet, integers and floats in 64 bits; row groups of `at_once` rows.

    The arguments are those of `write_csv`.
    """
    with needs_train("to_parquet"):
        import pyarrow
        from pyarrow.parquet import ParquetWriter

    kinds = {
        torch.int64: pyarrow.int64(),
        torch.float64: pyarrow.float64(),
        torch.bool: pyarrow.bool_(),
        str: pyarrow.string(),
        bool: pyarrow.bool_(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
    }

    def kind_of(column: Column) -> Any:
        return kinds[column.kind if isinstance(column, Cells) else column.dtype]

    def array(column: Column) -> Any:
        if isinstance(column, Cells) and column.kind is str:
            return pyarrow.array(map(_as_utf8, column.values), pyarrow.string())
        if isinstance(column, Cells) or column.dtype == torch.bool:
            return pyarrow.array(column.tolist(), kind_of(column))
        # Of numpy's arrays pyarrow asks whether they are pandas's, and imports that for it.
        content = pyarrow.py_buffer(column.contiguous().numpy())
        return pyarrow.Array.from_buffers(kind_of(column), len(column), [None, content])

    schema = pyarrow.schema((name, kind_of(column)) for name, column in rows(0, 0).items())
    with ParquetWriter(path, schema) as writer:
        for columns in _parts(rows, size, at_once):
            batch = [array(column) for column in columns.values()]
            writer.write_batch(pyarrow.RecordBatch.from_arrays(batch, schema=schema))


def _as_utf8(text: str | None) -> bytes | None:
    return None if text is None else text.encode(errors=_ERRORS)


def _parts(rows: Rows, size: int, at_once: int) -> Iterator[Mapping[str, Column]]:
    for start in range(0, size, at_once):
        yield rows(start, min(size, start + at_once))


def names_of(
    labels: Tensor,  # [n] int64, negative where there is none
    class_names: Sequence[str] | None,
) -> Cells:
    """Return labels as the names of their classes, or as numbers where these have none."""
    numbers = labels.tolist()
    if class_names is None:
        return Cells(int, [None if number < 0 else number for number in numbers])
    return Cells(str, [None if number < 0 else class_names[number] for number in numbers])


def keys_of(
    keys: Any,  # numpy's [n], integers or strings
) -> Column:
    """Return the keys of samples as a column."""
    if keys.dtype.kind == "S":
        return Cells(str, [key.decode(errors=_ERRORS) for key in keys.tolist()])
    if keys.dtype.kind in "iu":
        return torch.tensor(keys.tolist(), dtype=torch.int64, device="cpu")
    return Cells(str, keys.astype(str).tolist())


def only(column: Column, kept: Tensor) -> Column:  # bool [n]
    """Return a column whose cells are empty in the rows that are not kept."""
    kinds = {torch.bool: bool, torch.int64: int}
    kind = column.kind if isinstance(column, Cells) else kinds.get(column.dtype, float)
    return Cells(kind, [value if keep else None for value, keep in zip(column.tolist(), kept.tolist())])

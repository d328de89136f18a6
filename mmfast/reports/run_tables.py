"""Tables of a comparison: one row a run as CSV, one row a run and test sample as Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast.columns import Cells, Column, keys_of, names_of, write_csv, write_parquet
from mmfast.experiments.outcomes import MOST, Outcome
from mmfast.files import replacing

# Figures of an entry that are told by modality, and what their columns end in.
_BY_MODALITY = {"probe": "probe", "missing": "missing"}
_ENDINGS = {"modality_accuracy": "alone"}
# Of an entry, beside its metrics.
_BEFORE, _AFTER = ("method", "seed", "protocol"), ("epochs", "seconds", "seconds_per_epoch", "wall_seconds")
# Numbers of a row group, about: 16 MiB.
_NUMBERS, _MOST_ROWS = 2**21, 2**16


def write_runs(path: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write entries of results.json as CSV, one row a run; empty where a run has no such figure.

    Columns are `method`, `seed`, `protocol`, the figures of the test set, `ece`, for each modality
    `<modality>__alone`, `__contribution`, `__probe` and `__missing`, the accuracy without it; `epochs`, times
    in seconds, and `diverged`: why a run has no figures.
    """
    rows = [_run(entry) for entry in runs]
    # Runs that diverged lack most columns, and may come first.
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))

    def part(start: int, stop: int) -> dict[str, Column]:
        return {name: Cells(str, [row.get(name) for row in rows[start:stop]]) for name in names}

    with replacing(path, "wb") as file:
        write_csv(file.name, part, len(rows), len(rows) or 1)


def _run(entry: dict[str, Any]) -> dict[str, Any]:
    metrics = entry.get("metrics", {})
    row = {name: entry.get(name) for name in _BEFORE}
    row |= {name: value for name, value in metrics.items() if not isinstance(value, dict)}
    row["ece"] = entry.get("ece")
    tables = {_ENDINGS.get(name, name): value for name, value in metrics.items() if isinstance(value, dict)}
    tables |= {ending: entry[name] for name, ending in _BY_MODALITY.items() if name in entry}
    row |= {f"{m}__{ending}": value for ending, table in tables.items() for m, value in table.items()}
    row |= {name: entry[name] for name in _AFTER if name in entry}
    return row | {"diverged": entry.get("diverged")}


def write_predictions(
    path: Path,
    outcomes: Mapping[tuple[str, int], Outcome],
    keys: np.ndarray | None,  # [N]
    class_names: Sequence[str],
) -> bool:
    """Write what runs predict for each test sample as Parquet, one run after the other.

    Return whether it holds the probabilities of all classes.

    Columns are `method`, `seed`, `sample`, its index in the test part, `key` where the data have keys of
    their own, such as rows of a file or names of files, `label` and `prediction` as names of classes, and
    `probability__<class>` for each class, or `confidence`, the probability of the predicted one, and
    `likelihood`, that of the label, where runs keep no others. One run and one row group are in memory at a
    time.

    Args:
        path: of the file.
        outcomes: by method and seed, each read when it is asked for; at least one.
        keys: of the samples.
        class_names: of the C classes.

    Raises:
        ValueError: runs of other numbers of samples.
    """
    rows = _Rows(outcomes, keys, class_names)
    at_once = min(_MOST_ROWS, max(1, _NUMBERS // ((len(class_names) if rows.has_all else 2) + 6)))
    with replacing(path, "wb") as file:
        write_parquet(file.name, rows, rows.size, at_once)
    return rows.has_all


class _Rows:
    """Rows of all runs, of which the one that was read last is held."""

    def __init__(
        self,
        outcomes: Mapping[tuple[str, int], Outcome],
        keys: np.ndarray | None,  # [N]
        class_names: Sequence[str],
    ) -> None:
        self.outcomes, self.keys, self.class_names = outcomes, keys, class_names
        self.runs = list(outcomes)
        self.held = self.runs[0], outcomes[self.runs[0]]
        self.num_samples = len(self.held[1])
        self.size = len(self.runs) * self.num_samples
        # Runs from before there was a limit kept all of any number.
        self.has_all = self.num_samples * len(class_names) <= MOST

    def __call__(self, start: int, stop: int) -> dict[str, Column]:
        """Return some rows as columns."""
        parts: list[dict[str, Column]] = []
        while start < stop or not parts:
            run, first = divmod(start, max(1, self.num_samples))
            last = min(self.num_samples, first + stop - start)
            parts.append(self._of_run(self.runs[run], first, last))
            start += max(1, last - first)
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def _of_run(self, run: tuple[str, int], first: int, last: int) -> dict[str, Column]:
        outcome = self._outcome(run)
        size = last - first
        table: dict[str, Column] = {
            "method": Cells(str, [run[0]] * size),
            "seed": torch.full((size,), run[1]),
            "sample": torch.arange(first, last),
        }
        if self.keys is not None:
            table["key"] = keys_of(self.keys[first:last])
        for name in ("labels", "predicted"):
            numbers = torch.from_numpy(getattr(outcome, name)[first:last])
            table[{"labels": "label", "predicted": "prediction"}[name]] = names_of(numbers, self.class_names)
        return table | self._probabilities(outcome, first, last)

    def _probabilities(self, outcome: Outcome, first: int, last: int) -> dict[str, Column]:
        if outcome.probabilities is None or not self.has_all:
            named = zip(("confidence", "likelihood"), outcome.pair(), strict=True)
            return {name: torch.from_numpy(column[first:last]).double() for name, column in named}
        probabilities = torch.from_numpy(outcome.probabilities[first:last]).double()
        names = (f"probability__{name}" for name in self.class_names)
        return dict(zip(names, probabilities.T, strict=True))

    def _outcome(self, run: tuple[str, int]) -> Outcome:
        if self.held[0] != run:
            self.held = run, self.outcomes[run]
        if len(self.held[1]) != self.num_samples:
            raise ValueError(
                f"outcomes must be of the same {self.num_samples:,} samples, got {len(self.held[1]):,} of "
                f"{run[0]} with seed {run[1]}"
            )
        return self.held[1]


def _joined(parts: Sequence[Column]) -> Column:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Cells):
        return Cells(first.kind, [value for part in parts for value in part.tolist()])
    return torch.cat([part for part in parts if not isinstance(part, Cells)])

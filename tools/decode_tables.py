"""Tables of what tools/passes has counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from decodes import PARTS

Row = dict[str, Any]  # what tools/passes found of a method and process

_TITLES = ("main", "workers", "started", "seconds", "bound", "least s")


def by_process(found: Sequence[Row], processes: int) -> list[str]:
    """Return a table of methods and processes; the least is an equal share of what all need together."""
    titles = (*(title for part in PARTS for title in (part, "least")), *_TITLES)
    lines = [f"{'method':18} {'process':>7}" + "".join(f"{title:>9}" for title in titles)]
    for row in found:
        made = [row["decodes"][part]["in"] for part in PARTS]
        counts = [n for part, one in zip(PARTS, made) for n in (_sum(one), row["least"][part] / processes)]
        counts += [sum(one[where] for one in made) for where in ("main", "workers")]
        counts.append(row["workers_started"])
        times = [row[key] for key in ("seconds", "bound_seconds", "least_seconds")]
        cells = [f"{count:9,.0f}" for count in counts] + [f"{seconds:9.1f}" for seconds in times]
        lines.append(f"{row['method']:18} {row['process']:7}" + "".join(cells))
    return lines


def by_epoch(found: Sequence[Row]) -> list[str]:
    """Return a table of the epochs of each method, of all its processes together, seconds of the first."""
    most = max(len(row["epochs"]) for row in found)
    titles = "".join(f"{number:>8}" for number in (*range(most), "behind"))
    lines = [f"{'method':18} {'decodes':12}{titles}"]
    for name, group in groupby(found, itemgetter("method")):
        for title, cells in _epochs_of(list(group)).items():
            gap = [""] * (most - len(cells) + 1)
            lines.append(f"{name:18} {title:12}" + "".join(f"{c:>8}" for c in (*cells[:-1], *gap, cells[-1])))
            name = ""
    return lines


def _epochs_of(rows: list[Row]) -> dict[str, list[str]]:
    """Return the lines of a method by title: a cell per epoch, and one for what comes behind the last."""
    epochs = list(zip(*([*row["epochs"], row["behind"]] for row in rows), strict=True))  # of each: processes
    cells = {}
    for part in ("train", "val"):
        cells[part] = _numbers(sum(_sum(one[part]) for one in each) for each in epochs)
        cells[f"{part} least"] = _numbers(each[0]["least"][part] for each in epochs)
    cells["in main"] = _numbers(
        sum(one[p]["main"] for one in each for p in ("train", "val")) for each in epochs
    )
    cells["seconds"] = [f"{each[0]['seconds']:.1f}" for each in epochs]
    return cells


def by_place(found: Sequence[Row]) -> list[str]:
    """Return lines that say which code asked for decodes."""
    lines = []
    for row in found:
        lines.append(f"{row['method']}, process {row['process']}")
        for part in PARTS:
            counted = row["decodes"][part]
            lines += [f"  {part:6}{count:9,}  {place}" for place, count in counted["places"].items()]
            if counted["in"]["workers"]:
                lines.append(f"  {part:6}{counted['in']['workers']:9,}  in workers")
    return lines


def _sum(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _numbers(counts: Iterable[int]) -> list[str]:
    return [f"{count:,}" for count in counts]

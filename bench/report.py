"""What a benchmark leaves behind: tables, a JSON with the machine's facts, pictures of time against size."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mmfast
from mmfast import backend
from mmfast.cli import info
from mmfast.files import write_json

from .harness import DIRECTION_ORDER, OURS, Figure, Limits, Options, Row, Work, spelled

if TYPE_CHECKING:
    from rich.console import Console

LIMIT = "limit of this machine"
# More than these in one picture are too small to read.
_MOST_PANELS = 9
_PACKAGES = (
    *("torch", "triton", "numpy", "scikit-learn", "info-nce-pytorch", "shapiq", "captum"),
    *("cut-cross-entropy", "liger-kernel", "inf-cl", "flash-kmeans"),
)


def machine_facts(options: Options, limits: Limits | None, load_average: float | None) -> dict[str, Any]:
    """Return what a reader needs to know of the machine to judge the figures."""
    return {
        "processor": info.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": backend.extension("cpu").isa() if backend.why_not("cpu") is None else None,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"mmfast": mmfast.__version__} | _versions(),
        "load_average_before": load_average,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "allocator": _allocator(options),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "limits": None if limits is None else asdict(limits),
    }


def _allocator(options: Options) -> str:
    if options.device != "cpu":
        return "torch"
    return "the system's" if options.fresh_memory else "keeps freed memory, see clock.py"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def stem(facts: dict[str, Any], ops: Sequence[str], options: Options) -> str:
    """Return the name of a run's file: machine and date, and what was left out of a whole run."""
    machine = facts["gpu"] or f"{facts['processor']} {facts['threads']} threads"
    words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(.*?\)", "", machine.lower())).strip("-")
    parts = [words, facts["date"][:10], *ops, *(["quick"] if options.quick else [])]
    return "-".join(parts)


def print_machine(
    console: Console, facts: dict[str, Any], limits: Limits, load_average: float | None
) -> None:
    """Print where the run takes place, and what the machine reaches."""
    where = facts["gpu"] or f"{facts['processor']}, {facts['threads']} threads, {facts['instruction_set']}"
    products = ", ".join(f"{name} products {rate / 1e9:,.0f} GFLOP/s" for name, rate in limits.matrix.items())
    console.print(
        f"{where}, torch {facts['versions']['torch']}. Limits measured in this run: "
        f"copy {limits.copy / 1e9:,.1f} GB/s (read plus written), read {limits.read / 1e9:,.1f} GB/s, "
        f"{products}.",
        soft_wrap=True,
    )
    if limits.registers:
        console.print(f"Out of registers, a second: {_registers(limits.registers)}.", soft_wrap=True)
    if load_average is not None and load_average > 0.5:
        console.print(
            f"Others use this machine: load average {load_average:.1f} on {facts['cores']} cores before the "
            "run, so figures are rough.",
            soft_wrap=True,
        )
    console.print()


def _registers(rates: dict[str, dict[str, float]]) -> str:
    texts = []
    for kind, found in rates.items():
        figures = ", ".join(f"{rate / 1e9:,.1f} of {dtype}" for dtype, rate in found.items())
        unit = "operations of multiply-adds" if kind == "multiply_add" else f"{kind}s"
        texts.append(f"10^9 {unit}: {figures}")
    return "; ".join(texts)


def print_table(console: Console, op: str, rows: Sequence[Row]) -> None:
    """Print one line a case: backend, time, part of the limit, memory, times faster than each peer."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in (*row.peers, *row.missing)))
    shown = [name for name in names if any(name in row.peers for row in rows)]
    table = Table(title=op, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    table.add_column("pass", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    for heading in ("ms", "GB/s", "GFLOP/s", "% of limit", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in shown:
        table.add_column(f"x {name}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row), *(_ratio(row, name) for name in shown))
    # A line that does not fit is the terminal's to wrap: cut cells would be lost figures.
    width = Console(width=1000).measure(table).maximum
    Console(file=console.file, width=max(console.width, width), highlight=False).print(table)
    if plain := sum("reference" in row.backend for row in rows):
        console.print(f"{plain} of {len(rows)} rows: plain torch ran in our call, no kernel of ours.")
    if any(row.ratios for row in rows):
        console.print("x peer: the peer's time over ours. -: does not take part here.", style="dim")
    if any(row.percent > 100 for row in rows):
        console.print("Above 100% of a limit: the data stay in a cache.", style="dim")
    for name in names:
        for reason in dict.fromkeys(row.missing[name] for row in rows if name in row.missing):
            console.print(f"missing: {name}: {reason}", style="dim", soft_wrap=True)
    console.print()


def _cells(row: Row) -> list[str]:
    seconds, moved = row.ours.seconds, row.work.read + row.work.written
    operations = row.work.operations
    dtype = "" if row.dtype == "float32" else f" {row.dtype}"
    return [
        row.case + dtype,
        row.direction,
        spelled(row.backend),
        f"{seconds * 1e3:,.3g}" if seconds < 1 else f"{seconds * 1e3:,.0f}",
        f"{moved / seconds / 1e9:.1f}" if moved else "-",
        f"{operations / seconds / 1e9:,.0f}" if operations else "-",
        f"{row.percent:.0f} {row.limit}" if row.limit_seconds else "-",
        "?" if row.ours.peak_memory is None else f"{row.ours.peak_memory / 1e6:,.1f}",
    ]


def _ratio(row: Row, name: str) -> str:
    if name in row.ratios:
        return f"{row.ratios[name]:,.2f}" if row.ratios[name] < 100 else f"{row.ratios[name]:,.0f}"
    return "missing" if name in row.missing else "-"


def write(
    path: Path, facts: dict[str, Any], limits: Limits, options: Options, found: dict[str, list[Row]]
) -> None:
    """Write the JSON of a run: the machine, and every row with its peers' times, or why they are missing."""
    ops = {op: [entry(row) for row in rows] for op, rows in found.items()}
    write_json(path, {"format": 1, "options": asdict(options), "machine": facts, "ops": ops})


def entry(row: Row) -> dict[str, Any]:
    """Return a row as it stands in the JSON of a run."""
    seconds = row.ours.seconds
    return asdict(row) | {
        "bytes_per_second": (row.work.read + row.work.written) / seconds,
        "operations_per_second": row.work.operations / seconds,
        "percent_of_limit": row.percent,
    }


def row_of(entry: dict[str, Any]) -> Row:
    """Return the row of which `entry` made what stands in a JSON."""
    known = {name: value for name, value in entry.items() if name in Row.__dataclass_fields__}
    figures = {
        name: Figure(
            figure["seconds"], (figure["quartiles"][0], figure["quartiles"][1]), figure["peak_memory"]
        )
        for name, figure in (entry["peers"] | {OURS: entry["ours"]}).items()
    }
    return Row(**known | {"ours": figures.pop(OURS), "peers": figures, "work": Work(**entry["work"])})


def plot(op: str, rows: Sequence[Row], size: str, path: Path) -> None:
    """Write a log-log picture of time against size, a panel for each family of cases, the limit drawn in."""
    from matplotlib.figure import Figure

    from mmfast.plots import COLORS, DPI, MARKERS

    panels = _panels(rows)
    columns = min(len(panels), 3 if len(panels) <= 6 else 4)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(5.5, 0.6 + 3.2 * columns), 1.1 + 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    names = list(dict.fromkeys(name for row in rows for name in row.peers))
    styles = {
        name: {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[1 + number % (len(MARKERS) - 1)],
            "markersize": 5,
            "linestyle": "--",
            "linewidth": 1.3,
        }
        for number, name in enumerate(names)
    }
    handles: dict[str, Any] = {}
    for (title, members), axes in zip(panels.items(), grid.flat, strict=False):
        handles |= _draw(axes, members, styles)
        axes.set_title(title, fontsize=10)
    figure.supxlabel(size, fontsize=10)
    figure.supylabel("Time of a call (ms)", fontsize=10)
    order = [name for name in (OURS, *names, LIMIT) if name in handles]
    legend_columns = min(len(order), columns + 2)
    figure.legend(
        [handles[name] for name in order],
        order,
        title=op,
        loc="outside upper center",
        ncols=legend_columns,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return title -> rows by size: every pass of every family, or the fullest where that is too many."""
    words = {"both": "forward and backward"}
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.panel, row.direction), []).append(row)
    if len(panels) > _MOST_PANELS:
        fullest: dict[str, str] = {}
        for family, direction in panels:
            known = fullest.get(family, DIRECTION_ORDER[0])
            fullest[family] = max(known, direction, key=DIRECTION_ORDER.index)
        panels = {key: members for key, members in panels.items() if fullest[key[0]] == key[1]}
    # A single size is for the table, where others have several.
    if any(len(members) > 1 for members in panels.values()):
        panels = {key: members for key, members in panels.items() if len(members) > 1}
    return {
        ", ".join(part for part in (family, words.get(direction, direction)) if part): sorted(
            members, key=lambda row: row.size
        )
        for (family, direction), members in panels.items()
    }


def _draw(axes: Any, members: Sequence[Row], styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw one panel and return its lines by name."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from mmfast.plots import GREY

    lines = {}
    sizes = [row.size for row in members]
    for name, style in styles.items():
        points = [(row.size, 1e3 * row.peers[name].seconds) for row in members if name in row.peers]
        if points:
            (lines[name],) = axes.plot(*zip(*points, strict=True), **style)
    limits = [1e3 * row.limit_seconds for row in members]
    (lines[LIMIT],) = axes.plot(sizes, limits, ":", color=GREY, marker="_", linewidth=1.6)
    ours = [1e3 * row.ours.seconds for row in members]
    (lines[OURS],) = axes.plot(sizes, ours, "o-", color="black", markersize=6, linewidth=2)
    axes.set(xscale="log", yscale="log")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        # Where the axis spans little, tens alone would leave it with one label.
        steps = (1,) if high / low > 100 else (1, 3) if high / low > 20 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=steps, numticks=8))
        axis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    distinct = sorted(set(sizes))
    # Each size is a label where they do not run into each other.
    least = (distinct[-1] / distinct[0]) ** 0.18
    if len(distinct) <= 6 and all(high > max(1.5, least) * low for low, high in pairwise(distinct)):
        axes.set_xticks(distinct)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return lines


def _short(value: float) -> str:
    """Return 20000 as "20k"."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:g}"

"""The directive `measured`: an op's picture and every row of its latest benchmarks, read from bench/results."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
# A whole run: machine and day, nothing after it.
WHOLE_RUN = re.compile(r"(?P<machine>.+)-(?P<day>\d{4}-\d\d-\d\d)$")


def latest_runs(op: str) -> dict[str, dict[str, Any]]:
    """Return {name of the machine: its latest whole run that has `op`}."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        name = WHOLE_RUN.match(path.stem)
        if name is None:
            continue
        run = json.loads(path.read_text())
        if op in run["ops"]:
            found[name["machine"]] = run
    return found


def spelled(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            break
    return f"{seconds / factor:.3g} {unit}"


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table of MyST: times of ours, and how many times as long each peer takes."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row["ratios"]))
    lines = [
        "| " + " | ".join(["case", "direction", "dtype", "time", "of the limit", *peers]) + " |",
        "| --- | --- | --- |" + " ---: |" * (2 + len(peers)),
    ]
    for row in rows:
        percent = row.get("percent_of_limit")
        cells = [row["case"], row["direction"], row["dtype"], spelled(row["ours"]["seconds"])]
        cells.append("" if percent is None else f"{percent:.0f}%")
        cells += [f"{row['ratios'][peer]:.2f}x" if peer in row["ratios"] else "" for peer in peers]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def heading(run: dict[str, Any], count: int) -> str:
    """Return what a reader must know of a run, in a line."""
    machine, versions = run["machine"], run["machine"]["versions"]
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, torch {versions['torch']}, {machine['date'][:10]}: all {count} cases"


class Measured(SphinxDirective):
    """`{measured} <op>`: pictures and tables of the latest run on each machine."""

    required_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        op = self.arguments[0]
        runs = latest_runs(op)
        if not runs:
            raise self.error(f"no file of bench/results has figures of {op!r}")
        lines = []
        picture = RESULTS / f"{op}.png"
        if picture.exists():
            # Sphinx copies pictures that lie among the pages alone.
            copied = Path(self.env.srcdir) / "pictures" / "measured" / picture.name
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, copied)
            lines += [f"![Time against size of {op}](/pictures/measured/{picture.name})", ""]
        for run in runs.values():
            rows = run["ops"][op]
            lines += [f":::{{dropdown}} {heading(run, len(rows))}", "", table(rows), "", ":::", ""]
        lines.append("A peer's figure is how many times as long as ours it takes; less than 1 is faster.")
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}

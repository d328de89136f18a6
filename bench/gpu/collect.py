"""What bench/gpu/measure left, as bench/results/<gpu>-<date>.json with pictures and a table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import steps
from mmfast.bench import main, report
from mmfast.bench.harness import Limits, Options
from mmfast.files import write_json


class RefusedError(Exception):
    """The folder holds nothing to collect; the text is the one sentence the user reads."""


def load(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the run's facts and its lines.

    Raises:
        RefusedError: there are no results in the folder, or they come from a rehearsal.
    """
    paths = [folder / name for name in (steps.FACTS, steps.RESULTS)]
    if missing := [path.name for path in paths if not path.exists()]:
        raise RefusedError(f"{folder} holds no results of bench/gpu/measure: {', '.join(missing)} missing")
    facts, lines = json.loads(paths[0].read_text()), steps.read(paths[1])
    if facts.get("rehearsal") or any(line.get("rehearsal") for line in lines):
        raise RefusedError(f"{folder} holds a rehearsal, whose figures mean nothing")
    rows = [line for line in lines if line.get("row")]
    if not rows or "run" not in facts:
        raise RefusedError(f"{folder} holds no row of bench/gpu/measure")
    return facts, lines


def merged(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return op -> rows in order of size; a case that was measured more than once becomes one row.

    Ours and the limit are those of the first time. A peer timed later keeps the ratio of its own run, in
    which it took turns with ours.
    """
    found: dict[str, dict[tuple, dict[str, Any]]] = {}
    for line in lines:
        row = line.get("row")
        if not row:
            continue
        row = row | {"backend": line["ours"]}
        key = (row["panel"], row["case"], row["direction"], row["dtype"])
        first = found.setdefault(line["op"], {}).setdefault(key, row)
        if first is row:
            continue
        for name in ("peers", "ratios"):
            first[name] = row[name] | first[name]
        missing = first["missing"] | row["missing"]
        first["missing"] = {peer: why for peer, why in missing.items() if peer not in first["peers"]}
    return {
        op: sorted(rows.values(), key=lambda row: (row["panel"], row["direction"], row["size"]))
        for op, rows in found.items()
    }


def table(ops: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Yield the lines of bench/results/README.md's table: a panel and pass each, the span over its sizes."""
    yield "| op | cases | backend | time of a call | of the limit | times faster than |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for op, rows in ops.items():
        groups: dict[tuple, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["panel"], row["direction"], row["dtype"], row["backend"]), []).append(row)
        for (panel, direction, dtype, backend), members in groups.items():
            cases = ", ".join(dict.fromkeys((members[0]["case"], members[-1]["case"])))
            names = dict.fromkeys(name for row in members for name in row["ratios"])
            ratios = [
                f"{name} {_span([row['ratios'][name] for row in members if name in row['ratios']])}"
                for name in names
            ]
            yield (
                f"| `{op}` {panel}, {direction}, {dtype} | {cases} | {backend} "
                f"| {_span([1e3 * row['ours']['seconds'] for row in members])} ms "
                f"| {_span([row['percent_of_limit'] for row in members])}% | {'; '.join(ratios) or '-'} |"
            )


def choices(ops: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Yield, per op, how ours on other backends compare with the one that "auto" took."""
    for op, rows in ops.items():
        for name in dict.fromkeys(
            name for row in rows for name in row["ratios"] if name.startswith("mmfast, ")
        ):
            pairs = [(row["ratios"][name], row["case"]) for row in rows if name in row["ratios"]]
            faster = [case for ratio, case in pairs if ratio < 1]
            span = _span([ratio for ratio, _ in pairs])
            yield (
                f"{op}: {name.removeprefix('mmfast, ')} takes {span} of auto's time; "
                f"faster in {len(faster)} of {len(pairs)} cases"
            )


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}"


def collect(folder: Path, out: Path) -> None:
    """Write the JSON and the pictures; print the table, what settles "auto", and what did not run."""
    facts, lines = load(folder)
    machine, ops = facts["run"]["machine"], merged(lines)
    machine |= {"driver": facts.get("nvidia_smi"), "mmfast_from": facts.get("mmfast")}
    options = Options(**facts["run"]["options"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{report.stem(machine, [], options)}.json"
    limits = facts["run"]["limits"]
    content = {"format": 1, "options": facts["run"]["options"], "machine": machine, "ops": ops}
    write_json(path, content)
    print(f"{machine['gpu']}, {Limits(**limits)}", *table(ops), *choices(ops), sep="\n")
    for op, rows in ops.items():
        if size := main.load(op).SIZE:
            picture = out / f"{path.stem}-{op}.png"
            report.plot(op, [report.row_of(row) for row in rows], size, picture)
            print(f"picture: {picture}")
    for host in folder.glob("*-host.json"):
        # What calls with few samples cost the host: a file of its own, as `mmfast bench --host` writes it.
        shutil.copy(host, out)
        print(f"host: {out / host.name}")
    for line in lines:
        if "failed" in line and "case" in line:
            print(f"failed: {line['op']}, {line['case']}, {line['pass']}: {line['failed']}")
    log = folder / steps.STEPS
    for step in steps.read(log) if log.exists() else []:
        if step["state"] != "passed":
            print(f"{step['state']}: {step['step']}: {step['why']}")
    print(f"written: {path}")


def main_() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu/collect", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "results")
    arguments = parser.parse_args()
    try:
        collect(arguments.folder, arguments.out)
    except RefusedError as error:
        print(f"bench/gpu/collect: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main_())

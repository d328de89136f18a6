"""Rows of one op's benchmark, written one by one: rows.py OP|limits SELECTION OUT [--rehearse].

The harness and the cases are those of `mmfast bench`; a selection is which cases, and which peers in them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import steps
from mmfast import backend
from mmfast.bench import harness, main, report
from mmfast.bench.harness import Case, Limits, Options

# Peers on the CPU, or a call per class or tensor: seconds each, and no rival on a GPU.
SLOW = ("captum", "shapiq", "scikit-learn", "class by class")
SELECTIONS = ("headline", "all", "compiled", "peers")
HEADLINE_SIZE, HEADLINE_DIMS = 16_384, (128, 256)


def _is_compiled(peer: str) -> bool:
    return "compile" in peer


def _takes_part(selection: str, peer: str) -> bool:
    """Whether a peer is timed in a selection: each in one, but ours on other backends in all."""
    if selection == "compiled":
        return _is_compiled(peer)
    if selection == "peers":
        return peer in SLOW
    return not _is_compiled(peer) and peer not in SLOW


def selected(cases: Callable[[], Iterator[Case]], selection: str) -> Iterator[Case]:
    """Yield the cases of a selection, the smallest and the largest of each panel and pass first.

    Compilers and slow peers meet no others. Cases are made anew for each look at them: what a case holds in
    memory is kept for one at a time.
    """
    if selection == "headline":
        for case in cases():
            names = [f"N={HEADLINE_SIZE:,} d={dim}" for dim in HEADLINE_DIMS]
            if case.name in names and case.dtype == torch.bfloat16:
                yield case
        return
    sizes: dict[tuple, list[float]] = {}
    for case in cases():
        sizes.setdefault((case.panel, case.direction), []).append(case.size)
    for wants_end in (True, False) if selection == "all" else (True,):
        for case in cases():
            known = sizes[case.panel, case.direction]
            if (case.size in (min(known), max(known))) == wants_end:
                yield case


def rows(op: str, selection: str, limits: Limits, options: Options, rehearsal: bool) -> Iterator[dict]:
    """Yield what is written of each case; a case that fails is written and does not end the rest."""

    def cases() -> Iterator[Case]:
        torch.manual_seed(0)
        return main.load(op).cases(options)

    for case in harness.with_rivals(op, selected(cases, selection), options):
        peers = {
            name: call
            for name, call in case.peers.items()
            if name.startswith(harness.OURS) or _takes_part(selection, name)
        }
        if selection in ("compiled", "peers"):
            peers = {name: call for name, call in peers.items() if not name.startswith(harness.OURS)}
            if not any(callable(call) for call in peers.values()):
                continue
        case = replace(case, peers=peers)
        if rehearsal:
            case = replace(case, check=lambda found: None)
        about: dict[str, Any] = {"op": op, "case": case.name, "pass": case.direction, "selection": selection}
        about |= {"ours": backend.candidates(op, options.device, case.dtype)[0], "rehearsal": rehearsal}
        begun = time.perf_counter()
        try:
            row = harness.measure(case, limits, options)
        except Exception as error:
            if rehearsal and isinstance(error, ZeroDivisionError):
                yield about | {"row": None}
                continue
            text = " ".join(str(error).split())[:400]
            yield about | {"failed": f"{type(error).__name__}: {text}"}
            if isinstance(error, harness.WrongResultError | torch.OutOfMemoryError):
                continue
            raise
        took = round(time.perf_counter() - begun, 2)
        yield about | {"ours": row.backend, "row": report.entry(row), "took": took}


def main_() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("op")
    parser.add_argument("selection", nargs="?", choices=SELECTIONS, default="all")
    parser.add_argument("--out", type=Path, required=True, help="where the lines are appended")
    parser.add_argument(
        "--limits", type=Path, required=True, help="written by the op `limits`, read by others"
    )
    parser.add_argument("--rehearse", action="store_true", help="few small cases, nothing is judged")
    arguments = parser.parse_args()
    options = Options(quick=arguments.rehearse, device="cuda")
    if arguments.op == "limits":
        limits = harness.measure_limits(options)
        facts = report.machine_facts(options, limits, None)
        arguments.limits.write_text(
            json.dumps({"limits": asdict(limits), "machine": facts, "options": asdict(options)})
        )
        print(asdict(limits))
        return 0
    limits = Limits(**json.loads(arguments.limits.read_text())["limits"])
    failed = found = 0
    for line in rows(arguments.op, arguments.selection, limits, options, arguments.rehearse):
        steps.append(arguments.out, line)
        failed += "failed" in line
        found += 1
        row = line.get("row") or {}
        figures = (row.get("dtype"), line["ours"], row.get("ours"), row.get("ratios"))
        print(line["case"], line["pass"], *figures, flush=True)
    if arguments.selection == "headline" and not found and not arguments.rehearse:
        raise SystemExit("no case is the headline")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main_())

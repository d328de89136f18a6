"""Run the benchmarks of some or all ops and write what they found."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from mmfast.errors import check_one_of

from . import harness, host, report, tune

if TYPE_CHECKING:
    from rich.console import Console

PREFIX = "bench_"


def available() -> list[str]:
    """Return what has a benchmark: the ops in alphabetical order, then train."""
    files = Path(__file__).parent.glob(f"{PREFIX}*.py")
    return sorted(
        (file.stem.removeprefix(PREFIX) for file in files), key=lambda name: (name == "train", name)
    )


def load(op: str) -> ModuleType:
    """Return the module of an op's cases."""
    return importlib.import_module(f".{PREFIX}{op}", __package__)


def run(
    ops: list[str],
    *,
    quick: bool,
    device: str | None,
    out: Path,
    console: Console,
    fresh_memory: bool = False,
) -> Path:
    """Measure `ops` (all where empty), print their tables, write JSON and pictures; return the JSON's path.

    Raises:
        ValueError: an op has no benchmark, or torch cannot use the device.
        WrongResultError: a check failed.
    """
    known = available()
    ops = _chosen(ops, known)
    options = harness.Options(quick, _device(device), fresh_memory)
    busy = _load()
    limits = harness.measure_limits(options)
    facts = report.machine_facts(options, limits, busy)
    report.print_machine(console, facts, limits, busy)
    found: dict[str, list[harness.Row]] = {}
    path = out / f"{report.stem(facts, ops if ops != known else [], options)}.json"
    files = [path.name]
    for op in ops:
        module = load(op)
        found[op] = _measure(op, module.cases(options), limits, options, console)
        report.print_table(console, op, found[op])
        # After every op: what was measured stays when the run is interrupted.
        report.write(path, facts, limits, options, found)
        if module.SIZE:
            report.plot(op, found[op], module.SIZE, out / f"{op}.png")
            files.append(f"{op}.png")
    console.print(f"Written to {out}: {', '.join(files)}.", soft_wrap=True)
    return path


def run_tuning(ops: list[str], *, quick: bool, device: str | None, console: Console) -> Path | None:
    """Measure the tile shapes of the ops' GPU kernels, store the faster ones; return the file, if any are.

    Raises:
        ValueError: an op has no benchmark, or there is no GPU.
    """
    ops = _chosen(ops, available())
    options = harness.Options(quick, _device(device))
    if options.device != "cuda":
        raise ValueError("tuning needs a GPU: the kernels of the CPU have no tile shapes to choose from")
    torch.manual_seed(0)
    cases = {op: load(op).cases(options) for op in ops if op != "train"}
    found = tune.tune(cases, options, console)
    if not found:
        console.print("No candidate beats a default by 3%: nothing is stored.")
        return None
    file = tune.store(torch.device("cuda"), found)
    console.print(f"Stored in {file}; ops on this GPU use it from now on.", soft_wrap=True)
    return file


def run_host(ops: list[str], *, quick: bool, device: str | None, out: Path, console: Console) -> Path:
    """Measure what calls of `ops` (all where empty) cost the host, print it; return the JSON's path.

    Raises:
        ValueError: an op has no benchmark, or torch cannot use the device.
    """
    ops = [op for op in _chosen(ops, available()) if op != "train"]
    return host.run(ops, harness.Options(quick, _device(device)), _load(), out, console)


def _chosen(ops: list[str], known: list[str]) -> list[str]:
    """Return the ops to measure in the order of `known`, all of them where none is named."""
    for op in ops:
        check_one_of("op", op, known, suggest=True)
    return [op for op in known if op in ops] or known


def _measure(op: str, cases: Any, limits: harness.Limits, options: harness.Options, console: Console) -> list:
    torch.manual_seed(0)
    rows = []
    with console.status(op) as status:
        for row in harness.run(harness.with_rivals(op, cases, options), limits, options):
            rows.append(row)
            status.update(f"{op}: {row.case}, {row.direction}")
    return rows


def _device(name: str | None) -> str:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and torch cannot use a GPU here")
    return name


def _load() -> float | None:
    """Return the load average of the last minute, before this run adds to it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

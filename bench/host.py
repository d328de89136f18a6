"""What a call costs the host where there are few samples: microseconds, launches and allocations.

On a GPU the clock stops when all is handed over, not when it is done; on a CPU the kernel's own time is part
of the call. Contestants take turns, as everywhere; the figure is the median of the turns.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from mmfast import backend
from mmfast.files import write_json

from . import report
from .harness import Options
from .host_cases import HostCase, N, host_cases

if TYPE_CHECKING:
    from rich.console import Console

EAGER = "eager"
# Calls of a turn: few enough that a GPU's queue of launches, of some thousand, takes them all.
_CALLS = 20
_TURNS, _QUICK_TURNS = 30, 5
_LAUNCHES = ("cudaLaunch", "cuLaunch", "hipLaunch", "hipModuleLaunch", "hipExtModuleLaunch")


@dataclass(frozen=True)
class HostFigure:
    """What one contestant's call costs the host; launches are not counted on a CPU."""

    op: str
    direction: str  # "forward" or "both"
    contestant: str  # "eager" or a backend
    microseconds: float
    launches: int | None
    allocations: int


def run(ops: list[str], options: Options, load_average: float | None, out: Path, console: Console) -> Path:
    """Measure the ops of these stems, print the table, write it as JSON; return the JSON's path."""
    torch.manual_seed(0)
    device = options.device
    figures: list[HostFigure] = []
    missing: dict[str, str] = {}
    facts = report.machine_facts(options, None, load_average)
    path = out / f"{report.stem(facts, ['host'], options)}.json"
    out.mkdir(parents=True, exist_ok=True)
    with console.status("") as status:
        for case in host_cases(device):
            if case.stem not in ops:
                continue
            status.update(case.name)
            for direction in ("forward", "both") if case.is_smooth else ("forward",):
                figures += _measure(case, direction, options, missing)
                # After every call: what was measured stays when the run is interrupted.
                found = [asdict(figure) for figure in figures]
                write_json(path, {"machine": facts, "samples": N, "host": found, "missing": missing})
    _print(console, figures, device)
    for name, why in missing.items():
        console.print(f"{name}: eager torch does not run here: {why}", soft_wrap=True)
    console.print(f"Written to {path}.", soft_wrap=True)
    return path


def contestants(case: HostCase, device: str) -> list[str]:
    """Return who takes part: eager torch, and every backend with a kernel for the op on this device."""
    found = backend.candidates(case.stem, device, torch.float32)
    return [EAGER, *(name for name in found if name != "reference")]


def _measure(
    case: HostCase,
    direction: str,
    options: Options,
    missing: dict[str, str],  # gets why a peer does not run, by the op's name
) -> list[HostFigure]:
    device = options.device
    calls = {name: _call(case, direction, name) for name in contestants(case, device)}
    counted = {}
    for name, call in list(calls.items()):
        try:
            for _ in range(3):
                call()
        except RuntimeError as error:
            if name != EAGER:
                raise
            # A peer that does not run here is a fact of the table, not the end of the run.
            missing[case.name] = " ".join(str(error).split())[:120]
            del calls[name]
            continue
        counted[name] = _count(call, device)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_QUICK_TURNS if options.quick else _TURNS):
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        for name in list(calls)[:: -1 if number % 2 else 1]:
            turns[name].append(_seconds(calls[name], device))
    return [
        HostFigure(case.name, direction, name, 1e6 * statistics.median(turns[name]), *counted[name])
        for name in calls
    ]


def _call(case: HostCase, direction: str, contestant: str) -> Callable[[], Any]:
    run = case.eager if contestant == EAGER else lambda *inputs: case.ours(*inputs, contestant)
    if direction == "forward":
        return lambda: run(*case.inputs)
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    seeds: list[torch.Tensor] = []

    def both() -> Any:
        found = run(*leaves)
        results = [found] if isinstance(found, torch.Tensor) else list(found)
        if not seeds:
            seeds.extend(torch.ones_like(result) for result in results)
        return torch.autograd.grad(results, leaves, seeds)

    return both


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - begun) / _CALLS


def _count(call: Callable[[], Any], device: str) -> tuple[int | None, int]:
    """Return how many kernels a call launches, None on a CPU, and how often it asks for memory."""
    if device == "cpu":
        return None, _allocations_on_cpu(call)
    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
    launches = _launches(call)
    return launches, torch.cuda.memory_stats().get("allocation.all.allocated", 0) - before


def _launches(call: Callable[[], Any]) -> int:
    """Return the launches of a call, as the profiler sees them or as $MMFAST_LAUNCH_COUNTER counts them.

    The variable names LIBRARY:FUNCTION, a C function that returns the launches so far, for a stand-in of the
    driver that no profiler knows.
    """
    counter = os.environ.get("MMFAST_LAUNCH_COUNTER")
    if counter:
        library, _, name = counter.rpartition(":")
        count = getattr(ctypes.CDLL(library), name)
        count.restype = ctypes.c_long
        before = count()
        call()
        return count() - before
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.name.startswith(_LAUNCHES) for event in recorded.events())


def _allocations_on_cpu(call: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def _print(console: Console, figures: list[HostFigure], device: str) -> None:
    from rich.table import Table

    on_gpu = device == "cuda"
    what = "until all is handed to the GPU" if on_gpu else "kernel included"
    counts = "launches / allocations" if on_gpu else "allocations"
    console.print(f"Microseconds of a call with {N} samples, {what} ({counts}).", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("pass")
    names = list(dict.fromkeys(figure.contestant for figure in figures))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for figure in figures:
        parts = [] if figure.launches is None else [str(figure.launches)]
        text = f"{figure.microseconds:.1f} ({' / '.join([*parts, str(figure.allocations)])})"
        rows.setdefault((figure.op, figure.direction), {})[figure.contestant] = text
    for (op, direction), texts in rows.items():
        table.add_row(op, direction, *(texts.get(name, "-") for name in names))
    console.print(table)

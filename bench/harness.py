"""One harness for all benchmarks: check against the reference, then time ours and the peers in turns.

A `bench_<op>.py` yields cases; the harness measures the machine's limits in the same run, so that a figure
stands beside what it is compared with. Contestants take turns, round by round, and medians are compared:
what disturbs the machine for a while disturbs all of them.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmfast import backend
from mmfast.errors import dtype_name
from mmfast.ops._launch import DTYPE_CODE

from .clock import Clock
from .peers import Missing

OURS = "mmfast"
# Of a panel, the picture shows the last of these that it has.
DIRECTION_ORDER = ("backward", "forward", "both")
# A turn repeats a call until it takes so many seconds, so that the clock's steps do not count.
_TURN = 2e-3
# Rounds of a case: as many as fit into the budget in seconds, within these bounds.
_BUDGET = {False: 6.0, True: 0.4}
_ROUNDS = {False: (3, 25), True: (3, 7)}
# Numbers of the arrays that are copied and read, and rows of the matrices that are multiplied.
_STREAM = {"cpu": 2**25, "cuda": 2**28}
_SQUARE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Options:
    """What a run is asked for.

    Attributes:
        quick: measure few small cases, roughly.
        device: "cpu" or "cuda".
        fresh_memory: on a CPU, let large results be new pages at each call, as in a program that changes
            nothing about its allocator, instead of keeping freed memory.
    """

    quick: bool = False
    device: str = "cpu"
    fresh_memory: bool = False

    def clock(self) -> Clock:
        """Return a clock for the device."""
        return Clock(torch.device(self.device), self.fresh_memory)


@dataclass(frozen=True)
class Work:
    """What a call must do at least: bytes read and written once, operations and exponentials that count."""

    read: int
    written: int = 0
    operations: int = 0
    exponentials: int = 0
    logarithms: int = 0


@dataclass
class Case:
    """One row: our call, the peers' calls, and what the work is at least.

    Attributes:
        name: what is varied, such as "M=4 N=100,000".
        size: the same as a number, the picture's horizontal axis.
        panel: which panel of the picture the case belongs to, such as "d=128".
        ours: the call that is measured.
        peers: name -> call, or why the peer is missing.
        check: takes what our call returned; raises AssertionError unless it is right against float64.
        work: what the call must do at least.
        direction: "forward", "backward" or "both".
        dtype: of the data, which decides the rate of matrix products.
        once: the call takes so long that its first time is the figure.
    """

    name: str
    size: float
    panel: str
    ours: Callable[[], Any]
    peers: dict[str, Callable[[], Any] | Missing]
    check: Callable[[Any], None]
    work: Work
    direction: str = "forward"
    dtype: torch.dtype = torch.float32
    once: bool = False


@dataclass(frozen=True)
class Figure:
    """Seconds of a contestant's call, quartiles over rounds, and the most memory beyond its inputs."""

    seconds: float
    quartiles: tuple[float, float]
    peak_memory: int | None


@dataclass
class Row:
    """What was measured of a case."""

    case: str
    direction: str
    dtype: str
    size: float
    panel: str
    ours: Figure
    peers: dict[str, Figure]
    missing: dict[str, str]
    work: Work
    limit: str  # "copy", "read", "matrix", "fma" or "exp": which of the machine's limits is nearest
    limit_seconds: float
    ratios: dict[str, float] = field(default_factory=dict)  # the peer's seconds over ours
    backend: str = "?"  # what ran our call, as `ran` writes it; "?" in files of runs before it was noted

    @property
    def percent(self) -> float:
        """How much of the limit is reached; above 100 where the data stay in a cache."""
        return 100 * self.limit_seconds / self.ours.seconds


@dataclass(frozen=True)
class Limits:
    """What the machine reaches in this run, a second.

    Attributes:
        copy: bytes of a copy, read plus written.
        read: bytes of reading and nothing else.
        matrix: operations of matrix products, by dtype.
        registers: on a CPU, what the kernels' own exponential and logarithm, and multiply-adds, two
            operations each, reach while nothing comes from memory: name -> dtype -> a second.
    """

    copy: float
    read: float
    matrix: dict[str, float]
    registers: dict[str, dict[str, float]] = field(default_factory=dict)

    def nearest(self, work: Work, dtype: torch.dtype) -> tuple[str, float]:
        """Return which limit binds `work`, and the least seconds it leaves."""
        total = work.read + work.written
        # What is written costs as in a copy; what is read and little else is held against reading.
        name = "read" if 10 * work.written < work.read else "copy"
        seconds = {name: total / (self.read if name == "read" else self.copy)}
        # On a CPU our kernels are up to twice as fast as torch.mm: it is no limit there.
        for products, rates in (("fma", self.registers.get("multiply_add", {})), ("matrix", self.matrix)):
            if rate := rates.get(dtype_name(dtype)):
                seconds[products] = work.operations / rate
                break
        functions = {"exponential": work.exponentials, "logarithm": work.logarithms}
        seconds["exp"] = sum(
            count / rate
            for kind, count in functions.items()
            if (rate := self.registers.get(kind, {}).get(dtype_name(dtype)))
        )
        return max(seconds.items(), key=lambda item: item[1])


class WrongResultError(Exception):
    """Our call's result differs from the reference; nothing is timed."""


def measure_limits(options: Options) -> Limits:
    """Measure what bounds kernels on this machine, now: copying, reading, products, and without memory."""
    device, clock = torch.device(options.device), options.clock()
    source = torch.randn(_STREAM[device.type], device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    rows = _SQUARE[device.type]
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        calls[dtype_name(dtype)] = functools.partial(torch.mm, a, b)
    first = {}
    for name, call in calls.items():
        call()
        first[name] = clock.seconds(call, 1)
    seconds = {
        name: statistics.median(turns) for name, turns in interleaved(calls, first, clock, options).items()
    }
    products = {name: 2 * rows**3 / seconds[name] for name in ("float32", "bfloat16")}
    registers = _measure_registers(clock) if device.type == "cpu" and backend.why_not("cpu") is None else {}
    return Limits(2 * source.nbytes / seconds["copy"], source.nbytes / seconds["read"], products, registers)


def _measure_registers(clock: Clock) -> dict[str, dict[str, float]]:
    """Return what csrc/cpu/register_limit.cpp reaches, the best of a few turns."""
    module, rates = backend.extension("cpu"), {}
    for kind in ("exponential", "logarithm", "multiply_add"):
        function, found = getattr(module, f"register_limit_{kind}"), {}
        for dtype in (torch.float32, torch.bfloat16):
            call = functools.partial(function, DTYPE_CODE[dtype], 20_000, torch.get_num_threads())
            count = call()
            found[dtype_name(dtype)] = count / min(clock.seconds(call, 1) for _ in range(7))
        rates[kind] = found
    return rates


def interleaved(
    calls: dict[str, Callable[[], Any]],
    first: dict[str, float],  # roughly the seconds of a call
    clock: Clock,
    options: Options,
) -> dict[str, list[float]]:
    """Return the seconds of every call, one figure a round, in which all have taken turns."""
    repeats = {name: max(1, round(_TURN / max(first[name], 1e-7))) for name in calls}
    least, most = _ROUNDS[options.quick]
    a_round = sum(first[name] * repeats[name] for name in calls)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(min(most, max(least, int(_BUDGET[options.quick] / a_round)))):
        # Every other round runs backwards, so that nobody always follows the same neighbour.
        for name in list(calls)[:: -1 if number % 2 else 1]:
            turns[name].append(clock.seconds(calls[name], repeats[name]))
    return turns


def measure(case: Case, limits: Limits, options: Options) -> Row:
    """Check a case, then time it and its peers.

    Raises:
        WrongResultError: the check failed.
    """
    clock = options.clock()
    missing = {name: str(peer) for name, peer in case.peers.items() if isinstance(peer, Missing)}
    callable_peers = {name: peer for name, peer in case.peers.items() if not isinstance(peer, Missing)}
    calls = {OURS: case.ours, **callable_peers}
    first: dict[str, float] = {}
    peak: dict[str, int | None] = {}
    for name in list(calls):
        # Not with a peer: what ours has looked up stays known for its turns.
        noting: AbstractContextManager[set[str]] = backend.noting() if name == OURS else nullcontext(set())
        try:
            with noting as noted:
                if not case.once:
                    calls[name]()
                result, first[name], peak[name] = clock.first_call(calls[name])
        except Exception as error:
            if name == OURS:
                raise
            # A peer that does not run here is a fact of the table, not the end of the run.
            missing[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            del calls[name]
            continue
        if name == OURS:
            by = ran(noted)
            _check(case, result)
        del result
    turns = {name: [first[name]] for name in calls}
    if not case.once:
        turns = interleaved(calls, first, clock, options)
    figures = {name: _figure(turns[name], peak[name]) for name in calls}
    ours = figures.pop(OURS)
    limit, limit_seconds = limits.nearest(case.work, case.dtype)
    return Row(
        case=case.name,
        direction=case.direction,
        dtype=dtype_name(case.dtype),
        size=case.size,
        panel=case.panel,
        ours=ours,
        peers=figures,
        missing=missing,
        work=case.work,
        limit=limit,
        limit_seconds=limit_seconds,
        ratios={name: figure.seconds / ours.seconds for name, figure in figures.items()},
        backend=by,
    )


def ran(
    noted: set[str],  # of backend.noting
) -> str:
    """Return the backends that ran in a call, "none" where it called no op."""
    return " + ".join(name for name in backend.BACKENDS if name in noted) or "none"


def spelled(by: str) -> str:
    """Return what `ran` returned for the eyes of a reader: plain torch is called so."""
    return by.replace("reference", "reference (plain torch)")


def with_rivals(op: str, cases: Iterable[Case], options: Options) -> Iterator[Case]:
    """Yield the cases with our call on a GPU's other backends among the peers: what "auto" chooses from."""
    for case in cases:
        # The last, plain torch, is what each op's peers are made of.
        others = backend.candidates(op, options.device, case.dtype)[:-1] if op != "train" else []
        # The first is ours, but where some sizes are left to plain torch.
        if (op, options.device) not in backend.PLAIN_UP_TO or options.device == "cpu":
            others = others[1:]
        yield replace(case, peers=case.peers | {f"{OURS}, {name}": _on(name, case) for name in others})


def _on(name: str, case: Case) -> Callable[[], Any]:
    """Return our call on one backend, whose first result is checked, too."""
    is_checked = False

    def call() -> Any:
        nonlocal is_checked
        with backend.preferring(name):
            result = case.ours()
        if not is_checked:
            case.check(result)
            is_checked = True
        return result

    return call


def _check(case: Case, result: Any) -> None:
    try:
        case.check(result)
    except AssertionError as error:
        raise WrongResultError(f"wrong result in {case.name}, {case.direction}: {error}") from None


def _figure(turns: list[float], peak_memory: int | None) -> Figure:
    low, middle, high = statistics.quantiles(turns, n=4) if len(turns) > 1 else 3 * turns
    return Figure(middle, (low, high), peak_memory)


def run(cases: Iterable[Case], limits: Limits, options: Options) -> Iterator[Row]:
    """Yield a row for every case; a case whose check fails stops the run."""
    for case in cases:
        yield measure(case, limits, options)

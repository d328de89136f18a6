"""The commands of `mmfast` about the machine it runs on: what it reaches, and what is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfast.cli.flags import Traceback, make_console, plain_errors


def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OP]...",
            help="Ops to measure, such as duc_loss, and train for the methods; all by default.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few small cases, roughly, in seconds each.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda; cuda by default where torch can use a GPU.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON of results and the pictures.")] = Path(
        "mmfast-bench"
    ),
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Measure the tile shapes of the GPU kernels instead, and store the fastest for this GPU.",
        ),
    ] = False,
    host: Annotated[
        bool,
        typer.Option(
            "--host",
            help="What calls with 64 samples cost the host instead: microseconds, launches, allocations.",
        ),
    ] = False,
    fresh_memory: Annotated[
        bool,
        typer.Option(
            "--fresh-memory",
            help="On a CPU, let large results be new pages at each call instead of keeping freed memory.",
        ),
    ] = False,
    traceback: Traceback = False,
) -> None:
    """Measure ops against their peers and this machine's limits: time, bandwidth, operations, memory.

    Every result is checked against float64 first. Contestants take turns and medians are compared.
    """
    with plain_errors(traceback):
        from mmfast import backend

        if reason := backend.bare_checkout():
            raise ImportError(f"nothing is measured: {reason}")
        from mmfast.bench.harness import WrongResultError
        from mmfast.bench.main import run, run_host, run_tuning

        if tune:
            run_tuning(ops or [], quick=quick, device=device, console=make_console())
            return
        if host:
            run_host(ops or [], quick=quick, device=device, out=out, console=make_console())
            return
        try:
            run(
                ops or [],
                quick=quick,
                device=device,
                out=out,
                console=make_console(),
                fresh_memory=fresh_memory,
            )
        except WrongResultError as error:
            print(f"mmfast: {error}; nothing is timed", file=sys.stderr)
            raise typer.Exit(1) from None


def info() -> None:
    """Print versions, the CPU's instruction set, and what each backend offers or why it cannot run."""
    from mmfast.cli import info

    print(info.text(make_console().width))

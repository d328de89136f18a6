"""The application, options that several commands share, and how errors are shown."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from mmfast import __version__, backend
from mmfast.data.views import KINDS
from mmfast.errors import either
from mmfast.methods import METHODS
from mmfast.methods.base import format_value
from mmfast.models import FUSION_HEADS
from mmfast.models.build import ENCODERS

app = typer.Typer(
    help="Train multimodal models that neglect no modality, and show which one a model neglects.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, backend.BackendUnavailableError)


class Command(typer.core.TyperCommand):
    """A command that takes options alone, and says of a stray word which option it may belong to."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True
        stray = super().parse_args(ctx, args)
        if stray and not ctx.resilient_parsing:
            ctx.fail(f"{self.name} takes options alone, got {' '.join(stray)}{self._meant(stray)}")
        return stray

    def _meant(self, stray: list[str]) -> str:
        options = {name for parameter in self.params for name in parameter.opts}
        methods = [word for word in stray if word in METHODS]
        others = [word for word in stray if word not in METHODS and not word.startswith("-")]
        meant = []
        if methods and "--methods" in options:
            meant.append(f"--methods {','.join(methods)}")
        elif len(methods) == 1 and "--method" in options:
            meant.append(f"--method {methods[0]}")
        if len(others) == 1 and "--data" in options:
            meant.append(f"--data {others[0]}")
        return f"; did you mean {' '.join(meant)}?" if meant else ""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mmfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@contextlib.contextmanager
def plain_errors(traceback: bool) -> Iterator[None]:
    """Print what the user can mend as one sentence, or a list below one, and leave with code 2."""
    try:
        yield
    except USER_ERRORS as error:
        if traceback:
            raise
        # One sentence, and what it lists in indented lines.
        lines = [" ".join(line.split()) for line in re.split(r"\n  (?=\S)", str(error))]
        text = "\n  ".join(lines).strip() or type(error).__name__
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            text = f'this command needs {package}, which is not installed: pip install "mmfast[train]"'
        print(f"mmfast: {text}", file=sys.stderr)
        raise typer.Exit(2) from None


def make_console() -> Console:
    """Return the console of stdout; names with brackets are printed as they are."""
    return Console(markup=False, highlight=False)


def method_help() -> str:
    """Return the paragraph of --help that lists the options of all methods with their defaults."""
    lines = []
    for name, method in METHODS.items():
        options = ", ".join(f"{field.name}={format_value(field.default)}" for field in fields(method))
        lines.append(f"{name}: {options}" if options else name)
    return "Methods, and what --set changes:\n\n" + "\n\n".join(lines)


Data = Annotated[
    str, typer.Option(help='"htad" (embedded), FILE.npz or a FOLDER of raw media.', show_default=True)
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="Leave out files of a FOLDER that cannot be read, and say how many."
    ),
]
Modalities = Annotated[
    str | None,
    typer.Option(
        help="Modalities to use, separated by commas, in the order of the coalition bits; all by default.",
        show_default=False,
    ),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="MODALITY=KIND",
        help=f"Take a modality as {either(KINDS)}, or by {either(ENCODERS)}; "
        "may be given several times. A vector [D] goes as sequence [D, 1]; a sequence [T, F] as vector or "
        "image [1, T, F]; an image [C, H, W] as vector or sequence [W, C H], its columns the steps; a video "
        "[T, C, H, W] as vector, sequence [T, C H W] or image [T C, H, W].",
        show_default=False,
    ),
]
SplitSeed = Annotated[int, typer.Option(help="Seed of the split, where the data bring none.")]
Dim = Annotated[int, typer.Option(min=1, help="Feature dimensions D of every encoder.")]
Fusion = Annotated[str, typer.Option(help=f"Fusion head: {either(FUSION_HEADS)}.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.OPTION=VALUE",
        help="Set an option of a method, such as di-mml.temperature=50; may be given several times.",
        show_default=False,
    ),
]
SetOfOne = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTION=VALUE",
        help="Set an option of the method, such as temperature=50; may be given several times.",
        show_default=False,
    ),
]
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each method, with seeds 0, 1, ...")]
Trials = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Settings to try of each method on validation data, before runs with the best are tested: as "
        "given, then others of its options, of --lr and --weight-decay; what the command line sets stays. "
        "None by default: all methods run as given.",
        show_default=False,
    ),
]
TuneSeeds = Annotated[
    int, typer.Option(min=1, help="Runs of each trial, with other seeds than the runs that are tested.")
]
Accelerator = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Devices = Annotated[str, typer.Option(help="Number of devices a run trains on, or auto.")]
NumNodes = Annotated[
    int,
    typer.Option(
        min=1,
        help="Machines that train a run together; start the same command on each, by torchrun or srun, or "
        "with MASTER_ADDR, MASTER_PORT and NODE_RANK set.",
    ),
]
OneNode = Annotated[
    int,
    typer.Option(
        "--num-nodes",
        min=1,
        help="Must be 1: a comparison starts its runs itself, on one machine; train takes several.",
    ),
]
Jobs = Annotated[
    str,
    typer.Option(
        help="Runs at a time, or auto: one a core, or a GPU. They share the machine's threads and GPUs, and "
        "results are the same but for rounding where a model is large enough for several threads. "
        "Trials come before them, of several methods at a time."
    ),
]
Precision = Annotated[
    str, typer.Option(help="32-true, bf16-mixed, 16-mixed or another of Lightning Fabric's.")
]
NumWorkers = Annotated[
    int, typer.Option(min=0, help="Processes that read the files of a FOLDER; 0 reads them in this one.")
]
EvalBatchSize = Annotated[
    int, typer.Option(min=1, help="Samples of a batch where nothing is trained, on each device.")
]
DataOnDevice = Annotated[
    str,
    typer.Option(
        help="Whether the data lie on the device all the time: yes, no, or auto, which is yes if they fill "
        "at most a quarter of a GPU's free memory."
    ),
]
Confusion = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="Methods whose confusion matrices are drawn: names separated by commas, all or none; by default "
        "joint and the best one.",
        show_default=False,
    ),
]
Probe = Annotated[
    bool,
    typer.Option(
        "--probe/--no-probe",
        help="Measure each modality by a logistic regression on its frozen features, too; what a model "
        "neglects is told by it.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Drop what --out holds and start anew.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")]

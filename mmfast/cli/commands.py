"""The commands of `mmfast`: their options, and what they print."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmfast.cli import machine_commands, predict_command
from mmfast.cli.flags import (
    Accelerator,
    Command,
    Confusion,
    Data,
    DataOnDevice,
    Devices,
    Dim,
    Encoders,
    EvalBatchSize,
    Fusion,
    Jobs,
    Modalities,
    NumNodes,
    NumWorkers,
    OneNode,
    Overwrite,
    Precision,
    Probe,
    Seeds,
    Set,
    SetOfOne,
    SkipUnreadable,
    SplitSeed,
    Traceback,
    Trials,
    TuneSeeds,
    app,
    make_console,
    method_help,
    plain_errors,
)
from mmfast.cli.training_flags import with_training_options

if TYPE_CHECKING:
    from mmfast.data.overview import Overview
    from mmfast.experiments.comparison import ComparisonRunner
    from mmfast.experiments.runs import PlannedRun
    from mmfast.experiments.setup import Setup

# The rest is imported where a command needs it: `mmfast info` must work without it, and --help be quick.


@app.command(cls=Command, epilog=method_help())
@with_training_options
def compare(
    context: typer.Context,
    data: Data = "htad",
    methods: Annotated[
        str, typer.Option(help='"all", or names separated by commas, such as joint,unimodal,di-mml.')
    ] = "all",
    seeds: Seeds = 5,
    trials: Trials = None,
    tune_seeds: TuneSeeds = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report, results, pictures and checkpoints; mmfast-compare/DATA by default.",
            show_default=False,
        ),
    ] = None,
    dim: Dim = 64,
    fusion: Fusion = "concat",
    settings: Set = None,
    modalities: Modalities = None,
    encoder: Encoders = None,
    split_seed: SplitSeed = 0,
    skip_unreadable: SkipUnreadable = False,
    probe: Probe = True,
    confusion: Confusion = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "1",
    num_nodes: OneNode = 1,
    jobs: Jobs = "1",
    precision: Precision = "32-true",
    num_workers: NumWorkers = 0,
    eval_batch_size: EvalBatchSize = 256,
    data_on_device: DataOnDevice = "auto",
    overwrite: Overwrite = False,
    traceback: Traceback = False,
) -> None:
    """Train methods with several seeds on the same data, and print what each modality contributes to each.

    An interrupted comparison goes on where it stopped when the same command is given again.
    """
    with plain_errors(traceback):
        from mmfast.cli.options import make_methods, parse_jobs, setup_of, tuning_of
        from mmfast.cli.tuning import tune_methods
        from mmfast.experiments.comparison import ComparisonRunner
        from mmfast.experiments.results import RESULTS
        from mmfast.experiments.subprocesses import DIVERGED
        from mmfast.experiments.summary import summarize
        from mmfast.reports.confusions import confused_methods
        from mmfast.reports.kept_files import write_files
        from mmfast.reports.tables import show
        from mmfast.reports.tuning_tables import show_tuned
        from mmfast.training.optimization import Optimization
        from mmfast.training.stopping import Stopped

        chosen = make_methods(methods, settings or ())
        confused = confused_methods(confusion, [method.name for method in chosen])
        setup = setup_of(context.params, Optimization())
        out = out or Path("mmfast-compare") / setup.splits.name
        console = make_console()
        comparison = ComparisonRunner(
            setup,
            chosen,
            seeds,
            out,
            wait=lambda text: console.print(text, soft_wrap=True),
            tuning=tuning_of(context.params, chosen),
        )
        at_a_time = parse_jobs(jobs)
        comparison.check_jobs(at_a_time or 1)
        left = comparison.prepare(overwrite=overwrite)
        at_a_time = at_a_time or comparison.sensible_jobs(len(left))
        seen = _show_data(console, setup, seeds)
        total = len(chosen) * seeds
        if comparison.results.note:
            print(f"mmfast: {comparison.results.note}", file=sys.stderr)
        if comparison.tuning is not None:
            several = parse_jobs(jobs) or comparison.sensible_jobs(len(chosen))
            found, left = tune_methods(console, comparison, left, several)
        if len(left) < total:
            console.print(f"{total - len(left)} of {total} runs: already in {out / RESULTS}.", soft_wrap=True)
        try:
            _make_runs(console, comparison, left, total, at_a_time)
        except (KeyboardInterrupt, Stopped) as end:
            known = len(comparison.results.content["runs"])
            counted = f"{known} run{'s' * (known != 1)} in {out / RESULTS}"
            print(f"\nmmfast: stopped with {counted}; the same command goes on there.", file=sys.stderr)
            raise typer.Exit(_status(end)) from None
        runs = comparison.results.content["runs"]
        outcomes, splits = comparison.outcomes(), setup.splits
        summaries = summarize(runs, [method.name for method in chosen], seeds, outcomes=outcomes)
        files = [RESULTS]
        if any(summary.runs for summary in summaries):
            files = write_files(
                comparison.results,
                summaries,
                outcomes,
                splits.class_names,
                keys=splits.test.sample_keys,
                confused=confused,
                overview=seen,
                command=_command(),
                tell=lambda text: print(f"mmfast: {text}", file=sys.stderr),
            )
        console.print()
        if comparison.tuning is not None:
            show_tuned(console, found, comparison.tuning.seeds)
            console.print()
        show(
            console,
            summaries,
            data=setup.splits.description,
            out=out,
            files=files,
            trials=trials or 0,
        )
        if lost := [summary.title for summary in summaries if not summary.runs]:
            print(f"mmfast: no run of {', '.join(lost)} has a result", file=sys.stderr)
            raise typer.Exit(DIVERGED)


def _command() -> str:
    """Return the command of this process as one types it."""
    program = Path(sys.argv[0])
    words = ["python", "-m", "mmfast"] if program.name == "__main__.py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def _status(end: BaseException) -> int:
    """Return the exit status of a command that Ctrl-C has ended, or SIGTERM."""
    from mmfast.training.stopping import Stopped

    return end.status if isinstance(end, Stopped) else 130


def _show_data(console: Console, setup: Setup, seeds: int | None = None) -> Overview:
    from mmfast.data import overview
    from mmfast.reports.data_tables import show_overview

    found = overview(setup.splits, setup.model(0), seeds=seeds)
    show_overview(console, found)
    return found


def _make_runs(
    console: Console, comparison: ComparisonRunner, left: list[PlannedRun], total: int, jobs: int
) -> None:
    from mmfast.cli.progress import RunProgress

    with RunProgress(console, total, len(left)) as progress:
        for planned, entry in comparison.make_all(left, jobs, on_event=progress.event):
            progress.end(planned, entry)


@app.command(cls=Command, epilog=method_help())
@with_training_options
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, checkpoints and logs.")],
    data: Data = "htad",
    method: Annotated[
        str | None, typer.Option(help="Method to train by; joint by default.", show_default=False)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="A paper's method and settings, such as di-mml/crema-d; other options change them.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the run.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; start one where there is none.")
    ] = False,
    dim: Dim = 64,
    fusion: Fusion = "concat",
    settings: SetOfOne = None,
    modalities: Modalities = None,
    encoder: Encoders = None,
    split_seed: SplitSeed = 0,
    skip_unreadable: SkipUnreadable = False,
    probe: Probe = False,
    logger: Annotated[
        str | None,
        typer.Option(help="csv, tensorboard or both, separated by a comma; in --out.", show_default=False),
    ] = None,
    accelerator: Accelerator = "auto",
    devices: Devices = "1",
    num_nodes: NumNodes = 1,
    precision: Precision = "32-true",
    num_workers: NumWorkers = 0,
    eval_batch_size: EvalBatchSize = 256,
    data_on_device: DataOnDevice = "auto",
    overwrite: Overwrite = False,
    traceback: Traceback = False,
) -> None:
    """Train a model by one method, and print its test figures."""
    with plain_errors(traceback):
        from mmfast.cli.options import method_and_optimization, setup_of
        from mmfast.experiments.comparison import clear_run, has_run
        from mmfast.experiments.results import METRICS
        from mmfast.experiments.runs import make_run
        from mmfast.experiments.subprocesses import DIVERGED
        from mmfast.files import write_json
        from mmfast.reports.tables import show_run
        from mmfast.training.divergence import DivergedError
        from mmfast.training.launchers import is_first
        from mmfast.training.stopping import Stopped

        chosen, base = method_and_optimization(method, preset, settings or ())
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")
        first = is_first(num_nodes)
        if has_run(out) and not (resume or overwrite) and first:
            raise ValueError(f"{out} holds a run already; give --resume, --overwrite or another --out")
        setup = setup_of(context.params, base)
        setup.check(chosen)
        if overwrite and first:
            # Only now: what is wrong with the command has been found.
            clear_run(out)
        kinds = [kind.strip() for kind in (logger or "").split(",") if kind.strip()]
        console = make_console()
        if first:
            _show_data(console, setup)
        try:
            entry = make_run(
                setup, chosen, seed, out, resume=resume, loggers=kinds, progress=console.is_terminal and first
            )
        except (KeyboardInterrupt, Stopped) as end:
            if first:
                print(f"\nmmfast: stopped; the same command with --resume goes on in {out}.", file=sys.stderr)
            raise typer.Exit(_status(end)) from None
        except DivergedError as error:
            if first:
                print(f"mmfast: {error}", file=sys.stderr)
            raise typer.Exit(DIVERGED) from None
        if first:
            write_json(out / METRICS, entry)
            show_run(console, entry, chosen.title)
            console.print(
                f"\nData: {setup.splits.description}.\nWritten to {out}: {METRICS}, model.ckpt, last.ckpt.",
                soft_wrap=True,
            )


@app.command(cls=Command)
def valuate(
    model: Annotated[Path, typer.Option(help="Folder of a finished run, or its model.ckpt.")],
    data: Annotated[
        str | None,
        typer.Option(
            help='"htad", FILE.npz or FOLDER; by default what the model was trained on.', show_default=False
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    utility: Annotated[
        str,
        typer.Option(
            help="Value of a coalition: cardinality (its size where it is right), correct, probability, "
            "log_probability or margin."
        ),
    ] = "cardinality",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for valuation.csv, valuation.parquet, contributions.png and coalitions.json. "
            "By default valuation-SPLIT beside the model, of other data valuation-DATA-SPLIT.",
            show_default=False,
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    accelerator: Accelerator = "auto",
    devices: Devices = "1",
    num_workers: NumWorkers = 0,
    eval_batch_size: EvalBatchSize = 256,
    traceback: Traceback = False,
) -> None:
    """Print what each modality contributes to a trained model, exactly, over all coalitions of modalities."""
    with plain_errors(traceback):
        from mmfast.cli.options import parse_devices
        from mmfast.data.splits import PARTS
        from mmfast.errors import check_one_of
        from mmfast.experiments.runs import restore
        from mmfast.reports.tables import save_valuation, show_valuation
        from mmfast.valuation import UTILITIES, valuate

        check_one_of("split", split, PARTS)
        check_one_of("utility", utility, UTILITIES)
        trainer, splits, state = restore(
            model,
            data,
            skip_unreadable=skip_unreadable,
            accelerator=accelerator,
            devices=parse_devices(devices),
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
        )
        assert trainer.learner is not None
        valuation = valuate(trainer.learner, getattr(splits, split), utility=utility, fabric=trainer.fabric)
        if not trainer.fabric.is_global_zero:
            return
        beside = model if model.is_dir() else model.parent
        of_others = f"{splits.name}-" if data is not None else ""
        out = out or beside / f"valuation-{of_others}{split}"
        facts = {key: state[key] for key in ("method", "seed")} | {"data": splits.description, "split": split}
        files = save_valuation(valuation, out, facts)
        console = make_console()
        console.print(
            f"{facts['method']}, seed {facts['seed']}, on {len(valuation.labels):,} samples of {split}\n"
        )
        show_valuation(console, valuation)
        console.print(f"\nData: {splits.description}.")
        console.print(f"Written to {out}: {', '.join(files)}.", soft_wrap=True)


app.command(cls=Command)(predict_command.predict)
app.command(cls=Command)(machine_commands.bench)
app.command(cls=Command)(machine_commands.info)

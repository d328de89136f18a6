"""The command `predict`: what a finished run makes of new data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mmfast.cli.flags import (
    Accelerator,
    EvalBatchSize,
    NumWorkers,
    SkipUnreadable,
    Traceback,
    make_console,
    plain_errors,
)


def predict(
    model: Annotated[Path, typer.Option(help="Folder of a finished run, or its model.ckpt.")],
    data: Annotated[
        str,
        typer.Option(
            help="FILE.npz, with an array of labels or without; FOLDER of raw media, with folders of classes "
            'or without; or "htad".'
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="FILE.csv or FILE.parquet to write; by default predictions-DATA.csv beside the model.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, val or test: take this part of data that are split; by default all samples.",
            show_default=False,
        ),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    accelerator: Accelerator = "auto",
    num_workers: NumWorkers = 0,
    eval_batch_size: EvalBatchSize = 256,
    traceback: Traceback = False,
) -> None:
    """Predict the classes of new data, with labels or without, and write a table of them.

    The data are standardised as in training; modalities they lack count as absent.
    """
    with plain_errors(traceback):
        from mmfast.data.splits import PARTS
        from mmfast.errors import check_one_of
        from mmfast.experiments.loading import device_of, load, open_run
        from mmfast.experiments.prediction import check_table, new_data, show_predictions, write_table

        if split is not None:
            check_one_of("split", split, PARTS)
        run = open_run(model)
        beside = model if model.is_dir() else model.parent
        ending = f"-{split}" if split else ""
        table = check_table(out or beside / f"predictions-{Path(data).stem}{ending}.csv")
        dataset, notes = new_data(
            run, data, split=split, skip_unreadable=skip_unreadable, num_workers=num_workers
        )
        for note in notes:
            print(f"mmfast: {data}: {note}", file=sys.stderr)
        learner = load(model, device=device_of(accelerator))
        predictions = learner.predict(dataset, batch_size=eval_batch_size, contributions=False)
        write_table(predictions, table)
        console = make_console()
        whole = f"{split} of {data}" if split else data
        facts = f"{run.state['method']}, seed {run.state['seed']}"
        console.print(f"{facts}, on {len(predictions):,} samples of {whole}\n", soft_wrap=True)
        show_predictions(console, predictions)
        console.print(f"Written to {table}.", soft_wrap=True)

"""A finished run asked about new data: its predictions, and what of them is shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmfast.data import ArrayDataset
from mmfast.data.new import Known, load_new
from mmfast.errors import check_one_of
from mmfast.experiments.loading import Run
from mmfast.predictions import Predictions

# Endings of tables that can be written.
TABLES = (".csv", ".parquet")
# Classes that are shown; of more, those that are predicted most often.
_SHOWN = 20


def check_table(path: Path) -> Path:
    """Return a path whose ending says what is written there.

    Raises:
        ValueError: it is another one.
    """
    check_one_of("ending of out", path.suffix, TABLES)
    return path


def new_data(
    run: Run, source: str, *, split: str | None = None, skip_unreadable: bool = False, num_workers: int = 0
) -> tuple[ArrayDataset, list[str]]:
    """Return data as the model of a run of commands takes them, not standardised, and remarks on them.

    Raises:
        ValueError: the run is not one of commands, or the data do not fit it.
    """
    run.check_commands(source)
    facts = run.facts
    sound = facts.get("sound")
    known = Known(
        run.shapes,
        facts["classes"],
        run.encoders,
        None if sound is None else (int(sound[0]), int(sound[1])),
        facts.get("split_seed") or 0,
    )
    data, notes = load_new(
        source, known, split=split, skip_unreadable=skip_unreadable, num_workers=num_workers
    )
    if facts.get("source") in (source, str(Path(source).resolve())) and split in (None, "train"):
        notes.append(
            "these are the data of training, and figures on them flatter the model; --split test takes those "
            "that it has not seen"
        )
    return data, notes


def write_table(predictions: Predictions, path: Path) -> None:
    """Write predictions as CSV or Parquet, as the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (predictions.to_csv if path.suffix == ".csv" else predictions.to_parquet)(path)


def show_predictions(console: Console, predictions: Predictions) -> None:
    """Print how often each class is predicted, and where labels are known how often that is right."""
    names = predictions.class_names or tuple(map(str, range(predictions.logits.shape[1])))
    predicted, known = predictions.predicted, predictions.has_target
    counts = torch.bincount(predicted[predicted >= 0], minlength=len(names)).tolist()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("Class")
    table.add_column("Predicted", justify="right")
    labelled, right = _by_label(predictions, len(names))
    if known.any():
        table.add_column("Labelled", justify="right")
        table.add_column("Of these right (%)", justify="right")
    shown = sorted(range(len(names)), key=lambda c: (-counts[c], c))[:_SHOWN]
    for c in sorted(shown):
        share = [f"{labelled[c]:,}", f"{100 * right[c] / labelled[c]:.1f}" if labelled[c] else "–"]
        table.add_row(names[c], f"{counts[c]:,}", *(share if known.any() else ()))
    console.print(table)
    if len(names) > len(shown):
        console.print(
            f"The {len(shown)} classes of {len(names):,} that are predicted most often.", style="dim"
        )
    if predictions.accuracy is not None:
        console.print(
            f"\naccuracy {100 * predictions.accuracy:.1f}% of {int(known.sum()):,} samples with a label"
        )


def _by_label(predictions: Predictions, num_classes: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return by class how many samples have its label, and how many of these are right."""
    if predictions.targets is None or predictions.correct is None:
        return [0] * num_classes, [0] * num_classes
    known = predictions.has_target
    labels, correct = predictions.targets[known], predictions.correct[known]
    return (
        torch.bincount(labels, minlength=num_classes).tolist(),
        torch.bincount(labels[correct], minlength=num_classes).tolist(),
    )

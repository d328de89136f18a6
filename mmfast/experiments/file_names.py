"""What a comparison leaves beside results.json and its runs, by name: one that begins anew removes it."""

from __future__ import annotations

from mmfast.methods import METHODS

REPORT, RUNS, PREDICTIONS = "report.html", "results.csv", "predictions.parquet"
# Kinds of pictures, each of which is one file.
KINDS = ("accuracy", "probes", "contributions", "missing", "modality_accuracy")


def picture_name(kind: str) -> str:
    """Return the name of the file with a picture."""
    return f"{kind}.png"


def confusion_name(method: str) -> str:
    """Return the name of the file with the picture of a method's confusions."""
    return picture_name(f"confusion-{method}")


PICTURES = tuple(map(picture_name, KINDS))
FILES = (REPORT, RUNS, PREDICTIONS, *PICTURES, *map(confusion_name, METHODS))

"""The example of a whole project runs: from a data set of one's own to predictions and an exported file."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_from_data_to_file(tmp_path, capsys):
    found, predictions = runpy.run_path(str(ROOT / "examples" / "own_project.py"))["main"](tmp_path)
    assert [entry["method"] for entry in found.runs] == ["joint", "mla", "di-mml"]
    best = max(found.figures("auroc"), key=lambda method: found.figures("auroc")[method][0])
    assert predictions.accuracy == pytest.approx(found.figures("accuracy")[best][0])
    assert predictions.accuracy > 0.7
    printed = capsys.readouterr().out
    assert "contrib." in printed
    assert "auroc" in printed
    with open(tmp_path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    assert {"prediction", "probability", "text__prediction", "image__prediction", "correct"} <= set(rows[0])
    assert (tmp_path / "model.onnx").stat().st_size > 10_000

"""The tool that counts how often neglect is found where it is, and where it is not."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

TOOL = Path(__file__).parents[1] / "tools" / "planted"


def test_it_counts_both_kinds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planted", "--draws", "1", "--seeds", "2", "--epochs", "3"])
    runpy.run_path(str(TOOL), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["0", "planted"], ["0", "noise"]]
    assert all("unlearnt: a " in line for line in lines[:2])
    assert lines[2].startswith("planted: found in ")
    assert lines[3] == "not planted: found in 0 of 1 draws"


def test_draws_are_what_they_are_called():
    draw = runpy.run_path(str(TOOL))["draw"]
    for kind in ("planted", "noise", "halves", "plain"):
        splits = draw(kind, 0)
        again = draw(kind, 0)
        assert splits.modalities == ("a", "b")
        assert (splits.train.arrays["b"] == again.train.arrays["b"]).all()
        assert (splits.train.arrays["b"] != draw(kind, 1).train.arrays["b"]).any()

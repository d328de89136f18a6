"""The tool that measures copies with three modalities and more."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("multiviewstacking")

TOOL = Path(__file__).parents[1] / "tools" / "copies"


def test_each_rule_has_a_row(monkeypatch, capsys):
    words = ["synthetic-3", "--seeds", "1", "--epochs", "7", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["copies", *words])
    runpy.run_path(str(TOOL), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["data", "rule", "last", "selected", "epoch"]
    assert [row[1] for row in rows[1:]] == ["joint", "damping", "damping"]
    longer = [float(row[-2]) for row in rows[1:]]
    assert longer[0] == 1.0 < longer[2] < longer[1]


def test_parts_are_drawn_from_all_but_the_test_part():
    split = runpy.run_path(str(TOOL))["split_anew"]
    from mmfast import data

    htad, found = data.load("htad"), split("htad", 0)
    assert found.modalities == (*htad.modalities, "noise")
    parts = (found.train, found.val, found.test)
    assert sum(map(len, parts)) == len(htad.train) + len(htad.val)
    again = split("htad", 1)
    assert (again.train.labels == found.train.labels).all()
    assert (again.train.arrays["noise"] != found.train.arrays["noise"]).any()

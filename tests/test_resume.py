"""Commands killed in the middle of a run, without any warning, and given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("multiviewstacking")

from typer.testing import CliRunner

from mmfast.cli.commands import app

SETTINGS = ["--dim", "8", "--epochs", "12", "--accelerator", "cpu"]


def kill_in_mid_run(words, checkpoint):
    """Run `mmfast` until the checkpoint has been written twice, then kill it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", *words],
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    first, deadline = None, time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists():
            first = first or checkpoint.stat().st_mtime_ns
            if checkpoint.stat().st_mtime_ns != first:
                break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def finish(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def test_a_killed_run_resumes_to_the_same_figures(tmp_path):
    words = ["train", "--method", "diagnose-relearn", "--set", "epochs=1,8", "--set", "num_init=1", *SETTINGS]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_in_mid_run([*words, "--out", str(killed)], killed / "last.ckpt")
    assert not (killed / "metrics.json").exists()
    assert "unfinished run" in CliRunner().invoke(app, ["valuate", "--model", str(killed)]).stderr
    finish([*words, "--out", str(killed), "--resume"])
    finish([*words, "--out", str(whole)])
    one, other = (json.loads((out / "metrics.json").read_text()) for out in (killed, whole))
    assert one["metrics"] == other["metrics"]
    assert [e["loss"] for e in one["history"]] == [e["loss"] for e in other["history"]]


def test_a_killed_comparison_continues_with_the_same_figures(tmp_path):
    words = ["compare", "--methods", "sample-valuation,mla", "--seeds", "1", *SETTINGS]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_in_mid_run([*words, "--out", str(killed)], killed / "runs" / "mla-seed0" / "last.ckpt")
    runs = json.loads((killed / "results.json").read_text())["runs"]
    assert [entry["method"] for entry in runs] == ["sample-valuation"]
    for out in (killed, whole):
        finish([*words, "--out", str(out)])
    one, other = (json.loads((out / "results.json").read_text())["runs"] for out in (killed, whole))
    assert [(e["method"], e["metrics"]) for e in one] == [(e["method"], e["metrics"]) for e in other]

"""Commands killed in the middle of a run, without any warning or with one, and given again."""

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

from test_divergence import npz
from typer.testing import CliRunner

from mmfast.cli.commands import app
from mmfast.files import locked
from mmfast.training import checkpoint

__all__ = ["npz"]

SETTINGS = ["--dim", "8", "--epochs", "12", "--accelerator", "cpu"]


def end_in_mid_run(words, checkpoint, how=signal.SIGKILL, *, writes=1):
    """Run `mmfast` until the checkpoint has been written so often, then end it; return status and errors."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    seen, deadline = set(), time.monotonic() + 60
    while len(seen) < writes and time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists():
            seen.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.001)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def finish(words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


def test_a_killed_run_resumes_to_the_same_figures(tmp_path):
    words = ["train", "--method", "diagnose-relearn", "--set", "epochs=1,8", "--set", "num_init=1", *SETTINGS]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    status, _ = end_in_mid_run([*words, "--out", str(killed)], killed / "last.ckpt")
    assert status == -signal.SIGKILL
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
    status, _ = end_in_mid_run([*words, "--out", str(killed)], killed / "runs" / "mla-seed0" / "last.ckpt")
    assert status == -signal.SIGKILL
    runs = json.loads((killed / "results.json").read_text())["runs"]
    assert [entry["method"] for entry in runs] == ["sample-valuation"]
    for out in (killed, whole):
        finish([*words, "--out", str(out)])
    one, other = (json.loads((out / "results.json").read_text())["runs"] for out in (killed, whole))
    assert [(e["method"], e["metrics"]) for e in one] == [(e["method"], e["metrics"]) for e in other]


def test_a_run_that_is_told_to_end_resumes_to_the_same_figures(npz, tmp_path):
    words = ["train", "--method", "sample-valuation", "--set", "warmup=1", "--data", str(npz), "--dim", "8"]
    words += ["--accelerator", "cpu", "--epochs", "3000"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    status, said = end_in_mid_run(
        [*words, "--out", str(stopped)], stopped / "last.ckpt", signal.SIGTERM, writes=2
    )
    text = f"mmfast: stopped; the same command with --resume goes on in {stopped}."
    assert (status, said.strip().splitlines()[-1]) == (143, text)
    state = checkpoint.load(stopped / "last.ckpt")
    epochs = state["epoch"] + 4
    assert epochs < 3000
    # A run of fewer epochs is the same up to there.
    state["optimization"]["max_epochs"] = epochs
    checkpoint.save(stopped / "last.ckpt", {key: value for key, value in state.items() if key != "format"})
    words[-1] = str(epochs)
    finish([*words, "--out", str(stopped), "--resume"])
    finish([*words, "--out", str(whole)])
    one, other = (json.loads((out / "metrics.json").read_text()) for out in (stopped, whole))
    assert one["metrics"] == other["metrics"]
    assert [e["loss"] for e in one["history"]] == [e["loss"] for e in other["history"]]


@pytest.mark.parametrize("devices", ["1", "2"])
def test_a_comparison_that_is_told_to_end_goes_on(devices, npz, tmp_path):
    words = ["compare", "--methods", "joint", "--seeds", "1", "--data", str(npz), "--devices", devices]
    words += ["--out", str(tmp_path), "--dim", "8", "--accelerator", "cpu", "--epochs", "3000"]
    last = tmp_path / "runs" / "joint-seed0" / "last.ckpt"
    status, said = end_in_mid_run(words, last, signal.SIGTERM, writes=2)
    text = f"mmfast: stopped with 0 runs in {tmp_path / 'results.json'}; the same command goes on there."
    assert (status, said.strip().splitlines()[-1]) == (143, text)
    assert 0 < checkpoint.load(last)["epoch"] < 2999
    # The processes of the run have ended with it.
    with locked(last.with_name(".lock")):
        pass

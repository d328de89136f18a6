"""Runs side by side: what several processes find is what one does, however they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")
pytest.importorskip("joblib")

import joblib
import torch
from test_compare import npz
from typer.testing import CliRunner

import mmfast
from mmfast import data
from mmfast.cli.commands import app
from mmfast.experiments.comparison import ComparisonRunner
from mmfast.experiments.parallel import check_jobs, sensible_jobs, side_by_side
from mmfast.experiments.setup import Setup
from mmfast.experiments.worker import gpus_of
from mmfast.methods import Joint, Unimodal
from mmfast.models import build_model
from mmfast.training import checkpoint
from mmfast.training.optimization import Optimization

__all__ = ["npz"]

WORDS = ["--methods", "joint,sample-valuation", "--dim", "8", "--batch-size", "32", "--accelerator", "cpu"]


def compare(npz, out, *words):
    return CliRunner().invoke(app, ["compare", "--data", str(npz), "--out", str(out), *WORDS, *words])


def runs(out):
    found = json.loads((out / "results.json").read_text())["runs"]
    for entry in found:
        for epoch in entry["history"]:
            del epoch["seconds"]
    return [(e["method"], e["seed"], e["metrics"], e["history"]) for e in found]


def look(shared, number, tell):
    tell({"number": number})
    return number + float(shared["x"].sum()), torch.get_num_threads(), os.getpid()


def fail(shared, number, tell):
    if number == 1:
        raise ValueError(f"number must not be 1, got {number}")
    return number


def test_two_jobs_find_what_one_does(npz, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for jobs, out in (("1", one), ("2", two)):
        result = compare(npz, out, "--seeds", "2", "--epochs", "2", "--jobs", jobs)
        assert result.exit_code == 0, result.output
        assert sorted(line[:3] for line in result.stdout.splitlines() if "seed" in line and "/4" in line) == [
            f"{n}/4" for n in range(1, 5)
        ]
    assert runs(one) == runs(two)
    assert not list(two.glob(".jobs-*"))


def test_calls_are_made_elsewhere_and_tell_of_it(tmp_path):
    told = []
    shared = {"x": torch.arange(4.0)}
    calls = [(n,) for n in range(6)]
    found = dict(
        side_by_side(look, calls, 2, shared=shared, folder=tmp_path, on_event=lambda *e: told.append(e))
    )
    assert {i: value for i, (value, _, _) in found.items()} == {n: n + 6.0 for n in range(6)}
    assert {threads for _, threads, _ in found.values()} == {max(1, torch.get_num_threads() // 2)}
    assert os.getpid() not in {pid for _, _, pid in found.values()}
    assert sorted(told, key=str) == [(n, {"number": n}) for n in range(6)]
    assert not list(tmp_path.iterdir())


def test_an_error_arrives_as_it_was_raised(tmp_path):
    with pytest.raises(ValueError, match="number must not be 1") as caught:
        dict(side_by_side(fail, [(n,) for n in range(4)], 2, folder=tmp_path))
    assert str(caught.value) == "number must not be 1, got 1"
    assert "in fail" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_one_job_is_made_here():
    told = []
    found = list(
        side_by_side(
            look, [(3,)], shared={"x": torch.ones(1)}, on_event=lambda i, event: told.append((i, event))
        )
    )
    assert found == [(0, (4.0, torch.get_num_threads(), os.getpid()))]
    assert told == [(0, {"number": 3})]


def test_threads_are_refused(tmp_path):
    with (
        joblib.parallel_config(backend="threading"),
        pytest.raises(ValueError, match="must not be 'threading'"),
    ):
        list(side_by_side(look, [(1,)], 2, folder=tmp_path))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_all_stop_and_go_on(how, npz, tmp_path):
    psutil = pytest.importorskip("psutil")
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = [*WORDS, "--seeds", "1", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmfast", "compare", "--data", npz, "--out", out, *words, "--epochs", "9000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Away from the clone, whose bare sources would hide what is installed.
        cwd=tmp_path,
        # As a shell does it: Ctrl-C is for all of a group.
        start_new_session=True,
    )
    last = [out / "runs" / f"{name}-seed0" / "last.ckpt" for name in ("joint", "sample-valuation")]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not all(path.exists() for path in last):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, said = process.communicate(timeout=120)
    text = f"mmfast: stopped with 0 runs in {out / 'results.json'}; the same command goes on there."
    assert said.strip().splitlines() == [text]
    assert process.returncode == (143 if how == signal.SIGTERM else 130)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=20)[1] == []
    states = [checkpoint.load(path) for path in last]
    # Stopped within an epoch or after one: told, not killed.
    epochs = str(max(state["epoch"] for state in states) + 3)
    for path, state in zip(last, states, strict=True):
        state["optimization"]["max_epochs"] = int(epochs)
        checkpoint.save(path, {key: value for key, value in state.items() if key != "format"})
    for folder in (out, whole):
        result = compare(npz, folder, "--seeds", "1", "--epochs", epochs)
        assert result.exit_code == 0, result.output
    assert runs(out) == runs(whole)


def test_workers_of_dask_make_runs(tmp_path):
    distributed = pytest.importorskip("distributed")
    splits = data.synthetic(60, 3, dims={"m0": 4, "m1": 3})
    setup = Setup("here", splits, Optimization(2, 16), dim=4, accelerator="cpu")
    plain = ComparisonRunner(setup, [Joint(), Unimodal()], 1, tmp_path / "one")
    expected = {planned.method.name: entry for planned, entry in plain.make_all(plain.prepare())}
    spread = ComparisonRunner(setup, [Joint(), Unimodal()], 1, tmp_path / "two")
    begun, parts = [], (splits.train, splits.val, splits.test)
    own = {"model": lambda: build_model(splits.shapes, 3, dim=4), "seeds": 1, "max_epochs": 2, "trials": 2}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1"}
    left = spread.prepare()
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        made = spread.make_all(left, on_event=lambda *event: begun.append(event))
        found = {planned.method.name: entry for planned, entry in made}
        of_program = mmfast.compare(parts, "joint, unimodal", **own)
    here = mmfast.compare(parts, "joint, unimodal", **own)
    assert of_program.figures("loss") == here.figures("loss")
    assert of_program.tuned["joint"].settings == here.tuned["joint"].settings
    assert {name: entry["metrics"] for name, entry in found.items()} == {
        name: entry["metrics"] for name, entry in expected.items()
    }
    assert len(json.loads((tmp_path / "two" / "results.json").read_text())["runs"]) == 2
    assert sorted((planned.method.name, epoch) for planned, epoch in begun if epoch is not None) == [
        (name, epoch) for name in ("joint", "unimodal") for epoch in range(2)
    ]


@pytest.mark.parametrize(
    ("place", "count", "visible", "expected"),
    [
        (0, 1, "0,1", ["0"]),
        (1, 1, "0,1", ["1"]),
        (2, 1, "0,1", ["0"]),
        (1, 2, "0,1,2,3", ["2", "3"]),
        (0, 2, "5,7", ["5", "7"]),
        (3, 1, "4", ["4"]),
    ],
)
def test_gpus_are_handed_out_in_turn(place, count, visible, expected):
    assert gpus_of(place, count, visible.split(",")) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((2, 0, 1, 50), 2),
        ((16, 0, 2, 50), 8),
        ((16, 4, 1, 50), 4),
        ((16, 4, 2, 50), 2),
        ((8, 0, 1, 3), 3),
        ((8, 4, "auto", 9), 1),
        ((1, 0, 1, 9), 1),
        ((4, 0, "auto", 0), 1),
    ],
)
def test_as_many_as_suit_the_machine(given, expected):
    assert sensible_jobs(*given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0, 1, 0), "jobs must be at least 1, got 0"),
        ((2, "auto", 0), "devices must be a number with several jobs, got 'auto'"),
        ((3, 2, 4), "jobs must be at most 2 with devices = 2 on 4 GPUs, got 3"),
    ],
)
def test_what_cannot_be_side_by_side_is_refused(given, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        check_jobs(*given)
    check_jobs(8, 1, 2)


@pytest.mark.parametrize("jobs", ["0", "many", "-1"])
def test_jobs_are_a_number_or_auto(jobs, npz, tmp_path):
    result = compare(npz, tmp_path, "--jobs", jobs)
    assert result.exit_code == 2
    assert f"jobs must be a number of at least 1 or 'auto', got '{jobs}'" in result.stderr


def test_what_killed_processes_left_is_removed(tmp_path):
    import os
    import socket
    import subprocess
    import sys

    from mmfast.experiments.parallel import clear_scratch

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    names = {
        f".jobs-{host}-{gone.pid}-a": False,
        f".jobs-{host}-{os.getpid()}-b": True,
        ".jobs-other-1-c": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared").touch()
    clear_scratch(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names

"""Checkpoints written while training goes on: in order, by a copy, and told where a disk is full."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_checkpoint import assert_is, names, of

from mmfast import files
from mmfast.training import checkpoint, writing
from mmfast.training.checkpoint import Parted
from mmfast.training.stopping import Stopped
from mmfast.training.writing import Writer, snapshot

FOLDER = Path(__file__).parent


def test_a_copy_does_not_follow_what_is_trained():
    weight = torch.ones(4)
    state = {"learner": Parted({"w": weight}, [["w"]]), "tied": [weight, weight.view(2, 2)], "list": [1]}
    copy = snapshot(state)
    weight.zero_()
    state["list"].append(2)
    assert torch.equal(copy["learner"].entries["w"], torch.ones(4))
    assert copy["tied"][0] is copy["learner"].entries["w"]
    assert torch.equal(copy["tied"][1], torch.ones(2, 2))
    assert copy["list"] == [1]
    assert snapshot(copy)["learner"] is copy["learner"]


@pytest.fixture
def tiny_parts(monkeypatch):
    """Let the smallest entries have files of their own."""
    monkeypatch.setattr(checkpoint, "_LEAST", 1)


@pytest.fixture
def threaded(monkeypatch):
    """Let a thread write the smallest state, too."""
    monkeypatch.setattr(writing, "_SMALL", -1)


def slow_writes(monkeypatch) -> list[int]:
    """Let each write take a while; return the states that were written, in order."""
    done = []
    real = checkpoint.save

    def save(path, state):
        time.sleep(0.05)
        real(path, state)
        done.append(state["n"])

    monkeypatch.setattr(checkpoint, "save", save)
    return done


def test_a_small_state_is_written_at_once(monkeypatch, tmp_path):
    done = slow_writes(monkeypatch)
    with Writer(tmp_path / "last.ckpt") as writer:
        writer.save({"n": 0, "w": torch.zeros(2**19)})
        assert done == [0]
        writer.save({"n": 1, "w": [torch.zeros(2**20), torch.zeros(1)]})
        assert done == [0]
    assert done == [0, 1]


def test_states_are_written_in_order_and_the_end_waits(threaded, monkeypatch, tmp_path):
    monkeypatch.setattr(writing, "_BETWEEN", 0.0)
    done, before = slow_writes(monkeypatch), threading.active_count()
    with Writer(tmp_path / "last.ckpt") as writer:
        writer.save({"n": 0})
        assert done == []
        assert threading.active_count() == before + 1
        for n in range(1, 4):
            writer.save({"n": n})
            assert done == list(range(n))
    assert done == [0, 1, 2, 3]
    assert threading.active_count() == before
    assert checkpoint.load(tmp_path / "last.ckpt")["n"] == 3


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_follows_at_once_is_held_for_the_end(error, monkeypatch, tmp_path):
    path = tmp_path / "last.ckpt"
    weight = torch.zeros(2)
    monkeypatch.setattr(writing, "_BETWEEN", 60.0)
    caught = contextlib.nullcontext() if error is None else pytest.raises(error)
    with caught, Writer(path) as writer:
        for n in range(3):
            weight.fill_(n)
            writer.save({"weight": weight}, {"n": n})
            # The first is written, of the others none while it goes on.
            assert checkpoint.load(path)["n"] == 0
        weight.fill_(7)
        if error is not None:
            raise error
    found = checkpoint.load(path)
    assert (found["n"], found["weight"].tolist()) == (2, [2.0, 2.0])


def save_and_raise(path: Path, state: dict, error) -> None:
    with Writer(path) as writer:
        writer.save(state)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_no_thread_is_left_behind(error, threaded, monkeypatch, tmp_path):
    done, before = slow_writes(monkeypatch), threading.active_count()
    with pytest.raises(error):
        save_and_raise(tmp_path / "last.ckpt", {"n": 0}, error)
    assert done == [0]
    assert threading.active_count() == before


def test_a_write_that_fails_is_told_at_the_next_or_at_the_end(threaded, tmp_path):
    path, bad = tmp_path / "last.ckpt", {"value": lambda: None}
    with Writer(path) as writer:
        writer.save(bad)
        with pytest.raises(Exception, match="pickle"):
            writer.save({"n": 1})
    with pytest.raises(Exception, match="pickle"), Writer(path) as writer:
        writer.save(bad)
    # Nobody is told of a checkpoint that is not there.
    with pytest.raises(Exception, match="pickle"):
        save_and_raise(path, bad, Stopped("stopped"))
    with pytest.raises(ZeroDivisionError) as found:
        save_and_raise(path, bad, ZeroDivisionError())
    assert "the last checkpoint could not be written" in found.value.__notes__[0]
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_within_a_part_is_told_of_the_checkpoint(tiny_parts, tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, of(1.0))
    before = names(tmp_path)

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(files, "open", lambda path, mode: Full(path, "w"), raising=False)
    text = r"No space left on device; .*last\.ckpt is as it was: make room"
    # In the part, and in the checkpoint when the part is there.
    for room in (500, 1500):
        with pytest.raises(OSError, match=text):
            checkpoint.save(path, {**of(2.0), "more": torch.zeros(9000 if room == 1500 else 1)})
        assert names(tmp_path) == before
        assert_is(checkpoint.load(path), 1.0)


ON_A_FULL_DISK = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(FOLDER)!r})
import test_checkpoint as t
out, filler = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "filler"

def fill(entry):
    if entry["epoch"] == 1:
        with open(filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

try:
    t.fit_wide("joint", out, on_epoch=fill)
except OSError as error:
    print(error)
print(t.checkpoint.load(out / "last.ckpt")["epoch"])
filler.unlink()
resumed = t.fit_wide("joint", out, resume=True, model_seed=1)
whole = t.make_trainer("joint")
whole.fit(t.make_wide(), t.SPLITS.train, t.SPLITS.val)
t.assert_same_state(resumed.learner, whole.learner)
print("same")
"""


def test_a_full_disk_costs_one_epoch(tmp_path):
    program = shutil.which("unshare")
    mounted = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    prefix = [program or "", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if program is None or subprocess.run([*prefix, mounted], capture_output=True).returncode:
        pytest.skip("no file system of a given size can be mounted here")
    script = f'{mounted} && exec "$0" "$@"'
    done = subprocess.run(
        [*prefix, script, sys.executable, "-P", "-c", ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "last.ckpt"
    text = (
        f"[Errno 28] No space left on device; {path} is as it was: make room, and give the same command again"
    )
    assert done.stdout.splitlines() == [text, "0", "same"]

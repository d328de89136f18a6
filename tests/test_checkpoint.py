"""Checkpoints in parts, written by a thread: what stays the same is written once, a kill loses nothing."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_trainer import SPLITS, Killed, assert_same_state, fitted, make_trainer, without_times
from torch import nn

import mmfast
from mmfast import files, methods
from mmfast.experiments.comparison import clear_run, has_run
from mmfast.training import checkpoint, writing
from mmfast.training.checkpoint import Parted
from mmfast.training.stopping import Stopped
from mmfast.training.writing import Writer, snapshot

FOLDER = Path(__file__).parent


@pytest.fixture
def tiny_parts(monkeypatch):
    """Let the smallest entries have files of their own."""
    monkeypatch.setattr(checkpoint, "_LEAST", 1)


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, int]]:
    """Names and bytes of the files that are written."""
    found = []
    real = os.replace

    def replace(draft, path):
        found.append((Path(path).name, os.path.getsize(draft)))
        real(draft, path)

    monkeypatch.setattr(files.os, "replace", replace)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def parts(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".part")]


def of(value: float) -> dict:
    """Return a state with a part that stays and one that does not."""
    entries = {"stays": torch.ones(3), "moves": torch.full((2, 2), value), "small": value}
    return {"epoch": value, "learner": Parted(entries, [["stays"], ["moves"]])}


def assert_is(state: dict, value: float) -> None:
    assert state["epoch"] == state["learner"]["small"] == value
    assert torch.equal(state["learner"]["stays"], torch.ones(3))
    assert torch.equal(state["learner"]["moves"], torch.full((2, 2), value))


# Parts


def test_parts_that_stay_are_written_once_and_go_when_nothing_refers_to_them(tiny_parts, written, tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, of(1.0))
    first = {name for name, _ in written}
    assert len(first) == 3
    written.clear()
    checkpoint.save(path, of(2.0))
    assert len(written) == 2
    # What the checkpoint refers to is there before it is.
    assert written[-1][0] == "last.ckpt"
    assert_is(checkpoint.load(path), 2.0)
    assert len(names(tmp_path)) == 3
    assert len(first & set(parts(tmp_path))) == 1
    checkpoint.remove(path)
    assert names(tmp_path) == []


def test_small_parts_stay_inside(tmp_path):
    checkpoint.save(tmp_path / "last.ckpt", of(1.0))
    assert names(tmp_path) == ["last.ckpt"]
    assert_is(checkpoint.load(tmp_path / "last.ckpt"), 1.0)


def test_what_two_have_in_common_is_there_once(tiny_parts, tmp_path):
    path, weights = tmp_path / "last.ckpt", torch.randn(5)
    state = {name: Parted({"w": weights.clone(), "x": i}, [["w"]]) for i, name in enumerate("ab")}
    checkpoint.save(path, state)
    assert len(parts(tmp_path)) == 1
    found = checkpoint.load(path)
    assert all(torch.equal(found[name]["w"], weights) for name in "ab")


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(0),
        torch.tensor(1.5),
        torch.eye(3)[:, ::2],
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.eye(2).to_sparse(),
    ],
    ids=["empty", "scalar", "strided", "bfloat16", "bool", "sparse"],
)
def test_any_tensor_has_its_place(value, tiny_parts, tmp_path):
    state = {"learner": Parted({"value": value, "plain": [1, (2.5, None)]}, [["value"], ["plain"]])}
    checkpoint.save(tmp_path / "last.ckpt", state)
    found = checkpoint.load(tmp_path / "last.ckpt")["learner"]
    assert found["plain"] == [1, (2.5, None)]
    found, value = (x.to_dense() if x.is_sparse else x for x in (found["value"], value))
    assert found.dtype == value.dtype
    assert torch.equal(found, value)


def test_a_part_that_is_gone_or_another_is_told(tiny_parts, tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, of(1.0))
    one, other = (tmp_path / name for name in parts(tmp_path))
    kept = one.read_bytes()
    shutil.copy(other, one)
    with pytest.raises(ValueError, match=re.escape(f"{one} is damaged, it holds something else")):
        checkpoint.load(path)
    one.write_bytes(kept[:-100])
    with pytest.raises(ValueError, match=re.escape(f"{one} is no readable checkpoint")):
        checkpoint.load(path)
    one.unlink()
    text = f"{path} goes with {one.name}, which is not beside it: copy the whole folder"
    with pytest.raises(FileNotFoundError, match=re.escape(text)):
        checkpoint.load(path)


def test_a_kill_at_any_moment_leaves_the_state_before_or_after(tiny_parts, tmp_path):
    """A process of its own saves, and ends without warning at its nth change of the folder."""
    path, outcomes = tmp_path / "last.ckpt", []
    for last in range(20):
        shutil.rmtree(tmp_path)
        checkpoint.save(path, of(1.0))
        process = os.fork()
        if process == 0:
            _die_at(last)
            checkpoint.save(path, of(2.0))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        state = checkpoint.load(path)
        assert_is(state, state["epoch"])
        outcomes.append((status, state["epoch"]))
        checkpoint.save(path, of(3.0))
        assert_is(checkpoint.load(path), 3.0)
        assert len(names(tmp_path)) == 3
    # Of the kills some came before the new state was there, some after, and the last ones never.
    assert {(9, 1.0), (9, 2.0), (0, 2.0)} == set(outcomes)


def _die_at(last: int) -> None:
    count = 0

    def counted(real):
        def call(*arguments, **options):
            nonlocal count
            if count == last:
                os._exit(9)
            count += 1
            return real(*arguments, **options)

        return call

    for name in ("replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))


# What a run writes


def make_wide(seed: int = 0) -> mmfast.MultimodalModel:
    torch.manual_seed(seed)

    def encoder():
        return nn.Sequential(nn.Linear(6, 2000), nn.ReLU(), nn.Linear(2000, 8))

    return mmfast.MultimodalModel({"a": encoder(), "b": encoder()}, 8, 3)


def fit_wide(name: str, folder: Path, *, resume: bool = False, model_seed: int = 0, **options):
    trainer, model = make_trainer(name, out_dir=folder, **options), make_wide(model_seed)
    trainer.fit(model, SPLITS.train, SPLITS.val, resume=resume)
    return trainer


@pytest.mark.parametrize(
    ("name", "optimizer", "most"),
    [
        # In copies of the weights: them, and Adam's two. Best weights are those of an epoch, theta_0 and
        # what is frozen are there from the beginning.
        ("joint", "adam", [3, 3, 3, 3]),
        ("joint", "sgd", [2, 2, 2, 2]),
        # A diagnosis is after epochs 1 and 2, and pulls the weights away from those that may be best.
        ("diagnose-relearn", "adam", [4, 4, 4, 3]),
        ("di-mml", "adam", [3, 3, 3, 3, 1, 0]),
    ],
)
def test_an_epoch_writes_what_it_has_changed(name, optimizer, most, written, tmp_path):
    fit_wide(name, tmp_path, optimizer=optimizer)
    weights = sum(p.nbytes for p in make_wide().parameters())
    epochs = [0.0]
    for file, size in written:
        epochs[-1] += size / weights
        if file == "last.ckpt":
            epochs.append(0.0)
    assert len(epochs) == len(most) + 1
    assert all(found < allowed + 0.2 for found, allowed in zip(epochs, most))


@pytest.mark.parametrize("name", methods.METHODS)
def test_runs_in_parts_are_resumed_to_the_same_weights(name, tiny_parts, tmp_path):
    whole, _ = fitted(name)

    def stop(entry, seen=[]):  # noqa: B006  one list per definition is what counts the calls
        seen.append(entry)
        if len(seen) == len(whole.history) - 1:
            raise Killed

    with pytest.raises(Killed):
        fitted(name, out_dir=tmp_path, on_epoch=stop)
    assert parts(tmp_path)
    resumed, _ = fitted(name, out_dir=tmp_path, resume=True, model_seed=4)
    assert without_times(resumed.history) == without_times(whole.history)
    assert_same_state(resumed.learner, whole.learner)
    assert has_run(tmp_path)
    clear_run(tmp_path)
    assert not has_run(tmp_path)
    assert names(tmp_path) == []


def test_a_run_of_the_format_before_goes_on(tmp_path):
    whole, _ = fitted("sample-valuation")
    path = tmp_path / "last.ckpt"
    with pytest.raises(Killed):
        fitted("sample-valuation", out_dir=tmp_path, on_epoch=_killed_after(3))
    state = checkpoint.load(path)
    copies = state["learner"].pop("_extra_state")["method"]["copies"]
    samples, modalities = copies.nonzero(as_tuple=True)
    times = copies[samples, modalities].long()
    indices, shown = samples.repeat_interleave(times), (1 << modalities).repeat_interleave(times)
    assert len(indices) > 0
    state["extra"] = {"indices": indices, "coalitions": shown}
    del state["cut"]
    torch.save({**state, "format": 1}, path)
    resumed, _ = fitted("sample-valuation", out_dir=tmp_path, resume=True, model_seed=4)
    assert without_times(resumed.history) == without_times(whole.history)


def _killed_after(epochs: int):
    seen = []

    def on_epoch(entry):
        seen.append(entry)
        if len(seen) > epochs:
            raise Killed

    return on_epoch


def test_modules_that_look_for_their_version_are_resumed(tmp_path):
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
            if local_metadata.get("version") != 3:
                raise ValueError(f"version must be 3, got {local_metadata.get('version')}")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def make():
        return mmfast.MultimodalModel({name: Versioned(6, 8) for name in ("a", "b")}, 8, 3)

    trainer = make_trainer("joint", out_dir=tmp_path)
    trainer.fit(make(), SPLITS.train, SPLITS.val)
    again = make_trainer("joint", out_dir=tmp_path)
    again.fit(make(), SPLITS.train, SPLITS.val, resume=True)
    assert_same_state(again.learner, trainer.learner)
    model = make()
    again.restore(model)
    assert again.test(model, SPLITS.test) == trainer.test(trainer.learner.model, SPLITS.test)


# The thread that writes


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

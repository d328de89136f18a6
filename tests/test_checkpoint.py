"""Checkpoints in parts: what stays the same is written once, and a kill loses nothing."""

from __future__ import annotations

import os
import re
import shutil
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
def test_an_epoch_writes_what_it_has_changed(name, optimizer, most, written, monkeypatch, tmp_path):
    # However quick the epochs are, each is written.
    monkeypatch.setattr(writing, "_BETWEEN", 0.0)
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

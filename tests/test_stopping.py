"""SIGTERM in the middle of a fit: it ends with a checkpoint, and goes on as if never stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")

import torch
from test_trainer import SPLITS, assert_same_state, make_model, make_trainer, without_times
from torch import nn

import mmfast
from mmfast import methods
from mmfast.methods.base import Learner, Method
from mmfast.training import checkpoint, loop, trainer
from mmfast.training.stopping import STATUS, Stopped
from support.processes import launch

FOLDER = Path(__file__).parent
# Methods, and settings beyond those of the trainer's tests.
CASES = {name: {} for name in methods.METHODS} | {"mla epoch": {"reset": "epoch"}}


class Steps:
    """Counts the steps of fits, and sends SIGTERM within the step of a given number."""

    def __init__(self, monkeypatch) -> None:
        self.count, self.last = 0, None
        real = loop.Losses.add

        def add(losses, loss):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(losses, loss)

        monkeypatch.setattr(loop.Losses, "add", add)

    def stop_at(self, last: int | None) -> None:
        self.count, self.last = 0, last


@pytest.fixture
def steps(monkeypatch) -> Steps:
    return Steps(monkeypatch)


def fit(case: str | Method, *, resume: bool = False, model=None, train=SPLITS.train, **options):
    if isinstance(case, Method):
        made = mmfast.Trainer(case, max_epochs=3, batch_size=32, seed=3, **options)
    else:
        made = make_trainer(case.split()[0], max_epochs=3, seed=3, **options)
        made.method = replace(made.method, **CASES[case])
    made.fit(model or make_model(), train, SPLITS.val, resume=resume)
    return made


def assert_stopped_ends_as_whole(steps, folder, case, last, whole, make=make_model, **options) -> Stopped:
    """Stop a fit at a step, resume it with a model of other weights, and hold it against the whole one."""
    steps.stop_at(last)
    with pytest.raises(Stopped) as found:
        fit(case, out_dir=folder, model=make(0), **options)
    assert steps.count <= last + 1
    steps.stop_at(None)
    resumed = fit(case, out_dir=folder, resume=True, model=make(8), **options)
    assert without_times(resumed.history) == without_times(whole.history)
    assert_same_state(resumed.learner, whole.learner)
    return found.value


@pytest.mark.parametrize("case", CASES)
def test_a_stopped_run_ends_as_one_that_was_not(case, steps, tmp_path):
    whole = fit(case)
    total = steps.count
    for last in (total // 4, total - 2):
        assert_stopped_ends_as_whole(steps, tmp_path / str(last), case, last, whole)


def test_the_stop_is_after_the_batch_and_says_where(steps, tmp_path):
    steps.stop_at(9)
    with pytest.raises(Stopped) as found:
        fit("joint", out_dir=tmp_path)
    text = "stopped by SIGTERM after batch 3 of 6 in epoch 2 of 3: resume=True goes on from there"
    assert (str(found.value), found.value.code) == (text, 143)
    assert steps.count == 9
    state = checkpoint.load(tmp_path / "last.ckpt")
    assert (state["epoch"], state["cut"]["batch"], len(state["history"])) == (0, 3, 1)


@dataclass
class Augmented:
    """Samples that are changed at random, by each of the three that draw."""

    base: object

    def __len__(self):
        return len(self.base)

    def __getitem__(self, index):
        sample = dict(self.base[index])
        factor = random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1)  # noqa: NPY002
        return sample | {"a": factor * sample["a"] + 0.1 * torch.randn(6)}

    @property
    def evaluation(self):
        return self.base


def make_dropping(seed: int) -> mmfast.MultimodalModel:
    torch.manual_seed(seed)
    encoders = {name: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.ReLU()) for name in ("a", "b")}
    return mmfast.MultimodalModel(encoders, 8, 3)


def test_what_is_drawn_goes_on_where_it_stopped(steps, tmp_path):
    train = Augmented(SPLITS.train)

    def seeded(seed):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002

    seeded(1)
    whole = fit("joint", model=make_dropping(0), train=train)
    seeded(1)
    steps.stop_at(10)
    with pytest.raises(Stopped):
        fit("joint", model=make_dropping(0), train=train, out_dir=tmp_path)
    steps.stop_at(None)
    seeded(2)
    resumed = fit("joint", model=make_dropping(9), train=train, out_dir=tmp_path, resume=True)
    assert without_times(resumed.history) == without_times(whole.history)
    assert_same_state(resumed.learner, whole.learner)


def test_effective_dimensions_are_not_found_anew(steps, tmp_path, monkeypatch):
    steps.stop_at(9)
    with pytest.raises(Stopped, match="in epoch 2 of 3"):
        fit("di-mml", out_dir=tmp_path)
    steps.stop_at(None)
    monkeypatch.setattr(methods.DIMML.learner, "_effective_dimensions", None)
    assert len(fit("di-mml", out_dir=tmp_path, resume=True).history) == 5


class _SlowTeacherLearner(Learner):
    """A user's own: each epoch begins with what the weights of that moment say, and resets its counter."""

    def build(self):
        self.register_buffer("teacher", torch.zeros(8))
        self.steps_of_epoch = 0
        self.hardest = torch.zeros(0, dtype=torch.int64)

    def start_epoch(self, epoch, train):
        self.teacher.copy_(self.model.encoders["a"](train.arrays["a"]).mean(0).detach())
        self.hardest = self.model(train[:])[:, 0].detach().topk(20).indices
        self.steps_of_epoch = 0
        return train

    def forward(self, batch, step=0):
        self.steps_of_epoch += 1
        pull = self.encode(batch)[0].mean(0) - self.teacher
        weight = float(self.hardest.sum()) / 1000 + self.steps_of_epoch / 10
        return super().forward(batch, step) + weight * pull.square().sum()

    def extra_state(self):
        return {"steps": self.steps_of_epoch, "hardest": self.hardest}

    def load_extra_state(self, state):
        self.steps_of_epoch, self.hardest = state["steps"], state["hardest"]


@dataclass(frozen=True)
class SlowTeacher(Method):
    name = "slow-teacher"
    title = "Slow teacher"
    learner = _SlowTeacherLearner


def test_a_learner_of_the_user_s_own_goes_on(steps, tmp_path):
    whole = fit(SlowTeacher())
    assert_stopped_ends_as_whole(steps, tmp_path, SlowTeacher(), 9, whole)


def test_an_epoch_of_other_data_does_not_go_on(steps, tmp_path):
    steps.stop_at(3)
    with pytest.raises(Stopped):
        fit("joint", out_dir=tmp_path)
    steps.stop_at(None)
    with pytest.raises(ValueError, match=r"of an epoch of 4 batches, as the data give, got one of 6"):
        fit("joint", out_dir=tmp_path, resume=True, train=SPLITS.train.subset(range(100)))


def test_a_stop_between_epochs_or_at_the_end_is_one_too(tmp_path, monkeypatch):
    def stop(entry):
        if entry["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM after epoch 2 of 3"):
        fit("joint", out_dir=tmp_path, on_epoch=stop)
    real = trainer.weights_of

    def late(learner):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(learner)

    monkeypatch.setattr(trainer, "weights_of", late)
    with pytest.raises(Stopped, match="when the fit was finished"):
        fit("joint", out_dir=tmp_path, resume=True)
    assert (tmp_path / "model.ckpt").exists()


# The program's own handler


def test_the_program_s_handler_is_called_and_put_back(steps, tmp_path):
    seen = []

    def mine(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGTERM, mine)
    try:
        steps.stop_at(2)
        with pytest.raises(Stopped):
            fit("joint", out_dir=tmp_path)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
        # With nowhere to write to there is nothing to do beside it.
        steps.stop_at(2)
        fit("joint")
        assert len(seen) == 2
        # One that the program installs meanwhile stays.
        fit("joint", out_dir=tmp_path / "2", on_epoch=lambda entry: signal.signal(signal.SIGTERM, print))
        assert signal.getsignal(signal.SIGTERM) is print
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        steps.stop_at(2)
        fit("joint", out_dir=tmp_path / "3")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_fit_in_another_thread_installs_nothing(tmp_path):
    found = []
    worker = threading.Thread(
        target=fit,
        args=("joint",),
        kwargs={
            "out_dir": tmp_path,
            "on_epoch": lambda entry: found.append(signal.getsignal(signal.SIGTERM)),
        },
    )
    worker.start()
    worker.join()
    assert found == [signal.SIG_DFL] * 3
    assert (tmp_path / "model.ckpt").exists()


# Several processes

# Workers of a loader get the signal, too, for it goes to the whole group; in a step so long that their
# end would be noticed.
WITH_WORKERS = f"""
import sys, time
sys.path.insert(0, {str(FOLDER)!r})
import test_stopping as t

def forward(*_):
    print("a step", flush=True)
    time.sleep(1)

model, train = t.make_model(), t.Augmented(t.SPLITS.train)
trainer = t.make_trainer("joint", num_workers=2, out_dir=sys.argv[1])
t.loop.Losses.add = lambda *_: forward()
trainer.fit(model, train)
"""


def test_workers_outlive_the_signal(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-P", "-c", WITH_WORKERS, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "a step\n"
            os.killpg(process.pid, signal.SIGTERM)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == STATUS, said
    assert checkpoint.load(tmp_path / "last.ckpt")["cut"]["batch"] == 1


PROCESSES = f"""
import json, os, signal, sys
sys.path.insert(0, {str(FOLDER)!r})
import torch
from torch import nn
import mmfast
import test_stopping as t
from mmfast.training import checkpoint, loop, stopping

torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), os.path.dirname(sys.argv[1])
count, last = 0, None
real = loop.Losses.add

def add(losses, loss):
    global count
    count += 1
    # One of them alone is told.
    if rank == 1 and count == last:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(losses, loss)

loop.Losses.add = add
# They ask each other after every batch.
stopping._SECONDS = 0.0

def make(seed):
    def encoder():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3))
    torch.manual_seed(seed)
    return mmfast.MultimodalModel({{"a": encoder(), "b": encoder()}}, 8, 3)

def fit(name, seed, **options):
    global count
    count = 0
    return t.fit(name, model=make(seed), accelerator="cpu", **options)

result = {{}}
for name in ("joint", "mla", "di-mml"):
    whole, out = fit(name, 0), os.path.join(folder, name)
    last = 10
    try:
        fit(name, 0, out_dir=out)
    except stopping.Stopped as error:
        stopped = [str(error), error.code]
    last = None
    resumed = fit(name, 5, out_dir=out, resume=True)
    same = t.without_times(resumed.history) == t.without_times(whole.history)
    digests = [checkpoint.digest(trainer.learner.state_dict()) for trainer in (whole, resumed)]
    result[name] = [stopped, same, digests]
with open(sys.argv[1] + str(rank), "w") as file:
    json.dump(result, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_all_processes_stop_with_the_one_that_is_told(tmp_path):
    ranks = launch(PROCESSES, 2, tmp_path / "run")
    for name in ranks[0]:
        (stopped, same, digests), (other_stopped, other_same, other_digests) = (rank[name] for rank in ranks)
        assert stopped[0] == other_stopped[0]
        assert " in epoch " in stopped[0]
        # A launcher would take another status of the second for a failure, and kill the first.
        assert (stopped[1], other_stopped[1]) == (143, 0)
        assert same
        assert other_same
        assert len({*digests, *other_digests}) == 1

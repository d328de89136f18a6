"""Options of training in two processes with half a batch each, as in one with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.processes import launch

pytest.importorskip("lightning_fabric")

FOLDER = Path(__file__).parent
OPTIONS = {
    "accumulate": {"accumulate_grad_batches": 4, "batch_size": 16, "gradient_clip_val": 0.2},
    "average": {"ema_decay": 0.8, "schedule": "cosine", "warmup_steps": 3, "freeze": ["encoders.a"]},
}
CASES = [
    "mla accumulate",
    "mla accumulate missing",
    "di-mml accumulate missing",
    "mla average",
    "di-mml average",
]

SCRIPT = f"""
import json, os, sys
sys.path.insert(0, {str(FOLDER)!r})
import torch
from torch import nn
import mmfast
import test_trainer as t
from mmfast.data import ArrayDataset
from mmfast.training import checkpoint

torch.set_num_threads(1)
world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])

class Nested(torch.utils.data.Dataset):
    # A nest of tensors is encoded for the samples that have it alone: in some batches for none.
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        sample = self.data[index]
        return sample | {{"b": {{"whole": sample["b"]}}}}

class OfNests(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, nest):
        return self.inner(nest["whole"])

def rarely(data):
    draw = torch.Generator().manual_seed(len(data))
    present = {{"b": torch.rand(len(data), generator=draw) < 0.08}}
    return Nested(ArrayDataset(data.arrays, data.labels, present=present))

def trainer_of(name, **options):
    return t.make_trainer(name, accelerator="cpu", devices=world, **options)

class Losses:
    def __init__(self):
        self.all = []

    def on_step_end(self, trainer, learner, entry):
        self.all.append(entry["loss"])

def figures(case):
    name, option, *words = case.split()
    train, val, test = t.SPLITS.train, t.SPLITS.val, t.SPLITS.test
    model, losses = t.make_model(), Losses()
    trainer = trainer_of(name, callbacks=[losses], **{OPTIONS!r}[option])
    if words:
        train, val, test = map(rarely, (train, val, test))
        model.encoders["b"] = OfNests(model.encoders["b"])
    trainer.fit(model, train, val)
    found = trainer.test(model, test)
    steps = trainer.fabric.all_reduce(torch.stack(losses.all), reduce_op="mean").tolist()
    digests.append(checkpoint.digest(model.state_dict()))
    return [*steps, *(entry["loss"] for entry in trainer.history), found.loss, found.accuracy]

class StopsAlone:
    # In the last process.
    def on_step_end(self, trainer, learner, entry):
        trainer.should_stop = entry["epoch"] == 1 and trainer.fabric.global_rank == world - 1

def normed():
    def encoder():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    torch.manual_seed(0)
    return mmfast.MultimodalModel({{"a": encoder(), "b": encoder()}}, 8, 3)

def normed_average():
    trainer, model = trainer_of("joint", ema_decay=0.8, patience=3), normed()
    trainer.fit(model, t.SPLITS.train, t.SPLITS.val)
    digests.append(checkpoint.digest(model.state_dict()))
    return [entry["val"]["loss"] for entry in trainer.history]

digests = []
result = {{"figures": {{case: figures(case) for case in {CASES!r}}}}}
stopped = trainer_of("mla", callbacks=[StopsAlone()])
stopped.fit(t.make_model(), t.SPLITS.train, t.SPLITS.val)
result["epochs"] = len(stopped.history)
result["normed"] = normed_average()
result["digests"] = digests
with open(sys.argv[1] + str(rank), "w") as file:
    json.dump(result, file)
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("options_parallel")
    return {number: launch(SCRIPT, number, folder / str(number)) for number in (1, 2)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_reach_the_figures_of_one(case, runs):
    assert runs[2][0]["figures"][case] == pytest.approx(runs[1][0]["figures"][case], rel=1e-4, abs=1e-6)


def test_processes_have_the_same_weights(runs):
    assert len(runs[2][0]["digests"]) == len(CASES) + 1
    assert runs[2][0]["digests"] == runs[2][1]["digests"]
    assert runs[2][0]["normed"] == runs[2][1]["normed"]


def test_all_processes_end_with_the_one_that_wants_to(runs):
    assert [run["epochs"] for run in (*runs[1], *runs[2])] == [2, 2, 2]

"""Two processes with half a batch each train as one process with the whole batch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.processes import launch

FOLDER = Path(__file__).parent
EXACT = [
    "joint",
    "di-mml",
    "mla",
    "sample-valuation",
    "diagnose-relearn",
    "diagnose-relearn missing",
    "multi-loss missing",
    "di-mml missing",
    "di-mml missing sigmoid",
    "mla missing",
    "modality-valuation missing",
    "sample-valuation nested",
    "di-mml nested",
]
NORMALIZED = ["sample-valuation", "modality-valuation", "di-mml", "diagnose-relearn"]

# All runs of one launch: figures that must not depend on the number of processes, and what each process
# ends up with where batch norm makes them depend on it.
SCRIPT = f"""
import dataclasses, hashlib, json, os, sys
sys.path.insert(0, {str(FOLDER)!r})
import torch
from torch import nn
import mmfast
import test_trainer as t
from mmfast.data import ArrayDataset
from mmfast.training.probes import probe

torch.set_num_threads(1)
world = int(os.environ["WORLD_SIZE"])

def with_gaps(data):
    draw = torch.Generator().manual_seed(len(data))
    present = {{name: torch.rand(len(data), generator=draw) < 0.7 for name in data.modalities}}
    return ArrayDataset(data.arrays, data.labels, present=present)

class Nested(torch.utils.data.Dataset):
    # One modality is a nest of tensors, as a text's ids and mask are.
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        sample = self.data[index]
        return sample | {{"b": {{"first": sample["b"][:2], "others": (sample["b"][2:4], sample["b"][4:])}}}}

class OfNests(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, nest):
        return self.inner(torch.cat([nest["first"], *nest["others"]], 1))

def figures(case):
    name, *words = case.split()
    parts = t.SPLITS.train, t.SPLITS.val, t.SPLITS.test
    labels = t.SPLITS.test.labels.tolist()
    train, val, test = map(with_gaps, parts) if "missing" in words else parts
    trainer, model = t.make_trainer(name, accelerator="cpu", devices=world), t.make_model()
    if "nested" in words:
        train, val, test = map(Nested, parts)
        model.encoders["b"] = OfNests(model.encoders["b"])
    if "sigmoid" in words:
        trainer.method = dataclasses.replace(trainer.method, contrast="sigmoid")
    trainer.fit(model, train, val)
    found = trainer.test(model, test)
    # Each process values its share, and has the whole.
    valued = mmfast.valuate(trainer.learner, test, fabric=trainer.fabric)
    assert valued.labels.tolist() == labels
    values[case] = valued.contributions.tolist()
    # Fewer samples than processes.
    single = torch.utils.data.Subset(test, [0])
    first = mmfast.valuate(trainer.learner, single, fabric=trainer.fabric)
    assert first.contributions.shape == (1, 2)
    assert (first.present is None) == (valued.present is None)
    trainer.test(model, single)
    kept = trainer.learner.keep(single, whole=True)
    assert len(kept) == 1
    trainer.learner.forget()
    if case == "joint":
        values["probe"] = [list(probe(trainer.learner, train, test, trainer.fabric).values())]
    losses = [entry["loss"] for entry in trainer.history]
    return [*losses, found.loss, found.accuracy, found.macro_f1, *found.contribution.values()]

def digest(name):
    def encoder():
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    torch.manual_seed(0)
    model = mmfast.MultimodalModel({{"a": encoder(), "b": encoder()}}, 8, 3)
    trainer = t.make_trainer(name, accelerator="cpu", devices=world)
    learner = trainer.fit(model, t.SPLITS.train, t.SPLITS.val)
    state = learner.state_dict() | {{f"extra {{k}}": v for k, v in learner.extra_state().items()}}
    tensors = {{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}}
    return {{k: hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest() for k, v in tensors.items()}}

def elsewhere():
    # Resume with a folder that the other process does not see.
    folder = sys.argv[1] + "-out"
    t.make_trainer("joint", accelerator="cpu", devices=world, out_dir=folder).fit(
        t.make_model(), t.SPLITS.train, t.SPLITS.val
    )
    mine = folder if os.environ["RANK"] == "0" else folder + "-elsewhere"
    trainer = t.make_trainer("joint", accelerator="cpu", devices=world, out_dir=mine)
    try:
        trainer.fit(t.make_model(), t.SPLITS.train, t.SPLITS.val, resume=True)
    except ValueError as error:
        return str(error)

values = {{}}
result = {{"exact": {{case: figures(case) for case in {EXACT!r}}}}}
result["digest"] = {{name: digest(name) for name in {NORMALIZED!r}}}
result["values"] = values
result["elsewhere"] = elsewhere()
with open(sys.argv[1] + os.environ["RANK"], "w") as file:
    json.dump(result, file)
# A process that ends while the other still talks to it is killed by its own threads.
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("data_parallel")
    return {number: launch(SCRIPT, number, folder / str(number)) for number in (1, 2)}


@pytest.mark.parametrize("case", EXACT)
def test_two_processes_reach_the_metrics_of_one(case, runs):
    assert runs[2][0]["exact"][case] == pytest.approx(runs[1][0]["exact"][case], rel=1e-5)


@pytest.mark.parametrize("case", [*EXACT, "probe"])
def test_processes_value_their_shares_of_the_samples(case, runs):
    (alone,), (one, other) = runs[1], runs[2]
    assert one["values"][case] == other["values"][case]
    torch.testing.assert_close(torch.tensor(one["values"][case]), torch.tensor(alone["values"][case]))


def test_a_folder_that_only_one_process_sees_is_told(runs):
    text = "processes must agree on the number of epochs done, got 4, 0: out_dir must be a folder that"
    assert runs[1][0]["elsewhere"] is None
    assert all(run["elsewhere"].startswith(text) for run in runs[2])


@pytest.mark.parametrize("name", NORMALIZED)
def test_processes_decide_alike_with_batch_norm(name, runs):
    one, other = (run["digest"][name] for run in runs[2])
    assert one == other

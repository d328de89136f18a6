"""Passes shared by more processes than there are samples, and samples of which few tell what they lack."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning_fabric import Fabric

from mmfast import methods, valuation
from mmfast.data.kept import encode_once
from mmfast.training.evaluation import evaluate
from support.learners import bind, make_data

WORLD_SIZE = 3
LACKING = (1, 40)
SIZES = (1, 2, 64)


def samples(size):
    """Return samples of which only those that lack `b` say so."""
    data = make_data(size)
    name = data.modalities[1]
    return [
        data[i] | ({f"{name}__present": torch.tensor(False)} if i in LACKING else {}) for i in range(size)
    ]


def found(size, *, share):
    learner, data = bind(methods.Joint()), samples(size)
    learner.eval()
    phi, present = valuation.contributions(learner, data, share=share)
    kept = encode_once(learner, data, whole=True)
    marks = {key: value for key, value in kept.tensors.items() if key.endswith("__present")}
    return {"phi": phi, "present": present, **kept.tensors, "marks": marks}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    results = {size: found(size, share=True) for size in SIZES}
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_each_process_gets_the_whole_whatever_its_share(tmp_path: Path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=WORLD_SIZE)
    for rank in range(WORLD_SIZE):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        for size in SIZES:
            torch.testing.assert_close(results[size], found(size, share=False))


def test_few_samples_that_tell_of_themselves_are_told_from_the_others():
    learner, data = bind(methods.Joint()), samples(64)
    valued = valuation.valuate(learner, data)
    assert valued.present is not None
    lacking = (~valued.present).nonzero()
    assert lacking.tolist() == [[i, 1] for i in LACKING]
    phi, present = valuation.contributions(learner, data)
    assert torch.equal(present, valued.present)
    torch.testing.assert_close(phi, valued.contributions)
    kept = encode_once(learner, data, whole=False)
    (mask,) = (value for key, value in kept.tensors.items() if key == f"{learner.modalities[1]}__present")
    assert (~mask).nonzero().flatten().tolist() == list(LACKING)


def test_figures_of_no_batch_wait_for_those_of_others(monkeypatch):
    learner, data = bind(methods.Joint()), make_data(4)
    fabric = Fabric(accelerator="cpu", devices=1)
    learner.batches = lambda *words, **options: iter(())
    monkeypatch.setattr(fabric, "all_reduce", lambda sums, reduce_op: torch.ones_like(sums))
    # What torchmetrics says of a figure that was never updated is nobody's mistake.
    with pytest.warns(UserWarning, match="1 of 4 samples have NaN logits"):
        assert dataclasses.asdict(evaluate(learner, data, fabric))["accuracy"] == 1

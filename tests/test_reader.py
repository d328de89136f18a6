"""How data sets are read: alike whoever reads, by workers that stay, and no more than is shown."""

from __future__ import annotations

import copy
import os
import pickle
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from mmfast.coalitions import SHOWN
from mmfast.data import ArrayDataset
from mmfast.data.batches import Entries
from mmfast.data.devices import pinned
from mmfast.data.reader import Reader, evaluation_batches

CPU = torch.device("cpu")
NAMES = ("a", "b")
N = 40


class Drawing(Dataset):
    """Samples that are augmented at random, by each generator that data sets use."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), np.random.rand(), random.random()]  # noqa: NPY002
        return {
            "a": torch.tensor([index, *draws]),
            "b": torch.ones(2),
            "label": index % 3,
            "pid": os.getpid(),
        }


class Parts(Dataset):
    """Samples of which single modalities can be had; what is read is in the batch."""

    def __init__(self, present=None):
        self.present_of = present
        self.read = []

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.get(index, NAMES)

    def get(self, index, modalities):
        self.read.append((index, tuple(modalities)))
        sample = {name: torch.tensor([float(index), float(NAMES.index(name))]) for name in modalities}
        if self.present_of is not None:
            sample |= {"b__present": self.present_of(index)} if "b" in modalities else {}
        return sample | {"label": index % 3}


def in_batches(size, order=None):
    return (torch.arange(N) if order is None else order).split(size)


def read(dataset, batches=None, **options):
    settings = {key: options.pop(key) for key in ("num_workers", "collate_fn", "prefetch") if key in options}
    batches = in_batches(8) if batches is None else batches
    return list(Reader(**settings).read(dataset, batches, NAMES, CPU, **options))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_draws_do_not_depend_on_who_reads(num_workers):
    here, there = read(Drawing(), seed=5), read(Drawing(), seed=5, num_workers=num_workers)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["a"], other["a"])
        assert {os.getpid()} == set(one["pid"].tolist())
        assert os.getpid() not in other["pid"].tolist()
    other_seed = read(Drawing(), seed=6)
    assert not torch.equal(here[0]["a"][:, 1:], other_seed[0]["a"][:, 1:])
    assert not torch.equal(here[0]["a"][:, 1:], here[1]["a"][:, 1:])


def test_a_pass_that_begins_late_draws_as_a_whole_one():
    whole, late = read(Drawing(), seed=5), read(Drawing(), in_batches(8)[3:], seed=5, first=3)
    assert torch.equal(whole[3]["a"], late[0]["a"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_generators_of_the_process_stay_as_they_are(num_workers):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    read(Drawing(), num_workers=num_workers)
    assert state() == before


def pids(reader, dataset):
    batches = reader.read(dataset, in_batches(4), NAMES, CPU)
    return {pid for batch in batches for pid in batch["pid"].tolist()}


def test_workers_stay_from_pass_to_pass_and_go_at_the_end():
    reader, dataset = Reader(num_workers=2), Drawing()
    with reader.staying():
        first = pids(reader, dataset)
        # One that is given up in the middle, too.
        next(iter(reader.read(dataset, in_batches(4), NAMES, CPU)))
        assert pids(reader, dataset) == first
        assert len(first) == 2
        # The plain form of the same data has the same workers.
        plain = reader.read(dataset, in_batches(4), NAMES, CPU, plain=True)
        assert {pid for batch in plain for pid in batch["pid"].tolist()} == first
    for pid in first:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not pids(reader, dataset) & first


def test_two_passes_at_once_do_not_take_each_others_batches():
    reader, dataset = Reader(num_workers=1), Drawing()
    with reader.staying():
        passes = [reader.read(dataset, in_batches(8), NAMES, CPU, seed=seed) for seed in (1, 2)]
        both = list(zip(*passes, strict=True))
    for seed, found in zip((1, 2), zip(*both, strict=True), strict=True):
        for one, alone in zip(found, read(dataset, seed=seed), strict=True):
            assert torch.equal(one["a"], alone["a"])


def test_workers_that_failed_are_not_asked_again():
    class Failing(Drawing):
        def __getitem__(self, index):
            if index == 17:
                raise KeyError("sample 17 is broken")
            return super().__getitem__(index)

    reader, dataset = Reader(num_workers=1), Failing()
    with reader.staying():
        with pytest.raises(KeyError, match="sample 17 is broken"):
            list(reader.read(dataset, in_batches(8), NAMES, CPU))
        (batch,) = reader.read(dataset, [torch.arange(8)], NAMES, CPU)
        assert batch["a"][:, 0].tolist() == list(range(8))


def test_a_reader_is_copied_and_sent_without_its_workers():
    reader = Reader(num_workers=1)
    with reader.staying():
        list(reader.read(Drawing(), in_batches(8), NAMES, CPU))
        for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
            assert other == reader
            assert not other._pools


class Pair(NamedTuple):
    ids: torch.Tensor
    size: torch.Tensor


class Nested(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return {
            "a": {"ids": torch.tensor([index, 1]), "weight": torch.ones(2, dtype=torch.float64)},
            "b": Pair(torch.tensor([index]), torch.tensor([0.5], dtype=torch.float64)),
            "label": np.int32(index % 3),
            "name": f"sample {index}",
            "score": np.float64(0.25),
        }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nests_are_cast_as_one_and_other_values_are_left_alone(num_workers):
    batch = read(Nested(), num_workers=num_workers, dtype=torch.float32)[0]
    assert batch["a"]["weight"].dtype == batch["b"].size.dtype == torch.float32
    assert batch["a"]["ids"].dtype == batch["b"].ids.dtype == torch.int64
    assert isinstance(batch["b"], Pair)
    assert batch["label"].dtype == torch.int64
    assert batch["name"][3] == "sample 3"
    # Of what is no modality's the model knows nothing.
    assert batch["score"].dtype == torch.float64


def make_arrays(width, num_samples=N):
    draw = torch.Generator().manual_seed(0)
    arrays = {name: torch.randn(num_samples, width, generator=draw) for name in NAMES}
    present = {"b": torch.rand(num_samples, generator=draw) < 0.5}
    return ArrayDataset(arrays, torch.arange(num_samples) % 3, present=present)


@pytest.mark.parametrize("width", [1, 300, 40_000])
def test_batches_from_memory_are_those_of_the_data_set(width):
    dataset = make_arrays(width)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    # The last one is longer, as where a runt joins it.
    batches = [*order[:30].split(5), order[30:]]
    for batch, index in zip(read(dataset, batches, dtype=torch.float32), batches, strict=True):
        expected = dataset[index]
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key
    cast = read(dataset, batches, dtype=torch.float64)[0]
    assert cast["a"].dtype == torch.float64
    assert torch.equal(cast["a"], dataset[batches[0]]["a"].double())
    assert read(dataset, []) == []


@pytest.mark.parametrize("parts", [False, True])
def test_data_on_a_device_give_batches_there(parts):
    device = torch.device("meta")
    dataset = make_arrays(3).to(device)
    assert dataset.device == dataset[0]["a"].device == dataset[:5]["b"].device == device
    shown = torch.rand(N, 2, generator=torch.Generator().manual_seed(2)) < 0.6
    entries = Entries(dataset, torch.arange(N), shown if parts else None)
    for batch in Reader().read(entries, in_batches(8), NAMES, device, dtype=torch.float32):
        assert {value.device for value in batch.values()} == {device}
        assert (SHOWN in batch) == parts
        assert len(batch["label"]) == 8


def test_evaluation_takes_the_plain_form_in_order_and_in_shares():
    class Augmented(Drawing):
        evaluation = make_arrays(4)

    class Model(torch.nn.Module):
        modalities = NAMES

    whole = torch.cat([batch["a"] for batch in evaluation_batches(Model(), Augmented(), 7)])
    assert torch.equal(whole, Augmented.evaluation.arrays["a"])
    shares = [
        torch.cat([b["a"] for b in evaluation_batches(Model(), Augmented(), 7, rank=r, world_size=3)])
        for r in range(3)
    ]
    for r, share in enumerate(shares):
        assert torch.equal(share, whole[r::3])


def test_a_pass_over_few_samples_is_spread_over_workers():
    reader = Reader()
    assert reader.evaluation_size(make_arrays(2)) == 256
    assert reader.evaluation_size(Drawing()) == 16
    assert reader.evaluation_size(range(1_000)) == 63
    assert reader.evaluation_size(range(10**6)) == 256
    assert reader.evaluation_size(range(10**6), 32) == 32


BAD = {
    "workers": ({"num_workers": -1}, ValueError, "num_workers must be an integer of at least 0, got -1"),
    "batch": ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
    "prefetch": ({"prefetch": 1.5}, ValueError, "prefetch must be an integer of at least 1, got 1.5"),
    "collate": ({"collate_fn": 3}, TypeError, "collate_fn must be a function of a list of samples, got 3"),
    "pin": ({"pin_memory": "yes"}, ValueError, "pin_memory must be True, False or \"auto\", got 'yes'"),
}


@pytest.mark.parametrize(("options", "kind", "text"), BAD.values(), ids=BAD)
def test_what_no_reader_can_be(options, kind, text):
    with pytest.raises(kind, match=text):
        Reader(**options)


def test_a_function_that_returns_no_batch_is_told():
    with pytest.raises(TypeError, match="collate_fn must return a dict of the batch's values, got list of 8"):
        read(Drawing(), collate_fn=list)


def test_a_data_set_in_memory_with_samples_of_its_own_is_asked_for_them():
    class Doubled(ArrayDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"a": 2 * sample["a"]}

    data = Doubled({"a": torch.ones(N, 2), "b": torch.ones(N, 2)}, [0, 1] * (N // 2))
    assert {value for batch in read(data) for value in batch["a"].flatten().tolist()} == {2}


def test_a_data_set_may_have_grown_since_it_was_read():
    reader, data = Reader(), [Parts()[index] for index in range(4)]
    list(reader.read(data, [torch.arange(4)], NAMES, CPU))
    data.append(Parts()[4])
    list(reader.read(data, [torch.arange(5)], NAMES, CPU))
    assert len(reader.marks(data, NAMES).known) == 5


@pytest.mark.skipif(torch.accelerator.is_available(), reason="memory can be pinned")
def test_no_memory_is_pinned_where_no_device_takes_it():
    for data in (Parts(), make_arrays(2)):
        (batch,) = Reader(pin_memory=True).read(data, [torch.arange(4)], NAMES, CPU)
        assert not batch["label"].is_pinned()


def test_what_lies_on_a_device_is_not_pinned():
    value = torch.ones(2, device="meta")
    assert pinned({"a": value, "b": ["text"]}) == {"a": value, "b": ["text"]}

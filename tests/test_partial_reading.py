"""Copies that show few modalities: only what is shown is read, and what samples lack is remembered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_reader import CPU, NAMES, N, Parts, in_batches, make_arrays, read
from torch.utils.data import Dataset

from mmfast.coalitions import SHOWN, rows_key
from mmfast.data import ArrayDataset
from mmfast.data.batches import Entries, to_read
from mmfast.data.reader import Reader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_what_is_shown_is_read(num_workers):
    dataset = Parts()
    indices = torch.arange(12)
    shown = torch.ones(12, 2, dtype=torch.bool)
    shown[4:8, 0] = False
    shown[8:, 1] = False
    (batch,) = read(Entries(dataset, indices, shown), [torch.arange(12)], num_workers=num_workers)
    assert batch["a"][:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11] == batch[rows_key("a")].tolist()
    assert batch["b"][:, 0].tolist() == list(range(8)) == batch[rows_key("b")].tolist()
    assert torch.equal(batch[SHOWN], shown)
    assert batch["label"].tolist() == [index % 3 for index in range(12)]
    if num_workers == 0:
        assert dataset.read[4:6] == [(4, ("b",)), (5, ("b",))]
        assert dataset.read[8] == (8, ("a",))


def test_each_encoder_gets_two_rows():
    shown = torch.tensor([[True, False]] * 5)
    shown[3] = torch.tensor([True, True])
    assert to_read(shown).sum(0).tolist() == [5, 2]
    assert (to_read(shown) | ~shown).all()
    assert torch.equal(to_read(shown[:1]), torch.ones(1, 2, dtype=torch.bool))


def test_data_without_get_are_read_whole_and_given_in_part():
    class Whole(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return {"a": torch.ones(1), "b": torch.tensor([float(index)]), "label": 0}

    shown = torch.tensor([[True, False], [True, True], [True, True]])
    (batch,) = read(Entries(Whole(), torch.arange(3), shown), [torch.arange(3)])
    assert batch["b"].flatten().tolist() == [1, 2] == batch[rows_key("b")].tolist()
    assert rows_key("a") not in batch


class Batched(Dataset):
    """Gives batches by itself, as a data set in a store of columns does."""

    takes_batches = True

    def __len__(self):
        return N

    def __getitem__(self, index):
        index = np.asarray(index)
        return {"a": index[:, None] * 1.0, "b": torch.ones(len(index), 1), "label": index % 3}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_give_batches(num_workers):
    shown = torch.tensor([[True, False], [False, True], [True, True], [True, True]])
    entries = Entries(Batched(), torch.tensor([7, 8, 9, 9]), shown)
    (batch,) = read(entries, [torch.arange(4)], num_workers=num_workers, dtype=torch.float32)
    assert batch["a"].flatten().tolist() == [7, 9, 9]
    assert batch[rows_key("a")].tolist() == [0, 2, 3]
    assert batch["a"].dtype == torch.float32
    assert batch["label"].tolist() == [1, 2, 0, 0]


def test_a_function_of_the_users_gets_whole_samples():
    def together(samples):
        assert all(set(sample) == {"a", "b", "label"} for sample in samples)
        return {key: torch.as_tensor(np.stack([sample[key] for sample in samples])) for key in samples[0]}

    shown = torch.tensor([[True, False]] * 3 + [[True, True]] * 3)
    entries = Entries(Parts(), torch.arange(6), shown)
    (batch,) = read(entries, [torch.arange(6)], collate_fn=together)
    assert rows_key("b") not in batch
    assert len(batch["b"]) == 6
    assert torch.equal(batch[SHOWN], shown)


def test_parts_of_batches_from_memory():
    dataset = make_arrays(3)
    shown = torch.rand(N, 2, generator=torch.Generator().manual_seed(2)) < 0.6
    entries = Entries(dataset, torch.arange(N).flip(0), shown)
    for batch, index in zip(read(entries), in_batches(8), strict=True):
        for m, name in enumerate(NAMES):
            rows = batch.get(rows_key(name), torch.arange(8))
            assert torch.equal(batch[name], dataset.arrays[name][entries.indices[index][rows]])
            assert set(rows.tolist()) >= set(shown[index][:, m].nonzero().flatten().tolist())
        assert torch.equal(batch["b__present"], dataset.present["b"][entries.indices[index]])


def test_what_samples_tell_of_modalities_is_remembered():
    def present(index):
        return index % 4 != 0

    reader, dataset = Reader(), Parts(present)
    shown = torch.ones(N, 2, dtype=torch.bool)
    shown[20:, 1] = False
    entries = Entries(dataset, torch.arange(N), shown)
    with reader.staying():
        for _ in reader.read(entries, in_batches(8), NAMES, CPU):
            pass
        found, known = reader.marks(dataset, NAMES).over_processes()
    # Nothing is held of data sets afterwards.
    assert not reader.marks(dataset, NAMES).known.any()
    # Of samples that were read in part nothing is known.
    assert known.tolist() == [index < 20 for index in range(N)]
    assert found[:20, 1].tolist() == [present(index) for index in range(20)]
    assert found[:, 0].all()


def test_masks_of_the_data_set_are_known_unread():
    dataset = make_arrays(2)
    found, known = Reader().marks(dataset, NAMES).over_processes()
    assert known.all()
    assert torch.equal(found[:, 1], dataset.present["b"])


def test_copies_of_data_on_a_device_lie_there_whole():
    data = ArrayDataset({"a": torch.randn(4, 2), "b": torch.randn(4, 2)}, [0, 1, 0, 1])
    shown = torch.tensor([[True, False], [True, True], [True, True]])
    entries, place = Entries(data.to("meta"), torch.arange(3), shown), torch.device("meta")
    (batch,) = Reader().read(entries, [torch.arange(3)], ("a", "b"), place, dtype=torch.float32)
    assert {key: value.device for key, value in batch.items()} == dict.fromkeys(batch, place)
    assert rows_key("a") not in batch
    assert len(batch[rows_key("b")]) == 2


def test_what_few_samples_tell_of_a_modality_is_not_said_of_others():
    class Seldom(Parts):
        def get(self, index, modalities):
            sample = super().get(index, modalities)
            return sample | ({"b__present": False} if index == 1 and "b" in modalities else {})

    shown = torch.tensor([[True, True], [True, True], [True, False], [False, True]])
    (batch,) = read(Entries(Seldom(), torch.arange(4), shown), [torch.arange(4)])
    assert batch["b__present"].tolist() == [True, False, False, True]

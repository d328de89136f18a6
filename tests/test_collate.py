"""Batches of samples: what is stacked, what is listed, and what samples lack."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from mmfast.data.collate import assemble, collate, takes_parts


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


def sample(i: int, **more):
    return {"audio": torch.arange(3.0) + i, "label": i, **more}


def samples(*values, key="x"):
    return [sample(i, **{key: value}) for i, value in enumerate(values)]


def test_plain_samples_are_as_torch_stacks_them():
    given = [
        {"a": torch.randn(2, 3), "b": np.arange(4, dtype=np.int16) + i, "c": 0.5 * i, "label": i}
        for i in range(5)
    ]
    found, expected = collate(given), default_collate(given)
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


@pytest.mark.parametrize("make", [np.int32, lambda i: torch.tensor(i, dtype=torch.int16), int, np.uint8])
def test_labels_become_int64(make):
    labels = collate([{"label": make(i)} for i in range(3)])["label"]
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("make", [bool, int, np.bool_, torch.tensor])
def test_presence_becomes_bool(make):
    found = collate([sample(i, x__present=make(i != 1)) for i in range(3)])["x__present"]
    assert found.dtype == torch.bool
    assert found.tolist() == [True, False, True]


def test_lists_of_numbers_are_arrays():
    found = collate(samples([1, 2, 3], [4, 5, 6]))["x"]
    assert torch.equal(found, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    found = collate(samples([[1.0], [np.float32(2)]], [[3.0], [4.0]]))["x"]
    assert torch.equal(found, torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))


def test_nests_are_stacked_leaf_by_leaf():
    nests = [
        {"ids": [i, 2], "pair": (torch.ones(2) * i, np.zeros(1)), "named": Pair(torch.ones(3), i), "no": None}
        for i in range(3)
    ]
    found = collate(samples(*nests, key="text"))["text"]
    assert found["ids"].tolist() == [[0, 2], [1, 2], [2, 2]]
    assert type(found["pair"]) is tuple
    assert found["pair"][0].shape == (3, 2)
    assert found["pair"][1].shape == (3, 1)
    assert isinstance(found["named"], Pair)
    assert found["named"].right.tolist() == [0, 1, 2]
    assert found["no"] is None


def test_strings_and_other_values_become_lists():
    class Thing:
        pass

    things = [Thing(), Thing()]
    given = [
        sample(i, path=f"{i}.wav", thing=things[i], none=None, meta={"name": "ab"[i]}, words=np.array(["a"]))
        for i in range(2)
    ]
    found = collate(given)
    assert found["path"] == ["0.wav", "1.wav"]
    assert found["thing"] == things
    assert found["none"] == [None, None]
    assert found["meta"] == {"name": ["a", "b"]}
    assert len(found["words"]) == 2


def test_what_samples_lack_is_told_by_rows():
    given = [
        sample(0, text={"ids": torch.tensor([1, 2])}, name="zero"),
        {"label": 1, "text": {"ids": torch.tensor([3, 4])}},
        sample(2, name="two"),
    ]
    found = collate(given)
    assert found["label"].tolist() == [0, 1, 2]
    assert found["text"]["ids"].tolist() == [[1, 2], [3, 4]]
    assert found["text.rows"].tolist() == [0, 1]
    assert found["text.rows"].dtype == torch.int64
    assert found["audio"].shape == (2, 3)
    assert found["audio.rows"].tolist() == [0, 2]
    assert (found["name"], found["name.rows"].tolist()) == (["zero", "two"], [0, 2])


def test_other_keys_in_equal_number_are_noticed():
    found = collate([{"a": 1.0, "label": 0}, {"b": 2.0, "label": 1}])
    assert found["a.rows"].tolist() == [0]
    assert found["b.rows"].tolist() == [1]


def test_a_flag_that_samples_lack_follows_from_their_values():
    given = [sample(0, audio__present=False), sample(1), {"label": 2}]
    assert collate(given)["audio__present"].tolist() == [False, True, False]


@pytest.mark.parametrize("filler", [None, {"ids": [0, 0]}, {}, "nothing"])
def test_what_stands_for_an_absent_nest_has_no_row(filler):
    given = samples({"ids": [1, 2]}, filler, {"ids": [3, 4]}, key="text")
    for i, each in enumerate(given):
        each["text__present"] = torch.tensor(i != 1)
    found = collate(given)
    assert found["text"]["ids"].tolist() == [[1, 2], [3, 4]]
    assert found["text.rows"].tolist() == [0, 2]
    assert found["text__present"].tolist() == [True, False, True]
    assert set(collate(given[1:2])) == {"audio", "label", "text__present", "text.rows"}
    assert collate(given[1:2])["text.rows"].shape == (0,)


def test_arrays_that_stand_for_absence_stay():
    # Zeros in their place count in batch norm, as `MultimodalModel.encode` says.
    found = collate([sample(i, audio__present=i != 1) for i in range(3)])
    assert found["audio"].shape == (3, 3)
    assert "audio.rows" not in found
    mixed = collate([sample(0, audio__present=True), sample(1, audio__present=False) | {"audio": None}])
    assert mixed["audio.rows"].tolist() == [0]


def test_flags_that_the_first_sample_lacks_are_found():
    given = [sample(0, text=[1]), sample(1, text=None, text__present=False)]
    assert collate(given)["text.rows"].tolist() == [0]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            (torch.ones(2), torch.ones(3)),
            r"x must have one shape in all .* got \[2\] and \[3\]: cut .*data\.pad",
        ),
        (([1, 2], [3]), r"x must have one shape in all samples of a batch, got \[2\] and \[1\]"),
        (({"ids": [1]}, {"ids": [1, 2]}), r"x\['ids'\] must have one shape .* got \[1\] and \[2\]"),
        (({"ids": 1}, {"id": 1}), r"x must have the same keys .* got \['ids'\] and \['id'\]"),
        (
            ({"t": (torch.ones(1),)}, {"t": (torch.ones(1),) * 2}),
            r"x\['t'\] must have as many items .* 1 and 2",
        ),
        (({"ids": 1}, torch.ones(2)), "x must be the same nest in all samples .* dict of 1 and Tensor"),
        (((torch.ones(1),), 3), "x must be the same nest in all samples .* tuple of 1 and 3"),
        ((torch.ones(1), None), "x must be an array of numbers, got None"),
        (([1, "a"], [2, 3]), r"x must be an array of numbers, got \[1, 'a'\]"),
    ],
)
def test_what_does_not_fit_together_is_named(values, text):
    with pytest.raises((TypeError, ValueError), match=text):
        collate(samples(*values))


def test_a_sample_without_label_is_refused():
    with pytest.raises(ValueError, match="all samples must have 'label', got 1 without"):
        collate([sample(0), {"audio": torch.ones(3)}])


def test_numbers_beside_arrays_are_stacked():
    assert collate(samples(torch.tensor(1.0), 2.0))["x"].tolist() == [1.0, 2.0]


def test_batches_lie_in_main_memory_whatever_the_default_device():
    given = [sample(i, weight=0.5, size=np.float32(i), list=[1, 2], text={"ids": [i]}) for i in range(3)]
    with torch.device("meta"):
        batch = collate(given)
    for value in (batch["label"], batch["weight"], batch["size"], batch["list"], batch["text"]["ids"]):
        assert value.device.type == "cpu"
    assert batch["weight"].dtype == torch.float64
    assert batch["label"].dtype == batch["list"].dtype == torch.int64


def test_a_fault_in_what_joins_is_not_taken_for_lacking_keys():
    def join(name, values):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        assemble([sample(0)], join)


def test_who_takes_parts_is_seen_through_partial():
    assert takes_parts(collate)
    assert takes_parts(functools.partial(functools.partial(collate)))
    assert not takes_parts(default_collate)
    assert not takes_parts(None)


def test_workers_give_the_same_batches():
    given = [sample(i, text={"ids": [i, i]}, path=str(i)) for i in range(4)]
    alone = next(iter(DataLoader(given, batch_size=4, collate_fn=collate)))
    loaded = next(iter(DataLoader(given, batch_size=4, collate_fn=collate, num_workers=1)))
    assert torch.equal(alone["audio"], loaded["audio"])
    assert torch.equal(alone["text"]["ids"], loaded["text"]["ids"])
    assert alone["path"] == loaded["path"]

"""Samples whose modalities are nests: what is wrong with them is said in their own terms."""

from __future__ import annotations

import pytest

pytest.importorskip("lightning_fabric")

import torch
from torch.utils.data import IterableDataset

from mmfast.data import pad, samples
from mmfast.nests import leaves, mapped, named_leaves, tensors
from mmfast.training.divergence import bad_inputs
from support.reports import NAN, NUM_CLASSES, Alike, Reports, spoilt


def check(dataset, collate_fn=None):
    samples.check_samples(("text", "vector"), NUM_CLASSES, "train", dataset, collate_fn=collate_fn)


def test_lengths_may_differ_where_samples_are_collated():
    check(Reports(70), pad)
    check(spoilt(text="words for a tokenizer"), collate_fn=lambda each: each)
    check(spoilt(vector=torch.zeros(6)), pad)
    check(spoilt(text=torch.full((3,), torch.nan), at=0), pad)
    check(Alike(70))
    check(Alike(70, filler=lambda text: {"ids": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("dataset", "collate_fn", "error", "text"),
    [
        (
            Reports(70),
            None,
            ValueError,
            r"text\['ids'\] must have one shape in all samples of train, got \[\d\] in sample 1 and \[\d\] "
            r"in sample 2: cut them, or give collate_fn=mmfast\.data\.pad",
        ),
        (
            spoilt(text={"ids": [1, 2]}),
            None,
            ValueError,
            r"text must hold the same arrays in all samples of train, got text\['ids'\], text\['weights'\] "
            r"in sample 1 and text\['ids'\] in sample 2",
        ),
        (
            spoilt(text=NAN),
            pad,
            ValueError,
            r"text\['weights'\] of sample 2 of train must be finite, got 1 NaN or infinite of 2 values",
        ),
        (
            spoilt(text=("a", [1.0, 2.0]), at=1),
            None,
            TypeError,
            r"text\[0\] of sample 1 of train must be an array of numbers, got 'a'",
        ),
        (
            spoilt(text={"no": None}, at=1),
            None,
            TypeError,
            "text of sample 1 of train must hold an array of numbers, got dict of 1",
        ),
        (
            spoilt(text=None, text__present=True, at=0),
            None,
            TypeError,
            "text of sample 0 of train must be an array of numbers, got None",
        ),
    ],
)
def test_what_is_wrong_with_a_nest_is_said(dataset, collate_fn, error, text):
    with pytest.raises(error, match=text):
        check(dataset, collate_fn)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield from self.data

    def __len__(self):
        return len(self.data)


@pytest.mark.parametrize("make", [Stream, iter, lambda data: (sample for sample in data)])
def test_a_stream_is_told_what_is_needed(make):
    data = [Reports(70)[index] for index in range(9)]
    with pytest.raises(
        TypeError,
        match=r"train must be a data set with len\(train\) and train\[index\], got \w+, which gives samples "
        r"in its own order alone; .* Read it into a list, or write a class with __len__ and __getitem__",
    ):
        check(make(data), pad)
    check(list(make(data)), pad)


def test_samples_with_bad_numbers_are_found_in_every_tensor():
    batch = {
        "text": {"ids": torch.arange(3), "w": (torch.ones(3, 2), torch.ones(3))},
        "vector": torch.ones(4, 2),
        "text.rows": torch.tensor([3, 0, 1]),
    }
    asked = (batch, [10, 11, 12, 13], ("text", "vector", "other"))
    assert bad_inputs(*asked) == {}
    batch["text"]["w"][0][0, 1] = torch.nan
    batch["text"]["w"][1][2] = torch.inf
    batch["vector"][2, 0] = torch.nan
    assert bad_inputs(*asked) == {"text": [13, 11], "vector": [12]}
    batch["text__present"] = torch.tensor([True, False, True, True])
    assert bad_inputs(*asked) == {"text": [13], "vector": [12]}


def test_leaves_are_named_and_mapped():
    nest = {"a": torch.ones(1), "b": (torch.ones(2), [None, 3])}
    assert [name for name, _ in named_leaves(nest, "x")] == [
        "x['a']",
        "x['b'][0]",
        "x['b'][1][0]",
        "x['b'][1][1]",
    ]
    assert [leaf for _, leaf in named_leaves(nest, "x")] == list(leaves(nest))
    assert [len(each) for each in tensors(nest)] == [1, 2]
    doubled = mapped(lambda x: 2 * x, nest)
    assert doubled["b"][1] == [None, 3]
    assert doubled["b"][0].tolist() == [2, 2]
    assert type(doubled["b"]) is tuple

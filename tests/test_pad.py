"""Padding: values and mask, what is padded, and samples that lack a modality."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
import torch

from mmfast.data import pad
from mmfast.data.collate import collate, takes_parts

LENGTHS = (3, 5, 1)


def samples(make=lambda i, t: torch.arange(1, t + 1), key="text", lengths=LENGTHS, **more):
    return [
        {key: make(i, t), "audio": torch.ones(2) * i, "label": i, **{k: v(i) for k, v in more.items()}}
        for i, t in enumerate(lengths)
    ]


def test_ids_get_values_and_mask():
    batch = pad(samples())
    expected = [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]
    assert batch["text"]["values"].tolist() == expected
    assert batch["text"]["values"].dtype == torch.int64
    assert batch["text"]["mask"].dtype == torch.bool
    assert torch.equal(batch["text"]["mask"], torch.tensor(expected) != 0)
    assert torch.equal(batch["audio"], collate(samples(lambda i, t: 0))["audio"])
    assert batch["label"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda i, t: list(range(1, t + 1)),
        lambda i, t: tuple(range(1, t + 1)),
        lambda i, t: np.arange(1, t + 1, dtype=np.int32),
        lambda i, t: torch.arange(1, t + 1, dtype=torch.uint8),
    ],
    ids=["list", "tuple", "numpy", "uint8"],
)
def test_ids_of_every_kind_are_padded(make):
    found = pad(samples(make))["text"]
    assert torch.equal(found["values"].long(), pad(samples())["text"]["values"])
    if isinstance(make(0, 2), np.ndarray | torch.Tensor):
        assert found["values"].dtype == torch.as_tensor(make(0, 2)).dtype


def test_sequences_of_vectors_are_padded_by_name():
    given = samples(lambda i, t: torch.rand(t, 4) + 1, "pose", path=lambda i: f"{i}.npy")
    batch = pad(given, names=["pose"], value=-1.5)
    assert batch["pose"]["values"].shape == (3, 5, 4)
    for i, t in enumerate(LENGTHS):
        assert torch.equal(batch["pose"]["values"][i, :t], given[i]["pose"])
        assert (batch["pose"]["values"][i, t:] == -1.5).all()
        assert batch["pose"]["mask"][i].tolist() == [True] * t + [False] * (5 - t)
    assert batch["path"] == ["0.npy", "1.npy", "2.npy"]


def nest(i, t):
    return {
        "ids": torch.arange(t) + 1,
        "types": [2] * t,
        "pose": np.ones((t, 2), np.float32),
        "length": t,
        "no": None,
    }


def test_sequences_of_a_nest_share_the_mask():
    found = pad(samples(nest))["text"]
    assert set(found) == {"ids", "types", "pose", "length", "no", "mask"}
    assert torch.equal(found["mask"], pad(samples())["text"]["mask"])
    assert torch.equal(found["ids"] > 0, found["mask"])
    assert torch.equal(found["types"], 2 * found["mask"])
    assert torch.equal(found["pose"], found["mask"][..., None].expand(3, 5, 2).float())
    assert found["length"].tolist() == list(LENGTHS)
    assert found["no"] is None


def test_a_tuple_of_sequences_stands_under_values():
    found = pad(samples(lambda i, t: (torch.arange(t), torch.rand(t, 2))))["text"]
    assert type(found["values"]) is tuple
    assert [x.shape for x in found["values"]] == [(3, 5), (3, 5, 2)]
    assert found["mask"].sum(1).tolist() == list(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_its_own_is_kept(dtype):
    def masked(i, t):
        return {"ids": torch.arange(t), "mask": (torch.arange(t) > 0).to(dtype)}

    found = pad(samples(masked), value=7)["text"]
    assert found["mask"].dtype == torch.bool
    assert found["mask"].tolist() == [[False, *[True] * (t - 1), *[False] * (5 - t)] for t in LENGTHS]


def test_values_may_differ_by_key():
    found = pad(samples(nest), value={"text": {"ids": 9, "pose": -1}})["text"]
    assert found["ids"][2].tolist() == [1, 9, 9, 9, 9]
    assert found["types"][2].tolist() == [2, 0, 0, 0, 0]
    assert found["pose"][2, 1:].unique().tolist() == [-1]
    assert pad(samples(), value={"text": 4})["text"]["values"][2].tolist() == [1, 4, 4, 4, 4]
    assert pad(samples(), value={"text": {"ids": 4}})["text"]["values"][2].tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "size", "longest"),
    [
        ({"multiple_of": 8}, 8, 5),
        ({"multiple_of": 5}, 5, 5),
        ({"max_length": 4}, 4, 4),
        ({"max_length": 9}, 5, 5),
        ({"max_length": 4, "multiple_of": 3}, 4, 4),
        ({"max_length": 16, "multiple_of": 16}, 16, 5),
    ],
    ids=str,
)
def test_lengths_are_rounded_up_and_bounded(options, size, longest):
    found = pad(samples(nest), **options)["text"]
    assert found["ids"].shape == found["mask"].shape == (3, size)
    assert found["mask"].sum(1).tolist() == [min(t, longest) for t in LENGTHS]
    assert torch.equal(found["ids"] > 0, found["mask"])


def test_the_form_does_not_depend_on_the_lengths():
    for lengths in ((4, 4, 4), (0, 2, 1), (0, 0, 0), (1,)):
        for given in (
            pad(samples(lengths=lengths)),
            pad(samples(lambda i, t: list(range(t)), lengths=lengths)),
            pad(samples(lambda i, t: [[1.0]] * t, lengths=lengths), names=("text",)),
        ):
            assert set(given["text"]) == {"values", "mask"}
            size = max(*lengths, 1)
            assert given["text"]["values"].shape[:2] == given["text"]["mask"].shape == (len(lengths), size)
            assert given["text"]["mask"].sum(1).tolist() == list(lengths)


def test_empty_lists_take_the_form_of_the_others():
    found = pad(samples(lambda i, t: [[0.5, 1.5]] * t, lengths=(0, 2)), names=("text",))["text"]["values"]
    assert found.shape == (2, 2, 2)
    assert found.dtype == torch.float32
    assert pad(samples(lambda i, t: list(range(t)), lengths=(0, 2)))["text"]["values"].dtype == torch.int64
    # Where all are empty, an embedding must still take them.
    assert pad(samples(lambda i, t: [], lengths=(0, 0)))["text"]["values"].dtype == torch.int64


def test_what_is_no_id_is_not_padded_unless_named():
    more = {
        "vector": lambda i: torch.rand(4),
        "sequence": lambda i: torch.rand(6, 2),
        "flags": lambda i: torch.ones(3, dtype=torch.bool),
        "number": lambda i: 3,
        "coalition": lambda i: torch.tensor([1, 0]),
    }
    batch = pad(samples(**more))
    assert {key: batch[key].shape for key in more} == {
        "vector": (3, 4),
        "sequence": (3, 6, 2),
        "flags": (3, 3),
        "number": (3,),
        "coalition": (3, 2),
    }
    # And where names are given, ids are not by themselves.
    batch = pad(samples(lengths=(2, 2), **more), names=("vector",))
    assert batch["text"].shape == (2, 2)
    assert set(batch["vector"]) == {"values", "mask"}


@pytest.mark.parametrize("where", ["key", "flag", "flag and None"])
def test_samples_that_lack_a_modality_have_no_row(where):
    given = samples(image=lambda i: torch.ones(2))
    for sample in given:
        sample["text__present"] = True
    given[1]["text__present"] = False
    if where == "flag and None":
        given[1]["text"] = None
    if where == "key":
        del given[1]["text"], given[1]["text__present"]
    batch = pad(given)
    assert batch["text.rows"].tolist() == [0, 2]
    assert batch["text.rows"].dtype == torch.int64
    assert batch["text"]["values"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert batch["text__present"].tolist() == [True, False, True]
    assert "image.rows" not in batch


@pytest.mark.parametrize("collate_fn", [pad, functools.partial(pad, names=("text",))])
def test_a_modality_that_no_sample_has_is_rows_of_none(collate_fn):
    given = samples(lambda i, t: None, text__present=lambda i: torch.tensor(False))
    batch = collate_fn(given)
    assert "text" not in batch
    assert batch["text.rows"].shape == (0,)
    assert batch["text.rows"].dtype == torch.int64


def test_options_survive_workers():
    given = functools.partial(pad, names=("text",), multiple_of=4)
    assert takes_parts(given)
    assert pickle.loads(pickle.dumps(given))(samples())["text"]["mask"].shape == (3, 8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: pad(samples(lambda i, t: torch.rand(t, 2), "pose")),
            ValueError,
            r"pose must have one shape in all .* got \[3, 2\] and \[5, 2\]: pad needs names=\('pose',\)",
        ),
        (
            lambda: pad(samples(lambda i, t: torch.rand(t)), names=("pose", "sound")),
            ValueError,
            r"text must have one shape .*: pad needs names=\('pose', 'sound', 'text'\)",
        ),
        (
            lambda: pad(samples(lambda i, t: {"ids": [1] * t, "pose": torch.rand(3, 2)})),
            ValueError,
            r"text must hold sequences of one length .* got 5 of text\['ids'\], 3 of text\['pose'\]",
        ),
        (
            lambda: pad(samples(lambda i, t: torch.rand(t, t)), names=("text",)),
            ValueError,
            r"text must have the same dimensions after the first .*, got \[3, 3\] and \[5, 5\]",
        ),
        (
            lambda: pad(samples(lambda i, t: t), names=("text",)),
            ValueError,
            r"text must have shape \[T, \.\.\.\] to be padded, got 3",
        ),
        (
            lambda: pad(samples(lambda i, t: {"n": t}), names=("text",)),
            ValueError,
            "text must hold sequences of one length in a sample to be padded, got dict of 1",
        ),
        (
            lambda: pad(samples(lambda i, t: {"ids": [1] * t, "n": 1 if i == 0 else [1] * t})),
            ValueError,
            r"text\['n'\] must have one shape in all samples of a batch, got \[\] and \[5\]",
        ),
        (lambda: pad(samples(), names="text"), TypeError, r"names must be a sequence .*: names=\('text',\)"),
        (lambda: pad(samples(), multiple_of=0), ValueError, "multiple_of must be at least 1, got 0"),
        (lambda: pad(samples(), max_length=2.0), TypeError, "max_length must be an int, got 2.0"),
        (lambda: pad(samples(), value="x"), TypeError, "value must be a number, or a dict .*, got 'x'"),
        (
            lambda: pad(samples(lambda i, t: ["a"] * t), names=("text",)),
            ValueError,
            r"text must hold sequences of one length in a sample to be padded, got \['a', 'a', 'a'\]",
        ),
    ],
)
def test_what_cannot_be_padded_is_said(call, error, text):
    with pytest.raises(error, match=text):
        call()

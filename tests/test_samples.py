"""Data sets made in Python: what is wrong with one is said before any work, and no array is printed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("lightning_fabric")

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import mmfast
from mmfast.data import ArrayDataset, synthetic
from mmfast.errors import describe
from mmfast.models import build_model, encoder_for

SPLITS = synthetic(num_samples=120, num_classes=3, dims={"a": 6, "b": (5, 2)}, seed=0)
N = len(SPLITS.train)


class Samples(Dataset):
    """Samples of `SPLITS.train`, changed; without the attribute `labels` unless it is given."""

    def __init__(self, change=lambda sample, index: sample, **attributes):
        self.change = change
        self.__dict__.update(attributes)

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.change(SPLITS.train[index], index)


class Stream(IterableDataset):
    def __iter__(self):
        yield from SPLITS.train


def labelled(make):
    return Samples(lambda sample, index: sample | {"label": make(int(sample["label"]))})


def growing(sample, index):
    return sample | {"b": torch.zeros(5 + index, 2)}


LABELS = SPLITS.train.labels
CASES = {
    "loader": (
        DataLoader(SPLITS.train),
        TypeError,
        "{name} must be a data set, got a DataLoader: give the data set itself, batches are made here",
    ),
    "splits": (SPLITS, TypeError, "{name} must be one data set, got Splits of three: give splits.{part}"),
    "stream": (
        Stream(),
        TypeError,
        "{name} must be a data set with len({name}) and {name}[index], got Stream",
    ),
    "none": (None, TypeError, "{name} must be a data set with len({name}) and {name}[index], got None"),
    "batch": (
        SPLITS.train[:9],
        TypeError,
        "{name} must be a data set of samples, got dict of 3: mmfast.data.ArrayDataset(",
    ),
    "tensor": (
        torch.rand(N, 6),
        TypeError,
        "{name} must be a data set of samples, got Tensor [84, 6] of float32",
    ),
    "tuples": (
        TensorDataset(torch.rand(N, 6), LABELS),
        TypeError,
        "samples of {name} must be dicts {<modality>: array, 'label': int}, got tuple of 2",
    ),
    "unlabelled": (
        Samples(lambda sample, index: {"a": sample["a"], "b": sample["b"]}),
        ValueError,
        "samples of {name} must have 'label', got 'a', 'b'",
    ),
    "strings": (
        labelled(lambda label: "cat"),
        TypeError,
        "label of sample 0 of {name} must be an integer, got a string: np.unique(labels",
    ),
    "floats": (labelled(float), TypeError, "label of sample 0 of {name} must be one integer, got "),
    "float tensors": (
        labelled(lambda label: torch.tensor(label + 0.5)),
        TypeError,
        "label of sample 0 of {name} must be one integer, got ",
    ),
    "one-hot": (
        labelled(lambda label: torch.eye(3).long()[label]),
        TypeError,
        "label of sample 0 of {name} must be one integer, got Tensor [3] of int64",
    ),
    "no probabilities": (
        labelled(lambda label: torch.ones(3)),
        ValueError,
        "label of sample 0 of {name} must be probabilities that add up to 1, got [1.0, 1.0, 1.0]",
    ),
    "probabilities of others": (
        labelled(lambda label: torch.ones(4) / 4),
        ValueError,
        "label of sample 0 of {name} must be an integer, or probabilities [C] = [3] each, got shape [4]",
    ),
    "one in brackets": (
        labelled(lambda label: np.array([label])),
        TypeError,
        "label of sample 0 of {name} must be one integer, got ndarray [1] of int64",
    ),
    "from one": (
        labelled(lambda label: 3),
        ValueError,
        "label of sample 0 of {name} must lie in [0, C) = [0, 3), got 3",
    ),
    "third is out of range": (
        Samples(lambda sample, index: sample | {"label": -1 if index == 2 else 0}),
        ValueError,
        "label of sample 2 of {name} must lie in [0, C) = [0, 3), got -1",
    ),
    "lengths": (
        Samples(growing),
        ValueError,
        "b must have one shape in all samples of {name}, got [5, 2] in sample 0 and [6, 2] in sample 1",
    ),
    "no numbers": (
        Samples(lambda sample, index: sample | {"a": "clip.wav"}),
        TypeError,
        "a of sample 0 of {name} must be an array of numbers, got 'clip.wav'",
    ),
    "nan": (
        Samples(lambda sample, index: sample | {"a": sample["a"] * float("nan")}),
        ValueError,
        "a of sample 0 of {name} must be finite, got 6 NaN or infinite of 6 values",
    ),
    "all strings": (
        Samples(labels=["cat"] * N),
        TypeError,
        "labels of {name} must be integers, got strings: np.unique(labels, return_inverse=True)[1]",
    ),
    "all objects": (
        Samples(labels=np.array(["cat"] * N, dtype=object)),
        TypeError,
        "labels of {name} must be integers, got strings",
    ),
    "all floats": (
        Samples(labels=LABELS.double()),
        TypeError,
        "labels of {name} must be integers [N] from 0 to C - 1, got float64",
    ),
    "all bools": (
        Samples(labels=LABELS > 0),
        TypeError,
        "labels of {name} must be integers [N] from 0 to C - 1, got bool",
    ),
    "all one-hot": (
        Samples(labels=torch.eye(3, dtype=torch.int64)[LABELS]),
        ValueError,
        "labels of {name} must have shape [N] = [84], got [84, 3]: labels.argmax(1) is the class of",
    ),
    "column": (
        Samples(labels=LABELS[:, None].numpy()),
        ValueError,
        "labels of {name} must have shape [N] = [84], got [84, 1]: labels.reshape(-1) makes them so",
    ),
    "other length": (
        Samples(labels=LABELS[:80]),
        ValueError,
        "labels of {name} must have shape [N] = [84], got [80]",
    ),
    "class names": (
        Samples(labels={0: "cat"}),
        TypeError,
        "labels of {name} must be integers [N] from 0 to C - 1, got dict of 1",
    ),
    "all from one": (
        Samples(labels=LABELS + 1),
        ValueError,
        "labels of {name} must lie in [0, C) = [0, 3), got values from 1 to 3",
    ),
}


def fitted():
    trainer, model = mmfast.Trainer("joint", max_epochs=1), build_model(SPLITS.shapes, 3, dim=4)
    trainer.fit(model, SPLITS.train)
    return trainer, model


@pytest.fixture(scope="module")
def calls():
    """Every way in for a data set: {what errors call it: function}."""
    trainer, model = fitted()
    fresh = mmfast.Trainer("joint", max_epochs=1)
    return {
        "train": lambda dataset: fresh.fit(model, dataset, SPLITS.val),
        "val": lambda dataset: fresh.fit(model, SPLITS.train, dataset),
        "test": lambda dataset: trainer.test(model, dataset),
        "dataset": lambda dataset: mmfast.valuate(trainer.learner, dataset),
    }


@pytest.mark.parametrize("name", ["train", "val", "test", "dataset"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_the_same_words_everywhere(case, name, calls):
    if case == "none" and name == "val":
        pytest.skip("training goes without validation data")
    dataset, kind, text = CASES[case]
    with pytest.raises(kind) as caught:
        calls[name](dataset)
    text = text.replace("{name}", name).replace("{part}", "test" if name == "dataset" else name)
    assert str(caught.value).startswith(text)
    assert "tensor(" not in str(caught.value)
    assert "array(" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [int, np.int32, torch.tensor, lambda label: torch.tensor(label, dtype=torch.int16)],
    ids=["int", "int32", "tensor", "int16 tensor"],
)
def test_integers_of_every_kind_are_labels(make, calls):
    calls["dataset"](labelled(make))
    calls["train"](labelled(make))


@pytest.mark.parametrize(
    "labels", [LABELS.tolist(), LABELS.numpy().astype(np.uint8), LABELS.int(), tuple(LABELS.tolist())]
)
def test_labels_of_every_kind_are_an_attribute(labels, calls):
    calls["train"](Samples(labels=labels))


def test_names_as_labels_of_arrays_say_how_to_make_integers():
    with pytest.raises(
        TypeError, match=r"labels must be integers, got <U3: np\.unique\(labels, return_inverse=True\)"
    ):
        ArrayDataset({"a": np.ones((2, 3))}, ["cat", "dog"])


def test_few_samples_are_read(calls):
    read = []

    def note(sample, index):
        read.append(index)
        if index >= 4:
            raise AssertionError("read on")
        return sample

    with pytest.raises(AssertionError, match="read on"):
        calls["dataset"](Samples(note))
    # The second time is the work itself.
    assert read == [0, 1, 2, 3, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x: mmfast.Trainer(x),
            "method must be a method of mmfast.methods or its name, got Tensor [64, 64]",
        ),
        (
            lambda x: mmfast.valuate(build_model(SPLITS.shapes, 3), SPLITS.test, utility=x),
            "utility must be one of",
        ),
        (
            lambda x: mmfast.valuate(x, SPLITS.test),
            "model must be a mmfast.MultimodalModel or a learner, got Tensor",
        ),
        (
            lambda x: mmfast.valuate(torch.nn.Linear(3, 3), SPLITS.test),
            "model must be a mmfast.MultimodalModel or a learner, got Linear: MultimodalModel(encoders",
        ),
        (
            lambda x: mmfast.Trainer("joint").fit(x, SPLITS.train),
            "model must be a mmfast.MultimodalModel, got Tensor",
        ),
        (
            lambda x: mmfast.Trainer("joint", optimizer=x),
            "optimizer must be one of adam, adamw, sgd, got Tensor",
        ),
        (
            lambda x: build_model({"a": (3,)}, 3).encode_modality({"a": torch.zeros(2, 3)}, x),
            "name must be one of 'a', got Tensor",
        ),
        (lambda x: encoder_for((5, 2), 4, temporal=x.tolist()), "temporal must be one of"),
        (lambda x: mmfast.ops.kmeans(x, 2, backend=x.tolist()), 'backend must be "auto" or one of'),
        (lambda x: mmfast.ops.kmeans(x, x), "num_clusters must be an integer, got Tensor"),
        (lambda x: mmfast.ops.kmeans(x, 2, tol=x), "tol must be a number, got Tensor"),
        (lambda x: mmfast.ops.certainty_fusion(x[None], temperature=x.numpy()), "temperature"),
        (
            lambda x: mmfast.ops.coalition_utilities(x[:, None], x[0].long(), utility=x),
            "utility must be one of",
        ),
        (
            lambda x: ArrayDataset({("a", x): x}, [0] * 64),
            "modality names must be non-empty strings, got tuple of 2",
        ),
    ],
)
def test_no_error_prints_an_array(call, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(torch.zeros(64, 64))
    assert str(caught.value).startswith(text)
    assert "0., 0." not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "Tensor [2, 3] of float32"),
        (np.array(["ab"]), "ndarray [1] of <U2"),
        (torch.tensor(-1.5), "-1.5"),
        (np.float64(2.5), "2.5"),
        ((1, 2), "(1, 2)"),
        ([torch.zeros(2)], "list of 1"),
        ({"a": torch.zeros(2)}, "dict of 1"),
        ("x" * 100, "'" + "x" * 56 + "..."),
        (None, "None"),
        (torch.nn.ReLU(), "ReLU"),
        (torch.nn.ReLU, "ReLU"),
    ],
)
def test_values_are_described_by_shape_and_type(value, text):
    assert describe(value) == text

"""Arrays in memory, splits and standardisation."""

import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from mmfast.data import ArrayDataset, Splits
from mmfast.data.splits import block_split, stratified_split


def make_dataset(size: int = 10, **changes) -> ArrayDataset:
    rng = np.random.default_rng(0)
    arrays = {"audio": rng.normal(size=(size, 3)), "image": rng.normal(size=(size, 1, 4, 4))}
    return ArrayDataset(arrays, np.arange(size) % 2, **changes)


def make_arrays(size: int = 60, num_classes: int = 3) -> dict:
    rng = np.random.default_rng(0)
    return {
        "label": np.arange(size) % num_classes,
        "audio": rng.normal(size=(size, 3)).astype(np.float32),
        "image": rng.normal(size=(size, 1, 4, 4)).astype(np.float32),
    }


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(text))


# ArrayDataset


@pytest.mark.parametrize(
    "index",
    [
        [3, 0, 7],
        torch.tensor([3, 0, 7]),
        np.array([3, 0, 7], np.uint8),
        [-1, 2],
        slice(2, 8, 3),
        slice(None, None, -1),
        [],
        range(3),
    ],
    ids=["list", "tensor", "array", "negative", "slice", "reversed", "empty", "range"],
)
def test_batched_index_equals_stacked_samples(index):
    data = make_dataset(present={"image": np.arange(10) != 3})
    rows = list(range(10))[index] if isinstance(index, slice) else [int(i) for i in index]
    batch = data[index]
    assert list(batch) == ["audio", "image", "image__present", "label"]
    for key, value in batch.items():
        assert value.shape[0] == len(rows)
        if rows:
            assert torch.equal(value, torch.stack([data[row][key] for row in rows]))


def test_dtypes_shapes_and_default_collation():
    data = make_dataset(present={"audio": [True] * 10})
    assert (len(data), data.num_classes, data.modalities) == (10, 2, ("audio", "image"))
    assert data.shapes == {"audio": (3,), "image": (1, 4, 4)}
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "audio": (torch.float32, (4, 3)),
        "image": (torch.float32, (4, 1, 4, 4)),
        "audio__present": (torch.bool, (4,)),
        "label": (torch.int64, (4,)),
    }
    assert "10 samples, audio [3], image [1, 4, 4], 2 classes" in repr(data)


@pytest.mark.parametrize(
    "dtype", [np.float16, np.float64, np.uint8, np.int32, np.bool_, ">f4", np.longdouble]
)
def test_real_dtypes_become_float32(dtype):
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    values.setflags(write=False)
    assert ArrayDataset({"a": values}, [0, 1]).arrays["a"].tolist() == [[0, 1], [1, 0]]


def test_bfloat16_tensor_and_strided_array_are_taken():
    data = ArrayDataset({"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": np.ones((3, 4))[:, ::2].T}, [0, 1])
    assert data.shapes == {"a": (3,), "b": (3,)}
    assert data.arrays["b"].is_contiguous()


def test_absent_samples_may_hold_nan_and_become_zero():
    values = np.ones((3, 2), np.float32)
    values[1] = np.nan
    data = ArrayDataset({"a": values}, [0, 1, 0], present={"a": [True, False, True]})
    assert data.arrays["a"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert np.isnan(values[1]).all(), "the caller's array was written"


def test_subset_keeps_everything():
    data = make_dataset(present={"image": np.arange(10) > 4}, group=np.arange(10), num_classes=5)
    part = data.subset([8, 1])
    assert part.labels.tolist() == [0, 1]
    assert part.present["image"].tolist() == [True, False]
    assert part.group.tolist() == [8, 1]
    assert part.num_classes == 5
    assert torch.equal(part[1]["audio"], data[1]["audio"])
    assert len(data.subset(slice(2, 5))) == 3
    with raises("got one integer", TypeError):
        data.subset(3)


@pytest.mark.parametrize(
    ("index", "kind", "text"),
    [
        (10, IndexError, "index must lie in [-10, 10), got 10"),
        ([0, -11], IndexError, "got -11"),
        ([True, False], TypeError, "got torch.bool [2]"),
        ([0.5], TypeError, "got torch.float32 [1]"),
        ([[1, 2]], TypeError, "got torch.int64 [1, 2]"),
    ],
)
def test_bad_index(index, kind, text):
    with raises(text, kind):
        make_dataset()[index]


ONES = np.ones((4, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "labels", "options", "kind", "text"),
    [
        ({"a": ONES}, np.zeros((4, 1), int), {}, ValueError, "labels must have shape [N] = [4], got [4, 1]"),
        ({"a": ONES}, np.zeros(4), {}, TypeError, "labels must be integers, got float64"),
        ({"a": ONES}, [0, 1, -1, 0], {}, ValueError, "labels must lie in 0 .. C - 1, got -1"),
        ({"a": ONES}, [0, 1, 2, 0], {"num_classes": 2}, ValueError, "labels must lie in 0 .. 1, got 2"),
        ({}, [0], {}, ValueError, "arrays must hold at least one modality, got none"),
        ({"label": ONES}, [0] * 4, {}, ValueError, "modality name must not be label"),
        ({"a.b": ONES}, [0] * 4, {}, ValueError, "got 'a.b'"),
        ({"a__present": ONES}, [0] * 4, {}, ValueError, "got 'a__present'"),
        ({3: ONES}, [0] * 4, {}, TypeError, "modality names must be non-empty strings, got 3"),
        ({"a": ONES}, [0] * 5, {}, ValueError, "a must have shape [N, ...] with N = 5 as labels, got [4, 2]"),
        (
            {"a": ONES, "b": ONES},
            [0] * 5,
            {},
            ValueError,
            "labels must have shape [N] with N = 4 as a, b, got [5]",
        ),
        (
            {"a": ONES},
            [0] * 5,
            {"present": {"a": np.ones(4, bool)}},
            ValueError,
            "labels must have shape [N] with N = 4 as a, a__present, got [5]",
        ),
        (
            {"a": ONES, "b": ONES},
            np.zeros((5, 3), int),
            {"task": "multilabel"},
            ValueError,
            "labels must have shape [N, ...] with N = 4 as a, b, got [5, 3]",
        ),
        ({"a": ONES, "b": ONES[:3]}, None, {}, ValueError, "b must have shape [N, ...] with N = 4 as a, got"),
        ({"a": ONES[:, 0]}, [0] * 4, {}, ValueError, "a must have shape [N, D], [N, T, F], [N, C, H, W] or"),
        ({"a": ONES[:, :0]}, [0] * 4, {}, ValueError, "a must have at least one feature, got shape [4, 0]"),
        ({"a": ONES.astype(complex)}, [0] * 4, {}, TypeError, "a must be real numbers, got complex128"),
        ({"a": ONES.astype(object)}, [0] * 4, {}, TypeError, "a must be real numbers, got object"),
        ({"a": ONES.astype(str)}, [0] * 4, {}, TypeError, "a must be real numbers, got <U"),
        ({"a": [[1, 2], [3]]}, [0, 1], {}, ValueError, "a must be one array, got rows of unequal shape"),
        (
            {"a": ONES * [[np.inf, np.nan]]},
            [0] * 4,
            {},
            ValueError,
            "a must be finite in float32, got 8 NaN or",
        ),
        ({"a": np.full((4, 2), 1e300)}, [0] * 4, {}, ValueError, "got 8 NaN or infinite of 8 values"),
        ({"a": ONES}, [0] * 4, {"present": {"b": [True] * 4}}, ValueError, "among a, got b"),
        (
            {"a": ONES},
            [0] * 4,
            {"present": {"a": [1] * 4}},
            TypeError,
            "present['a'] must be bool, got int64",
        ),
        (
            {"a": ONES},
            [0] * 4,
            {"present": {"a": [True]}},
            ValueError,
            "present['a'] must have shape [N] = [4], got [1]",
        ),
        ({"a": ONES}, [0] * 4, {"group": [1, 2]}, ValueError, "group must have shape [N] = [4], got [2]"),
        ({"a": ONES}, [0] * 4, {"group": np.ones(4)}, TypeError, "group must hold integers or strings"),
    ],
)
def test_bad_arrays(arrays, labels, options, kind, text):
    with raises(text, kind):
        ArrayDataset(arrays, labels, **options)


# Splits


def test_stratified_split_has_the_shares_in_every_class_and_follows_the_seed():
    labels = np.repeat([0, 1, 2], [400, 100, 20])
    parts = stratified_split(labels, seed=3)
    for label, size in enumerate([400, 100, 20]):
        counts = [np.count_nonzero(parts[labels == label] == part) for part in ("train", "val", "test")]
        assert np.abs(np.array(counts) - size * np.array([0.7, 0.15, 0.15])).max() <= 1
    assert (parts == stratified_split(labels, seed=3)).all()
    assert (parts != stratified_split(labels, seed=4)).any()


@pytest.mark.parametrize("names", ["integers", "strings"])
def test_groups_never_cross_parts(names):
    rng = np.random.default_rng(0)
    group = rng.integers(0, 40, 600).astype(int if names == "integers" else str)
    labels = rng.integers(0, 3, 600)
    parts = stratified_split(labels, group=group, seed=1)
    held = {part: set(group[parts == part]) for part in ("train", "val", "test")}
    assert not held["train"] & held["val"]
    assert not held["train"] & held["test"]
    assert not held["val"] & held["test"]
    for part, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        counts = np.bincount(labels[parts == part], minlength=3) / np.bincount(labels)
        assert np.abs(counts - share).max() < 0.07
    assert (parts == stratified_split(labels, group=group, seed=1)).all()


def test_few_groups_and_rare_classes_are_split():
    labels = np.tile([0, 1], 30)
    parts = stratified_split(labels, group=np.repeat([0, 1, 2], 20))
    assert {part: np.count_nonzero(parts == part) for part in ("train", "val", "test")} == {
        "train": 20,
        "val": 20,
        "test": 20,
    }
    # One sample of a class stays in training; of three, each part can have one.
    parts = stratified_split(np.repeat([0, 1, 2], [50, 3, 1]))
    assert parts[-1] == "train"
    assert "train" in parts[50:53]


def test_block_split_takes_each_class_in_order():
    parts = block_split(np.repeat([1, 0], 100))
    for start in (0, 100):
        assert (parts[start : start + 70] == "train").all()
        assert (parts[start + 70 : start + 85] == "val").all()
        assert (parts[start + 85 : start + 100] == "test").all()


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        # As np.loadtxt and pandas read a column of whole numbers, and a column of names.
        ([0.0, 2.0, 10.0], ("0", "2", "10")),
        (np.array([0, 2, 10], dtype=np.float16), ("0", "2", "10")),
        (torch.tensor([0.0, 2.0, 10.0]), ("0", "2", "10")),
        (np.array(["a", "b", "cc"], dtype=object), ("a", "b", "cc")),
        (np.array([b"a", b"b", b"cc"]), ("a", "b", "cc")),
        (np.array([0, 2, 10], dtype=object), ("0", "2", "10")),
        ([False, True, True], ("False", "True")),
    ],
)
def test_labels_as_tables_have_them(labels, names):
    twenty = torch.cat([labels] * 20) if isinstance(labels, torch.Tensor) else np.concatenate([labels] * 20)
    found = Splits.from_arrays({"a": np.random.default_rng(0).normal(size=(60, 2))}, twenty)
    assert found.class_names == names
    keys = np.asarray(found.train.sample_keys) % 3
    assert found.train.labels.tolist() == np.minimum(keys, len(names) - 1).tolist()


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([0.0, 0.5, 1.0], "float64 with 0.5"),
        ([0.0, np.nan, 1.0], "float64 with nan"),
        ([0.0, 1e300, 1.0], "float64 with 1e+300"),
        (np.array(["a", None, "b"], dtype=object), "None among them"),
        (np.array([1, True, 2], dtype=object), "True among them"),
        ([1j, 2, 3], "complex128"),
    ],
)
def test_labels_that_are_no_classes(labels, got):
    with pytest.raises(TypeError, match=re.escape(f"labels must be integers or strings, got {got}")):
        Splits.from_arrays({"a": np.ones((3, 2))}, labels)


def test_from_arrays_draws_reports_and_repeats():
    data = make_arrays()
    label = np.array(["cat", "ant", "bee"])[data.pop("label")]
    first, again = (Splits.from_arrays(data, label, seed=5, standardize=False, name="mine") for _ in range(2))
    assert first.class_names == ("ant", "bee", "cat")
    assert (len(first.train), len(first.val), len(first.test)) == (42, 9, 9)
    assert first.split_seed == 5
    assert "split 70/15/15%, stratified by class, drawn with seed 5" in first.description
    assert (first.name, first.modalities, first.shapes["image"]) == ("mine", ("audio", "image"), (1, 4, 4))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(first, part).arrays["audio"], getattr(again, part).arrays["audio"])
    # The features still belong to their labels.
    row = first.test[0]
    at = int((data["audio"] == row["audio"].numpy()).all(1).argmax())
    assert first.class_names[row["label"]] == label[at]


def test_given_split_is_kept_and_missing_validation_is_carved_from_train():
    data = make_arrays()
    label = data.pop("label") + 10
    split = np.repeat(["train", "val", "test"], 20)
    given = Splits.from_arrays(data, label, split=split)
    assert given.split_seed is None
    assert given.class_names == ("10", "11", "12")
    assert given.description.endswith("split as given")
    split = np.repeat(["train", "test"], [40, 20]).astype(bytes)
    carved = Splits.from_arrays(data, torch.from_numpy(label), split=split, seed=2, standardize=False)
    assert (len(carved.train), len(carved.val), len(carved.test)) == (34, 6, 20)
    assert carved.val.labels.bincount().tolist() == [2, 2, 2]
    assert carved.test.arrays["audio"].tolist() == data["audio"][40:].tolist()
    assert carved.split_seed == 2
    assert "val is 15% of the given train, stratified by class, drawn with seed 2" in carved.description
    group = np.repeat(np.arange(12), 5)
    grouped = Splits.from_arrays(data, label, split=split, group=group)
    assert not set(grouped.train.group) & set(grouped.val.group)
    assert grouped.val.group.tolist()
    assert "by group" in grouped.description


def test_class_names_need_matching_integer_labels():
    data = make_arrays()
    label = data.pop("label")
    assert Splits.from_arrays(data, label, class_names="xyz").class_names == ("x", "y", "z")
    with raises("labels must lie in 0 .. 1, got 2"):
        Splits.from_arrays(data, label, class_names="xy")
    with raises("every class must have training samples, got none of w"):
        Splits.from_arrays(data, label, class_names="xyzw")
    with raises("labels must be integers where class_names are given", TypeError):
        Splits.from_arrays(data, label.astype(str), class_names="xyz")


# Standardisation


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5,), 1), ((6, 5), 2), ((5, 3, 4), 1), ((2, 5, 3, 4), 2)],
    ids=["D", "TF", "CHW", "TCHW"],
)
def test_standardize_uses_present_training_samples_only(shape, axis):
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=(90, *shape))
    channels = np.moveaxis(values, axis, -1)
    channels[..., 0] = 0.1
    channels[60:, ..., 0] = 7
    mask = np.arange(90) % 5 != 0
    values[~mask] = np.nan
    split = np.repeat(["train", "val", "test"], 30)
    splits = Splits.from_arrays({"a": values}, np.arange(90) % 2, split=split, present={"a": mask})
    train = values[:30][mask[:30]]
    over = tuple(i for i in range(values.ndim) if i != axis)
    mean, std = train.mean(over, keepdims=True), train.std(over, keepdims=True)
    expected = np.where(std > 1e-9, (values[60:] - mean) / np.maximum(std, 1e-9), 0)
    expected[~mask[60:]] = 0
    np.testing.assert_allclose(splits.test.arrays["a"].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert (np.moveaxis(splits.test.arrays["a"].numpy(), axis, -1)[..., 0] == 0).all()


def test_standardize_can_be_left_to_the_caller():
    data = make_arrays()
    label = data.pop("label")
    raw = Splits.from_arrays(data, label, standardize=False)
    scaled = Splits.from_arrays(data, label)
    assert not torch.equal(raw.train.arrays["audio"], scaled.train.arrays["audio"])
    assert torch.equal(raw.standardize().test.arrays["audio"], scaled.test.arrays["audio"])


@pytest.mark.parametrize("names", [None, ["x", "y"]])
def test_a_label_that_stands_for_none_is_no_class_of_a_split(names):
    labels = np.array([0, 1] * 20)
    labels[:3] = -100
    with pytest.raises(ValueError, match="labels must be those of all samples, got -100 for 3 of 40"):
        Splits.from_arrays({"a": np.zeros((40, 2))}, labels, class_names=names)

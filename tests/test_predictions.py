"""What a learner predicts for data sets: with and without labels, raw and standardised, as a table."""

from __future__ import annotations

import csv
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

import mmfast
from mmfast import methods, predictions
from mmfast.data import ArrayDataset, Splits
from mmfast.predictions import Predictions
from mmfast.training.state import note_data
from support.learners import NUM_CLASSES, bind, make_data


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Two modalities far from mean 0, of which one lacks in some samples; not standardised."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % NUM_CLASSES
    arrays = {
        name: (rng.normal(size=(120, 5)) + labels[:, None]) * scale + 50
        for name, scale in (("a", 9.0), ("b", 0.1))
    }
    return Splits.from_arrays(
        arrays,
        np.array(["cat", "dog", "owl"])[labels],
        present={"b": rng.random(120) > 0.2},
        standardize=False,
        sample_keys=[f"clip_{i}" for i in range(120)],
    )


@pytest.fixture(scope="module")
def learner(splits):
    pytest.importorskip("lightning_fabric")
    torch.manual_seed(0)
    scaled = splits.standardize()
    model = mmfast.models.build_model(scaled.shapes, NUM_CLASSES, dim=8)
    return mmfast.Trainer("joint", max_epochs=3, accelerator="cpu").fit(model, scaled.train, scaled.val)


def without_labels(part: ArrayDataset) -> ArrayDataset:
    return ArrayDataset(part.arrays, present=part.present, sample_keys=part.sample_keys)


class Samples(torch.utils.data.Dataset):
    """The samples of a data set, and nothing else of it."""

    def __init__(self, part: ArrayDataset, *, labels: bool = False, keys: bool = False) -> None:
        self.part, self.with_labels = part, labels
        if keys:
            self.sample_keys = [f"file {i}.wav" for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict:
        sample = dict(self.part[index])
        if not self.with_labels:
            del sample["label"]
        if not sample["b__present"]:
            sample["b"] = None
        return sample | {"author": "somebody"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_data_set_is_predicted_as_its_batches_are(name):
    data, learner = make_data(30), bind(name)
    learner.eval()
    found = learner.predict(data)
    with torch.no_grad():
        logits, own = learner.predict(data[:]), learner.own_logits(learner.encode(data[:]))
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.own_logits, own)
    torch.testing.assert_close(found.probabilities, logits.softmax(1))
    assert found.predicted.tolist() == logits.argmax(1).tolist()
    assert found.labels == found.predicted.tolist()
    assert found.present.all()
    assert found.accuracy == float((logits.argmax(1) == data.labels).double().mean())
    torch.testing.assert_close(found.contributions, mmfast.valuate(learner, data).contributions)
    bare = learner.predict(ArrayDataset(data.arrays))
    assert torch.equal(bare.logits, found.logits)
    assert (bare.targets, bare.contributions, bare.accuracy, bare.correct) == (None,) * 4


def test_predictions_say_in_a_line_what_they_are():
    found = bind("joint").predict(make_data(30))
    assert repr(found) == f"Predictions(30 samples, m0, m1, 3 classes, accuracy {found.accuracy:.3f})"


def test_a_data_set_leaves_the_mode_and_a_batch_has_its_gradient():
    data, learner = make_data(30), bind("joint")
    learner.train()
    assert learner.predict(data).logits.grad_fn is None
    assert learner.training
    assert learner.predict(data[:]).requires_grad
    with pytest.raises(TypeError, match="of a batch predict takes no options, got batch_size"):
        learner.predict(data[:], batch_size=3)


def test_raw_data_are_standardised_as_the_training_data_were(splits, learner):
    scaled = splits.standardize()
    assert learner.scaling == scaled.scaling
    assert learner.class_names == ("cat", "dog", "owl")
    expected = learner.predict(scaled.test)
    for data in (splits.test, without_labels(splits.test), Subset(splits.test, range(len(splits.test)))):
        found = learner.predict(data, batch_size=7)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.present, expected.present)
        assert found.sample_keys.tolist() == expected.sample_keys.tolist()
    assert torch.equal(learner.predict(splits.test).logits, expected.logits)
    assert torch.equal(learner.predict(splits.test).contributions, expected.contributions)
    joined = learner.predict(ConcatDataset([splits.test, splits.test]))
    torch.testing.assert_close(joined.logits, torch.cat([expected.logits] * 2), rtol=1e-5, atol=1e-6)
    # What would be wrong without a word.
    assert not torch.allclose(learner.predict(splits.test, standardized=True).logits, expected.logits)


def test_samples_of_ones_own_must_tell_whether_they_are_standardised(splits, learner):
    scaled = splits.standardize()
    expected = learner.predict(scaled.test)
    with pytest.raises(ValueError, match=r"dataset must tell whether .* give standardized=True, or"):
        learner.predict(Samples(scaled.test))
    for part, is_scaled in ((scaled.test, True), (splits.test, False)):
        for workers in (0, 2):
            found = learner.predict(Samples(part), standardized=is_scaled, num_workers=workers, batch_size=6)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.present, expected.present)
            assert found.targets is None
    found = learner.predict(Samples(splits.test, labels=True, keys=True), standardized=False)
    assert found.targets.tolist() == splits.test.labels.tolist()
    assert found.sample_keys[3] == "file 3.wav"


def test_data_standardised_otherwise_and_of_other_classes_are_refused(splits, learner):
    other = splits.standardize({name: ([0.0] * 5, [1.0] * 5) for name in "ab"})
    with pytest.raises(ValueError, match=r"dataset must be raw, or standardised as .* standardize=False"):
        learner.predict(other.test)
    named = ArrayDataset(splits.test.arrays, splits.test.labels, class_names=["dog", "cat", "owl"])
    with pytest.raises(ValueError, match="must have the classes of the training data, cat, dog, owl, got"):
        learner.predict(named)
    with pytest.raises(ValueError, match="parts of a ConcatDataset must be standardised alike"):
        learner.predict(ConcatDataset([splits.test, other.test]))


def test_a_valuation_refuses_data_that_are_not_as_the_training_data_were(splits, learner):
    with pytest.raises(ValueError, match=r"standardised as the training data were: .*learner\.scaling"):
        mmfast.valuate(learner, splits.test)
    scaled = splits.standardize(learner.scaling).test
    expected = learner.predict(scaled)
    found = mmfast.valuate(learner, scaled)
    torch.testing.assert_close(found.contributions, expected.contributions)
    assert found.predicted.tolist() == expected.predicted.tolist()
    assert mmfast.valuate(learner, Samples(scaled, labels=True)).sample_keys is None
    assert mmfast.valuate(learner.model, splits.test).class_names == ("cat", "dog", "owl")


def test_a_valuation_leads_back_to_the_data(splits, learner, tmp_path):
    from pyarrow.parquet import read_table

    data = splits.standardize(learner.scaling).test
    found = mmfast.valuate(learner, data)
    found.to_csv(tmp_path / "v.csv")
    found.to_parquet(tmp_path / "v.parquet")
    rows, predicted = rows_of(tmp_path / "v.csv"), learner.predict(data)
    assert list(rows[0]) == ["sample", "label", "a", "b", "key", "class", "prediction", "correct"]
    assert [row["key"] for row in rows] == data.sample_keys.tolist()
    assert [row["class"] for row in rows] == [("cat", "dog", "owl")[label] for label in data.labels]
    assert [row["prediction"] for row in rows] == predicted.labels
    assert [row["correct"] for row in rows] == [str(right) for right in predicted.correct.tolist()]
    assert read_table(tmp_path / "v.parquet").to_pydict() == found.columns()
    renamed = dataclasses.replace(found, modalities=("key", "class"))
    columns = ["sample", "label", "key", "class", "key_", "class_", "prediction", "correct"]
    assert list(renamed.columns()) == columns


def test_a_learner_of_raw_data_refuses_those_that_are_standardised(splits):
    pytest.importorskip("lightning_fabric")
    model = mmfast.models.build_model(splits.shapes, NUM_CLASSES, dim=8)
    learner = mmfast.Trainer("joint", max_epochs=1, accelerator="cpu").fit(model, splits.train, splits.val)
    assert learner.scaling == {}
    learner.predict(splits.test)
    with pytest.raises(ValueError, match="standardised as the training data were, not at all"):
        learner.predict(splits.standardize().test)
    with pytest.raises(ValueError, match="dataset must not be standardised, as the training data were not"):
        mmfast.valuate(learner, splits.standardize().test)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "dataset must hold at least one sample"),
        ("new.npz", "dataset must be a data set, got 'new.npz': mmfast predict --data takes files"),
        ([{"a": torch.zeros(5)}], "samples of dataset must have 'b', got 'a'"),
        (
            [{"a": torch.zeros(5), "b": torch.zeros(5), "label": 7}],
            r"label of sample 0 of dataset must lie in \[0, C\) = \[0, 3\), got 7",
        ),
        ([{"a": torch.zeros(4), "b": torch.zeros(5)}], "a must have 5 features or channels"),
    ],
    ids=["empty", "path", "modality", "label", "shape"],
)
def test_what_is_no_data_set_for_it_is_refused(learner, data, text):
    with pytest.raises((TypeError, ValueError), match=text):
        learner.predict(data, standardized=False)


def rows_of(path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


def test_the_table_tells_all_of_each_sample(splits, learner, tmp_path, monkeypatch):
    from pyarrow.parquet import read_table

    monkeypatch.setattr(predictions, "_ROWS", 5)
    found = learner.predict(splits.test)
    found.to_csv(tmp_path / "p.csv")
    found.to_parquet(tmp_path / "p.parquet")
    rows, names = rows_of(tmp_path / "p.csv"), ["cat", "dog", "owl"]
    columns = "row key prediction probability a__prediction a__present b__prediction b__present label correct"
    assert list(rows[0]) == columns.split()
    assert len(rows) == len(splits.test)
    for i, row in enumerate(rows):
        assert (row["row"], row["key"]) == (str(i), splits.test.sample_keys[i])
        best = int(found.logits[i].argmax())
        assert row["prediction"] == names[best] == found.labels[i]
        assert float(row["probability"]) == float(found.logits[i].softmax(0)[best])
        assert row["a__prediction"] == names[int(found.own_logits[0, i].argmax())]
        has = bool(splits.test.present["b"][i])
        assert row["b__prediction"] == (names[int(found.own_logits[1, i].argmax())] if has else "")
        assert row["b__present"] == str(has)
        label = int(splits.test.labels[i])
        assert (row["label"], row["correct"]) == (names[label], str(best == label))
    assert found.accuracy == sum(row["correct"] == "True" for row in rows) / len(rows)
    assert read_table(tmp_path / "p.parquet").to_pydict() == found.columns()
    assert not all(map(all, splits.test.present.values()))


def test_a_table_without_labels_or_names_and_without_samples(tmp_path):
    from pyarrow.parquet import read_table

    found = Predictions(
        torch.randn(4, 3), torch.randn(2, 4, 3), ("a", "b"), None, torch.ones(4, 2, dtype=torch.bool)
    )
    assert found.labels == found.logits.argmax(1).tolist()
    assert list(found.columns()) == [
        "row", "prediction", "probability", "a__prediction", "a__present", "b__prediction", "b__present"
    ]  # fmt: skip
    none = found._part(slice(0, 0))
    none.to_parquet(tmp_path / "p.parquet")
    assert read_table(tmp_path / "p.parquet").num_rows == 0


def test_samples_without_a_label_count_for_nothing():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    marks = torch.ones(3, 1, dtype=torch.bool)
    found = Predictions(logits, logits[None], ("a",), ("x", "y"), marks, targets=torch.tensor([0, -100, 1]))
    assert found.accuracy == 0.5
    assert found.columns()["label"] == ["x", None, "y"]
    assert found.columns()["correct"] == [True, None, False]


def test_logits_that_are_nan_are_no_prediction():
    data, learner = make_data(8), bind("joint")
    with torch.no_grad():
        learner.model.head.linear.bias[1] = torch.nan
    with pytest.warns(UserWarning, match="8 of 8 samples have NaN logits"):
        found = learner.predict(data)
    assert found.predicted.tolist() == [-1] * 8
    assert found.labels == [None] * 8
    assert found.accuracy == 0


def test_several_labels_at_once_and_values():
    data, learner = make_data(6), bind("joint")
    targets = torch.tensor([[1, 0, 1]] * 6)
    learner.objective = mmfast.objectives.Objective("multilabel")
    found = learner.predict(ArrayDataset(data.arrays))
    assert torch.equal(found.probabilities, found.logits.sigmoid())
    assert torch.equal(found.predicted, found.logits > 0)
    told = Predictions(
        torch.tensor([[1.0, -1.0, 2.0], [1.0, -1.0, -2.0]]),
        torch.zeros(1, 2, 3),
        ("a",),
        ("x", "y", "z"),
        torch.ones(2, 1, dtype=torch.bool),
        targets=targets[:2],
        task="multilabel",
    )
    table = told.columns()
    assert (table["prediction"], table["label"], table["correct"]) == (
        ["x+z", "x"],
        ["x+z", "x+z"],
        [True, False],
    )
    assert table["probability__y"] == pytest.approx([0.2689414] * 2)
    learner.objective = mmfast.objectives.Objective("regression")
    found = learner.predict(ArrayDataset(data.arrays))
    assert (found.probabilities, found.accuracy) == (None, None)
    assert found.columns()["m1__prediction__2"] == found.own_logits[1, :, 2].tolist()


def test_subsets_know_where_their_samples_come_from(splits):
    part = make_data(20)
    assert part.sample_keys is None
    assert part.subset([7, 3]).subset(slice(1, 2)).sample_keys.tolist() == [3]
    moved = splits.test.to("cpu").subset([2])
    assert moved.sample_keys.tolist() == splits.test.sample_keys[[2]].tolist()
    given = Splits.from_arrays({"a": np.ones((9, 2))}, np.arange(9) // 3, split=["train", "val", "test"] * 3)
    assert given.test.sample_keys.tolist() == [2, 5, 8]
    assert given.test.class_names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sample_keys": [1.5, 2]}, "sample_keys must hold integers or strings, got dtype float64"),
        ({"sample_keys": [1]}, r"sample_keys must have shape \[N\] = \[2\], got \[1\]"),
        ({"class_names": ["x"], "num_classes": 2}, "class_names must name C = 2 classes, got 1"),
        ({"class_names": "xy"}, "class_names must be strings, one a class, got 'xy'"),
    ],
)
def test_keys_and_names_that_do_not_fit_are_refused(options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        ArrayDataset({"a": torch.zeros(2, 3)}, **options)


def test_attributes_of_ones_own_that_mean_something_else_do_no_harm():
    class Own(list):
        class_names = {0: "x"}  # noqa: RUF012
        shapes = scaling = 3.0

        def sample_keys(self):
            return 1

    data, learner = make_data(6), bind("joint")
    samples = Own(data[i] for i in range(6))
    note_data(learner, samples)
    assert (learner.class_names, learner.scaling, learner.shapes) == (None, None, None)
    found = learner.predict(samples)
    assert (found.sample_keys, found.class_names) == (None, None)
    assert torch.equal(found.targets, data.labels)


def test_padded_sequences_without_labels():
    data, learner = make_data(6), bind("joint")
    samples = [{"m0": data.arrays["m0"][i], "m1": data.arrays["m1"][i]} for i in range(6)]
    padded = learner.predict(samples, collate_fn=functools.partial(mmfast.data.pad, names=()))
    torch.testing.assert_close(padded.logits, learner.predict(data).logits)


def test_arrays_without_labels(splits):
    data = without_labels(splits.test)
    assert repr(data) == f"ArrayDataset({len(data)} samples, a [5], b [5], no labels)"
    assert list(data[0]) == ["a", "b", "b__present"]
    assert "label" not in data.gather(torch.tensor([1, 2]))
    assert data.subset([1]).labels is None
    with pytest.raises(ValueError, match="must have 'label'"):
        mmfast.valuate(mmfast.models.build_model(data.shapes, 3, dim=4), data)


@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 2)])
def test_values_are_written_as_tables(shape, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = Predictions(
        torch.arange(24.0).view(12, 2)[:, : shape[-1] if len(shape) > 1 else 1],
        torch.zeros(1, 12, shape[-1] if len(shape) > 1 else 1),
        ("a",),
        None,
        torch.ones(12, 1, dtype=torch.bool),
        torch.rand(shape),
        task="regression",
    )
    found.to_csv(tmp_path / "table.csv")
    rows = rows_of(tmp_path / "table.csv")
    assert [float(row["prediction" if len(shape) == 1 or shape[1] == 1 else "prediction__1"]) for row in rows]
    found.to_parquet(tmp_path / "table.parquet")
    assert parquet.read_table(tmp_path / "table.parquet").to_pydict() == found.columns()
    assert list(rows[0]) == list(found.columns())


def test_data_sets_put_together_keep_keys_and_classes(splits, learner):
    both = learner.predict(ConcatDataset([splits.val, Subset(splits.test, [2, 0])]))
    expected = [*splits.val.sample_keys, *splits.test.sample_keys[[2, 0]]]
    assert both.sample_keys.tolist() == expected
    some = ArrayDataset(splits.val.arrays, splits.val.labels, sample_keys=range(len(splits.val)))
    assert learner.predict(ConcatDataset([splits.test, some])).sample_keys is None
    other = splits.test._with(class_names=("owl", "dog", "cat"))
    with pytest.raises(ValueError, match="classes of the training data, cat, dog, owl, got owl, dog, cat"):
        learner.predict(ConcatDataset([other, other]))
    with pytest.raises(ValueError, match="must have the same classes, got cat, dog, owl in one and owl, dog"):
        learner.predict(ConcatDataset([splits.test, other]))
    unlabelled = without_labels(splits.test)._with(class_names=other.class_names)
    for data in (unlabelled, Subset(unlabelled, [0, 1]), ConcatDataset([unlabelled, unlabelled])):
        assert learner.predict(data).class_names == ("cat", "dog", "owl")


def test_labels_beyond_the_first_samples_are_checked(splits, learner):
    def samples(change, rows):
        found = [dict(splits.standardize().train[i]) for i in range(64)]
        for row in rows:
            change(found[row])
        return found

    options = {"standardized": True, "batch_size": 16}
    for rows in (range(63), range(16), range(48, 64)):
        if 0 in rows:
            data = samples(lambda sample: sample.pop("label"), rows)
        with pytest.raises(ValueError, match=r"all (of its )?samples (or in none, got|must have 'label')"):
            learner.predict(data, **options)
    for label in (7, -5):
        data = samples(lambda sample: sample.update(label=label), [40])  # noqa: B023
        for contributions in (True, False):
            with pytest.raises(
                ValueError, match=rf"label of sample 40 of dataset must lie in .*, got {label}"
            ):
                learner.predict(data, contributions=contributions, **options)


@pytest.mark.parametrize(
    ("keys", "written"),
    [
        (np.array([2**63, 1], dtype=np.uint64), ["9223372036854775808", "1"]),
        (np.array(["é".encode(), b"\xff"]), ["é", "\\xff"]),
        ([b"\xe9".decode(errors="surrogateescape"), "é"], ["\\udce9", "é"]),
    ],
    ids=["large", "bytes", "no text"],
)
def test_keys_of_every_kind_are_written(keys, written, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    learner, data = bind("joint"), make_data(2)
    found = learner.predict(ArrayDataset(data.arrays, sample_keys=keys))
    found.to_csv(tmp_path / "table.csv")
    found.to_parquet(tmp_path / "table.parquet")
    with open(tmp_path / "table.csv", encoding="utf-8") as file:
        assert [row["key"] for row in csv.DictReader(file)] == written
    assert parquet.read_table(tmp_path / "table.parquet").to_pydict()["key"] == written

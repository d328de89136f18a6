"""What is said of data before any training: how each modality was read, and what a result will not show."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from mmfast import data
from mmfast.cli.commands import app
from mmfast.data import Splits, overview
from mmfast.models import build_model
from mmfast.reports.data_tables import show_overview

FAST = ["--epochs", "1", "--dim", "8", "--accelerator", "cpu"]
N = 160


def arrays():
    rng = np.random.default_rng(0)
    still = np.full((N, 3), 0.1)  # float32 rounds it: a constant all the same
    return {
        "wrist": np.concatenate([rng.normal(size=(N, 4)), still], 1),
        "pose": rng.normal(size=(N, 5, 3)) * [1, 0, 1] + [0, 7, 0],
        "front_camera": rng.normal(size=(N, 3, 12, 10)),
        "clip": rng.normal(size=(N, 2, 1, 8, 8)),
    }


def present():
    return {"pose": np.arange(N) % 8 != 0}


def make(**options):
    return Splits.from_arrays(arrays(), np.arange(N) % 4, present=present(), **options)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "kinds.npz"
    np.savez(path, label=np.arange(N) % 4, pose__present=present()["pose"], **arrays())
    return path


def invoke(command, npz, out, *words, width=80):
    given = ["--data", str(npz), "--out", str(out), *FAST, *words]
    result = CliRunner().invoke(app, [command, *given], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return result.stdout


def printed(seen, width):
    stream = io.StringIO()
    show_overview(Console(file=stream, width=width, markup=False, highlight=False), seen)
    return stream.getvalue()


@pytest.mark.parametrize("standardize", [True, False])
def test_kind_lack_and_constants_are_counted(standardize):
    seen = overview(make(standardize=standardize))
    assert seen.samples == N
    assert [m.name for m in seen.modalities] == ["wrist", "pose", "front_camera", "clip"]
    assert [m.kind for m in seen.modalities] == ["vector", "sequence", "image", "video"]
    assert [m.shape for m in seen.modalities] == [(7,), (5, 3), (3, 12, 10), (2, 1, 8, 8)]
    assert [m.lacking for m in seen.modalities] == [0, N // 8, 0, 0]
    assert [m.constant for m in seen.modalities] == [3, 1, 0, 0]
    assert [m.features for m in seen.modalities] == [7, 3, 3, 1]
    assert seen.modalities[0].encoder is seen.modalities[0].parameters is None


def test_what_varies_in_test_alone_counts_as_constant():
    split = np.repeat(["train", "val", "test"], [100, 30, 30])
    varying = np.where(split == "test", np.arange(N), 3.0)[:, None]
    splits = Splits.from_arrays(
        {"a": np.concatenate([varying, np.eye(N)[:, :2]], 1)}, np.arange(N) % 4, split=split
    )
    assert overview(splits).modalities[0].constant == 1


def test_a_model_names_its_encoders_with_their_parameters():
    splits = make()
    model = build_model(splits.shapes, splits.num_classes, dim=8)
    seen = overview(splits, model).modalities
    assert [m.encoder for m in seen] == ["MLP", "TemporalConv", "SmallCNN", "SmallCNN per frame"]
    for m in seen:
        assert m.parameters == sum(p.numel() for p in model.encoders[m.name].parameters())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits(width):
    splits = make()
    seen = overview(splits, build_model(splits.shapes, splits.num_classes, dim=8))
    assert max(map(len, printed(seen, width).splitlines())) <= width
    # The table alone, without the warnings below it.
    text = printed(dataclasses.replace(seen, warnings=()), width)
    assert "…" not in text
    # Names may break over lines at their own separators.
    whole = " ".join(text.split())
    for word in ("wrist", "[7]", "vector", "MLP", "3/7", "sequence", "TemporalConv", "1/3", "video"):
        assert word in whole, word
    assert "20" in whole.split("pose")[1].split("clip")[0].split()
    assert len(text.splitlines()) <= 12


def test_the_note_is_left_out_where_nothing_lacks():
    plain = data.synthetic(600, 3)
    assert "Absent:" not in printed(overview(plain), 80)
    assert "Absent:" in printed(overview(make()), 80)


def test_comparisons_begin_with_it_also_when_nothing_is_left_to_run(npz, tmp_path):
    words = ("--methods", "joint", "--seeds", "1")
    for turn in range(2):
        lines = invoke("compare", npz, tmp_path, *words).splitlines()
        assert "Modality" in "".join(lines[:2])
        table = "\n".join(lines[: lines.index("")])
        for name in ("wrist", "pose", "front_camera", "clip"):
            assert name in table
        assert ("1 of 1 runs: already in" in "\n".join(lines)) == bool(turn)


def test_training_begins_with_it(npz, tmp_path):
    text = invoke("train", npz, tmp_path, width=60)
    assert "Modality" in "".join(text.splitlines()[:2])
    assert text.index("TemporalConv") < text.index("test accuracy")


def test_looking_leaves_the_data_alone():
    splits = make()
    before = {name: array.clone() for name, array in splits.train.arrays.items()}
    overview(splits)
    assert all(torch.equal(before[name], array) for name, array in splits.train.arrays.items())


def warnings_of(arrays, labels, *, seeds=None, **options):
    return overview(Splits.from_arrays(arrays, labels, **options), seeds=seeds).warnings


def normal(size=1000, features=3):
    return np.random.default_rng(1).normal(size=(size, features))


def test_good_data_come_without_warnings():
    assert warnings_of({"a": normal()}, np.arange(1000) % 4, seeds=5) == ()


@pytest.mark.parametrize(("size", "points"), [(49, "2.0"), (20, "5.0")])
def test_few_test_samples(size, points):
    split = np.array(["test"] * size + ["val"] * 50 + ["train"] * (900 - size))
    (sentence,) = warnings_of({"a": normal(950)}, np.arange(950) % 2, split=split)
    assert f"has {size} samples, so one is {points} points of accuracy" in sentence


def test_fifty_test_samples_are_enough():
    split = np.array(["test"] * 50 + ["val"] * 50 + ["train"] * 900)
    assert warnings_of({"a": normal()}, np.arange(1000) % 2, split=split) == ()


def test_one_seed():
    (sentence,) = warnings_of({"a": normal()}, np.arange(1000) % 4, seeds=1)
    assert "One seed shows no spread" in sentence


@pytest.mark.parametrize(("count", "counted"), [(1, "1 sample"), (2, "2 samples")])
def test_a_class_too_rare_for_every_part_is_named(count, counted):
    labels = np.array(["rare"] * count + ["common", "other"] * 500)
    assert warnings_of({"a": normal(1000 + count)}, labels) == (
        f"Class rare ({counted}) has none in val or test: "
        "epochs are chosen without it, and the test figures say nothing of it.",
    )


@pytest.mark.parametrize(
    ("lacking", "meaning"),
    [("val", "epochs are chosen without it"), ("test", "the test figures say nothing of it")],
)
def test_a_class_that_a_given_part_lacks_is_named(lacking, meaning):
    labels, split = np.arange(1000) % 4, np.repeat(["train", "val", "test"], [800, 100, 100])
    split[(labels == 2) & (split == lacking)] = "train"
    (sentence,) = warnings_of({"a": normal()}, labels, split=split)
    assert sentence == f"Class 2 (250 samples) has none in {lacking}: {meaning}."


def test_many_rare_classes_make_one_sentence():
    labels = np.concatenate([np.arange(1000) % 2, np.arange(2, 10)])
    (sentence,) = warnings_of({"a": normal(1008)}, labels)
    assert sentence.startswith("Classes 2 (1 sample), ")
    assert "6 (1 sample) and 3 more have none in val or test" in sentence


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("start", [0, 1_000_000])
def test_a_row_number_is_noticed(standardize, start):
    numbers = np.random.default_rng(0).permutation(1000)[:, None] + start
    labels = np.arange(1000) % 4
    (sentence,) = warnings_of({"a": normal(), "id": numbers}, labels, standardize=standardize)
    assert sentence.startswith("id is a different whole number in every sample")


def test_a_row_number_is_noticed_where_some_samples_lack_it():
    has = np.arange(1000) % 3 > 0
    (sentence,) = warnings_of(
        {"a": normal(), "id": np.arange(1000)[:, None] * has[:, None]},
        np.arange(1000) % 4,
        present={"id": has},
    )
    assert sentence.startswith("id is")


@pytest.mark.parametrize(
    "measured",
    [normal(features=1), np.arange(1000)[:, None] // 2, np.arange(1000)[:, None] / 8, normal(features=2)],
    ids=["real", "shared", "eighths", "two"],
)
def test_measurements_are_no_row_numbers(measured):
    assert warnings_of({"a": normal(), "b": measured}, np.arange(1000) % 4) == ()


def test_a_modality_without_any_varying_feature():
    (sentence,) = warnings_of({"a": normal(), "dead": np.full((1000, 2), 3.0)}, np.arange(1000) % 4)
    assert sentence == "All features of dead are constant in train: it tells no class from another."


def test_a_modality_that_no_test_sample_has():
    split = np.repeat(["train", "val", "test"], [800, 100, 100])
    (sentence,) = warnings_of(
        {"a": normal(), "b": normal()}, np.arange(1000) % 4, split=split, present={"b": split != "test"}
    )
    assert sentence == "No test sample has b: what it contributes is not measured."


@pytest.mark.parametrize("width", [60, 80])
def test_commands_print_the_warnings_before_training(npz, tmp_path, width):
    text = invoke("compare", npz, tmp_path / "c", "--methods", "joint", "--seeds", "1", width=width)
    head = text[: text.index("1/1 joint")]
    whole = " ".join(head.split())
    assert "Warning: The test part has 24 samples, so one is 4.2 points of accuracy" in whole
    assert "Warning: One seed shows no spread" in whole
    assert max(map(len, head.splitlines())) <= width
    alone = invoke("train", npz, tmp_path / "t", width=width)
    assert "Warning: The test part has 24 samples" in " ".join(alone[: alone.index("test accuracy")].split())
    assert "One seed" not in alone


@pytest.mark.parametrize(("seeds", "more"), [(None, ""), (5, " and which modality is the best alone")])
def test_few_validation_samples(seeds, more):
    split = np.repeat(["train", "val", "test"], [851, 49, 100])
    splits = Splits.from_arrays({"a": normal()}, np.arange(1000) % 4, split=split)
    (sentence,) = overview(splits, seeds=seeds).warnings
    assert sentence == (
        f"The validation part has 49 samples: which epoch's weights are kept{more} is decided largely by "
        "chance."
    )


def test_modalities_that_no_sample_has_together():
    present = {"a": torch.arange(60) % 2 == 0, "b": torch.arange(60) % 2 == 1}
    arrays = {name: torch.randn(60, 3) for name in "ab"}

    def said(masks):
        splits = Splits.from_arrays(arrays, torch.arange(60) % 3, present=masks)
        return any("No training sample has two modalities" in text for text in overview(splits).warnings)

    assert said(present)
    assert not said({"a": present["a"]})
    assert not said(None)

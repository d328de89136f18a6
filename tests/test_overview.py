"""What is said of data before any training: how each modality was read, and what a result will not show."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("typer")

from rich.console import Console
from typer.testing import CliRunner

from mmfast import data
from mmfast.commands import app
from mmfast.data import Splits, overview
from mmfast.models import build_model
from mmfast.overview_report import show_overview

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
    text = printed(seen, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    # Names may break over lines at their own separators.
    whole = " ".join(text.split())
    for word in ("wrist", "[7]", "vector", "MLP", "3/7", "sequence", "TemporalConv", "1/3", "video"):
        assert word in whole, word
    assert "20" in whole.split("pose")[1].split("clip")[0].split()
    assert len(text.splitlines()) <= 12


def test_the_note_is_left_out_where_nothing_lacks():
    plain = data.synthetic(60, 3)
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
        assert ("1 of 1 runs are already in" in "\n".join(lines)) == bool(turn)


def test_training_begins_with_it(npz, tmp_path):
    text = invoke("train", npz, tmp_path, width=60)
    assert "Modality" in "".join(text.splitlines()[:2])
    assert text.index("TemporalConv") < text.index("test accuracy")


def test_looking_leaves_the_data_alone():
    splits = make()
    before = {name: array.clone() for name, array in splits.train.arrays.items()}
    overview(splits)
    assert all(torch.equal(before[name], array) for name, array in splits.train.arrays.items())

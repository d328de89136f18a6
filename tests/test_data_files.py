"""The `.npz` format, the embedded default, and what `load` says to bad input."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast.data import load


def make_arrays(size: int = 60, num_classes: int = 3) -> dict:
    rng = np.random.default_rng(0)
    return {
        "label": np.arange(size) % num_classes,
        "audio": rng.normal(size=(size, 3)).astype(np.float32),
        "image": rng.normal(size=(size, 1, 4, 4)).astype(np.float32),
    }


@pytest.fixture
def save(tmp_path):
    def write(**arrays) -> Path:
        np.savez(tmp_path / "data.npz", **arrays)
        return tmp_path / "data.npz"

    return write


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(text))


def test_npz_round_trip_with_presence_and_group(save):
    mask = np.arange(60) % 4 != 0
    arrays = make_arrays()
    arrays["audio"][~mask] = np.nan
    splits = load(save(**arrays, audio__present=mask, group=np.arange(60) // 2), seed=7)
    assert splits.name == "data"
    assert splits.split_seed == 7
    assert splits.modalities == ("audio", "image")
    sample = splits.val[[0, 1]]
    assert list(sample) == ["audio", "image", "audio__present", "label"]
    assert torch.isfinite(splits.train.arrays["audio"]).all()
    assert (
        sum(int(part.present["audio"].sum()) for part in (splits.train, splits.val, splits.test))
        == mask.sum()
    )
    assert torch.equal(
        load(save(**arrays, audio__present=mask), seed=7).val.labels.bincount(), torch.tensor([3] * 3)
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label": np.arange(60) / 2}, "labels must be integers or strings, got float64 with 0.5"),
        ({"label": np.zeros((60, 1), int)}, "labels must have shape [N] = [60], got [60, 1]"),
        ({"label": np.zeros(0, int)}, "labels must hold at least one sample"),
        ({"split": np.repeat(["train", "valid"], 30)}, "only train, val and test, got 'valid'"),
        ({"split": np.repeat(["val", "test"], 30)}, "train and test samples, got none of train"),
        ({"split": np.repeat(["val", "val"], 30)}, "got none of train and test"),
        ({"split": np.array(["train"])}, "split must have shape [N] = [60], got [1]"),
        ({"split": np.zeros(60)}, "split must hold strings, got float64"),
        (
            {"split": np.repeat(["train", "test"], 30), "group": np.arange(60) // 20},
            "each group must lie in one split, got 1 in several: 1",
        ),
        (
            {"split": np.repeat(["train", "val", "test"], 20), "label": np.arange(60) // 15},
            "every class must have training samples, got none of 2, 3",
        ),
        (
            {"split": np.repeat(["train", "val", "test"], 20), "audio__present": np.arange(60) > 30},
            "every modality must be present in a training sample, got none with audio",
        ),
        (
            {"group": np.zeros(60, int)},
            "split cannot be drawn: 1 group(s), at most 20 samples a class, are too",
        ),
        ({"group": np.arange(60) % 2}, "split cannot be drawn: 1 group(s), at most 10 samples"),
        ({"group": np.arange(60) % 3}, "whichever groups of the 3 go to test, a class loses its last"),
        ({"label": np.arange(60)}, "60 samples of 60 classes are too few for a test part beside train"),
        (
            {"audio": np.full((60, 3), np.inf)},
            "audio must be finite in float32, got 180 NaN or infinite of 180",
        ),
        ({"audio": np.zeros((59, 3))}, "audio must have shape [N, ...] with N = 60 as labels, got [59, 3]"),
        (
            {"label": np.arange(59) % 3},
            "labels must have shape [N] with N = 60 as audio, image, got [59]",
        ),
        ({"audio__presnt": np.ones(60, bool)}, "got 'audio__presnt'; did you mean audio__present?"),
        ({"audio__Presence": np.ones((60, 1))}, "got 'audio__Presence'; did you mean audio__present?"),
        ({"audio_present": np.ones(60, bool)}, "got 'audio_present'; did you mean audio__present?"),
        ({"voice__presnt": np.ones((60, 2))}, "got 'voice__presnt'; did you mean voice__present?"),
        ({"splits": np.repeat(["train", "test"], 30)}, "or another name, got [60]; did you mean split?"),
        ({"group_": np.arange(60)}, "or another name, got [60]; did you mean group?"),
        ({"audoi__present": np.ones(60, bool)}, "among audio, image, got audoi; did you mean audio?"),
        ({"video__present": np.ones(60, bool)}, "present must name modalities among audio, image, got video"),
        ({"label": np.array([b"\xff"] * 60)}, "can't decode byte"),
    ],
)
def test_bad_npz_contents_are_named_with_the_file(save, changes, text):
    path = save(**{**make_arrays(), **changes})
    with raises(text) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_the_first_value_that_is_not_finite_is_named_with_what_to_do(save):
    arrays = make_arrays()
    arrays["audio"][[7, 40], [2, 0]] = np.nan
    with raises(
        "audio must be finite in float32, got 2 NaN or infinite of 180 values, in 2 of 60 samples, first in "
        "sample 7, column 2, counted from 0: impute them, or mark the samples that lack audio, by audio__pres"
    ):
        load(save(**arrays))
    mask = np.ones(60, bool)
    mask[[7, 40]] = False
    load(save(**arrays, audio__present=mask))
    arrays = make_arrays()
    arrays["image"][50:] = np.inf
    with raises("in 10 of 60 samples, first in sample 50, counted from 0: impute"):
        load(save(**arrays))


def test_names_that_are_near_a_mark_may_be_those_of_modalities(save):
    arrays = make_arrays() | {"audio_present": np.ones((60, 2)), "audio__parent": np.eye(60)}
    assert set(load(save(**arrays)).modalities) == {"audio", "image", "audio_present", "audio__parent"}


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("key", ["label", "audio", "split", "audio__present"])
def test_object_arrays_are_refused_and_never_unpickled(save, tmp_path, key):
    trap = tmp_path / "trap"
    touch = np.array([_Touch(trap)] * 60, dtype=object)
    pickle.loads(pickle.dumps(touch))
    assert trap.exists(), "the trap does not work"
    trap.unlink()
    path = save(**{**make_arrays(), key: touch})
    with raises(f"{path}: array {key!r} holds Python objects, which are never unpickled"):
        load(path)
    assert not trap.exists()


def test_pickle_in_place_of_an_archive_is_refused(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "data.npz"
    path.write_bytes(pickle.dumps(_Touch(trap)))
    with raises(f"{path}: not a readable .npz file"):
        load(path)
    assert not trap.exists()


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.9, -1])
def test_truncated_file(save, kept):
    path = save(**make_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with raises(f"{path}: not a readable .npz file"):
        load(path)


def test_damaged_array(save):
    path = save(**make_arrays())
    content = bytearray(path.read_bytes())
    content[content.index(make_arrays()["image"].tobytes()[:64]) + 20] ^= 255
    path.write_bytes(content)
    with raises(f"{path}: array 'image' is damaged"):
        load(path)


def test_npz_without_label_or_of_another_kind(save, tmp_path):
    arrays = make_arrays()
    arrays["labels"] = arrays.pop("label")
    with raises("must hold an array named label, got audio, image, labels (is 'labels' meant?)"):
        load(save(**arrays))
    with raises("must hold an array named label, got no array"):
        load(save())
    with raises("arrays must hold at least one modality, got none"):
        load(save(label=np.arange(4)))
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with raises("must be an .npz archive of named arrays (numpy.savez), got a single .npy array"):
        load(tmp_path / "data.npz")


def test_unknown_source_is_named_with_close_names(save, tmp_path, monkeypatch):
    # What lies in the folder of the tests' caller is named, too.
    monkeypatch.chdir(tmp_path)
    with raises("data must be \"htad\", a FILE.npz or a FOLDER, got 'htda', not found; did you mean htad?"):
        load("htda")
    save(**make_arrays())
    with raises(f"not found; did you mean {tmp_path / 'data.npz'}?"):
        load(tmp_path / "dat.npz")
    (tmp_path / "table.xlsx").write_text("1")
    with raises("of another kind"):
        load(tmp_path / "table.xlsx")


# HTAD


def test_htad_is_split_by_block():
    pytest.importorskip("multiviewstacking")
    splits = load()
    assert splits.shapes == {"audio": (36,), "accelerometer": (16,)}
    assert splits.class_names == (
        "brush_teeth",
        "eat_chips",
        "mop_floor",
        "sweep",
        "type_on_keyboard",
        "wash_hands",
        "watch_tv",
    )
    sizes = np.array([180, 282, 181, 178, 179, 180, 206])
    train, val = sizes * 70 // 100, sizes * 85 // 100 - sizes * 70 // 100
    assert splits.train.labels.bincount().tolist() == train.tolist()
    assert splits.val.labels.bincount().tolist() == val.tolist()
    assert splits.test.labels.bincount().tolist() == (sizes - train - val).tolist()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (968, 208, 210)
    assert splits.split_seed is None
    assert "split by block" in splits.description
    raw = load("htad", standardize=False)
    # The first window of the file is the first of "watch_tv".
    first = raw.train.labels.tolist().index(6)
    assert raw.train[first]["audio"][:2].tolist() == pytest.approx([120.0788862, 3.025170556])


def test_htad_names_the_package_it_needs(monkeypatch):
    monkeypatch.setattr("mmfast.data.htad.find_spec", lambda name: None)
    with raises('"htad" is part of multiviewstacking: pip install "mmfast[train]"', ImportError):
        load()


def test_importing_and_loading_htad_needs_no_heavy_package():
    pytest.importorskip("multiviewstacking")
    code = (
        "import sys, mmfast.data as d; d.load();"
        "heavy = ('pandas', 'sklearn', 'PIL', 'matplotlib', 'scipy', 'soundfile');"
        "print([m for m in heavy if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr

"""Bad files of a folder: all of them in one report, or left out, in Python and on the command line."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("soundfile")
pytest.importorskip("typer")

import soundfile
from PIL import Image
from typer.testing import CliRunner

from mmfast.cli.commands import app
from mmfast.cli.options import make_setup
from mmfast.data import Splits, load, load_folder
from mmfast.experiments.runs import PlannedRun, restore
from mmfast.experiments.subprocesses import train_arguments
from mmfast.methods import Joint
from mmfast.training import checkpoint
from mmfast.training.optimization import Optimization

FAST = ["--epochs", "1", "--dim", "4", "--accelerator", "cpu"]


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(text))


def fill(folder: Path, count: int = 20, classes: str = "ab", sound: bool = True) -> Path:
    """Write samples with a vector each, of their class and number, and where wanted a recording."""
    for i in range(count):
        place = folder / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"s{i:02d}.pose.npy", np.array([i, i % 2, 1.0]))
        if sound:
            soundfile.write(place / f"s{i:02d}.wav", 0.1 * np.sin(np.arange(800) * (i % 2 + 1)), 8000)
    return folder


def parts(splits: Splits):
    return splits.train, splits.val, splits.test


def poses(splits: Splits) -> list[float]:
    """Return the numbers of the samples that are left, from the vectors that are present."""
    return sorted(
        row[0].item()
        for part in parts(splits)
        for row, there in zip(part.arrays["pose"], part.present.get("pose", np.ones(len(part), bool)))
        if there
    )


# The report


def test_bad_files_of_every_kind_are_reported_together(tmp_path):
    fill(tmp_path)
    (tmp_path / "a" / "s00.wav").write_bytes(b"")
    (tmp_path / "a" / "s02.wav").write_bytes(b"")
    (tmp_path / "b" / "s01.pose.npy").write_bytes(b"")
    (tmp_path / "b" / "s03.pose.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "b" / "s05.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    np.save(tmp_path / "b" / "s07.pose.npy", np.array([1, np.nan, np.inf]))
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "b" / f"clip_{i:03d}.png")
    # In the middle: the first and the last frame are readable.
    (tmp_path / "b" / "clip_001.png").write_bytes(b"<html> none")
    with pytest.raises(ValueError, match="files cannot be read") as caught:
        load(tmp_path)
    lines = str(caught.value).split("\n")
    assert lines[0] == (
        f"{tmp_path}: 7 of 44 files cannot be read; "
        "skip_unreadable=True (--skip-unreadable) leaves such files out:"
    )
    assert sorted(lines[1:]) == sorted(
        [
            "  empty (0 bytes); copy or download it again (3 files): a/s00.wav, a/s02.wav, b/s01.pose.npy",
            "  text, not a picture, beginning with '<html> none'; copy or download it again: b/clip_001.png",
            "  must be finite in float32, got 2 NaN or infinite of 3 values: b/s07.pose.npy",
            "  not a readable picture: of no known format; copy it again: b/s05.png",
            next(line for line in lines if line.endswith(": b/s03.pose.npy")),
        ]
    )
    assert "  not a readable .npy file of numbers: " in str(caught.value)


def test_ten_files_are_shown_and_the_rest_counted_without_hiding_a_rare_reason(tmp_path):
    fill(tmp_path, 40, sound=False)
    for i in range(0, 36, 2):
        (tmp_path / "a" / f"s{i:02d}.pose.npy").write_bytes(b"")
    (tmp_path / "b" / "s39.pose.npy").write_bytes(b"version https://git-lfs.example\noid 5\n")
    with pytest.raises(ValueError, match="19 of 40 files cannot be read") as caught:
        load(tmp_path)
    lines = str(caught.value).split("\n")
    assert len(lines) == 4
    assert lines[1].startswith("  empty (0 bytes); copy or download it again (18 files): a/s00.pose.npy, ")
    assert lines[1].endswith(", a/s16.pose.npy")
    assert lines[2].endswith("fetch the file with git lfs pull: b/s39.pose.npy")
    assert sum(line.count(".pose.npy,") for line in lines) + 2 == 10
    assert lines[3] == "  and 9 more"


def test_a_single_bad_file_is_one_sentence(tmp_path):
    fill(tmp_path)
    path = tmp_path / "a" / "s00.pose.npy"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty") as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{path}: empty (0 bytes); copy or download it again; "
        "skip_unreadable=True (--skip-unreadable) leaves such files out"
    )


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"'shape': (3,), }", b"'shape': (3,), (", "not a readable .npy file of numbers: "),
        (b"'shape': (3,), }   ", b"'shape':(10**15,)} ", "not a readable .npy file of numbers: "),
        (b"'shape': (3,), }         ", b"'shape':(999999999999,),}", "not a readable .npy file of numbers: "),
        (b"'shape': (3,)", b"'shape': (0,)", "must hold at least one number, got shape [0]"),
        (b"'<f8'", b"'<c8'", "must hold real numbers, got complex64"),
    ],
)
def test_a_damaged_header_of_an_array_is_reported(tmp_path, old, new, text):
    path = fill(tmp_path) / "a" / "s00.pose.npy"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with raises(f"{path}: {text}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"PK\x03\x04" + bytes(100), "it does not begin like one; save it again with numpy.save"),
        (b"\x80\x04\x95" + bytes(100), "it does not begin like one; save it again with numpy.save"),
    ],
)
def test_what_is_no_array_is_never_taken_for_a_pickle(tmp_path, content, text):
    fill(tmp_path)
    (tmp_path / "a" / "s00.pose.npy").write_bytes(content)
    with raises(text) as caught:
        load(tmp_path)
    assert "pickle" not in str(caught.value)


# Leaving out


@pytest.fixture
def spoilt(tmp_path):
    """20 samples: one without a readable recording, one without a readable vector, one without either."""
    fill(tmp_path / "data")
    (tmp_path / "data" / "a" / "s00.wav").write_bytes(b"")
    (tmp_path / "data" / "b" / "s01.pose.npy").write_bytes(b"")
    (tmp_path / "data" / "a" / "s02.pose.npy").write_bytes(b"")
    # Its header is right, its content is not: found only when it is read.
    soundfile.write(tmp_path / "data" / "a" / "s02.wav", np.full(800, np.nan), 8000, subtype="FLOAT")
    return tmp_path / "data"


def test_left_out_files_are_absent_modalities_and_samples(spoilt):
    splits = load_folder(spoilt, skip_unreadable=True, standardize=False)
    assert splits.description.endswith("; 4 unreadable files left out, and 1 sample without any other file")
    assert sum(map(len, parts(splits))) == 19
    assert poses(splits) == [0, *range(3, 20)]
    absent = {name: sum(int((~p.present[name]).sum()) for p in parts(splits)) for name in ("audio", "pose")}
    assert absent == {"audio": 1, "pose": 1}
    for part in parts(splits):
        for name in ("audio", "pose"):
            assert (part.arrays[name][~part.present[name]] == 0).all()
            assert (part.arrays[name][part.present[name]].flatten(1) != 0).any(1).all()


def test_workers_read_what_one_process_does(spoilt):
    here, there = (load_folder(spoilt, skip_unreadable=True, num_workers=number) for number in (0, 2))
    assert here.description == there.description
    for part in ("train", "val", "test"):
        one, other = getattr(here, part), getattr(there, part)
        for name in one.modalities:
            assert torch.equal(one.arrays[name], other.arrays[name])
    texts = []
    for number in (0, 2):
        with pytest.raises(ValueError, match="cannot be read") as found:
            load_folder(spoilt, num_workers=number)
        texts.append(str(found.value))
    assert texts[0] == texts[1]


def test_without_bad_files_nothing_changes_or_is_said(tmp_path):
    fill(tmp_path)
    plain, skipped = (load(tmp_path, skip_unreadable=skip) for skip in (False, True))
    assert skipped.description == plain.description
    assert skipped.train.present == {}
    assert skipped.train.arrays["audio"].equal(plain.train.arrays["audio"])


def test_a_video_with_a_bad_frame_is_left_out(tmp_path):
    fill(tmp_path, sound=False)
    for i in range(20):
        for frame in range(3):
            picture = Image.new("RGB", (4, 4), (10 * i, 0, 0))
            picture.save(tmp_path / "ab"[i % 2] / f"v{i:02d}_{frame:03d}.png")
    (tmp_path / "a" / "v00_001.png").write_bytes(b"")
    (tmp_path / "a" / "v00_002.png").write_bytes(b"")
    splits = load(tmp_path, skip_unreadable=True)
    assert splits.description.endswith("; 2 unreadable files left out, and 1 sample without any other file")
    assert sum(map(len, parts(splits))) == 39


def test_a_modality_or_class_that_loses_every_file_is_refused(tmp_path):
    fill(tmp_path / "one", 12)
    for path in (tmp_path / "one").rglob("*.wav"):
        path.write_bytes(b"")
    with raises("12 of 24 files cannot be read; at least one audio file must be readable, got none"):
        load(tmp_path / "one", skip_unreadable=True)
    fill(tmp_path / "two", 30, classes="abc", sound=False)
    for path in (tmp_path / "two" / "b").glob("*.npy"):
        path.write_bytes(b"")
    with raises("every class must have training samples, got none of b"):
        load(tmp_path / "two", skip_unreadable=True)


# On the command line


def mmfast(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_commands_list_bad_files_line_by_line(spoilt, tmp_path):
    result = mmfast("train", "--data", spoilt, "--out", tmp_path / "run", *FAST)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"mmfast: {spoilt}: 4 of 40 files cannot be read; ")
    assert lines[1].startswith("  empty (0 bytes); copy or download it again (3 files): a/s00.wav, ")
    assert len(lines) == 3


def test_train_and_valuate_leave_the_same_files_out(spoilt, tmp_path):
    out, said = tmp_path / "run", "4 unreadable files left out, and 1 sample without any other file."
    result = mmfast("train", "--data", spoilt, "--out", out, "--skip-unreadable", *FAST)
    assert result.exit_code == 0, result.output
    assert said in " ".join(result.stdout.split())
    assert checkpoint.load(out / "model.ckpt")["metadata"]["skip_unreadable"] is True
    for words in ([], ["--data", spoilt]):
        # The checkpoint remembers it.
        result = mmfast("valuate", "--model", out, *words)
        assert result.exit_code == 0, result.output
        assert said in " ".join(result.stdout.split())
    trained = load_folder(spoilt, skip_unreadable=True)
    _, splits, _ = restore(out, accelerator="cpu")
    assert poses(splits) == pytest.approx(poses(trained), abs=1e-5)
    assert splits.test.present["audio"].equal(trained.test.present["audio"])


def test_valuate_leaves_files_of_other_data_out_where_it_is_told(spoilt, tmp_path):
    fill(tmp_path / "whole")
    out = tmp_path / "run"
    assert mmfast("train", "--data", tmp_path / "whole", "--out", out, *FAST).exit_code == 0
    assert checkpoint.load(out / "model.ckpt")["metadata"]["skip_unreadable"] is False
    result = mmfast("valuate", "--model", out, "--data", spoilt)
    assert result.exit_code == 2
    assert "4 of 40 files cannot be read" in result.stderr
    result = mmfast("valuate", "--model", out, "--data", spoilt, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert "4 unreadable files left out" in " ".join(result.stdout.split())


def test_a_run_goes_on_with_the_option_or_without_where_the_data_are_the_same(tmp_path):
    fill(tmp_path / "whole")
    words = ["train", "--data", tmp_path / "whole", "--out", tmp_path / "run", *FAST]
    assert mmfast(*words).exit_code == 0
    result = mmfast(*words, "--resume", "--skip-unreadable")
    assert result.exit_code == 0, result.output


def test_compare_leaves_files_out_and_tells_its_processes(spoilt, tmp_path):
    out = tmp_path / "out"
    words = ["compare", "--data", spoilt, "--methods", "joint", "--seeds", 1, "--out", out, *FAST]
    assert mmfast(*words).exit_code == 2
    result = mmfast(*words, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert "4 unreadable files left out" in " ".join(result.stdout.split())
    assert "4 unreadable" in json.loads((out / "results.json").read_text())["data"]["description"]


@pytest.mark.parametrize("skip", [False, True])
def test_the_command_of_a_run_passes_the_option_on(tmp_path, skip, monkeypatch):
    setup = make_setup(
        str(fill(tmp_path / "whole")), 0, Optimization(1), "1", dim=4, accelerator="cpu", skip_unreadable=skip
    )
    words = train_arguments(setup, PlannedRun(Joint(), 0, 1), tmp_path / "run")
    assert ("--skip-unreadable" in words) == skip
    seen = []

    def look(setup, *arguments, **options):
        seen.append(setup.skip_unreadable)
        raise ValueError("seen")

    # What the command imports while the function is replaced would keep the other one.
    importlib.import_module("mmfast.experiments.comparison")
    monkeypatch.setattr("mmfast.experiments.runs.make_run", look)
    assert mmfast(*words).exit_code == 2
    assert seen == [skip]

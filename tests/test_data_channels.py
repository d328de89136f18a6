"""Channels last in pictures and video: recognised in files and said, left alone where ambiguous."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch

from mmfast.data import ArrayDataset, Splits, load, load_npz
from mmfast.data.channels import is_channels_last

LAST = [(20, 8, 6, 3), (20, 28, 28, 1), (20, 5, 5, 4), (20, 7, 8, 6, 3), (20, 3, 9, 9, 3), (20, 8, 6, 5, 1)]
KEPT = [
    (20, 3, 8, 6),
    (20, 1, 28, 28),
    (20, 4, 8, 6),
    # Both readings have a number of channels.
    (20, 3, 8, 3),
    (20, 1, 8, 1),
    (20, 3, 4, 4),
    # Feature maps of few pixels, and signals of one row.
    (20, 64, 3, 3),
    (20, 512, 1, 1),
    (20, 64, 4, 4),
    (20, 2, 8, 3),
    # Two channels, or five, are no picture's.
    (20, 8, 6, 2),
    (20, 8, 6, 5),
    # Other ranks.
    (20, 3),
    (20, 8, 3),
    (20, 3, 3, 8, 6),
    (20, 8, 3, 8, 3),
]


def first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, -3)


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def given(size: int) -> np.ndarray:
    return np.repeat(["train", "val", "test"], [size - 8, 4, 4])


def npz(path, array: np.ndarray, **options) -> Splits:
    np.savez(path, label=np.arange(len(array)) % 2, split=given(len(array)), image=array)
    return load_npz(path, standardize=False, **options)


@pytest.mark.parametrize("shape", LAST)
def test_npz_with_channels_last_is_turned_and_says_so(tmp_path, shape):
    array = numbers(shape)
    splits = npz(tmp_path / "x.npz", array)
    assert splits.shapes["image"] == (*shape[1:-3], shape[-1], *shape[-3:-1])
    np.testing.assert_array_equal(splits.train.arrays["image"], first(array)[:12])
    turned = {
        4: "image was [N, H, W, C] and became [N, C, H, W]",
        5: "image was [N, T, H, W, C] and became [N, T, C, H, W]",
    }
    assert splits.description.endswith(f"; {turned[len(shape)]}")


@pytest.mark.parametrize("shape", KEPT)
def test_other_and_ambiguous_shapes_stay_as_they_are(tmp_path, shape):
    array = numbers(shape)
    splits = npz(tmp_path / "x.npz", array)
    np.testing.assert_array_equal(splits.train.arrays["image"], array[:12])
    assert "became" not in splits.description


def test_integers_of_pictures_are_turned(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 8, 6, 3)).astype(np.uint8)
    splits = npz(tmp_path / "x.npz", array)
    np.testing.assert_array_equal(splits.train.arrays["image"], first(array)[:12].astype(np.float32))


def test_statistics_are_of_the_channels(tmp_path):
    array = numbers((20, 8, 6, 3)) * [1, 10, 100] + [0, 5, 50]
    np.savez(tmp_path / "x.npz", label=np.arange(20) % 2, image=array)
    splits = load(tmp_path / "x.npz")
    assert splits.scaling is not None
    assert [1 / scale for scale in splits.scaling["image"][1]] == pytest.approx([1, 10, 100], rel=0.2)


@pytest.mark.parametrize(("shape", "turned"), [((8, 6, 3), (3, 8, 6)), ((2, 8, 6, 1), (2, 1, 8, 6))])
def test_arrays_of_a_folder_are_turned_and_it_is_said(tmp_path, shape, turned):
    for i in range(20):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        np.save(folder / f"s{i}.image.npy", np.full(shape, i))
        np.save(folder / f"s{i}.npy", np.ones((3, 8, 6)))
    splits = load(tmp_path)
    assert splits.shapes == {"array": (3, 8, 6), "image": turned}
    assert re.search(r"; image was \[N, .*H, W, C\] and became \[N, .*C, H, W\]$", splits.description)


def test_arrays_in_python_are_taken_as_they_are_with_a_warning():
    array = torch.from_numpy(numbers((20, 8, 6, 3)))
    labels = np.arange(20) % 2
    text = (
        "image should have its channels before height and width, got shape [20, 8, 6, 3], which looks like "
        "channels last; if it is, give numpy.transpose(image, (0, 3, 1, 2)) or image.permute(0, 3, 1, 2)"
    )
    with pytest.warns(UserWarning, match=re.escape(text)) as caught:
        data = ArrayDataset({"image": array}, labels)
    assert caught[0].filename == __file__
    assert len(caught) == 1
    assert torch.equal(data.arrays["image"], array)
    # What it advises is what ends it, and parts are not looked at again.
    mended = ArrayDataset({"image": array.permute(0, 3, 1, 2)}, labels)
    mended = ArrayDataset({"image": np.transpose(array.numpy(), (0, 3, 1, 2))}, labels)
    assert mended.shapes == {"image": (3, 8, 6)}
    assert data.subset([1, 2]).shapes == {"image": (8, 6, 3)}
    with pytest.warns(UserWarning, match=re.escape("video.permute(0, 1, 4, 2, 3)")):
        Splits.from_arrays({"video": numbers((20, 2, 8, 6, 3))}, labels, split=given(20))


@pytest.mark.parametrize("shape", KEPT)
def test_other_shapes_in_python_are_not_warned_of(shape):
    assert not is_channels_last(shape)
    ArrayDataset({"x": numbers(shape)}, np.arange(20) % 2)

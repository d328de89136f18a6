"""Data that are large: read in blocks, held once, and none the different for it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast import data
from mmfast.data import ArrayDataset, Splits, features, load_npz, members
from mmfast.data.splits import PARTS
from mmfast.experiments import setup as setups
from mmfast.experiments.setup import Setup, fingerprint

N = 90
SHAPES = {"vector": (7,), "sequence": (4, 5), "image": (3, 8, 6), "video": (2, 3, 8, 6), "last": (8, 6, 3)}
FILM = (2, 8, 6, 3)


@pytest.fixture(params=[1, 300, 2**22], ids=["sample", "block", "whole"])
def block(request, monkeypatch):
    """Read one sample, a few, or all at a time."""
    monkeypatch.setattr(features, "BLOCK", request.param)
    monkeypatch.setattr(members, "_COLUMNS", request.param)


def numbers(shape: tuple[int, ...], dtype: object = np.float32) -> np.ndarray:
    values = np.random.default_rng(len(shape)).normal(3, 20, (N, *shape))
    return np.abs(values).astype(dtype) if np.dtype(dtype).kind == "u" else values.astype(dtype)


def split(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(PARTS, [50, 20, 20]))


def expected(array: np.ndarray, part: str, mask: np.ndarray | None = None) -> torch.Tensor:
    """Return the features of a part, computed at once."""
    whole = array.astype(np.float32)
    if mask is not None:
        whole[~mask] = 0
    return torch.from_numpy(whole[split() == part])


# What is read


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_in_blocks_is_the_file(tmp_path, block, save, order):
    arrays = {name: np.asarray(numbers(shape), order=order) for name, shape in SHAPES.items()}
    arrays["film"] = np.asarray(numbers(FILM, np.float64), order=order)
    save(tmp_path / "data.npz", label=np.arange(N) % 3, split=split(), **arrays)
    splits = load_npz(tmp_path / "data.npz", standardize=False)
    turned = arrays | {
        "last": np.transpose(arrays["last"], (0, 3, 1, 2)),
        "film": np.transpose(arrays["film"], (0, 1, 4, 2, 3)),
    }
    assert splits.modalities == tuple(arrays)
    for part in PARTS:
        found = getattr(splits, part)
        assert found.labels.tolist() == (np.arange(N) % 3)[split() == part].tolist()
        for name, array in turned.items():
            assert torch.equal(found.arrays[name], expected(array, part)), (part, name)
            assert found.arrays[name].is_contiguous()


@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "<f8", ">f8", "g", "u1", "<i2", ">i8", "?"])
def test_every_dtype_of_a_file_and_in_memory(tmp_path, block, dtype):
    array = numbers((7,), dtype)
    np.savez(tmp_path / "data.npz", label=np.arange(N) % 3, split=split(), a=array)
    read = load_npz(tmp_path / "data.npz", standardize=False)
    array.setflags(write=False)
    held = Splits.from_arrays({"a": array}, np.arange(N) % 3, split=split(), standardize=False)
    for part in PARTS:
        for splits in (read, held):
            assert torch.equal(getattr(splits, part).arrays["a"], expected(array, part))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_every_dtype_of_tensors(block, dtype):
    array = torch.from_numpy(numbers((4, 5))).to(dtype)
    splits = Splits.from_arrays({"a": array}, np.arange(N) % 3, split=split(), standardize=False)
    for part in PARTS:
        assert torch.equal(getattr(splits, part).arrays["a"], expected(array.float().numpy(), part))


def test_absent_samples_and_strided_arrays(block):
    mask = np.arange(N) % 4 != 0
    array = np.repeat(numbers((6,), np.float64), 2, axis=1)[::-1, ::2]
    array[~mask] = np.nan
    before = array.copy()
    labels = np.arange(N) % 3
    splits = Splits.from_arrays({"a": array}, labels, split=split(), present={"a": mask}, standardize=False)
    whole = ArrayDataset({"a": array}, labels, present={"a": mask})
    for part in PARTS:
        assert torch.equal(getattr(splits, part).arrays["a"], expected(array, part, mask))
        assert torch.equal(whole.arrays["a"][split() == part], expected(array, part, mask))
    np.testing.assert_array_equal(array, before)


def test_scaled_in_place_or_not_is_the_same_and_leaves_what_was_given(block):
    arrays = {name: numbers(shape) for name, shape in SHAPES.items()}
    arrays["vector"][:, 2] = 5
    del arrays["last"]
    mask = np.arange(N) % 5 > 0
    before = {name: array.copy() for name, array in arrays.items()}
    options = {"split": split(), "present": {"image": mask}}
    raw = Splits.from_arrays(arrays, np.arange(N) % 3, **options, standardize=False)
    copied = {part: dict(getattr(raw, part).arrays) for part in PARTS}
    kept = {part: {name: array.clone() for name, array in copied[part].items()} for part in PARTS}
    there = Splits.from_arrays(arrays, np.arange(N) % 3, **options)
    apart = raw.standardize()
    assert apart.scaling == there.scaling
    for part in PARTS:
        for name, array in kept[part].items():
            assert torch.equal(copied[part][name], array), "the splits that were scaled have changed"
            axis = {2: 1, 3: 2, 4: 1, 5: 2}[array.ndim]
            shape = [-1 if i == axis else 1 for i in range(array.ndim)]
            mean, inverse = (torch.tensor(x).view(shape) for x in there.scaling[name])
            scaled = (array - mean) * inverse
            if name == "image":
                scaled[~getattr(raw, part).present["image"]] = 0
            for splits in (apart, there):
                assert torch.equal(getattr(splits, part).arrays[name], scaled)
    for name, array in before.items():
        np.testing.assert_array_equal(arrays[name], array)
    assert raw.standardize(in_place=True).train.arrays["vector"] is copied["train"]["vector"]


def test_the_file_may_be_overwritten_afterwards(tmp_path):
    path = tmp_path / "data.npz"
    array = numbers((7,))
    np.savez(path, label=np.arange(N) % 3, split=split(), a=array)
    splits = load_npz(path, standardize=False)
    path.write_bytes(b"")
    assert torch.equal(splits.train.arrays["a"], expected(array, "train"))


# What is refused


def write(path: Path, changes: dict[str, bytes], save=np.savez) -> Path:
    """Write a file, with bytes of its members replaced by others; their checksums stay as they were."""
    arrays = {"a": numbers((7,)), "b": numbers((4, 5))}
    save(path, label=np.arange(N) % 3, split=split(), **arrays)
    content = path.read_bytes()
    for old, new in changes.items():
        key = old.encode("latin-1") if isinstance(old, str) else old
        assert content.count(key) == 1
        content = content.replace(key, new)
    path.write_bytes(content)
    return path


def reason(path: Path) -> str:
    """Return what numpy says to the first array that it cannot read, reading it whole."""
    with np.load(path) as archive:
        for key in archive.files:
            try:
                archive[key]
            except Exception as error:
                return f"{path}: array {key!r} is damaged: {error}"
    raise AssertionError("nothing is damaged")


INSIDE = numbers((4, 5)).tobytes()[100:108]


@pytest.mark.parametrize("modalities", [None, ["a"]], ids=["all", "others"])
@pytest.mark.parametrize(
    "changes",
    [
        {INSIDE: bytes(8)},
        {b"(90, 4, 5)": b"(91, 4, 5)"},
        {b"(90, 4, 5)": b"(80, 4, 5)"},
        {b"(90, 4, 5)": b"(99, 9, 9)"},
        {b"(90, 4, 5)": b"(90, 4  5)"},
        {b"(90, 4, 5)": b"(90, 7, 5)"},
        # Of two that are damaged the first in the file, also where the second has the rarer fault.
        {INSIDE: bytes(8), numbers((7,)).tobytes()[:4]: np.float32(np.nan).tobytes()},
    ],
    ids=["numbers", "longer", "shorter", "much longer", "header", "wider", "two"],
)
def test_damage_is_told_in_the_words_of_before(tmp_path, block, changes, modalities):
    path = write(tmp_path / "data.npz", changes)
    with pytest.raises(ValueError, match=re.escape(reason(path))):
        data.load(path, modalities=modalities)


def test_damage_of_a_compressed_file(tmp_path, block):
    path = write(tmp_path / "data.npz", {}, np.savez_compressed)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("b.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 400] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason(path))):
        data.load(path)


@pytest.mark.parametrize("size", [N, 40_000])
def test_an_array_that_ends_too_early(tmp_path, size):
    path, short = tmp_path / "data.npz", tmp_path / "short.npz"
    np.savez(path, label=np.arange(size) % 3, b=np.zeros((size, 4, 5), np.float32))
    with zipfile.ZipFile(short, "w") as archive, zipfile.ZipFile(path) as whole:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name)[: -5 if name == "b.npy" else None])
    with pytest.raises(ValueError, match="array 'b' is damaged: EOF: reading array data") as caught:
        data.load(short)
    assert str(caught.value) == reason(short)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_that_are_not_finite_are_counted_in_all_parts(block, dtype):
    array = numbers((7,), dtype)
    array[[3, 3, 50], [1, 2, 0]] = np.nan, np.inf, 1e300 if dtype == np.float64 else -np.inf
    text = f"a must be finite in float32, got 3 NaN or infinite of {7 * N} values"
    for make in (ArrayDataset, lambda *given: Splits.from_arrays(*given, split=split())):
        with pytest.raises(ValueError, match=re.escape(text)):
            make({"a": array}, np.arange(N) % 3)


def test_large_numbers_whose_sum_is_infinite_are_taken():
    largest = np.full((N, 7), np.finfo(np.float32).max)
    assert ArrayDataset({"a": largest}, np.arange(N) % 3).arrays["a"].max() == largest[0, 0]


def test_a_warning_names_the_line_of_the_caller():
    for make in (ArrayDataset, lambda *given: Splits.from_arrays(*given, split=split())):
        with pytest.warns(UserWarning, match="channels before height and width") as caught:
            make({"a": numbers((8, 6, 3))}, np.arange(N) % 3)
        assert caught[0].filename == __file__


# What is told of them


def test_the_digest_is_that_of_all_bytes(block):
    mask = np.arange(N) % 4 != 0
    arrays = {"a": numbers((7,)), "b": numbers((3, 8, 6))}
    splits = Splits.from_arrays(arrays, np.arange(N) % 3, split=split(), present={"b": mask})
    splits.val.arrays["b"] = splits.val.arrays["b"].transpose(2, 3).contiguous().transpose(2, 3)
    plain = hashlib.sha256()
    for part in (splits.train, splits.val, splits.test):
        for name, tensor in {"label": part.labels, **part.arrays, "b present": part.present["b"]}.items():
            plain.update(f"{name}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert fingerprint(splits) == plain.hexdigest()[:16]


def test_the_digest_is_taken_once(monkeypatch):
    taken = []
    monkeypatch.setattr(setups, "fingerprint", lambda splits: taken.append(splits) or "digest")
    setup = Setup("synthetic", data.synthetic(60, 3))
    assert [setup.metadata()["data"] for _ in range(3)] == ["digest"] * 3
    assert len(taken) == 1


# What they take

_LOAD = """
import re, sys
from mmfast import data

def resident(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

data.load(sys.argv[1])
before = resident("VmRSS")
splits = data.load(sys.argv[2])
print(resident("VmHWM") - before, len(splits.train))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_loading_takes_half_as_much_again_as_the_data_at_most(tmp_path, dtype):
    size = 125_000
    for name, count in (("few", 20_000), ("many", size)):
        rng = np.random.default_rng(0)
        arrays = {m: rng.standard_normal((count, 64), dtype=np.float32).astype(dtype) for m in "ab"}
        np.savez(tmp_path / f"{name}.npz", label=np.arange(count) % 10, **arrays)
    words = [sys.executable, "-c", _LOAD, str(tmp_path / "few.npz"), str(tmp_path / "many.npz")]
    # What the first file took goes back at once: the second would take less than its size in what was kept.
    thresholds = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | thresholds)
    assert done.returncode == 0, done.stderr
    taken, trained = (float(word) for word in done.stdout.split())
    assert trained == 87_500
    megabytes = 2 * size * 64 * 4 / 2**20
    assert megabytes < taken < 1.5 * megabytes

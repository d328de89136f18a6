"""Synthetic data, raw media folders, and the example converters on real data."""

import os
import re
import runpy
import wave
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmfast.data import Splits, load, load_folder, synthetic
from mmfast.data.sound import log_mel, mel_filters, read_sound

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("MMFAST_TEST_DATA", ROOT.parent / "shared" / "data"))


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(text))


def flat(splits: Splits, part: str, modalities) -> np.ndarray:  # [N, D]
    data = getattr(splits, part)
    return np.concatenate([data.arrays[name].flatten(1).numpy() for name in modalities], axis=1)


def linear_accuracy(splits: Splits, *modalities: str, parts=("test",)) -> float:
    model = LogisticRegression(max_iter=300)
    model.fit(flat(splits, "train", modalities), splits.train.labels.numpy())
    hits = [
        model.predict(flat(splits, part, modalities)) == getattr(splits, part).labels.numpy()
        for part in parts
    ]
    return float(np.concatenate(hits).mean())


# Synthetic


@pytest.mark.parametrize(
    ("dims", "unique", "shared", "num_classes"),
    [
        ({"a": 16, "b": 16}, {"a": 0.5, "b": 0.1}, 0.2, 4),
        ({"a": 16, "b": (4, 8), "c": (1, 6, 6)}, {"a": 0.1, "c": 0.3}, 0.4, 5),
        ({"a": 16}, {"a": 0.6}, 0.2, 2),
    ],
    ids=["two", "three", "one"],
)
def test_synthetic_gives_the_accuracies_and_shapley_values_it_promises(dims, unique, shared, num_classes):
    splits = synthetic(6000, num_classes, dims=dims, unique=unique, shared=shared, noise=0.3, seed=1)
    names = list(dims)

    def designed(coalition) -> float:
        told = (shared if coalition else 0) + sum(unique.get(name, 0) for name in coalition)
        return told + (1 - told) / num_classes

    held = ("val", "test")
    for name in names:
        assert linear_accuracy(splits, name, parts=held) == pytest.approx(designed([name]), abs=0.035)
    assert linear_accuracy(splits, *names, parts=held) == pytest.approx(designed(names), abs=0.035)

    def value(coalition) -> float:
        return linear_accuracy(splits, *coalition, parts=held) if coalition else 1 / num_classes

    orders = list(permutations(names))
    for name in names:
        gains = [
            value(order[: order.index(name) + 1]) - value(order[: order.index(name)]) for order in orders
        ]
        promised = (1 - 1 / num_classes) * (unique.get(name, 0) + shared / len(names))
        assert np.mean(gains) == pytest.approx(promised, abs=0.035)


def test_synthetic_is_balanced_shaped_and_follows_the_seed():
    splits = synthetic(400, 4, dims={"a": 8, "b": [3, 4]}, seed=3)
    assert splits.shapes == {"a": (8,), "b": (3, 4)}
    assert splits.train.labels.bincount().tolist() == [70] * 4
    assert (len(splits.val), len(splits.test), splits.split_seed) == (60, 60, None)
    again, other = (synthetic(400, 4, dims={"a": 8, "b": [3, 4]}, seed=seed) for seed in (3, 4))
    assert torch.equal(splits.train.arrays["b"], again.train.arrays["b"])
    assert not torch.equal(splits.train.arrays["b"], other.train.arrays["b"])


def test_synthetic_noise_is_per_modality():
    splits = synthetic(2000, 2, dims={"a": 4, "b": 4}, unique={}, shared=0, noise={"a": 0.1, "b": 3})
    assert splits.train.arrays["a"].std().item() == pytest.approx(0.1, rel=0.05)
    assert splits.train.arrays["b"].std().item() == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shared": 0.9}, "shared and unique must not be negative and sum to at most 1, got [0.9, 0.2, 0.2]"),
        ({"shared": -0.1}, "got [-0.1, 0.2, 0.2]"),
        ({"dims": {"a": 3, "b": 16}}, "dims['a'] must hold at least C = 4 features, got [3]"),
        ({"dims": {}}, "dims must name at least one modality, got none"),
        ({"unique": {"c": 0.1}}, "unique must name modalities among a, b, got c"),
        ({"noise": {"a": 0.1}}, "noise must give every modality a value, got none for b"),
        ({"noise": -1}, "noise must not be negative, got -1 for a"),
        ({"num_samples": 20}, "num_samples must be at least 7 C = 28, got 20"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_synthetic(options, text):
    with raises(text):
        synthetic(**options)


# Folders


def write_wav(path: Path, samples: np.ndarray, *, rate: int = 8000, width: int = 2) -> None:
    pytest.importorskip("soundfile")
    scaled = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i4")
    if width == 1:
        content = (scaled + 128).astype(np.uint8).tobytes()
    else:
        content = np.ascontiguousarray(scaled[..., None].view(np.uint8)[..., :width]).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)


def write_picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, colour).save(path)


def tone(hertz: float, seconds: float = 0.2, rate: int = 8000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def fill(folder: Path, count: int = 10, classes=("dog", "cat")) -> Path:
    for label in classes:
        for i in range(count):
            write_wav(folder / label / f"clip{i}.wav", tone(500 if label == "dog" else 2000))
            write_picture(folder / label / f"clip{i}.png", (255, 0, 0) if label == "dog" else (0, 0, 255))
    return folder


def test_folder_of_classes(tmp_path):
    (fill(tmp_path) / "dog" / ".hidden.wav").write_bytes(b"")
    (tmp_path / "dog" / "notes.txt").write_text("passed over")
    splits = load(tmp_path, seed=2)
    assert splits.class_names == ("cat", "dog")
    assert splits.shapes == {"audio": (1, 64, 17), "image": (3, 64, 64)}
    assert (len(splits.train), len(splits.val), len(splits.test), splits.split_seed) == (14, 3, 3, 2)
    assert splits.train.present == {}
    raw = load_folder(tmp_path, mels=16, seconds=0.1, size=8, standardize=False)
    assert raw.shapes == {"audio": (1, 16, 7), "image": (3, 8, 8)}
    sample = raw.train[raw.train.labels.tolist().index(1)]
    assert sample["image"][:, 0, 0].tolist() == [1, 0, 0]


def test_folder_of_splits_with_video_arrays_and_missing_files(tmp_path):
    for part, count in (("train", 6), ("test", 2)):
        for label in ("a", "b"):
            for i in range(count):
                folder = tmp_path / part / label
                for frame in range(5):
                    write_picture(folder / f"x{i}_{frame:03d}.jpg", (frame * 50, 0, 0))
                np.save(folder / f"x{i}.pose.npy", np.full((4, 2), i))
                if i != 1:
                    write_wav(folder / f"x{i}.wav", tone(500, 0.1 if part == "train" else 0.3))
    splits = load_folder(tmp_path, size=4, frames=3, standardize=False, seed=1)
    assert splits.modalities == ("audio", "pose", "video")
    # The length comes from training recordings: 0.1 s.
    assert splits.shapes == {"audio": (1, 64, 7), "pose": (4, 2), "video": (3, 3, 4, 4)}
    assert (len(splits.train), len(splits.val), len(splits.test)) == (10, 2, 4)
    assert "val is 15% of the given train" in splits.description
    assert splits.test.present["audio"].tolist() == [True, False] * 2
    assert (splits.test.arrays["audio"][~splits.test.present["audio"]] == 0).all()
    red = splits.test.arrays["video"][0, :, 0, 0, 0]
    assert (red * 255).tolist() == pytest.approx([0, 100, 200], abs=4)


def test_numbered_pictures_beside_recordings_are_images(tmp_path):
    for i in range(20):
        write_wav(tmp_path / "ab"[i % 2] / f"cat_{i:03d}.wav", tone(500))
        write_picture(tmp_path / "ab"[i % 2] / f"cat_{i:03d}.png", (i, i, i))
    assert load_folder(tmp_path, size=4).shapes == {"audio": (1, 64, 17), "image": (3, 4, 4)}


def test_named_arrays_may_stand_for_audio_or_images(tmp_path):
    for i in range(20):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        np.save(folder / f"s{i}.audio.npy", np.ones(5))
        np.save(folder / f"s{i}.npy", np.ones((2, 3)))
    assert load_folder(tmp_path).shapes == {"array": (2, 3), "audio": (5,)}


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (
            lambda d: write_wav(d / "dog/clip0.wav", tone(9), rate=16000),
            "clip0.wav: has 16000 samples a second, most recordings have",
        ),
        (lambda d: (d / "dog/clip1.wav").write_bytes(b"RIFF"), "clip1.wav: not a readable recording"),
        (lambda d: (d / "dog/clip1.png").write_bytes(b"\x89PNG"), "clip1.png: not a readable picture"),
        (
            lambda d: write_picture(d / "dog/clip1.jpg", (0, 0, 0)),
            "second image file of sample 'clip1', beside",
        ),
        (
            lambda d: (d / "dog/clip1.npy").write_bytes(b"\x93NUM"),
            "clip1.npy: not a readable .npy file of numbers",
        ),
        (
            lambda d: np.save(d / "dog/clip1.npy", np.array(["x"])),
            "clip1.npy: must hold real numbers, got <U1",
        ),
        (
            lambda d: [np.save(d / f"dog/clip{i}.npy", np.ones(i + 1)) for i in range(2)],
            "clip1.npy: must have the shape of",
        ),
        (lambda d: np.save(d / "dog/clip1.npy", np.array([None])), "Object arrays cannot be loaded"),
        (lambda d: np.save(d / "dog/clip1.npy", np.float32(1)), "array must have shape [N, D]"),
        (lambda d: (d / "train").mkdir(), "holds train, so every folder must be a split, got cat, dog"),
    ],
)
def test_bad_files_are_named(tmp_path, spoil, text):
    spoil(fill(tmp_path, 4))
    with raises(text):
        load(tmp_path)


def test_folder_without_usable_files(tmp_path):
    with raises("no usable file; expected <class>/<stem>.<ext>"):
        load(tmp_path)
    write_wav(tmp_path / "train" / "clip.wav", tone(500))
    with raises("no usable file"):
        load(tmp_path)
    fill(tmp_path / "val")
    with raises("split must hold train and test samples, got none of train and test"):
        load(tmp_path)
    with raises("mels must be positive, got 0"):
        load_folder(tmp_path, mels=0)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ((), "got no file"),
        (("notes.txt", ".hidden"), "got 1 .txt"),
        (("x.npz", "cat/y.npz"), "got 2 .npz: give the .npz itself, {path}/cat/y.npz"),
        (
            ("x.csv", "y.csv"),
            "got 2 .csv: give the table itself, {path}/x.csv, to be told how to make",
        ),
        (("cat/x.csv", "dog/x.tsv"), "got 1 .csv, 1 .tsv: make a .npy of the table of each sample"),
        (
            ("train/x.wav", "x.npz"),
            "give the .npz itself, {path}/x.npz; or put recordings, pictures",
        ),
    ],
)
def test_a_folder_of_other_files_says_what_to_do_with_them(tmp_path, files, text):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with raises(text.format(path=tmp_path)) as caught:
        load(tmp_path)
    assert f"{tmp_path}: no usable file; expected <class>/<stem>.<ext>" in str(caught.value)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_every_width_reads_alike(tmp_path, width, channels):
    samples = tone(440)
    stereo = samples if channels == 1 else np.stack([samples + 0.1, samples - 0.1], axis=1)
    write_wav(tmp_path / "a.wav", stereo, width=width)
    np.testing.assert_allclose(
        read_sound(tmp_path / "a.wav"), samples, atol=2 * 2.0 ** (1 - 8 * width) + 1e-6
    )


@pytest.mark.parametrize(("mels", "rate"), [(64, 16000), (32, 8000), (128, 8000)])
def test_log_mel_peaks_at_the_tone_and_every_band_hears(mels, rate):
    num_fft = 512 if rate == 16000 else 256
    filters = mel_filters(mels, num_fft, rate)
    assert filters.shape == (mels, num_fft // 2 + 1)
    assert (filters.sum(1) > 0).all()
    spectrogram = log_mel(torch.from_numpy(tone(1000, 1, rate)).float(), rate, num_samples=rate, mels=mels)
    assert spectrogram.shape[:2] == (1, mels)
    band = spectrogram[0].mean(1).argmax()
    heard = filters[band].argmax().item() * rate / num_fft
    assert heard == pytest.approx(1000, abs=rate / num_fft * 1.5)
    silence = log_mel(torch.zeros(10), rate, num_samples=rate, mels=mels)
    assert torch.isfinite(silence).all()
    assert silence.shape == spectrogram.shape


# Real data through the examples


@pytest.fixture
def convert(tmp_path):
    def run(name: str, **options) -> Splits:
        if not (REAL_DATA / name).is_dir():
            pytest.skip(f"needs the data set {name} in {REAL_DATA} (environment variable MMFAST_TEST_DATA)")
        out = tmp_path / f"{name}.npz"
        runpy.run_path(str(ROOT / "examples" / f"make_{name}.py"))["main"](REAL_DATA / name, str(out))
        return load(out, **options)

    return run


def test_htad_linear_models():
    pytest.importorskip("multiviewstacking")
    splits = load()
    audio, accelerometer = linear_accuracy(splits, "audio"), linear_accuracy(splits, "accelerometer")
    both = linear_accuracy(splits, "audio", "accelerometer")
    assert both > max(audio, accelerometer) > 0.5
    assert min(audio, accelerometer) > 2 / 7


def test_wikipedia_text_beats_both(convert):
    splits = convert("wikipedia")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1847, 326, 693)
    assert splits.class_names[0] == "art"
    text, both = linear_accuracy(splits, "text"), linear_accuracy(splits, "image", "text")
    assert text == pytest.approx(0.672, abs=0.015)
    assert linear_accuracy(splits, "image") == pytest.approx(0.261, abs=0.03)
    assert both < text


def test_handwritten(convert):
    splits = convert("handwritten")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1360, 240, 400)
    assert len(splits.modalities) == 6
    assert splits.test.labels.bincount().tolist() == [40] * 10
    assert linear_accuracy(splits, "pixels") > 0.97
    assert linear_accuracy(splits, "morphology") == pytest.approx(0.70, abs=0.04)


def test_protein_fold(convert):
    splits = convert("protein_fold", seed=4)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (486, 104, 104)
    assert len(splits.modalities) == 12
    assert splits.split_seed == 4
    assert linear_accuracy(splits, *splits.modalities) > 0.4


@pytest.mark.slow
def test_fsdd_mnist(convert):
    splits = convert("fsdd_mnist")
    assert splits.shapes == {"audio": (1, 32, 48), "image": (1, 28, 28)}
    assert (len(splits.train), len(splits.val), len(splits.test)) == (2000, 500, 500)
    # One speaker, who says every digit 50 times.
    assert splits.val.labels.bincount().tolist() == [50] * 10
    train = {image.tobytes() for image in splits.train.arrays["image"].numpy()}
    assert not any(image.tobytes() in train for image in splits.test.arrays["image"].numpy())
    assert linear_accuracy(splits, "image") == pytest.approx(0.88, abs=0.04)
    assert linear_accuracy(splits, "audio") > 0.4

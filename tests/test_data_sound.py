"""Recordings of every encoding, with broken headers and with none, and what is said of those that fail."""

from __future__ import annotations

import re
import struct
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("soundfile")

import soundfile

from mmfast.data import load_folder
from mmfast.data.sound import log_mel, read_sound, sound_header

RATE = 8000
UNKNOWN = 0xFFFFFFFF
TONE = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 5) / RATE)
PCM = np.round(TONE * 32767).astype("<i2")
# What ffmpeg writes before the data.
LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"


def riff(content: bytes, *, data_bytes: int, riff_bytes: int | None = None, before: bytes = b"") -> bytes:
    """Return a mono 16-bit WAV file whose header claims `data_bytes` and `riff_bytes`."""
    chunks = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16) + before
    riff_bytes = 12 + len(chunks) + len(content) if riff_bytes is None else riff_bytes
    data = b"data" + struct.pack("<I", data_bytes) + content
    return b"RIFF" + struct.pack("<I", riff_bytes) + b"WAVE" + chunks + data


def raises(text: str, kind: type[Exception] = ValueError):
    return pytest.raises(kind, match=re.escape(text))


def fill(folder: Path, extension: str = "wav", count: int = 8, **options) -> Path:
    for i in range(count):
        path = folder / "ab"[i % 2] / f"clip{i}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, TONE, RATE, **options)
    return folder


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_16_bit_pcm_reads_bit_for_bit_as_by_the_wave_module(tmp_path, channels):
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**15), 2**15, (500, channels)).astype("<i2")
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(values.tobytes())
    expected = torch.from_numpy(values.astype(np.float32) / 2**15).mean(1)
    assert torch.equal(read_sound(path), expected)
    assert torch.equal(read_sound(path, stop=100), expected[:100])
    assert sound_header(path) == (RATE, 500)


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 2**-7),
        ("WAV", "PCM_24", 2**-22),
        ("WAV", "PCM_32", 2**-23),
        ("WAV", "FLOAT", 2**-23),
        ("WAV", "DOUBLE", 2**-23),
        # Sixteen logarithmic steps an octave, A-law's near 0 as coarse.
        ("WAV", "ULAW", 2**-6),
        ("WAV", "ALAW", 2**-6),
        ("WAVEX", "PCM_16", 2**-14),
        ("WAVEX", "PCM_24", 2**-22),
        ("WAVEX", "FLOAT", 2**-23),
        ("FLAC", "PCM_16", 2**-14),
        ("FLAC", "PCM_24", 2**-22),
        ("OGG", "VORBIS", 0.02),
    ],
)
def test_every_encoding_reads_alike(tmp_path, format, subtype, tolerance):
    path = tmp_path / ("a." + {"WAVEX": "wav"}.get(format, format.lower()))
    stereo = np.stack([TONE + 0.1, TONE - 0.1], axis=1)
    soundfile.write(path, stereo, RATE, format=format, subtype=subtype)
    assert soundfile.info(path).format == format
    assert sound_header(path) == (RATE, len(TONE))
    np.testing.assert_allclose(read_sound(path), TONE, atol=tolerance)


@pytest.mark.parametrize(
    ("extension", "options"),
    [("wav", {"format": "WAVEX", "subtype": "PCM_24"}), ("flac", {}), ("ogg", {}), ("FLAC", {})],
)
def test_folder_of_recordings_of_every_extension(tmp_path, extension, options):
    splits = load_folder(fill(tmp_path, extension, **options))
    assert splits.shapes == {"audio": (1, 64, 17)}


def test_one_sample_has_one_recording(tmp_path):
    fill(tmp_path)
    soundfile.write(tmp_path / "a" / "clip0.flac", TONE, RATE)
    with raises("clip0.wav: second audio file of sample 'clip0', beside clip0.flac"):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("data_bytes", "riff_bytes", "before"),
    [(UNKNOWN, UNKNOWN, LIST), (UNKNOWN, None, b""), (0x7FFFFFFF - 36, 0x7FFFFFFF, b"")],
    ids=["ffmpeg", "data", "2 GB"],
)
@pytest.mark.parametrize("odd", [0, 1])
def test_a_header_written_to_a_pipe_is_read_to_the_real_end(tmp_path, data_bytes, riff_bytes, before, odd):
    content = PCM.tobytes()[: -odd or None]
    file = riff(content, data_bytes=data_bytes, riff_bytes=riff_bytes, before=before)
    (tmp_path / "a.wav").write_bytes(file)
    assert sound_header(tmp_path / "a.wav") == (RATE, len(PCM) - odd)
    whole = PCM[: len(PCM) - odd].astype(np.float32) / 2**15
    assert torch.equal(read_sound(tmp_path / "a.wav"), torch.from_numpy(whole))
    folder = fill(tmp_path / "data")
    (folder / "a" / "clip0.wav").write_bytes(file)
    splits = load_folder(folder, standardize=False)
    # 0.2 s like the others, not 10 s of which most is silence.
    assert splits.shapes == {"audio": (1, 64, 17)}


def test_a_truncated_recording_is_padded_with_silence(tmp_path):
    folder = fill(tmp_path)
    (folder / "a" / "clip0.wav").write_bytes(riff(PCM.tobytes()[:1000], data_bytes=2 * len(PCM)))
    assert sound_header(folder / "a" / "clip0.wav") == (RATE, 500)
    assert load_folder(folder).shapes == {"audio": (1, 64, 17)}


def flac_of_unknown_length(path: Path) -> bytes:
    soundfile.write(path, TONE, RATE)
    content = bytearray(path.read_bytes())
    # 36 bits for the number of samples, in the last half byte of 21 and 22 to 25.
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return bytes(content)


def damaged_flac(path: Path) -> bytes:
    soundfile.write(path, TONE, RATE)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    return bytes(content)


def float_wav(path: Path, value: float) -> bytes:
    soundfile.write(path, np.where(np.arange(len(TONE)) == 5, value, TONE), RATE, subtype="FLOAT")
    return path.read_bytes()


def slow(path: Path) -> bytes:
    soundfile.write(path, TONE, 20)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("x.wav", lambda p: b"", "empty (0 bytes); copy or download it again"),
        ("x.wav", lambda p: riff(b"", data_bytes=0), "holds no samples; record or copy it again"),
        ("x.wav", lambda p: riff(b"", data_bytes=UNKNOWN), "holds no samples; record or copy it again"),
        (
            "x.wav",
            lambda p: b"version https://git-lfs.example/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer in place of the recording; fetch the file with git lfs pull",
        ),
        (
            "x.wav",
            lambda p: b"/annex/objects/SHA256E-s5--4d7a.wav\n",
            "a git-annex pointer in place of the recording; fetch the file with git annex get",
        ),
        (
            "x.ogg",
            lambda p: "<html>\n  <b>Größe</b> not found".encode(),
            "text, not a recording, beginning with '<html> <b>Größe</b> not found'; copy or download it",
        ),
        (
            "x.wav",
            lambda p: bytes(range(256)) * 4,
            "not a readable recording: Format not recognised; copy it again or convert it to 16-bit WAV",
        ),
        ("x.wav", lambda p: riff(b"", data_bytes=0)[:36], "No 'data' chunk marker; copy it again"),
        ("x.flac", damaged_flac, "not a readable recording: flac decoder lost sync; copy it again"),
        ("x.flac", flac_of_unknown_length, "its header gives no length; encode it again, to a file"),
        ("x.wav", lambda p: float_wav(p, np.nan), "must be finite in float32, got 1 NaN or infinite samples"),
        ("x.wav", slow, "must have a sample rate of at least 100 Hz, got 20 Hz; correct its header"),
    ],
)
def test_a_recording_that_cannot_be_read_is_named_with_what_to_do(tmp_path, name, make, text):
    folder = fill(tmp_path)
    path = folder / "a" / name
    path.write_bytes(make(path))
    with raises(f"{path}: ") as caught:
        load_folder(folder)
    assert text in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


def test_a_link_to_nothing_is_named(tmp_path):
    folder = fill(tmp_path)
    (folder / "a" / "x.wav").symlink_to("../store/x.wav")
    with raises("x.wav: a link to ../store/x.wav, which does not exist; bring the file that it means"):
        load_folder(folder)


def test_sample_rates_that_differ_name_the_odd_file_even_if_it_comes_first(tmp_path):
    folder = fill(tmp_path)
    odd = folder / "a" / "clip0.wav"
    soundfile.write(odd, TONE, 2 * RATE)
    reason = f"has {2 * RATE} samples a second, most recordings have {RATE}; resample it"
    with raises(f"{odd}: {reason}"):
        load_folder(folder)
    # With what else cannot be read, and left out as that is.
    (folder / "b" / "clip1.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of [0-9]+ files cannot be read") as found:
        load_folder(folder)
    assert reason in str(found.value)
    assert "empty (0 bytes)" in str(found.value)
    splits = load_folder(folder, skip_unreadable=True)
    assert "2 unreadable files left out" in splits.description


def test_files_of_other_kinds_are_counted(tmp_path):
    folder = fill(tmp_path)
    assert "passed over" not in load_folder(folder).description
    for name in ("x.mp3", "y.mp3", ".hidden", "Thumbs.db"):
        (folder / "a" / name).write_bytes(b"x")
    assert "files of other kinds passed over: 2 .mp3, 1 .db" in load_folder(folder).description


def test_reading_only_what_is_needed_changes_nothing(tmp_path):
    # The window is longer than 5 ms, and is still filled.
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        soundfile.write(tmp_path / "ab"[i % 2] / f"{i}.wav", 0.1 * rng.normal(size=4000), RATE)
    splits = load_folder(tmp_path, seconds=0.005, standardize=False, mels=8)
    found = [row for part in (splits.train, splits.val, splits.test) for row in part.arrays["audio"]]
    files = sorted(tmp_path.rglob("*.wav"))
    expected = [log_mel(read_sound(file), RATE, num_samples=40, mels=8) for file in files]
    assert sorted(x.sum().item() for x in found) == sorted(x.sum().item() for x in expected)


def test_soundfile_is_needed_for_sound_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(tmp_path / "ab"[i % 2] / f"{i}.npy", np.ones(3))
    assert load_folder(tmp_path).shapes == {"array": (3,)}
    (tmp_path / "a" / "0.wav").write_bytes(riff(PCM.tobytes(), data_bytes=2 * len(PCM)))
    with raises('reading sound needs soundfile: pip install "mmfast[train]"', ImportError):
        load_folder(tmp_path, skip_unreadable=True)

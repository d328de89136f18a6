"""A project from data to file: posts of text and a picture, three methods compared, the best one taken along.

python examples/own_project.py [FOLDER]
"""

import functools
import sys
from pathlib import Path

import torch
from torchmetrics.classification import MulticlassAUROC

import mmfast


class Posts(torch.utils.data.Dataset):
    """Token ids of any length and a picture; a class shows in either, and the first is the most frequent."""

    def __init__(self, size: int, seed: int):
        draw = torch.Generator().manual_seed(seed)
        self.labels = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(size // 6)
        lengths = torch.randint(3, 12, (size,), generator=draw).tolist()
        words = [torch.randint(9, 60, (n,), generator=draw) for n in lengths]
        self.ids = [torch.cat([w, y + torch.tensor([1, 4])]) for w, y in zip(words, self.labels)]
        self.images = torch.randn(size, 3, 12, 12, generator=draw)
        self.images[torch.arange(size), self.labels] += 0.25

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"text": self.ids[i], "image": self.images[i], "label": self.labels[i]}


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(60, 32)

    def forward(self, text):  # {"values": ids [N, T], "mask": bool [N, T]}
        mask = text["mask"][..., None]
        return (self.embed(text["values"]) * mask).sum(1) / mask.sum(1)


def make_model():
    encoders = {"text": Words(), "image": mmfast.models.SmallCNN(3, 32)}
    return mmfast.MultimodalModel(encoders, dim=32, num_classes=3)


def main(folder: Path):
    train, val, test = Posts(300, 0), Posts(60, 1), Posts(120, 2)
    pad = functools.partial(mmfast.data.pad, names=("text",))
    found = mmfast.compare(
        (train, val, test), ["joint", "mla", "di-mml"], model=make_model, seeds=1, max_epochs=6, lr=5e-3,
        out_dir=folder, overwrite=True, schedule="cosine", warmup_epochs=1, gradient_clip_val=1.0, patience=4,
        class_weights="balanced", metrics={"auroc": MulticlassAUROC(3)}, select="val/auroc", collate_fn=pad,
    )  # fmt: skip
    print(found)
    best = max(found.figures("auroc"), key=lambda method: found.figures("auroc")[method][0])
    learner = mmfast.load(folder / "runs" / f"{best}-seed0", model=make_model())
    predictions = learner.predict(test, collate_fn=pad)
    predictions.to_csv(folder / "predictions.csv")
    learner.export(folder / "model.onnx", pad([test[i] for i in range(4)]))
    return found, predictions


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "own_project"))

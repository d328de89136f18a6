"""Text as token ids of any length, through a small transformer, beside vectors: a data set of one's own.

python examples/train_text.py [--samples 1200] [--epochs 10] [--method joint] [--num-workers 0]

The data are made here: sentences, in which two words of the class stand among up to 24 others, beside
readings of 16 sensors. As in real data some samples show their class in one of the two alone, and some have
no text. `mmfast.data.pad` makes batches, in which the encoder gets ids [N, T] and a mask of what is a word.
"""

import argparse
import functools

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmfast

NUM_CLASSES, NUM_SENSORS, DIM = 4, 16, 32
NUM_WORDS, LONGEST, PADDING = 60, 24, 0  # of a word's id; the first after PADDING are the classes' own
WORDS_OF_A_CLASS = 3


class Reports(Dataset):
    """Samples {"text": ids [t], "sensors": [16], "label": int, "text__present": bool, "author": str}."""

    def __init__(self, num_samples: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(num_samples) % NUM_CLASSES
        # A third of the samples shows its class in both, one in the text, one in the sensors.
        where = torch.randint(3, (num_samples,), generator=rng)
        centres = torch.eye(NUM_CLASSES, NUM_SENSORS) * 3
        noise = torch.randn(num_samples, NUM_SENSORS, generator=rng)
        self.sensors = noise + centres[self.labels] * (where != 1)[:, None]
        self.has_text = (torch.rand(num_samples, generator=rng) > 0.1) | (where == 1)
        self.texts = [
            _sentence(int(label) if place != 2 else None, rng)
            for label, place in zip(self.labels, where.tolist())
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {
            "text": self.texts[index] if self.has_text[index] else None,
            "text__present": self.has_text[index],
            "sensors": self.sensors[index],
            "label": self.labels[index],
            "author": f"person {index % 7}",  # what is no modality goes along, and harms nothing
        }


def _sentence(label: int | None, rng: torch.Generator) -> Tensor:  # [t] int64
    own = 1 + NUM_CLASSES * WORDS_OF_A_CLASS
    length = int(torch.randint(LONGEST + 1, (), generator=rng))
    words = torch.randint(own, NUM_WORDS, (length,), generator=rng)
    if label is not None:
        telling = 1 + label * WORDS_OF_A_CLASS + torch.randint(WORDS_OF_A_CLASS, (2,), generator=rng)
        words = torch.cat([words, telling])
    return words[torch.randperm(len(words), generator=rng)]


class TextEncoder(nn.Module):
    """A transformer of one layer, its outputs averaged over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, DIM, padding_idx=PADDING)
        self.places = nn.Embedding(LONGEST + 2, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(
        self,
        text: dict[str, Tensor],  # values: int64 [N, T], mask: bool [N, T]
    ) -> Tensor:  # [N, D]
        ids, mask = text["values"], text["mask"]
        seen = mask.clone()
        # A sentence without a word would leave attention nothing to look at: 0 / 0, in the gradient too.
        seen[:, 0] = True
        h = self.words(ids) + self.places.weight[: ids.shape[1]]
        h = self.layers(h, src_key_padding_mask=~seen)
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def main(samples: int, epochs: int, method: str, num_workers: int) -> tuple:
    # Lengths are rounded up, so that a GPU sees few shapes.
    collate = functools.partial(
        mmfast.data.pad, names=("text",), value=PADDING, multiple_of=8, max_length=LONGEST + 2
    )
    train, val, test = (
        Reports(size, seed) for seed, size in enumerate([samples, samples // 4, samples // 2])
    )
    torch.manual_seed(0)
    encoders = {"text": TextEncoder(), "sensors": mmfast.models.MLP(NUM_SENSORS, DIM)}
    model = mmfast.MultimodalModel(encoders, dim=DIM, num_classes=NUM_CLASSES)
    trainer = mmfast.Trainer(method, max_epochs=epochs, collate_fn=collate, num_workers=num_workers)
    trainer.fit(model, train, val)
    metrics = trainer.test(model, test)
    alone = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in metrics.modality_accuracy.items())
    print(f"accuracy {metrics.accuracy:.2f}; alone: {alone}")
    valuation = mmfast.valuate(trainer.learner, test, collate_fn=collate)
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in valuation.means.items())
    print(f"mean contribution: {means}; {int(test.has_text.sum())} of {len(test)} samples have text")
    return metrics, valuation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--method", default="joint")
    parser.add_argument("--num-workers", type=int, default=0)
    main(**vars(parser.parse_args()))

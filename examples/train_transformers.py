"""A method in the loop of transformers: a BERT over token ids and masks beside readings of sensors.

python examples/train_transformers.py [--method sample-valuation] [--epochs 10] [--samples 1200]

The data are those of train_text.py. The BERT is small and has random weights, so that nothing is downloaded:
put `BertModel.from_pretrained(...)` in its place, and let `collate` call its tokenizer.
"""

import argparse
import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from train_text import DIM, LONGEST, NUM_CLASSES, NUM_SENSORS, NUM_WORDS, PADDING, Reports
from transformers import BertConfig, BertModel, TrainingArguments

import mmfast
from mmfast.integrations.transformers import MethodTrainer


class Bert(nn.Module):
    """What a modality's collated batch is to a BERT, and its outputs averaged over the words."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=NUM_WORDS,
            hidden_size=DIM,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=2 * DIM,
            max_position_embeddings=LONGEST + 2,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(
        self,
        text: dict[str, Tensor],  # values: int64 [N, T], mask: bool [N, T]
    ) -> Tensor:  # [N, D]
        ids, mask = text["values"], text["mask"]
        h = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def main(method: str, epochs: int, samples: int, out: Path) -> dict[str, float]:
    collate = functools.partial(mmfast.data.pad, names=("text",), value=PADDING, max_length=LONGEST + 2)
    train, val, test = (
        Reports(size, seed) for seed, size in enumerate([samples, samples // 4, samples // 2])
    )
    torch.manual_seed(0)
    encoders = {"text": Bert(), "sensors": mmfast.models.MLP(NUM_SENSORS, DIM)}
    model = mmfast.MultimodalModel(encoders, dim=DIM, num_classes=NUM_CLASSES)
    args = TrainingArguments(
        str(out),
        num_train_epochs=epochs,  # of all stages of the method
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        warmup_steps=0.1,
        save_strategy="epoch",
        save_total_limit=1,
        eval_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
    )
    trainer = MethodTrainer(method, model, args, train, val, data_collator=collate)
    trainer.train()
    metrics = trainer.evaluate(test, metric_key_prefix="test")
    alone = ", ".join(f"{name} {metrics[f'test_{name}_accuracy']:.2f}" for name in encoders)
    print(f"accuracy {metrics['test_accuracy']:.2f}; alone: {alone}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="sample-valuation")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=Path("hf_run"))
    main(**vars(parser.parse_args()))

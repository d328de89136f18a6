"""A method in Lightning's loop, on the embedded data set HTAD: sound and wrist movement of daily activities.

python examples/train_lightning.py [--method di-mml] [--epochs 10] [--out lightning_run] [--resume]

Interrupt it and start it again with --resume: it goes on from the last checkpoint, to the same weights.
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import mmfast
from mmfast.integrations.lightning import MethodModule


def main(method: str, epochs: int, out: Path, resume: bool) -> float:
    splits = mmfast.data.load("htad")
    torch.manual_seed(0)
    model = mmfast.models.build_model(splits.train.shapes, splits.train.num_classes)
    module = MethodModule(method, model, splits.train, splits.val, max_epochs=epochs, lr=1e-3)
    trainer = lightning.Trainer(
        max_epochs=module.num_epochs,  # of all stages of the method
        reload_dataloaders_every_n_epochs=1,
        accelerator="auto",
        devices=1,
        logger=CSVLogger(out, name="log"),
        callbacks=[ModelCheckpoint(out, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=out / "last.ckpt" if resume else None)
    metrics = module.evaluate(splits.test)
    alone = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in metrics.modality_accuracy.items())
    print(f"accuracy {metrics.accuracy:.2f}; alone: {alone}")
    return metrics.accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="di-mml")
    parser.add_argument("--epochs", type=int, default=10, help="of the method's first stage")
    parser.add_argument("--out", type=Path, default=Path("lightning_run"))
    parser.add_argument("--resume", action="store_true")
    main(**vars(parser.parse_args()))

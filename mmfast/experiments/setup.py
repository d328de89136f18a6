"""What runs share: data, model and settings, and the trainers they make of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast import models
from mmfast.data import ArrayDataset, Splits
from mmfast.data.devices import fits_on
from mmfast.data.features import row_blocks
from mmfast.data.splits import PARTS
from mmfast.errors import changed, check_one_of, shown
from mmfast.files import plain
from mmfast.methods import Method
from mmfast.models import MultimodalModel
from mmfast.models.build import ENCODERS
from mmfast.objectives import Objective
from mmfast.training.optimization import Optimization
from mmfast.training.trainer import Trainer

# Whether data lie on the device all the time.
DATA_ON_DEVICE = ("auto", "yes", "no")


@dataclass(frozen=True)
class Setup:
    """What the runs of a comparison share.

    Attributes:
        source: where `splits` come from: "htad", FILE.npz or FOLDER; None: from a program.
        splits: the data.
        optimization: optimizer, schedule, batch and epochs.
        dim: D of every encoder.
        fusion: name of the fusion head.
        accelerator, devices, precision: as Lightning Fabric takes them.
        modalities: those that `splits` were made of, where not of all in `source`.
        encoders: what modalities are taken as, or the encoders that take them, where given.
        num_nodes: machines that train a run together, as `Trainer` takes it.
        probe: measure every modality by a logistic regression on its frozen features, too.
        skip_unreadable: files of a FOLDER that cannot be read were left out.
        num_workers: processes that read files and samples.
        eval_batch_size: samples of a batch where nothing is trained.
        data_on_device: one of DATA_ON_DEVICE; "auto" puts data on a GPU if they fill at most a quarter of its
            free memory.
        compile, deterministic, class_weights, label_smoothing, select, select_mode: as `Trainer` takes them.
        others: what else `Trainer` takes, by name; programs give it, the commands do not.
    """

    source: str | None
    splits: Splits
    optimization: Optimization = field(default_factory=Optimization)
    dim: int = 64
    fusion: str = "concat"
    accelerator: str = "auto"
    devices: int | str = 1
    precision: str = "32-true"
    probe: bool = False
    skip_unreadable: bool = False
    modalities: tuple[str, ...] | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)
    num_nodes: int = 1
    num_workers: int = 0
    eval_batch_size: int = 256
    data_on_device: str = "auto"
    compile: bool = False
    deterministic: bool = False
    class_weights: str | tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    select: str | None = None
    select_mode: str | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_one_of("data_on_device", self.data_on_device, DATA_ON_DEVICE)

    def __repr__(self) -> str:
        optimization = shown(changed(self.optimization))
        options = {k: v for k, v in changed(self).items() if k not in ("source", "splits", "optimization")}
        lines = [f"Setup({self.source!r}, Optimization({optimization})", *repr(self.splits).splitlines()]
        return "\n  ".join([*lines, shown(options)] if options else lines) + ")"

    def with_settings(self, **settings: Any) -> Setup:
        """Return it with some fields set, but for the data, whose digest is not taken anew."""
        other = replace(self, **settings)
        if "fingerprint" in vars(self):
            vars(other)["fingerprint"] = self.fingerprint
        return other

    def parts_on(self, device: torch.device, names: Sequence[str] = PARTS) -> dict[str, ArrayDataset]:
        """Return training, validation and test data, or some of them, where runs on a device find them."""
        parts = {part: getattr(self.splits, part) for part in names}
        size = sum(len(part) * part.sample_bytes for part in parts.values())
        fits = device.type == "cuda" and fits_on(device, size)
        if self.data_on_device == "yes" or (self.data_on_device == "auto" and fits):
            parts = {name: part.to(device) for name, part in parts.items()}
        return parts

    @property
    def data(self) -> str:
        """Description of the data."""
        return self.splits.description

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each of PARTS."""
        return {part: len(getattr(self.splits, part)) for part in PARTS}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the C classes."""
        return self.splits.class_names

    @property
    def test_keys(self) -> np.ndarray | None:  # [N]
        """By which the data tell their test samples."""
        return self.splits.test.sample_keys

    def model(self, seed: int) -> MultimodalModel:
        """Return the untrained model of a seed, the same for every method."""
        torch.manual_seed(seed)
        return models.build_model(
            self.splits.shapes,
            self.splits.num_classes,
            dim=self.dim,
            fusion=self.fusion,
            encoders=self.named_encoders,
        )

    @property
    def named_encoders(self) -> dict[str, str]:
        """The encoders that are chosen by name; what a modality is taken as is seen in its shape."""
        return {name: encoder for name, encoder in self.encoders.items() if encoder in ENCODERS}

    @property
    def learning(self) -> dict[str, Any]:
        """What the trainer's loss and selection are told, where it is not the default."""
        given = ("class_weights", "label_smoothing", "select", "select_mode")
        return {name: getattr(self, name) for name in given if getattr(self, name)}

    @property
    def configuration(self) -> dict[str, Any]:
        """What results tell of the settings that all runs share."""
        return {
            **self.optimization.told(),
            **self.learning,
            **told_of(self.others),
            "dim": self.dim,
            "fusion": self.fusion,
            "precision": self.precision,
            "encoders": self.named_encoders or None,
        }

    @cached_property
    def fingerprint(self) -> str:
        """The digest of `splits`, which is taken once: it reads all of the data."""
        return fingerprint(self.splits)

    def metadata(self) -> dict[str, Any]:
        """Return the plain values that `restore` rebuilds model and data from."""
        chosen: dict[str, Any] = {}
        if self.source is not None:
            path = Path(self.source)
            chosen["source"] = str(path.resolve()) if path.exists() else self.source
        if self.modalities is not None:
            chosen["modalities"] = list(self.modalities)
        if self.encoders:
            chosen["encoders"] = dict(self.encoders)
        return chosen | {
            "split_seed": self.splits.split_seed,
            "shapes": {name: list(shape) for name, shape in self.splits.shapes.items()},
            "classes": list(self.splits.class_names),
            "dim": self.dim,
            "fusion": self.fusion,
            "skip_unreadable": self.skip_unreadable,
            "scaling": plain(self.splits.scaling),
            "sound": plain(self.splits.sound),
            "data": self.fingerprint,
        }

    def description(self) -> dict[str, Any]:
        """Return what results tell of data and settings."""
        splits = self.splits
        return {
            "data": {
                "name": splits.name,
                "source": self.source,
                "description": splits.description,
                "sizes": self.sizes,
                "shapes": splits.shapes,
                "classes": splits.class_names,
                "split_seed": splits.split_seed,
                "fingerprint": self.fingerprint,
            },
            "configuration": self.configuration,
        }

    @property
    def is_made_here(self) -> bool:
        """Whether runs are made in this process: several devices have processes of their own by a command."""
        is_told = self.source is not None and not self.others and isinstance(self.devices, int | str)
        return self.devices in (1, "1") or not is_told

    def trainer(self, method: Method, seed: int, out_dir: Path | None, **options: Any) -> Trainer:
        """Return the trainer of a run.

        Raises:
            ValueError: also where the machine lacks the accelerator asked for.
        """
        try:
            return Trainer(
                method,
                optimization=self.optimization,
                seed=seed,
                accelerator=self.accelerator,
                devices=self.devices,
                num_nodes=self.num_nodes,
                precision=self.precision,
                out_dir=out_dir,
                # Only checkpoints hold it, and it takes a look at all of the data.
                metadata=None if out_dir is None else self.metadata(),
                num_workers=self.num_workers,
                eval_batch_size=self.eval_batch_size,
                compile=self.compile,
                deterministic=self.deterministic,
                **self.learning,
                **{**self.others, **options},
            )
        except RuntimeError as error:
            raise ValueError(f"accelerator {self.accelerator!r} cannot be used: {error}") from error

    def check(self, method: Method) -> int:
        """Return the number of epochs of a run of `method`, or raise ValueError for what would stop one."""
        model, splits = self.model(0), self.splits
        self.trainer(method, 0, None, loggers=()).check(model, splits.train, splits.val, splits.test)
        learner = method.bind(model)
        return sum(stage.epochs for stage in learner.stages(self.optimization.max_epochs))


def told_of(others: Mapping[str, Any]) -> dict[str, Any]:
    """Return what results tell of options that a program gives: what changes figures, by its name."""
    found: dict[str, Any] = {}
    if others.get("loss") is not None:
        found["loss"] = Objective(loss=others["loss"]).config()["loss"]
    if others.get("metrics"):
        found["metrics"] = list(others["metrics"])
    return found


def fingerprint(splits: Splits) -> str:
    """Return a digest of all samples and of how they are split."""
    digest = hashlib.sha256()
    for part in (splits.train, splits.val, splits.test):
        tensors = {
            "label": part.labels,
            **part.arrays,
            **{f"{k} present": v for k, v in part.present.items()},
        }
        for name, tensor in tensors.items():
            digest.update(f"{name}{list(tensor.shape)}".encode())
            # In blocks: what is not contiguous is copied.
            for rows in row_blocks(len(tensor), tensor[:1].nbytes):
                digest.update(np.ascontiguousarray(tensor[rows].numpy()).data)
    return digest.hexdigest()[:16]

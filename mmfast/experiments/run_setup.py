"""What runs share, as those ask for it that make them: a `setup.Setup`, or what a program gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from mmfast.data.splits import PARTS
from mmfast.methods import Method
from mmfast.models import MultimodalModel
from mmfast.training.optimization import Optimization
from mmfast.training.trainer import Trainer


class RunSetup(Protocol):
    """Data, models and settings of runs."""

    @property
    def optimization(self) -> Optimization:
        """Optimizer, schedule, batch and epochs."""

    @property
    def probe(self) -> bool:
        """Whether every modality is measured by a logistic regression on its frozen features, too."""

    @property
    def devices(self) -> Any:
        """Of a run, as Lightning Fabric takes them."""

    @property
    def num_nodes(self) -> int:
        """Machines that train a run together."""

    @property
    def is_made_here(self) -> bool:
        """Whether runs are made in this process."""

    @property
    def data(self) -> str:
        """Description of the data."""

    @property
    def fingerprint(self) -> str:
        """A digest of the data."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Samples of each of PARTS that there is."""

    @property
    def class_names(self) -> Sequence[str]:
        """Of the C classes."""

    @property
    def test_keys(self) -> np.ndarray | None:  # [N]
        """By which the data tell their test samples."""

    @property
    def configuration(self) -> dict[str, Any]:
        """What results tell of the settings that all runs share."""

    def with_settings(self, **settings: Any) -> Self:
        """Return it with some settings changed."""

    def trainer(self, method: Method, seed: int, out_dir: Path | None, **options: Any) -> Trainer:
        """Return the trainer of a run."""

    def model(self, seed: int) -> MultimodalModel:
        """Return the untrained model of a seed, the same for every method."""

    def parts_on(self, device: torch.device, names: Sequence[str] = PARTS) -> Mapping[str, Any]:
        """Return training, validation and test data, or some of them, where runs on a device find them."""

    def check(self, method: Method) -> int:
        """Return the number of epochs of a run of `method`, or raise ValueError for what would stop one."""

    def description(self) -> dict[str, Any]:
        """Return what results tell of data and settings."""

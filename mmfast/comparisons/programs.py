"""What a program compares methods on: data sets of its own with a model of its own."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mmfast.data.arrays import LABEL
from mmfast.data.labels import told_labels
from mmfast.data.splits import PARTS
from mmfast.errors import describe
from mmfast.experiments.setup import told_of
from mmfast.methods import Joint, Method
from mmfast.models import MultimodalModel
from mmfast.training.optimization import Optimization
from mmfast.training.trainer import Trainer

# Labels of each part that tell one data set from another, where it does not tell all of them.
_LOOKED_AT = 16


class Maker:
    """Makes the models of runs: each anew, with the weights of its seed.

    Args:
        model: the function of the program.
        num_runs: that it makes models for.
    """

    def __init__(self, model: Callable[[], MultimodalModel], num_runs: int) -> None:
        self._model, self._num_runs = model, num_runs
        self._before: list[weakref.ref[torch.nn.Parameter]] = []
        self._is_new = True

    def __call__(self, seed: int) -> MultimodalModel:
        """Return a new model.

        Raises:
            TypeError: the function returns something else.
        """
        torch.manual_seed(seed)
        made = self._model()
        if not isinstance(made, MultimodalModel):
            raise TypeError(f"model must return a mmfast.MultimodalModel, got {describe(made)}")
        trained = [p for p in made.parameters() if p.requires_grad]
        self._is_new &= not {id(p) for p in trained} & {id(before()) for before in self._before}
        self._before = [weakref.ref(p) for p in trained]
        return made

    def __getstate__(self) -> dict[str, Any]:
        # For other processes, which have none of these models.
        return self.__dict__ | {"_before": []}

    def check_new(self) -> None:
        """Raise ValueError where a model had weights of the one before: a run would go on from another's."""
        if not self._is_new and self._num_runs > 1:
            raise ValueError(
                "model must return a new model each time, got one with weights of the one before"
            )


@dataclass(frozen=True)
class Program:
    """What the runs of a comparison share, where data or model are a program's: see `RunSetup`.

    Attributes:
        parts: data sets by the names of PARTS; that of validation may be None.
        make: makes the models.
        optimization: optimizer, schedule, batch and epochs.
        options: further ones of `Trainer`, by name.
        probe: measure every modality by a logistic regression on its frozen features, too.
        text: description of the data; None: the sizes of the parts.
        names: of the C classes; empty where the data have none.
    """

    parts: Mapping[str, Any]
    make: Maker
    optimization: Optimization
    options: Mapping[str, Any]
    probe: bool
    text: str | None = None
    names: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """Description of the data."""
        if self.text is not None:
            return self.text
        sizes = (f"{name} {len(part):,}" for name, part in self.parts.items() if part is not None)
        return f"samples {', '.join(sizes)}"

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the labels of the data sets."""
        return "-".join(_digest(part) for part in self.parts.values() if part is not None)

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each of PARTS that there is."""
        return {name: len(part) for name, part in self.parts.items() if part is not None}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the C classes; numbers, where the data have no names for them."""
        return self.names or tuple(map(str, range(self.make(0).num_classes)))

    @property
    def test_keys(self) -> np.ndarray | None:  # [N]
        """By which the data tell their test samples."""
        return getattr(self.parts["test"], "sample_keys", None)

    @property
    def devices(self) -> Any:
        """Of a run, as Lightning Fabric takes them."""
        return self.options.get("devices", 1)

    @property
    def num_nodes(self) -> int:
        """Machines that train a run together."""
        return self.options.get("num_nodes", 1)

    @property
    def is_made_here(self) -> bool:
        """Runs are made in this process, which alone has the program's functions."""
        return True

    def with_settings(self, **settings: Any) -> Program:
        """Return it with another optimization, or other options of `Trainer`."""
        optimization = settings.pop("optimization", self.optimization)
        other = replace(self, optimization=optimization, options={**self.options, **settings})
        if "fingerprint" in vars(self):
            vars(other)["fingerprint"] = self.fingerprint
        return other

    def parts_on(self, device: torch.device, names: Sequence[str] = PARTS) -> Mapping[str, Any]:
        """Return the data sets, which lie where the program has put them."""
        return {name: self.parts[name] for name in names}

    def model(self, seed: int) -> MultimodalModel:
        """Return a new model with the weights of a seed.

        Raises:
            TypeError, ValueError: the program's function returns no model, or no new one.
        """
        made = self.make(seed)
        self.make.check_new()
        return made

    def trainer(self, method: Method, seed: int, out_dir: Any, **options: Any) -> Trainer:
        """Return the trainer of a run."""
        given = {**self.options, **options}
        return Trainer(method, optimization=self.optimization, seed=seed, out_dir=out_dir, **given)

    def check(self, method: Method) -> int:
        """Return the number of epochs of a run of `method`, or raise what would stop one."""
        model = self.make(0)
        self.trainer(method, 0, None, loggers=()).check(model, *(self.parts[part] for part in PARTS))
        return sum(stage.epochs for stage in method.bind(model).stages(self.optimization.max_epochs))

    @property
    def configuration(self) -> dict[str, Any]:
        """What results tell of the settings that all runs share."""
        trainer = self.trainer(Joint(), 0, None, loggers=())
        return {
            **self.optimization.told(),
            **trainer.objective.config(),
            **trainer.measures.config(),
            **told_of(self.options),
            "precision": trainer.fabric.strategy.precision.precision,
        }

    def description(self) -> dict[str, Any]:
        """Return what results tell of data and settings."""
        return {
            "data": {
                "source": None,
                "description": self.data,
                "sizes": self.sizes,
                "fingerprint": self.fingerprint,
            },
            "configuration": self.configuration,
        }


def _digest(dataset: Any) -> str:
    """Return a digest of a data set's labels, of a few where it does not tell them all."""
    labels = told_labels(dataset)
    if labels is None:
        few = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
        labels = [np.asarray(dataset[i][LABEL]).tolist() for i in few]
    return hashlib.sha256(repr(np.asarray(labels).tolist()).encode()).hexdigest()[:16]

"""mmfast: kernels and a thin trainer for balanced multimodal learning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mmfast.errors import needs_train

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "MultimodalModel",
    "Predictions",
    "Trainer",
    "Valuation",
    "backend",
    "compare",
    "data",
    "load",
    "methods",
    "models",
    "ops",
    "valuate",
]

_HOME = {
    "Comparison": "mmfast.comparisons.compared",
    "MultimodalModel": "mmfast.models",
    "Predictions": "mmfast.predictions",
    "Trainer": "mmfast.training.trainer",
    "Valuation": "mmfast.valuation",
    "compare": "mmfast.comparisons.compare",
    "load": "mmfast.experiments.loading",
    "valuate": "mmfast.valuation",
}
_SUBMODULES = ("backend", "data", "methods", "models", "ops")

if TYPE_CHECKING:
    from mmfast import backend, data, methods, models, ops
    from mmfast.comparisons.compare import compare
    from mmfast.comparisons.compared import Comparison
    from mmfast.experiments.loading import load
    from mmfast.models import MultimodalModel
    from mmfast.predictions import Predictions
    from mmfast.training.trainer import Trainer
    from mmfast.valuation import Valuation, valuate


def __getattr__(name: str):
    # Lazy, so that `import mmfast.ops` never needs what only the trainer depends on.
    if name in _SUBMODULES or name in _HOME:
        with needs_train(f"mmfast.{name}"):
            if name in _SUBMODULES:
                return importlib.import_module(f"mmfast.{name}")
            return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

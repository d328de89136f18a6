"""Settings that the papers publish, by method and data set; for large audio-visual data, not small tables."""

from __future__ import annotations

from typing import Any

from mmfast.methods.base import Method
from mmfast.methods.di_mml import DIMML
from mmfast.methods.diagnose_relearn import DiagnoseRelearn
from mmfast.methods.mla import MLA
from mmfast.methods.modality_valuation import ModalityValuation
from mmfast.methods.sample_valuation import SampleValuation

# Fields of mmfast.training.optimization.Optimization; those not named keep their defaults.
_DI_MML = {"max_epochs": 150, "batch_size": 16, "optimizer": "sgd", "lr": 1e-3, "lr_step": 70}
_DIAGNOSE = {"max_epochs": 90, "batch_size": 64, "optimizer": "sgd", "lr": 2e-3}
_MLA = {"max_epochs": 100, "batch_size": 64, "optimizer": "sgd", "lr": 1e-3, "lr_step": 70}
_VALUATION = {"max_epochs": 60, "batch_size": 64, "optimizer": "adam", "lr": 5e-5, "lr_step": 30}

PUBLISHED: dict[str, tuple[Method, dict[str, Any]]] = {
    "sample-valuation/kinetics-sounds": (SampleValuation(), _VALUATION),
    "modality-valuation/kinetics-sounds": (ModalityValuation(), _VALUATION),
    "di-mml/crema-d": (DIMML(e0=20, temperature=50, fusion_temperature=1), _DI_MML),
    "di-mml/ave": (DIMML(e0=20, temperature=10, fusion_temperature=3), _DI_MML),
    "di-mml/ucf-101": (DIMML(e0=20, temperature=10, fusion_temperature=1), _DI_MML),
    "di-mml/modelnet40": (DIMML(e0=20, temperature=50, fusion_temperature=3), _DI_MML),
    "diagnose-relearn/published": (DiagnoseRelearn(), _DIAGNOSE),
    "mla/published": (MLA(), _MLA),
}

"""Training methods: four published ones, in five variants, and the baselines they must beat."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mmfast.errors import check_one_of, describe, did_you_mean
from mmfast.methods.base import Learner, Method, Stage
from mmfast.methods.di_mml import DIMML
from mmfast.methods.diagnose_relearn import DiagnoseRelearn
from mmfast.methods.ensemble import Ensemble
from mmfast.methods.frozen_unimodal import FrozenUnimodal
from mmfast.methods.joint import Joint
from mmfast.methods.mla import MLA
from mmfast.methods.modality_valuation import ModalityValuation
from mmfast.methods.multi_loss import MultiLoss
from mmfast.methods.sample_valuation import SampleValuation
from mmfast.methods.unimodal import Unimodal

# In the order of tables and plots; a class brings its name on the command line and its title.
_CLASSES: tuple[type[Method], ...] = (
    Joint,
    Unimodal,
    Ensemble,
    MultiLoss,
    FrozenUnimodal,
    SampleValuation,
    ModalityValuation,
    DIMML,
    DiagnoseRelearn,
    MLA,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _CLASSES}

__all__ = [
    "METHODS",
    "Learner",
    "Method",
    "Stage",
    "chosen",
    "make",
    *(method.__name__ for method in _CLASSES),
]


def make(name: str, **options: Any) -> Method:
    """Return the method of this name on the command line, its options set.

    Raises:
        ValueError: unknown method or option; the message gives the nearest names.
    """
    check_one_of("method", name, METHODS, suggest=True)
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method {name} has no option {option!r}{did_you_mean(option, known)}; {has}")
    return METHODS[name](**options)


def chosen(method: Method | str) -> Method:
    """Return a method as it is, or the one of this name.

    Raises:
        TypeError: it is neither, such as a method's class.
        ValueError: unknown name.
    """
    if isinstance(method, type):
        raise TypeError(f"method must be an instance, {method.__name__}(), or a name, got the class")
    if not isinstance(method, str | Method):
        raise TypeError(f"method must be a method of mmfast.methods or its name, got {describe(method)}")
    return make(method) if isinstance(method, str) else method

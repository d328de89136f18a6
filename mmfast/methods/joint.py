"""Joint training: one cross-entropy on the fused prediction. The baseline that the methods mend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmfast.methods.base import Learner, Method


@dataclass(frozen=True)
class Joint(Method):
    """Train encoders and head together by the cross-entropy of the fused logits."""

    name: ClassVar[str] = "joint"
    title: ClassVar[str] = "Joint"
    is_baseline: ClassVar[bool] = True
    learner = Learner

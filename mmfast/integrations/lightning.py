"""`MethodModule`: a method in the loop of `lightning.Trainer`, lightning 2.x."""

from __future__ import annotations

from typing import ClassVar

from mmfast.errors import needs_train

with needs_train("mmfast.integrations.lightning", extra="lightning"):
    import lightning.pytorch

    from mmfast.integrations._lightning import MethodHooks

__all__ = ["MethodModule"]


class MethodModule(MethodHooks, lightning.pytorch.LightningModule):
    __doc__ = MethodHooks.__doc__

    _lightning: ClassVar = lightning.pytorch

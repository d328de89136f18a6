"""`MethodModule` for those who import Lightning as `pytorch_lightning`, whose Trainer takes its own alone."""

from __future__ import annotations

from typing import ClassVar

from mmfast.errors import needs_train

with needs_train("mmfast.integrations.pytorch_lightning", extra="lightning"):
    import pytorch_lightning

    from mmfast.integrations._lightning import MethodHooks

__all__ = ["MethodModule"]


class MethodModule(MethodHooks, pytorch_lightning.LightningModule):
    __doc__ = MethodHooks.__doc__

    _lightning: ClassVar = pytorch_lightning

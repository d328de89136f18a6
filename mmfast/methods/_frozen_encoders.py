"""Two stages: encoders with unimodal heads, then the fusion head over the frozen encoders."""

from __future__ import annotations

from mmfast.data.batches import presence
from mmfast.methods._late_fusion import LateFusionLearner, UnimodalHeads
from mmfast.methods.base import Stage


class FrozenEncodersLearner(LateFusionLearner):
    """A learner of two stages: encoders with unimodal heads first, then the fusion head over frozen encoders.

    In the first stage, whose fusion head knows nothing yet, it predicts by the average of the unimodal heads.
    """

    def build(self) -> None:
        self.own_heads = UnimodalHeads(self.model)

    @property
    def in_head_stage(self) -> bool:
        """Whether the fusion head is what trains."""
        return self.stage.name == "head"

    def stages(self, max_epochs):
        return [Stage("encoders", max_epochs), Stage("head", self.method.head_epochs)]

    def frozen(self):
        if not self.in_head_stage:
            return (self.model.head,)
        return tuple(module for module in (self.model.encoders, *self.children()) if module is not self.model)

    @property
    def encodes_once(self):
        return self.in_head_stage and self.takes_kept

    def start_epoch(self, epoch, train):
        # Every process, as the batches of an epoch are shared out anew in each.
        return self.keep(train, whole=True) if self.encodes_once else train

    def train(self, mode=True):
        super().train(mode)
        if self.in_head_stage:
            # Frozen means batch-norm statistics and dropout too.
            self.model.encoders.eval()
            self.own_heads.eval()
        return self

    def forward(self, batch, step=0):
        features, present = self.encode(batch), presence(batch, self.modalities)
        if not self.in_head_stage:
            return self.encoder_loss(features, batch["label"], present)
        logits = self.model.fuse(features, present=present)
        return self.loss(logits, batch["label"])

    def encoder_loss(self, features, labels, present):
        """Return the loss of the first stage."""
        return self.unimodal_loss(self.own_logits(features), labels, present)

    def own_logits(self, features):
        return self.own_heads(features)

    def combine(self, logits, present):
        return self.average(logits, present)

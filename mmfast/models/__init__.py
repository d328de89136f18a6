"""Encoders, fusion heads and the multimodal model."""

from mmfast.models.build import build_model, encoder_for
from mmfast.models.encoders import (
    MLP,
    Encoder,
    FrameMean,
    GRUEncoder,
    SmallCNN,
    TemporalConv,
)
from mmfast.models.fusion import (
    FUSION_HEADS,
    AttentionHead,
    ConcatHead,
    FiLMHead,
    FusionHead,
    GatedHead,
    SumHead,
)
from mmfast.models.multimodal import MultimodalModel
from mmfast.models.pretrained import PretrainedEncoder
from mmfast.models.resnet import ResNet18

__all__ = [
    "FUSION_HEADS",
    "MLP",
    "AttentionHead",
    "ConcatHead",
    "Encoder",
    "FiLMHead",
    "FrameMean",
    "FusionHead",
    "GRUEncoder",
    "GatedHead",
    "MultimodalModel",
    "PretrainedEncoder",
    "ResNet18",
    "SmallCNN",
    "SumHead",
    "TemporalConv",
    "build_model",
    "encoder_for",
]

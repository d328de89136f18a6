"""Models that fit the shapes of the data: an encoder for a shape, a multimodal model for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfast.models._checks import check_size, nearest_names
from mmfast.models.encoders import MLP, Encoder, FrameMean, GRUEncoder, SmallCNN, TemporalConv
from mmfast.models.fusion import FusionHead
from mmfast.models.multimodal import MultimodalModel
from mmfast.models.resnet import ResNet18

# Images with both sides at least this long go to ResNet-18.
LARGE_IMAGE = 96

TEMPORAL = ("conv", "gru")


def encoder_for(
    shape: Sequence[int],
    dim: int,
    *,
    temporal: str = "conv",
    dropout: float = 0.0,
    name: str = "shape",
) -> Encoder:
    """Return an encoder that fits samples of the given shape.

    | shape | encoder |
    | --- | --- |
    | [D] | `MLP` |
    | [T, F] | `TemporalConv`, or `GRUEncoder` |
    | [C, H, W] | `SmallCNN`; `ResNet18` where H and W are both at least 96 |
    | [T, C, H, W] | `FrameMean` of the encoder for [C, H, W] |

    Args:
        shape: shape of one sample, without N. T is not fixed by it, nor are H and W.
        dim: D, the number of features.
        temporal: "conv" or "gru", the encoder of sequences.
        dropout: dropout in training; `ResNet18` has it before its last layer.
        name: what errors call the shape, usually the modality.

    Raises:
        TypeError, ValueError: a shape of another rank or with a size below 1, an unknown `temporal`.
    """
    if temporal not in TEMPORAL:
        raise ValueError(f"temporal must be one of {nearest_names(temporal, TEMPORAL)}, got {temporal!r}")
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"{name} must have samples [D], [T, F], [C, H, W] or [T, C, H, W], got {list(shape)}"
        )
    sizes = [check_size(f"{name}: size {i} of {list(shape)}", size) for i, size in enumerate(shape)]
    if len(sizes) == 1:
        return MLP(sizes[0], dim, dropout=dropout)
    if len(sizes) == 2:
        return (GRUEncoder if temporal == "gru" else TemporalConv)(sizes[1], dim, dropout=dropout)
    large = min(sizes[-2:]) >= LARGE_IMAGE
    image: Encoder = (ResNet18 if large else SmallCNN)(sizes[-3], dim, dropout=dropout)
    return FrameMean(image) if len(sizes) == 4 else image


def build_model(
    shapes: Mapping[str, Sequence[int]],  # modality -> shape of one sample
    num_classes: int,
    *,
    dim: int = 64,
    fusion: str | FusionHead = "concat",
    **options: Any,
) -> MultimodalModel:
    """Return a model whose encoders fit the shapes of one sample of each modality.

    Equivalent to:

        encoders = {name: encoder_for(shape, dim, **options) for name, shape in shapes.items()}
        model = MultimodalModel(encoders, dim, num_classes, fusion)

    Args:
        shapes: modality name -> [D], [T, F], [C, H, W] or [T, C, H, W], in the order of the coalition bits.
        num_classes: C.
        dim: D of every encoder.
        fusion: a name of FUSION_HEADS or a FusionHead made for these dimensions.
        options: passed on to `encoder_for`.

    Raises:
        TypeError, ValueError: as `encoder_for` (naming the modality) and `MultimodalModel`.
    """
    encoders = {name: encoder_for(shape, dim, name=name, **options) for name, shape in shapes.items()}
    return MultimodalModel(encoders, dim, num_classes, fusion)

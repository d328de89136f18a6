"""Models that fit the shapes of the data: an encoder for a shape, a multimodal model for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfast.errors import check_one_of, unknown_modalities
from mmfast.models._checks import check_size
from mmfast.models.encoders import MLP, Encoder, FrameMean, GRUEncoder, SmallCNN, TemporalConv
from mmfast.models.fusion import FusionHead
from mmfast.models.multimodal import MultimodalModel
from mmfast.models.resnet import ResNet18

# Images with both sides at least this long go to ResNet-18.
LARGE_IMAGE = 96

TEMPORAL = ("conv", "gru")

# Encoders by name, and the ranks of the samples they take; FrameMean takes images' ones to video.
ENCODERS = {"mlp": (1,), "conv": (2,), "gru": (2,), "cnn": (3, 4), "resnet18": (3, 4)}


def encoder_for(
    shape: Sequence[int],
    dim: int,
    *,
    encoder: str | None = None,
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
        encoder: "mlp", "conv", "gru", "cnn" or "resnet18", one that takes the shape; None chooses.
        temporal: "conv" or "gru", the encoder of sequences where `encoder` is None.
        dropout: dropout in training; `ResNet18` has it before its last layer.
        name: what errors call the shape, usually the modality.

    Raises:
        TypeError, ValueError: a shape of another rank or with a size below 1, an unknown `temporal` or
            `encoder`, or one that takes other shapes.
    """
    check_one_of("temporal", temporal, TEMPORAL, nearest_first=True)
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"{name} must have samples [D], [T, F], [C, H, W] or [T, C, H, W], got {list(shape)}"
        )
    sizes = [check_size(f"{name}: size {i} of {list(shape)}", size) for i, size in enumerate(shape)]
    if encoder is not None:
        known = [one for one, ranks in ENCODERS.items() if len(sizes) in ranks]
        check_one_of(f"encoder of {name} {list(shape)}", encoder, known, nearest_first=True)
    if len(sizes) == 1:
        return MLP(sizes[0], dim, dropout=dropout)
    if len(sizes) == 2:
        return (GRUEncoder if (encoder or temporal) == "gru" else TemporalConv)(
            sizes[1], dim, dropout=dropout
        )
    large = min(sizes[-2:]) >= LARGE_IMAGE if encoder is None else encoder == "resnet18"
    image: Encoder = (ResNet18 if large else SmallCNN)(sizes[-3], dim, dropout=dropout)
    return FrameMean(image) if len(sizes) == 4 else image


def build_model(
    shapes: Mapping[str, Sequence[int]],  # modality -> shape of one sample
    num_classes: int,
    *,
    dim: int = 64,
    fusion: str | FusionHead = "concat",
    encoders: Mapping[str, str] | None = None,
    **options: Any,
) -> MultimodalModel:
    """Return a model whose encoders fit the shapes of one sample of each modality.

    Equivalent to:

        built = {name: encoder_for(shape, dim, **options) for name, shape in shapes.items()}
        model = MultimodalModel(built, dim, num_classes, fusion)

    Args:
        shapes: modality name -> [D], [T, F], [C, H, W] or [T, C, H, W], in the order of the coalition bits.
        num_classes: C.
        dim: D of every encoder.
        fusion: a name of FUSION_HEADS or a FusionHead made for these dimensions.
        encoders: modality name -> name of its encoder, for those that are not to be chosen by shape.
        options: passed on to `encoder_for`.

    Raises:
        TypeError, ValueError: as `encoder_for` (naming the modality) and `MultimodalModel`.
    """
    named = encoders or {}
    unknown = [name for name in named if name not in shapes]
    if unknown:
        raise unknown_modalities("encoders", ", ".join(unknown), shapes)
    built = {
        name: encoder_for(shape, dim, name=name, encoder=named.get(name), **options)
        for name, shape in shapes.items()
    }
    return MultimodalModel(built, dim, num_classes, fusion)

"""Models that fit the shapes of the data: an encoder for a shape, a multimodal model for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmfast.errors import check_one_of, describe, unknown_modalities
from mmfast.models._checks import check_size
from mmfast.models._hugging_face import PREFIX, is_pretrained
from mmfast.models.encoders import MLP, Encoder, FrameMean, GRUEncoder, SmallCNN, TemporalConv
from mmfast.models.fusion import FusionHead
from mmfast.models.multimodal import MultimodalModel
from mmfast.models.pretrained import PretrainedEncoder
from mmfast.models.resnet import ResNet18

# Images with both sides at least this long go to ResNet-18.
LARGE_IMAGE = 96

TEMPORAL = ("conv", "gru")

# Encoders by name, and the ranks of the samples they take; FrameMean takes images' ones to video.
ENCODERS = {"mlp": (1,), "conv": (2,), "gru": (2,), "cnn": (3, 4), "resnet18": (3, 4)}


# Ranks of the samples that a pretrained encoder takes, by its kind; FrameMean takes images' one to video.
PRETRAINED = {"text": (1,), "image": (3, 4), "sound": (1, 2)}


def encoder_for(
    shape: Sequence[int] | str,
    dim: int | None,
    *,
    encoder: str | None = None,
    temporal: str = "conv",
    dropout: float = 0.0,
    freeze: bool = False,
    pooling: str | None = None,
    name: str = "shape",
) -> Encoder:
    """Return an encoder that fits samples of the given shape, or a pretrained one.

    - [D]: `MLP`
    - [T, F]: `TemporalConv`, or `GRUEncoder`
    - [C, H, W]: `SmallCNN`; `ResNet18` where H and W are both at least 96
    - [T, C, H, W]: `FrameMean` of the encoder for [C, H, W]
    - "hf:<name or folder>": `PretrainedEncoder`, of text, images or sound

    Args:
        shape: shape of one sample, without N. T is not fixed by it, nor are H and W. Or
            "hf:<name or folder>", a model of transformers, which knows what it takes.
        dim: D, the number of features; None, for a pretrained encoder alone, takes its own.
        encoder: "mlp", "conv", "gru", "cnn" or "resnet18", one that takes the shape; "hf:<name or folder>";
            None chooses.
        temporal: "conv" or "gru", the encoder of sequences where `encoder` is None.
        dropout: dropout in training; `ResNet18` and `PretrainedEncoder` have it before their last layer.
        freeze, pooling: of a `PretrainedEncoder`; no other may be frozen, as its weights are drawn.
        name: what errors call the shape, usually the modality.

    Raises:
        TypeError, ValueError: a shape of another rank or with a size below 1, an unknown `temporal` or
            `encoder`, or one that takes other shapes; what `PretrainedEncoder` refuses.
        ImportError, OSError: as `PretrainedEncoder`.
    """
    check_one_of("temporal", temporal, TEMPORAL, nearest_first=True)
    if isinstance(shape, str) or is_pretrained(encoder):
        if not isinstance(shape, str):
            assert encoder is not None
            pretrained = PretrainedEncoder(encoder, dim, pooling=pooling, freeze=freeze, dropout=dropout)
            return _fitted(pretrained, shape, name)
        if not is_pretrained(shape) or encoder not in (None, shape):
            got = f"{describe(shape)}" + ("" if encoder is None else f" and encoder {describe(encoder)}")
            raise ValueError(
                f'{name} must be the shape of a sample, or "{PREFIX}<name or folder>", got {got}'
            )
        return PretrainedEncoder(shape, dim, pooling=pooling, freeze=freeze, dropout=dropout)
    if freeze or pooling is not None:
        option = f"pooling = {describe(pooling)}" if pooling is not None else "freeze = True"
        raise ValueError(
            f'{name} needs encoder = "{PREFIX}<name or folder>" for {option}, got {describe(encoder)}'
        )
    if not isinstance(shape, Sequence):
        raise TypeError(f"{name} must have a shape, such as [20], got {describe(shape)}")
    if not 1 <= len(shape) <= 4:
        raise ValueError(
            f"{name} must have samples [D], [T, F], [C, H, W] or [T, C, H, W], got {list(shape)}"
        )
    sizes = [check_size(f"{name}: size {i} of {list(shape)}", size) for i, size in enumerate(shape)]
    if encoder is not None:
        known = [one for one, ranks in ENCODERS.items() if len(sizes) in ranks]
        check_one_of(f"encoder of {name} {list(shape)}", encoder, known, nearest_first=True)
    dim = check_size("dim", dim)
    if len(sizes) == 1:
        return MLP(sizes[0], dim, dropout=dropout)
    if len(sizes) == 2:
        return (GRUEncoder if (encoder or temporal) == "gru" else TemporalConv)(
            sizes[1], dim, dropout=dropout
        )
    large = min(sizes[-2:]) >= LARGE_IMAGE if encoder is None else encoder == "resnet18"
    image: Encoder = (ResNet18 if large else SmallCNN)(sizes[-3], dim, dropout=dropout)
    return FrameMean(image) if len(sizes) == 4 else image


def _fitted(encoder: PretrainedEncoder, shape: Sequence[int], name: str) -> Encoder:
    """Return a pretrained encoder for samples of a shape, or raise ValueError where it takes others."""
    if len(shape) not in PRETRAINED[encoder.kind]:
        kinds = {"text": "[T]", "image": "[C, H, W] or [T, C, H, W]", "sound": "[T] or [T, F]"}
        raise ValueError(
            f"{name} must have samples {kinds[encoder.kind]} for {encoder.source!r}, got {list(shape)}"
        )
    return FrameMean(encoder) if len(shape) == 4 else encoder


def build_model(
    shapes: Mapping[str, Sequence[int] | str],  # modality -> shape of one sample
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

    where `freeze` and `pooling` are those of the pretrained encoders alone.

    Args:
        shapes: modality name -> [D], [T, F], [C, H, W] or [T, C, H, W], or "hf:<name or folder>", in the
            order of the coalition bits.
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
    pretrained = {name for name, shape in shapes.items() if is_pretrained(named.get(name, shape))}
    for_all = {key: value for key, value in options.items() if key not in ("freeze", "pooling")}
    built = {
        # Where none is pretrained, each says that it is not.
        name: encoder_for(
            shape,
            dim,
            name=name,
            encoder=named.get(name),
            **(options if name in pretrained or not pretrained else for_all),
        )
        for name, shape in shapes.items()
    }
    return MultimodalModel(built, dim, num_classes, fusion)

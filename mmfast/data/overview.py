"""How a data set was read: what each modality is taken as, what lacks, what is constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mmfast.data.cautions import cautions
from mmfast.data.splits import PARTS, Splits
from mmfast.data.standardize import scaling_of
from mmfast.data.views import kind_of

if TYPE_CHECKING:
    from mmfast.models import MultimodalModel


@dataclass(frozen=True)
class ModalityOverview:
    """How one modality was read.

    Attributes:
        name: of the modality.
        shape: of one sample.
        kind: "vector", "sequence", "image" or "video".
        lacking: samples of all parts without it.
        constant: features (of vectors and sequences) or channels (of images and video) that are constant in
            the training part.
        features: how many of them there are.
        encoder: name of its encoder, None without a model.
        parameters: of its encoder, None without a model.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    lacking: int
    constant: int
    features: int
    encoder: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Overview:
    """How a data set was read.

    Attributes:
        samples: N, of all parts.
        modalities: in the order of the coalition bits.
        warnings: sentences on what a result on these data will not show.
    """

    samples: int
    modalities: tuple[ModalityOverview, ...]
    warnings: tuple[str, ...]


def overview(
    splits: Splits,
    model: MultimodalModel | None = None,
    *,
    seeds: int | None = None,
) -> Overview:
    """Return how the modalities of a data set were read.

        for modality in mmfast.data.overview(splits).modalities:
            print(modality.name, modality.kind, modality.constant)

    Constant features are those that standardising sets to 0: they are known from `splits.scaling`, and
    computed in chunks where the splits are not standardised.

    Args:
        splits: the data.
        model: for them; names the encoders and counts their parameters.
        seeds: runs of each method, where methods are to be compared.
    """
    scaling = scaling_of(splits.train) if splits.scaling is None else splits.scaling
    found = []
    for name, shape in splits.shapes.items():
        inverse = scaling[name][1]
        encoder = None if model is None else model.encoders[name]
        found.append(
            ModalityOverview(
                name=name,
                shape=shape,
                kind=kind_of(shape),
                lacking=_lacking(splits, name),
                constant=sum(value == 0 for value in inverse),
                features=len(inverse),
                encoder=None if encoder is None else _encoder_name(encoder),
                parameters=None if encoder is None else sum(p.numel() for p in encoder.parameters()),
            )
        )
    constant = [modality.name for modality in found if modality.constant == modality.features]
    return Overview(
        sum(len(getattr(splits, part)) for part in PARTS),
        tuple(found),
        cautions(splits, constant, seeds=seeds),
    )


def _lacking(splits: Splits, name: str) -> int:
    masks = [getattr(splits, part).present.get(name) for part in PARTS]
    return sum(int((~mask).sum()) for mask in masks if mask is not None)


def _encoder_name(encoder: nn.Module) -> str:
    # What works on every frame is the encoder inside.
    inner = getattr(encoder, "encoder", None)
    return f"{type(inner).__name__} per frame" if isinstance(inner, nn.Module) else type(encoder).__name__

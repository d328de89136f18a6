"""Some of a data set's modalities, and what each is taken as.

| a sample is | as vector | as sequence | as image |
| --- | --- | --- | --- |
| vector [D] | | [D, 1] | |
| sequence [T, F] | [T F] | | [1, T, F] |
| image [C, H, W] | [C H W] | [W, C H]: columns are steps, as in a spectrogram | |
| video [T, C, H, W] | [T C H W] | [T, C H W] | [T C, H, W]: frames are channels |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from mmfast.data.arrays import ArrayDataset
from mmfast.data.splits import Splits, describe_shapes
from mmfast.errors import check_one_of, describe, did_you_mean, unknown_modalities
from mmfast.models.build import ENCODERS

# What a sample is taken as, by the number of its dimensions: [D], [T, F], [C, H, W], [T, C, H, W].
KINDS = ("vector", "sequence", "image", "video")

# How an array [N, ...] of one kind is taken as another.
VIEWS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("vector", "sequence"): lambda x: x.unsqueeze(2),
    ("sequence", "vector"): lambda x: x.flatten(1),
    ("sequence", "image"): lambda x: x.unsqueeze(1),
    ("image", "vector"): lambda x: x.flatten(1),
    ("image", "sequence"): lambda x: x.permute(0, 3, 1, 2).flatten(2),
    ("video", "vector"): lambda x: x.flatten(1),
    ("video", "sequence"): lambda x: x.flatten(2),
    ("video", "image"): lambda x: x.flatten(1, 2),
}


def kind_of(
    shape: Sequence[int],  # of one sample
) -> str:
    """Return what samples of a shape are taken as: "vector", "sequence", "image" or "video"."""
    return KINDS[len(shape) - 1]


def choose(
    splits: Splits,
    modalities: Sequence[str] | None = None,
    encoders: Mapping[str, str] | None = None,
) -> Splits:
    """Return splits of some modalities, in the order given, which is that of the coalition bits.

    Args:
        splits: the data, not standardised: statistics are those of the shape that a modality is taken as.
        modalities: names of those to keep; None keeps all.
        encoders: what a modality is taken as, one of KINDS, or the encoder that takes it, one of
            `mmfast.models.build.ENCODERS`; by name.

    Raises:
        ValueError: standardised splits, an unknown name, a modality given twice, a shape that cannot be taken
            so.
    """
    if splits.scaling is not None:
        raise ValueError("splits must not be standardised yet: load them with standardize=False")
    names = list(splits.modalities if modalities is None else modalities)
    encoders = encoders or {}
    if not names:
        raise ValueError("modalities must hold at least one name, got none")
    for name in names:
        _check_known("modalities", name, splits.modalities)
    if len(set(names)) < len(names):
        raise ValueError(f"modalities must be named once each, got {', '.join(names)}")
    for name in encoders:
        _check_known("encoder", name, names)
    views = {
        name: _view(name, splits.shapes[name], encoders[name]) if name in encoders else _as_it_is
        for name in names
    }
    train, val, test = (_chosen(part, views) for part in (splits.train, splits.val, splits.test))
    found = replace(splits, train=train, val=val, test=test)
    before, after = describe_shapes(splits.shapes), describe_shapes(found.shapes)
    return replace(found, description=splits.description.replace(before, after, 1))


def viewed(part: ArrayDataset, encoders: Mapping[str, str]) -> ArrayDataset:
    """Return a data set with its modalities taken as `choose` takes them, all of them in their order."""
    views = {
        name: _view(name, shape, encoders[name]) if name in encoders else _as_it_is
        for name, shape in part.shapes.items()
    }
    return _chosen(part, views)


def _chosen(part: ArrayDataset, views: Mapping[str, Callable[[Tensor], Tensor]]) -> ArrayDataset:
    return part._with(
        arrays={name: view(part.arrays[name]).contiguous() for name, view in views.items()},
        present={name: part.present[name] for name in views if name in part.present},
    )


def _as_it_is(array: Tensor) -> Tensor:
    return array


def _view(name: str, shape: Sequence[int], wanted: str) -> Callable[[Tensor], Tensor]:
    """Return the function that makes of a modality's array what is wanted."""
    check_one_of(f"encoder of {name}", wanted, (*KINDS, *ENCODERS), suggest=True)
    kinds = (wanted,) if wanted in KINDS else tuple(KINDS[rank - 1] for rank in ENCODERS[wanted])
    kind = kind_of(shape)
    if kind in kinds:
        return _as_it_is
    if (kind, kinds[0]) not in VIEWS:
        possible = [kind, *(other for one, other in VIEWS if one == kind)]
        raise ValueError(
            f"{name} {list(shape)} must be taken as {' or '.join(possible)}, got {wanted!r}"
            + (f", which takes a {kinds[0]}" if wanted != kinds[0] else "")
        )
    return VIEWS[kind, kinds[0]]


def _check_known(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise unknown_modalities(what, describe(name) + did_you_mean(str(name), known), known)

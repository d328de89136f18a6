"""Data with chosen unique, shared and missing information per modality: the right answers are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from mmfast.data.splits import Splits, block_split
from mmfast.errors import unknown_modalities


def synthetic(
    num_samples: int = 1000,
    num_classes: int = 4,
    dims: Mapping[str, int | Sequence[int]] | None = None,
    unique: Mapping[str, float] | None = None,
    shared: float = 0.5,
    noise: float | Mapping[str, float] = 0.5,
    seed: int = 0,
) -> Splits:
    """Draw samples of which a chosen share shows its class in every, in one, or in no modality.

    Each sample independently shows its class in all modalities with probability `shared`, in modality m alone
    with probability `unique[m]`, and otherwise nowhere. A modality that shows class y holds the prototype of
    y (one of C orthogonal vectors with mean square 1 per feature), one that does not holds zeros; Gaussian
    noise is added to both.

    With r_m = shared + unique[m] and r = shared + sum of unique, and noise small enough that prototypes can
    be told apart (up to 0.5 for D >= 16), the best classifier, and a linear one, is right with probability

        modality m alone   r_m + (1 - r_m) / C
        all modalities     r + (1 - r) / C
        coalition S        the same with r_S = shared + sum of unique over S

    so with v(S) that probability and v(none) = 1 / C the Shapley value of modality m is
    (1 - 1 / C) (unique[m] + shared / M). A head trained on all modalities and asked with some masked gives
    less to a modality that it could do without (small unique share, large noise): the gap is its neglect.

    Args:
        num_samples: N; 70% of each class train, 15% validation, 15% test.
        num_classes: C; classes are balanced.
        dims: Features per modality, D or a shape such as [T, F] or [C, H, W], at least C in all; any number
            of modalities. Default: "a" and "b" of 16.
        unique: Share of samples whose class only this modality shows, 0 for modalities left out; by default
            0.2 for "a" and "b".
        shared: Share of samples whose class every modality shows.
        noise: Standard deviation of the noise on every feature, one for all or one per modality.
        seed: Seed of everything drawn.

    Raises:
        ValueError: shares that are negative or sum to more than 1, fewer features than classes, too few
            samples, unknown modalities.
    """
    dims = {"a": 16, "b": 16} if dims is None else dims
    unique = {name: 0.2 for name in ("a", "b") if name in dims} if unique is None else unique
    noise = dict.fromkeys(dims, noise) if isinstance(noise, (int, float)) else noise
    shapes = {name: (size,) if isinstance(size, int) else tuple(size) for name, size in dims.items()}
    _check(num_samples, num_classes, shapes, unique, shared, noise)

    rng = np.random.default_rng(seed)
    names = list(shapes)
    labels = rng.permutation(np.arange(num_samples) % num_classes)
    shares = [shared, *(unique.get(name, 0.0) for name in names)]
    # 0: every modality shows the class; m + 1: modality m alone; M + 1: none.
    shown_by = rng.choice(len(names) + 2, num_samples, p=[*shares, max(0.0, 1 - sum(shares))])
    arrays = {}
    for m, (name, shape) in enumerate(shapes.items()):
        size = prod(shape)
        orthogonal = np.linalg.qr(rng.standard_normal((size, num_classes)))[0]
        prototypes = orthogonal.T * np.sqrt(size)  # [C, D]
        shows = (shown_by == 0) | (shown_by == m + 1)  # [N]
        scatter = noise[name] * rng.standard_normal((num_samples, size))
        features = shows[:, None] * prototypes[labels] + scatter  # [N, D]
        arrays[name] = features.astype(np.float32).reshape(num_samples, *shape)
    return Splits.from_arrays(
        arrays,
        labels,
        split=block_split(labels),
        split_note="70/15/15% of each class",
        class_names=[f"class {label}" for label in range(num_classes)],
        standardize=False,
        name="synthetic",
    )


def _check(
    num_samples: int,
    num_classes: int,
    shapes: Mapping[str, tuple[int, ...]],
    unique: Mapping[str, float],
    shared: float,
    noise: Mapping[str, float],
) -> None:
    if not shapes:
        raise ValueError("dims must name at least one modality, got none")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    # Seven of a class are the fewest of which 70%, 85% and 100% differ.
    if num_samples < 7 * num_classes:
        raise ValueError(f"num_samples must be at least 7 C = {7 * num_classes}, got {num_samples}")
    for argument, mapping in (("unique", unique), ("noise", noise)):
        unknown = [name for name in mapping if name not in shapes]
        if unknown:
            raise unknown_modalities(argument, ", ".join(unknown), shapes)
    without = [name for name in shapes if name not in noise]
    if without:
        raise ValueError(f"noise must give every modality a value, got none for {', '.join(without)}")
    for name, shape in shapes.items():
        if prod(shape) < num_classes:
            raise ValueError(
                f"dims[{name!r}] must hold at least C = {num_classes} features, got {list(shape)}"
            )
        if noise[name] < 0:
            raise ValueError(f"noise must not be negative, got {noise[name]} for {name}")
    shares = [shared, *unique.values()]
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"shared and unique must not be negative and sum to at most 1, got {shares}")

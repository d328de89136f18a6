"""What a result on a data set will not show, one sentence each."""

from __future__ import annotations

from collections import defaultdict

import torch

from mmfast.data.arrays import ArrayDataset
from mmfast.data.splits import PARTS, Splits

# Below this many samples one of them is more than two points of accuracy.
FEW_SAMPLES = 50
_NAMED = 5  # classes that a sentence names
_MEANING = {"val": "epochs are chosen without {}", "test": "the test figures say nothing of {}"}


def cautions(
    splits: Splits,
    constant: list[str],
    *,
    seeds: int | None = None,
) -> tuple[str, ...]:
    """Return sentences on what weakens results on these data.

    Args:
        splits: the data.
        constant: names of modalities whose features are all constant in training.
        seeds: runs of each method; None where methods are not compared.
    """
    found, size = [], len(splits.test)
    if 0 < size < FEW_SAMPLES:
        found.append(
            f"The test part has {_samples(size)}, so one is {100 / size:.1f} points of accuracy: "
            "smaller differences show nothing."
        )
    if 0 < (chosen_by := len(splits.val)) < FEW_SAMPLES:
        # Which is the best of all encoders is asked of them where methods are compared.
        more = " and which modality is the best alone" if seeds is not None else ""
        found.append(
            f"The validation part has {_samples(chosen_by)}: which epoch's weights are kept{more} is decided "
            "largely by chance."
        )
    if seeds == 1:
        found.append("One seed shows no spread, so no difference between methods can be told from chance.")
    found += _rare_classes(splits)
    for name in splits.modalities:
        if name in constant:
            found.append(f"All features of {name} are constant in train: it tells no class from another.")
        elif _is_row_number(splits, name):
            found.append(
                f"{name} is a different whole number in every sample, as a row number is: it may give the "
                "classes away or be memorised. Leave it out unless it was measured."
            )
        mask = splits.test.present.get(name)
        if size and mask is not None and not mask.any():
            found.append(f"No test sample has {name}: what it contributes is not measured.")
    bare = sum(_without_any(getattr(splits, part)) for part in PARTS)
    if bare:
        verb = "has" if bare == 1 else "have"
        found.append(f"{_samples(bare)} {verb} none of the modalities: all that answers there is a constant.")
    if len(splits.modalities) > 1 and len(splits.train) and not _most_together(splits.train) > 1:
        found.append(
            "No training sample has two modalities at once: nothing is learned of how to join them. Of "
            "files, those of one sample share their stem, as in clip.wav and clip.png."
        )
    return tuple(found)


def _most_together(part: ArrayDataset) -> int:
    """Return how many modalities the sample has that has most."""
    everyone = torch.ones(len(part), dtype=torch.bool, device="cpu")
    return int(torch.stack([part.present.get(name, everyone) for name in part.modalities]).sum(0).max())


def _without_any(part: ArrayDataset) -> int:
    masks = [part.present.get(name) for name in part.modalities]
    if any(mask is None for mask in masks) or not len(part):
        return 0
    return int((~torch.stack(masks).any(0)).sum())  # type: ignore[arg-type]


def _rare_classes(splits: Splits) -> list[str]:
    counts = {
        part: torch.bincount(getattr(splits, part).labels, minlength=splits.num_classes).tolist()
        for part in PARTS
    }
    lacking: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for label, name in enumerate(splits.class_names):
        parts = tuple(part for part in _MEANING if not counts[part][label] and len(getattr(splits, part)))
        if parts:
            lacking[parts].append(f"{name} ({_samples(sum(counts[part][label] for part in PARTS))})")
    found = []
    for parts, names in lacking.items():
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" * (len(names) > _NAMED))
        subject, them = (f"Class {shown} has", "it") if len(names) == 1 else (f"Classes {shown} have", "them")
        meaning = ", and ".join(_MEANING[part].format(them) for part in parts)
        found.append(f"{subject} none in {' or '.join(parts)}: {meaning}.")
    return found


def _is_row_number(splits: Splits, name: str) -> bool:
    """Whether a modality is one integer that no two samples share."""
    if splits.shapes[name] != (1,):
        return False
    parts = [getattr(splits, part) for part in PARTS]
    values = torch.cat([part.arrays[name][part.present.get(name, slice(None))] for part in parts]).view(-1)
    mean, inverse = ([0.0], [1.0]) if splits.scaling is None else splits.scaling[name]
    if inverse[0] == 0 or len(values) < 2:
        return False
    shift, factor = torch.tensor([mean[0], inverse[0]], dtype=torch.float32, device="cpu")
    # Scaled values are rounded, so the nearest integers are scaled again and must give the same bits.
    whole = (values.double() / factor.double() + shift.double()).round()
    again = (whole.float() - shift) * factor
    return bool((again == values).all()) and len(whole.unique()) == len(whole)


def _samples(count: int) -> str:
    return f"{count:,} sample{'s' * (count != 1)}"

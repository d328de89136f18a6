"""What is wrong with data, found before any work: missing modalities, labels out of range, absent classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfast.batches import Entries, evaluating, evaluation_batches
from mmfast.methods.base import Learner
from mmfast.models import MultimodalModel


def check_data(model: MultimodalModel, name: str, dataset: Any, *, whole: bool = False) -> None:
    """Raise ValueError unless `dataset` holds labelled samples of the model's modalities.

    Args:
        model: names the modalities and the number of classes C.
        name: what errors call the data set.
        dataset: map-style data set; its labels are checked where it has them as an attribute `labels`.
        whole: every class and every modality must occur, as in a training set.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"model must be a mmfast.MultimodalModel, got {type(model).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    sample = dataset[0]
    for key in (*model.modalities, "label"):
        if key not in sample:
            raise ValueError(f"samples of {name} must have {key!r}, got {', '.join(map(repr, sample))}")
    for key, mask in getattr(dataset, "present", {}).items():
        if whole and key in model.modalities and not bool(torch.as_tensor(mask, device="cpu").any()):
            raise ValueError(f"{name} must hold samples with {key}, got none of {len(dataset)}")
    for key in model.modalities:
        check_finite(f"{key} of the first sample of {name}", torch.as_tensor(sample[key], device="cpu"))
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return
    labels = torch.as_tensor(labels, device="cpu")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= model.num_classes:
        raise ValueError(
            f"labels of {name} must lie in [0, C) = [0, {model.num_classes}), got values from {low} to {high}"
        )
    if whole:
        counts = torch.bincount(labels, minlength=model.num_classes)
        absent = (counts == 0).nonzero().flatten().tolist()
        if absent:
            raise ValueError(
                f"{name} must hold every class of C = {model.num_classes}, got no sample of {absent}"
            )


def check_finite(
    name: str,
    value: Tensor,  # any shape
) -> None:
    """Raise ValueError for NaN or infinite numbers, with their count."""
    bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {value.numel()} values")


def check_fits(learner: Learner, train: Any) -> None:
    """Raise what encoders or prediction have against two samples, before any training."""
    with evaluating(learner):
        few = Entries(getattr(train, "evaluation", train), torch.arange(min(2, len(train)), device="cpu"))
        for batch in evaluation_batches(learner, few):
            learner.predict(batch)

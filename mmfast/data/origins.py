"""What data sets tell of themselves: keys of samples, names of classes, how features were standardised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from mmfast.data.arrays import ArrayDataset
from mmfast.data.standardize import Scaling


def keys_of_samples(dataset: Any) -> np.ndarray | None:  # [N]
    """Return the keys of a data set that has them as `sample_keys`, integers or strings; else None.

    Of torch's Subset: those of its samples, or their numbers in the whole; of a ConcatDataset those of all
    parts, where these have keys of one kind.

    Raises:
        TypeError, ValueError: keys of another kind, or of another number of samples.
    """
    if isinstance(dataset, Subset):
        indices, keys = np.asarray(list(dataset.indices), dtype=np.int64), keys_of_samples(dataset.dataset)
        return indices if keys is None else keys[indices]
    if isinstance(dataset, ConcatDataset):
        return _joined([keys_of_samples(part) for part in dataset.datasets])
    keys = _attribute(dataset, "sample_keys")
    if keys is None:
        return None
    array = np.asarray(keys)
    if array.dtype.kind not in "iuSU":
        raise TypeError(f"sample_keys must hold integers or strings, got dtype {array.dtype}")
    if array.shape != (len(dataset),):
        raise ValueError(f"sample_keys must have shape [N] = [{len(dataset)}], got {list(array.shape)}")
    # Tables hold integers of int64.
    is_large = array.dtype.kind == "u" and len(array) > 0 and array.max() > np.iinfo(np.int64).max
    return array.astype(str) if is_large else array


def names_of_classes(dataset: Any, num_classes: int) -> tuple[str, ...] | None:
    """Return the names of a data set that has them as `class_names`; of a Subset, those of the whole.

    An attribute that is something else than C strings is a matter of the data set's own: None.

    Raises:
        ValueError: data sets put together whose class numbers mean other classes in one than in another.
    """
    if isinstance(dataset, Subset):
        return names_of_classes(dataset.dataset, num_classes)
    if isinstance(dataset, ConcatDataset):
        return _agreed([names_of_classes(part, num_classes) for part in dataset.datasets])
    names = _attribute(dataset, "class_names")
    if not isinstance(names, list | tuple) or len(names) != num_classes:
        return None
    return tuple(names) if all(isinstance(name, str) for name in names) else None


def has_no_labels(dataset: Any) -> bool:
    """Whether a data set tells that none of its samples has a label: its attribute `labels` is None."""
    if isinstance(dataset, Subset):
        return has_no_labels(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(has_no_labels, dataset.datasets))
    return getattr(dataset, "labels", True) is None


def shapes_of_samples(dataset: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of an ArrayDataset's samples, or of a Subset of one, by modality; else None."""
    if isinstance(dataset, Subset):
        return shapes_of_samples(dataset.dataset)
    return dataset.shapes if isinstance(dataset, ArrayDataset) else None


def told_scaling(dataset: Any) -> Scaling | None:
    """Return what features were standardised by: {} where they were not, None where nothing tells.

    An ArrayDataset tells, and torch's Subset and ConcatDataset of such.

    Raises:
        ValueError: data sets put together of which one was standardised otherwise than another.
    """
    if isinstance(dataset, Subset):
        return told_scaling(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return _common([told_scaling(part) for part in dataset.datasets])
    return (dataset.scaling or {}) if isinstance(dataset, ArrayDataset) else None


def scaling_for(learner: Any, dataset: Any, standardized: bool | None) -> Scaling | None:
    """Return what a data set's features are yet to be standardised by, for a learner; None: by nothing.

    Args:
        learner: has as `scaling` what its training data were standardised by, {} where they were not, None
            where that is not known.
        dataset: tells what its features were standardised by, or does not.
        standardized: whether they are standardised as the training data were; None: as the data set tells.

    Raises:
        ValueError: the data set tells nothing of it and the learner needs it, or it was standardised
            otherwise than the training data.
    """
    wanted = learner.scaling
    if standardized is not None or wanted is None:
        return None if standardized is None or standardized else wanted or None
    told = told_scaling(dataset)
    if told is None:
        if not wanted:
            return None
        raise ValueError(
            "dataset must tell whether its features are standardised, as those of the training data were, "
            "got one that does not: give standardized=True, or standardized=False and they will be"
        )
    if not told:
        return wanted or None
    if not _is_same(told, wanted, learner.modalities):
        by = "by statistics of their own" if wanted else "not at all"
        raise ValueError(
            f"dataset must be raw, or standardised as the training data were, {by}; got one that was "
            "standardised otherwise: load it with standardize=False"
        )
    return None


def check_standardized(learner: Any, dataset: Any) -> None:
    """Raise ValueError for a data set that tells it was not standardised as a learner's training data were.

    For what takes data as they are; a model, and a learner that knows nothing of its data, take any.
    """
    wanted = getattr(learner, "scaling", None)
    told = None if wanted is None else told_scaling(dataset)
    if wanted is None or told is None or _is_same(told, wanted, learner.modalities):
        return
    if wanted:
        must, last = "be standardised as the training data were", " and .standardize(learner.scaling)"
    else:
        must, last = "not be standardised, as the training data were not", ""
    raise ValueError(f"dataset must {must}: load it with standardize=False{last}")


def _is_same(told: Scaling, wanted: Scaling, modalities: Sequence[str]) -> bool:
    """Whether features were standardised by the same statistics, or not at all in both."""
    if not told or not wanted:
        return not told and not wanted
    return all(
        name in told and list(map(list, told[name])) == list(map(list, wanted[name])) for name in modalities
    )


def _common(found: Sequence[Scaling | None]) -> Scaling | None:
    first = found[0] if found else None
    if any(other != first for other in found):
        raise ValueError("the parts of a ConcatDataset must be standardised alike, got some that are not")
    return first


def _joined(found: Sequence[np.ndarray | None]) -> np.ndarray | None:  # [n] each -> [N]
    """Return the keys of data sets put together, None where one has none, or numbers and another names."""
    keys = [part for part in found if part is not None]
    is_number = {part.dtype.kind in "iu" for part in keys}
    return np.concatenate(keys) if len(keys) == len(found) and len(is_number) == 1 else None


def _agreed(found: Sequence[tuple[str, ...] | None]) -> tuple[str, ...] | None:
    told = list(dict.fromkeys(names for names in found if names is not None))
    if len(told) > 1:
        raise ValueError(
            f"the parts of a ConcatDataset must have the same classes, got {', '.join(told[0])} in one and "
            f"{', '.join(told[1])} in another"
        )
    return told[0] if told else None


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute, None where it is a method: data sets of others may call one so."""
    value = getattr(dataset, name, None)
    return None if callable(value) else value

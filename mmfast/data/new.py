"""Data to be predicted: read as those that a model was trained on, with labels or without, in one part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmfast.data.array_checks import as_classes
from mmfast.data.arrays import ArrayDataset, check
from mmfast.data.channels import channels_first
from mmfast.data.folder import audio_length, read_files
from mmfast.data.load import load
from mmfast.data.members import Member
from mmfast.data.npz import marks_among, read_npz
from mmfast.data.sample_files import find_new_samples
from mmfast.data.splits import PARTS, Splits
from mmfast.data.tables import how_to_convert_new, is_single
from mmfast.data.unreadable import Unreadable
from mmfast.data.views import viewed
from mmfast.errors import did_you_mean

# As `load_folder` reads them by default, which is how commands do.
_MELS, _SIZE, _FRAMES = 64, 64, 3


@dataclass(frozen=True)
class Known:
    """What is known of the data that a model was trained on.

    Attributes:
        shapes: of a sample of each modality, as the model takes it.
        class_names: in the order of the model's logits.
        encoders: what modalities are taken as, where that was given.
        sound: samples a second of recordings and how many are taken of each; None where it was not noted.
        split_seed: of the split, where one was drawn.
    """

    shapes: Mapping[str, tuple[int, ...]]
    class_names: Sequence[str]
    encoders: Mapping[str, str] = field(default_factory=dict)
    sound: tuple[int, int] | None = None
    split_seed: int = 0

    def numbers(self, labels: Any) -> np.ndarray:  # [N] -> [N] int64
        """Return labels, names or numbers of classes as files have them, as the model's class numbers."""
        array = as_classes(labels)
        number = {name: label for label, name in enumerate(self.class_names)}
        names, places = np.unique(array.astype(str), return_inverse=True)
        for name in names.tolist():
            if name not in number:
                raise ValueError(
                    f"labels must be among the model's classes, {', '.join(self.class_names)}, got {name!r}"
                    f"{did_you_mean(name, self.class_names)}"
                )
        return np.array([number[name] for name in names.tolist()], dtype=np.int64)[places.reshape(-1)]


def load_new(
    source: str | Path,
    known: Known,
    *,
    split: str | None = None,
    skip_unreadable: bool = False,
    num_workers: int = 0,
) -> tuple[ArrayDataset, list[str]]:
    """Return data to be predicted, not standardised, and remarks on how they were read.

    Modalities that no sample has count as absent in all, which a remark says.

    Args:
        source: "htad", FILE.npz, with `label` or without; or a FOLDER as for training, or with its files in
            it, which have no label then.
        known: what the model was trained on.
        split: the part of the data to take, of a split that they bring or that was drawn for training; None
            takes all samples, in their order.
        skip_unreadable: leave out files of a folder that cannot be read.
        num_workers: processes that read the files of a folder.

    Raises:
        ValueError: a source that is none of these, none of the model's modalities, other shapes than in
            training, labels that are no classes of the model; and what reading refuses.
    """
    path = Path(source)
    options: dict[str, Any] = {"skip_unreadable": skip_unreadable, "num_workers": num_workers}
    notes: list[str] = []
    if split is not None:
        part = _of_split(load(source, seed=known.split_seed, standardize=False, **options), split, known)
    elif path.is_dir():
        part, notes = _of_folder(path, known, **options)
    elif path.is_file() and path.suffix == ".npz":
        part, notes = read_npz(path, lambda arrays: _of_arrays(arrays, known))
    elif is_single(path):
        raise ValueError(how_to_convert_new(path, known.shapes))
    else:
        part = _of_all(load(source, standardize=False), known)
    part = viewed(part, {name: kind for name, kind in known.encoders.items() if name in part.arrays})
    _check_shapes(part, known)
    return _whole(part, known), [*notes, *_absent(part, known)]


def _of_arrays(arrays: Mapping[str, np.ndarray | Member], known: Known) -> tuple[ArrayDataset, list[str]]:
    """Return the samples of a file, and what it holds that is not the model's."""
    features = dict(arrays)
    label, _, _ = (features.pop(key, None) for key in ("label", "split", "group"))
    present = marks_among(features)
    found = {name: features[name] for name in known.shapes if name in features}
    if not found:
        raise ValueError(
            f"must hold at least one of the model's modalities, {', '.join(known.shapes)}, got "
            f"{', '.join(features) or 'none'}"
        )
    turned, notes = channels_first(found)
    if others := [name for name in features if name not in known.shapes]:
        notes.append(f"passed over, as the model does not know them: {', '.join(others)}")
    size = next(iter(found.values())).shape[0]
    checked = check(
        turned,
        None if label is None else known.numbers(label),
        present={name: mask for name, mask in present.items() if name in found},
        group=None,
        num_classes=len(known.class_names),
        sample_keys=np.arange(size),
        class_names=known.class_names,
    )
    return checked.parts([np.arange(size)])[0], notes


def _of_folder(
    path: Path, known: Known, *, skip_unreadable: bool, num_workers: int
) -> tuple[ArrayDataset, list[str]]:
    samples = find_new_samples(path)
    others = Counter(name for sample in samples for name in sample.files if name not in known.shapes)
    samples = [
        sample._replace(files={name: files for name, files in sample.files.items() if name in known.shapes})
        for sample in samples
    ]
    samples = [sample for sample in samples if sample.files]
    if not samples:
        raise ValueError(
            f"{path}: must hold files of at least one of the model's modalities, {', '.join(known.shapes)}, "
            f"got {', '.join(others)}"
        )
    bad = Unreadable(path)
    notes = []
    if known.sound is not None:
        audio_length(samples, None, bad, rate=known.sound[0])
        sound = known.sound
    else:
        sound = audio_length(samples, None, bad)
        if sound[0]:
            notes.append(
                f"the run does not tell the sample rate of its recordings, these have {sound[0]} a second"
            )
    files = read_files(path, samples, bad, sound, _MELS, _SIZE, _FRAMES, skip_unreadable, num_workers)
    if others:
        notes.append(f"passed over, as the model does not know them: {', '.join(others)}")
    labels = [sample.label for sample in files.samples]
    try:
        part = ArrayDataset(
            files.arrays,
            known.numbers(labels) if labels[0] else None,
            present=files.present,
            sample_keys=[sample.key for sample in files.samples],
            class_names=known.class_names,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return part, [*files.notes, *notes]


def _of_split(splits: Splits, split: str, known: Known) -> ArrayDataset:
    """Return a part of data that are split, of the model's modalities and with its class numbers."""
    part: ArrayDataset = getattr(splits, split)
    found = [name for name in known.shapes if name in part.arrays]
    if not found:
        raise ValueError(
            f"data must hold at least one of the model's modalities, {', '.join(known.shapes)}, got "
            f"{', '.join(part.arrays)}"
        )
    numbers = torch.from_numpy(known.numbers(np.array(splits.class_names)))
    return part._with(
        arrays={name: part.arrays[name] for name in found},
        present={name: mask for name, mask in part.present.items() if name in found},
        labels=numbers[part.labels],
        class_names=tuple(known.class_names),
        num_classes=len(known.class_names),
    )


def _of_all(splits: Splits, known: Known) -> ArrayDataset:
    """Return all samples of data that are split, in the order they had before."""
    parts = [_of_split(splits, split, known) for split in PARTS]
    keys = np.concatenate([np.asarray(part.sample_keys) for part in parts])
    order = torch.from_numpy(np.argsort(keys))
    first = parts[0]
    return first._with(
        arrays={name: torch.cat([part.arrays[name] for part in parts])[order] for name in first.arrays},
        present={name: torch.cat([part.present[name] for part in parts])[order] for name in first.present},
        labels=torch.cat([part.labels for part in parts])[order],
        group=None,
        sample_keys=np.sort(keys),
    )


def _check_shapes(part: ArrayDataset, known: Known) -> None:
    for name, shape in part.shapes.items():
        if shape != known.shapes[name]:
            raise ValueError(
                f"{name} must have samples of shape {list(known.shapes[name])}, as in training, "
                f"got {list(shape)}"
            )


def _absent(part: ArrayDataset, known: Known) -> list[str]:
    """Return remarks on modalities of which no sample has any."""
    gone = [name for name in known.shapes if name not in part.arrays]
    gone += [name for name, mask in part.present.items() if not bool(mask.any())]
    return [f"no sample has {name}: it counts as absent in all" for name in gone]


def _whole(part: ArrayDataset, known: Known) -> ArrayDataset:
    """Return the data set with all modalities of the model, in its order."""
    size = len(part)
    arrays, present = {}, {}
    for name, shape in known.shapes.items():
        if name in part.arrays:
            arrays[name] = part.arrays[name]
            if name in part.present:
                present[name] = part.present[name]
        else:
            # One zero stands for all of them.
            arrays[name] = torch.zeros(1, device="cpu").expand(size, *shape)
            present[name] = torch.zeros(size, dtype=torch.bool, device="cpu")
    return part._with(arrays=arrays, present=present)

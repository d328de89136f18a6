"""What a learner makes of a data set, with or without labels: predictions, as tensors and as a table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.columns import Cells, Column, keys_of, names_of, only, write_csv, write_parquet
from mmfast.data.arrays import LABEL
from mmfast.data.batches import evaluating, presence
from mmfast.data.devices import model_place
from mmfast.data.origins import has_no_labels, keys_of_samples, names_of_classes, scaling_for
from mmfast.data.reader import Reader, evaluation_batches, reader_of
from mmfast.data.samples import check_samples
from mmfast.data.standardize import Scaling, scaled
from mmfast.data.threads import fitting_threads
from mmfast.errors import check_one_of
from mmfast.objectives import IGNORED, TASKS, check_targets
from mmfast.valuation import batch_contributions

# Rows of a table that are written at a time.
_ROWS = 2**16


@dataclass(frozen=True)
class Predictions:
    """What a learner predicts for each sample of a data set; all tensors are on the CPU.

    Attributes:
        logits: [N, C] float32, what the method predicts with; of a regression the predicted values.
        own_logits: [M, N, C] float32, of each modality alone, by the method's protocol; they say nothing for
            samples that lack it.
        modalities: names of the M modalities.
        class_names: of the C classes, None where they are not known.
        present: bool [N, M], which samples have which modality.
        targets: [N] int64, the labels that the data have, negative where a sample has none; [N, C] or [N, K]
            where they are no class numbers; None where no sample has one.
        contributions: [N, M] float32, what each modality contributes to each sample that has a label, NaN
            where it has none, under the value function that `mmfast.valuate` has for the task; None without
            labels.
        sample_keys: [N] integers or strings by which the data set tells its samples, such as rows of a file
            or names of files; None where it does not.
        task: "multiclass", "multilabel" or "regression".
    """

    logits: Tensor  # [N, C]
    own_logits: Tensor  # [M, N, C]
    modalities: tuple[str, ...]
    class_names: tuple[str, ...] | None
    present: Tensor  # bool [N, M]
    targets: Tensor | None = None  # [N]
    contributions: Tensor | None = None  # [N, M]
    sample_keys: np.ndarray | None = None  # [N]
    task: str = "multiclass"

    def __post_init__(self) -> None:
        check_one_of("task", self.task, TASKS)

    def __len__(self) -> int:
        return len(self.logits)

    def __repr__(self) -> str:
        width = self.logits.shape[1]
        words = [f"{len(self)} samples", *self.modalities, f"{width} classes"]
        if self.task == "regression":
            words[-1] = f"{width} values"
        if self.accuracy is not None:
            words.append(f"accuracy {self.accuracy:.3f}")
        return f"Predictions({', '.join(words)})"

    @property
    def probabilities(self) -> Tensor | None:  # [N, C]
        """Softmax of the classes' logits, of several labels at once their sigmoid; None without classes."""
        if self.task == "regression":
            return None
        return self.logits.sigmoid() if self.task == "multilabel" else self.logits.softmax(1)

    @property
    def predicted(self) -> Tensor:  # [N] int64, bool [N, C] or [N, C]
        """The predicted class of each sample, -1 where its logits hold NaN.

        Of several labels at once, which classes a sample has; of a regression, the values.
        """
        return _decided(self.logits, self.task)

    @property
    def labels(self) -> list[Any]:  # N
        """The predicted classes by name, by number where no names are known; None where logits hold NaN.

        Of several labels at once the names are joined by "+"; of a regression these are the values.
        """
        return _named(self.predicted, self.class_names, self.task).tolist()

    @property
    def correct(self) -> Tensor | None:  # bool [N]
        """Which samples are predicted as their label says, False where they have none; None without."""
        if self.targets is None or self.task == "regression":
            return None
        found = self.predicted == self._classes()
        return found.all(1) if found.ndim == 2 else found

    @property
    def has_target(self) -> Tensor:  # bool [N]
        """Which samples have a label."""
        if self.targets is None:
            return torch.zeros(len(self), dtype=torch.bool, device="cpu")
        if self.task == "multiclass" and self.targets.ndim == 1:
            return self.targets >= 0
        return torch.ones(len(self), dtype=torch.bool, device="cpu")

    @property
    def accuracy(self) -> float | None:
        """The share that is right of the samples with a label; None where none has, and of a regression."""
        correct, known = self.correct, self.has_target
        return None if correct is None or not known.any() else float(correct[known].double().mean())

    def columns(self) -> dict[str, list]:
        """Return the table, one row a sample, as lists: what `to_csv` writes."""
        return {name: column.tolist() for name, column in self._rows(0, len(self)).items()}

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, one row a sample, cells empty for what a sample does not have.

        Columns are `row`, `key` where the data set has keys, `prediction` and its `probability`, for each
        modality `<modality>__prediction`, what it predicts alone, and `<modality>__present`; and where the
        data have labels `label` and `correct`. Of several labels at once there is a column
        `probability__<class>` for each class; of a regression to several values a column for each of them.
        """
        write_csv(path, self._rows, len(self), _ROWS)

    def to_parquet(self, path: str | Path) -> None:
        """Write the table of `to_csv` as Parquet; row groups of 65,536."""
        write_parquet(path, self._rows, len(self), _ROWS)

    def _classes(self) -> Tensor:  # [N] int64 or bool [N, C]
        """Return the labels in the form of `predicted`; a share of each class is that of the largest."""
        assert self.targets is not None
        if self.task == "multilabel":
            return self.targets > 0.5
        return self.targets.argmax(1) if self.targets.ndim == 2 else self.targets

    def _rows(self, start: int, stop: int) -> dict[str, Column]:
        """Return some rows of the table."""
        part = self._part(slice(start, stop))
        table: dict[str, Column] = {"row": torch.arange(start, start + len(part), device="cpu")}
        if part.sample_keys is not None:
            table["key"] = keys_of(part.sample_keys)
        table |= part._answers("prediction", part.predicted)
        probabilities = part.probabilities
        if part.task == "multiclass" and probabilities is not None:
            table["probability"] = _largest(probabilities).double()
        elif probabilities is not None:
            for name, column in zip(part._of_classes("probability"), probabilities.T, strict=True):
                table[name] = column.double()
        for m, name in enumerate(part.modalities):
            has = part.present[:, m]
            own = part._answers(f"{name}__prediction", _decided(part.own_logits[m], part.task))
            table |= {key: only(column, has) for key, column in own.items()}
            table[f"{name}__present"] = has
        return table | part._known()

    def _known(self) -> dict[str, Column]:
        """Return what the data's own labels say."""
        if self.targets is None:
            return {}
        known = self.has_target
        told = self._answers("label", self.targets if self.task == "regression" else self._classes())
        table = {name: only(column, known) for name, column in told.items()}
        if (correct := self.correct) is not None:
            table["correct"] = only(correct, known)
        return table

    def _answers(self, name: str, answers: Tensor) -> dict[str, Column]:
        """Return classes, or values of a regression, as columns."""
        if self.task != "regression":
            return {name: _named(answers, self.class_names, self.task)}
        values = (answers if answers.ndim == 2 else answers[:, None]).double()
        names = [name] if values.shape[1] == 1 else self._of_classes(name)
        return dict(zip(names, values.T, strict=True))

    def _of_classes(self, prefix: str) -> list[str]:
        """Return a column's name for each class, or for each value of a regression."""
        names = self.class_names or range(self.logits.shape[1])
        return [f"{prefix}__{name}" for name in names]

    def _part(self, rows: slice) -> Predictions:
        def of(value: Any) -> Any:
            return None if value is None else value[rows]

        return replace(
            self,
            logits=self.logits[rows],
            own_logits=self.own_logits[:, rows],
            present=self.present[rows],
            targets=of(self.targets),
            contributions=of(self.contributions),
            sample_keys=of(self.sample_keys),
        )


def _decided(
    logits: Tensor,  # [N, C]
    task: str,
) -> Tensor:  # [N] int64, bool [N, C] or [N, C]
    if task == "regression":
        return logits
    if task == "multilabel":
        return logits > 0
    # Of NaN argmax makes a class.
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def _largest(probabilities: Tensor) -> Tensor:  # [N, C] -> [N]
    return probabilities.amax(1) if probabilities.shape[1] else probabilities.new_zeros(len(probabilities))


def _named(answers: Tensor, class_names: Sequence[str] | None, task: str) -> Column:
    if task == "regression":
        return answers
    if task == "multiclass":
        return names_of(answers, class_names)
    names = class_names or list(map(str, range(answers.shape[1])))
    return Cells(str, ["+".join(n for n, has in zip(names, row) if has) for row in answers.tolist()])


def predict(
    learner: Any,
    dataset: Any,
    *,
    standardized: bool | None = None,
    contributions: bool = True,
    batch_size: int | None = None,
    num_workers: int | None = None,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    pin_memory: bool | str | None = None,
    prefetch: int | None = None,
) -> Predictions:
    """Return what a learner predicts for a data set; `Learner.predict` says what the arguments are."""
    if isinstance(dataset, str | Path):
        raise TypeError(
            f"dataset must be a data set, got {str(dataset)!r}: mmfast predict --data takes files, and "
            "mmfast.data.load makes data sets of them"
        )
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "collate_fn": collate_fn,
        "pin_memory": pin_memory,
        "prefetch": prefetch,
    }
    reader = replace(reader_of(learner), **{key: value for key, value in given.items() if value is not None})
    task = learner.objective.task
    names = learner.modalities
    check_samples(
        names,
        learner.num_classes,
        "dataset",
        dataset,
        collate_fn=reader.collate_fn,
        need_labels=False,
        task=task,
    )
    keys, class_names = keys_of_samples(dataset), _class_names(learner, dataset)
    scaling = scaling_for(learner, dataset, standardized)
    found = _Rows(learner)
    threads = fitting_threads(learner, dataset, reader.batch_size, reader)
    # A callback may ask while the learner trains.
    with threads, evaluating(learner), learner.objective.for_any_labels():
        for batch in _batches(learner, dataset, reader, scaling):
            found.add(batch, contributions=contributions)
    predictions = found.joined(class_names, keys, task)
    if num_nan := int(predictions.logits.isnan().any(1).sum()):
        warnings.warn(f"{num_nan} of {len(predictions)} samples have NaN logits", stacklevel=3)
    return predictions


class _Rows:
    """What the batches of a pass give, on the CPU."""

    def __init__(self, learner: Any) -> None:
        self.learner = learner
        self.logits: list[Tensor] = []
        self.own_logits: list[Tensor] = []
        self.present: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.contributions: list[Tensor] = []

    def add(self, batch: Mapping[str, Any], *, contributions: bool) -> None:
        """Take in a batch."""
        learner = self.learner
        present, features = presence(batch, learner.modalities), learner.encode(batch)
        logits = learner.fuse(features, present=present)
        self.logits.append(logits.float().cpu())
        self.own_logits.append(learner.own_logits(features).float().cpu())
        marks = torch.ones(len(logits), len(features), dtype=torch.bool, device="cpu")
        self.present.append(marks if present is None else present.T.cpu())
        labels = batch.get(LABEL)
        if labels is None:
            return
        self.targets.append(labels.cpu())
        self._check(self.targets[-1])
        if contributions:
            unknown = ~learner.objective.counted(labels)[:, None]
            phi = batch_contributions(learner, features, labels, present)
            self.contributions.append(phi.float().masked_fill(unknown, torch.nan).cpu())

    def _check(
        self,
        labels: Tensor,  # [n] or [n, C]
    ) -> None:
        """Raise ValueError for labels of the last batch that are none of the task's."""
        task, num_classes = self.learner.objective.task, self.learner.num_classes
        first = sum(map(len, self.logits[:-1]))
        if task != "multiclass" or labels.ndim == 2:
            where = "labels of dataset"
            check_targets(task, num_classes, where, labels, lambda row: f"label of sample {first + row}")
            return
        bad = ((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"label of sample {first + row} of dataset must lie in [0, C) = [0, {num_classes}), or be "
                f"{IGNORED} for none, got {labels[row]}"
            )

    def joined(self, class_names: tuple[str, ...] | None, keys: np.ndarray | None, task: str) -> Predictions:
        """Return the rows of all batches."""
        if self.targets and (lack := sum(map(len, self.logits)) - sum(map(len, self.targets))):
            raise ValueError(
                f"dataset must have a label in all of its samples or in none, got {lack:,} without: "
                f"{IGNORED} is the class of a sample without"
            )
        return Predictions(
            torch.cat(self.logits),
            torch.cat(self.own_logits, dim=1),
            tuple(self.learner.modalities),
            class_names,
            torch.cat(self.present),
            torch.cat(self.targets) if self.targets else None,
            torch.cat(self.contributions) if self.contributions else None,
            keys,
            task,
        )


def _class_names(learner: Any, dataset: Any) -> tuple[str, ...] | None:
    """Return the names of the classes; raise where the data set's labels are numbers of other ones."""
    own, told = learner.class_names, names_of_classes(dataset, learner.num_classes)
    if own is None or told is None or own == told or has_no_labels(dataset):
        return own or told
    raise ValueError(
        f"dataset must have the classes of the training data, {', '.join(own)}, got {', '.join(told)}"
    )


def _batches(learner: Any, dataset: Any, reader: Reader, scaling: Scaling | None) -> Iterator[dict[str, Any]]:
    """Yield a data set in order; what is raw is standardised before it takes the model's dtype."""
    if scaling is None:
        yield from evaluation_batches(learner, dataset, reader=reader)
        return
    device, dtype = model_place(learner)
    batches = torch.arange(len(dataset), device="cpu").split(reader.evaluation_size(dataset))
    for batch in reader.read(dataset, batches, learner.modalities, device, plain=True):
        found = dict(batch)
        for name in learner.modalities:
            if name in found:
                found[name] = scaled(name, found[name], *scaling[name]).to(dtype)
        yield found

"""What each modality contributes to each sample, as `mmfast.valuate` finds it: figures and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfast import coalitions
from mmfast.columns import Column, keys_of, names_of, only, write_csv, write_parquet
from mmfast.errors import needs_train, shown

# Rows of a table that are written at a time.
_ROWS = 2**16


@dataclass(frozen=True)
class Valuation:
    """What each modality contributes to each sample.

    Attributes:
        contributions: [N, M] Shapley values, float32, on the CPU; NaN where a sample has no label.
        labels: [N] int64, or what the model's task takes.
        modalities: names of the M modalities.
        utility: the value function: "cardinality" (then values of a sample sum to M where it is classified
            right, and below 1 marks a low-contributing modality), "correct", "probability",
            "log_probability", "margin", "negative_loss", "negative_squared_error", "multilabel_f1", or that
            of a function.
        coalition_accuracy: [S] accuracy with only the modalities of coalition s, bit m of s for modality m;
            None where there are no classes.
        present: bool [N, M], which samples have which modality; None where all have all.
        coalition_value: [S] float64, mean value of each coalition over the labelled samples: the mean
            contributions, samples counted that lack a modality, add up to its last less its first.
        labelled: bool [N], which samples have a label; None where all have.
        predicted: [N] int64, the class that all modalities of a sample together predict, -1 where logits hold
            NaN; None where it was not asked for.
        class_names: of the C classes, None where they are not known.
        sample_keys: [N] integers or strings by which the data set tells its samples, such as rows of a file
            or names of files; None where it does not.
    """

    contributions: Tensor  # [N, M]
    labels: Tensor  # [N] or [N, C]
    modalities: tuple[str, ...]
    utility: str
    coalition_accuracy: Tensor | None  # [S]
    present: Tensor | None = None  # bool [N, M]
    coalition_value: Tensor | None = None  # [S]
    labelled: Tensor | None = None  # bool [N]
    predicted: Tensor | None = None  # [N]
    class_names: tuple[str, ...] | None = None
    sample_keys: np.ndarray | None = None  # [N]

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {mean:.4g}" for name, mean in self.means.items())
        return f"Valuation({len(self.labels):,} samples, {shown({'utility': self.utility})}, means: {means})"

    @property
    def means(self) -> dict[str, float]:
        """Mean contribution of each modality over the samples that have it; NaN where none has."""
        found = mean_contributions(self.contributions, self._known)
        return dict(zip(self.modalities, found.tolist(), strict=True))

    @property
    def _known(self) -> Tensor | None:  # bool [N, M]
        """Which samples have a modality and a label; None: all."""
        if self.labelled is None:
            return self.present
        labelled = self.labelled[:, None].expand(self.contributions.shape)
        return labelled if self.present is None else labelled & self.present

    def column(self, m: int) -> Tensor:  # [n]
        """Return the contributions of modality m to the samples that have it, and a label."""
        phi, known = self.contributions[:, m], self._known
        return phi if known is None else phi[known[:, m]]

    def coalition_name(self, coalition: int) -> str:
        """Return a coalition as its members' names: "audio+image"; the empty one is "none"."""
        return coalitions.name(coalition, self.modalities)

    def columns(self) -> dict[str, list]:
        """Return the table one row a sample, as lists: what `to_csv` writes."""
        return {name: column.tolist() for name, column in self._rows(0, len(self.labels)).items()}

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, one row a sample.

        Columns are `sample`, its index, `label` and each modality's contribution; after these `key`, `class`,
        the label by name, `prediction`, by name, and `correct`, as far as they are known. Where a modality
        has one of these names, the column's ends in "_".
        """
        write_csv(path, self._rows, len(self.labels), _ROWS)

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as Parquet: integers in 64 bits, contributions in float64; row groups of 65,536."""
        write_parquet(path, self._rows, len(self.labels), _ROWS)

    def _rows(self, start: int, stop: int) -> dict[str, Column]:
        """Return some rows of the table."""
        labels = self.labels[start:stop]
        labels = labels.double() if labels.is_floating_point() else labels.long()
        table: dict[str, Column] = {"sample": torch.arange(start, start + len(labels), device="cpu")}
        if labels.ndim == 1:
            table["label"] = labels
        else:
            table |= {f"label[{k}]": column.contiguous() for k, column in enumerate(labels.T)}
        for m, name in enumerate(self.modalities):
            table[name] = self.contributions[start:stop, m].double()
        told = self._origins(slice(start, stop))
        return table | {name + "_" * (name in table): column for name, column in told.items()}

    def _origins(self, rows: slice) -> dict[str, Column]:
        """Return what leads from some rows back to the data, and what was predicted for them."""
        table: dict[str, Column] = {}
        if self.sample_keys is not None:
            table["key"] = keys_of(self.sample_keys[rows])
        if self.predicted is None:
            return table
        classes = self.labels[rows].argmax(1) if self.labels.ndim > 1 else self.labels[rows]
        if self.class_names is not None:
            table["class"] = names_of(classes, self.class_names)
        table["prediction"] = names_of(self.predicted[rows], self.class_names)
        table["correct"] = only(self.predicted[rows] == classes, classes >= 0)
        return table

    def plot(self, path: str | Path) -> None:
        """Write a picture: a histogram of contributions per modality."""
        with needs_train("plot"):
            from mmfast.plots import plot_valuation

        plot_valuation(self.contributions, self._known, self.modalities, self.utility, Path(path))


def mean_contributions(
    phi: Tensor,  # [N, M]
    present: Tensor | None,  # bool [N, M]
) -> Tensor:  # [M] float64
    """Return the mean contribution of each modality over the samples that have it; NaN where none has."""
    phi = phi.double()
    if present is None:
        return phi.mean(0)
    # A modality that a sample lacks contributes 0 to it, which says nothing of how good it is.
    return phi.masked_fill(~present, 0).sum(0) / present.sum(0)
